"""What a run says while it runs: metrics.jsonl, TensorBoard when installed, a progress bar."""

import contextlib
import importlib.util
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dinov3core.printable import printable
from dinov3core.writing import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends one JSON object per line; each leaves this process at once, so a kill loses none.

    A row that cannot be written (the disk is full, say) is kept and tried again with the next one.

    Args:
        folder: run folder; `metrics.jsonl` and, when TensorBoard is installed, event files are
            written there.
        resume_step: drop lines beyond this step (they will be written again); 0 starts the file
            anew.

    Attributes:
        evaluation: the last evaluation's row, of a resumed run as well; None before the first.
        trouble: why rows could not be written; empty when they could.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        self.path = folder / "metrics.jsonl"
        rows = read_rows(self.path) if resume_step else []
        rows = [row for row in rows if row["step"] <= resume_step]
        judged = [row for row in rows if row.get("event") == "eval"]
        self.evaluation: dict[str, Any] | None = judged[-1] if judged else None
        self.trouble = ""
        self._board: SummaryWriter | None = None
        self._errno: int | None = None  # of the trouble
        self._waiting = b""
        write_whole(self.path, "".join(_line(row) for row in rows))
        self._open()
        self._open_board(resume_step + 1 if resume_step else 0)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`, which has a "step"; NaN and Inf become null, as JSON has neither."""
        if row.get("event") == "eval":
            self.evaluation = row
        self._waiting += _line(row).encode()
        self._flush()
        if self._board is not None and self.path.is_file():
            self._show(row, self._board)

    def restore(self) -> bool:
        """Write the file again, all rows, when it was deleted or moved; whether that was so."""
        if self.path.is_file() and os.path.samestat(self.path.stat(), os.fstat(self._file)):
            return False
        # An open file outlives its name.
        rows = os.pread(self._file, os.fstat(self._file).st_size, 0)
        os.close(self._file)
        self._open()
        self._waiting = rows + self._waiting
        self._flush()
        self._open_board()
        return True

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: rows are still waiting.
        """
        self._flush()
        os.close(self._file)
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._waiting:
            raise OSError(self._errno, self.trouble, str(self.path))

    def _open_board(self, purge_step: int | None = None) -> None:
        """TensorBoard, when it is installed; it forgets what it has from `purge_step` on."""
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self.path.with_name("tensorboard"), purge_step=purge_step)

    def _show(self, row: dict[str, Any], board: "SummaryWriter") -> None:
        try:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    board.add_scalar(name, value, row["step"])
            board.flush()  # or its thread would write later, when the folder may be gone
        except OSError as error:
            self._board = None
            tqdm.write(f"no more curves for TensorBoard: {error.strerror}", file=sys.stderr)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def _flush(self) -> None:
        """Write what waits, past Python's buffers: they forget it when a write fails."""
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
            self.trouble = ""
        except OSError as error:
            self.trouble = error.strerror or str(error)
            self._errno = error.errno


def report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` without TensorBoard's thread, whose error `flush` raises."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"


class StepClock:
    """Seconds that steps worked, and those that went before: for images, say.

    Attributes:
        waited, seconds: of the last step; the second is with the work.
    """

    def __init__(self) -> None:
        self.waited = self.seconds = 0.0
        self._sums: dict[str, float] = {}  # by the names of columns of metrics.jsonl
        self._steps = 0

    @contextlib.contextmanager
    def working(self, waited: Mapping[str, float]) -> Iterator[None]:
        """Around the work of a step.

        Args:
            waited: what went before, by the name of its column.
        """
        began = time.perf_counter()
        yield
        work = time.perf_counter() - began
        self.waited = sum(waited.values())
        self.seconds = work + self.waited
        for name, seconds in {"step_seconds": work, **waited}.items():
            self._sums[name] = self._sums.get(name, 0.0) + seconds
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Seconds per step since the last call, by name: `step_seconds` of work, and those before.

        Together they are what a step took.
        """
        means = {name: total / self._steps for name, total in self._sums.items()}
        self._sums = {}
        self._steps = 0
        return means


class Progress:
    """A tqdm bar with loss, images/s and the share of time spent waiting for data.

    Args:
        total: steps of the run.
        start: steps done before.
        enabled: False on all processes but one, which stay silent.
        title: what is done.
    """

    def __init__(self, total: int, start: int, enabled: bool, title: str = "pretrain"):
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not enabled,
            desc=title,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )

    def advance(self, loss: float, images_per_second: float, data_share: float) -> None:
        """One more step is done."""
        self._bar.set_postfix(
            loss=f"{loss:.3f}",
            img_s=f"{images_per_second:.0f}",
            data=f"{data_share:.0%}",
            refresh=False,
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(printable(text), file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated GPU memory, or on CPU the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
