"""What a run says while it runs: metrics.jsonl always, TensorBoard when installed, a progress bar."""

import importlib.util
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dinov3core.data.names import printable


class MetricsLog:
    """Appends one JSON object per line; each line is flushed, so a killed run loses none.

    Args:
        folder: run folder; `metrics.jsonl` and, when TensorBoard is installed, event files are written there.
        resume_step: drop lines beyond this step (they will be written again); 0 starts the file anew.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= resume_step] if resume_step else []
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(_line(row) for row in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=resume_step or None)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`, which has a "step"; NaN and Inf become null, as JSON has neither."""
        self._file.write(_line(row))
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"


class Progress:
    """A tqdm bar with loss, images/s and the share of time spent waiting for data; silent on other processes."""

    def __init__(self, total: int, start: int, enabled: bool):
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not enabled,
            desc="pretrain",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )

    def advance(self, loss: float, images_per_second: float, data_share: float) -> None:
        self._bar.set_postfix(
            loss=f"{loss:.3f}", img_s=f"{images_per_second:.0f}", data=f"{data_share:.0%}", refresh=False
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(printable(text), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated GPU memory, or on CPU the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
