"""What `replay` needs to run a bad step again, written beside the run."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.objective import Crops
from dinov3core.train.engine.trainer import Trainer

FIELDS = {"argv", "crops", "modules", "step"}  # that a replay needs


def write_dump(
    folder: Path,
    trainer: Trainer,
    crops: Crops,
    step: int,
    values: dict[str, float],
    argv: list[str],
) -> str:
    """Write weights, crops and values of a step; what to say about it, also when that fails.

    Args:
        folder: made when missing, but not the run folder around it.
        values: of the step's report.
        argv: the command line of the run.
    """
    path = folder / f"step_{step:08d}_rank{trainer.world.rank}.pt"
    content = {
        "step": step,
        "argv": argv,
        "values": values,
        "crops": {name: _on_cpu(tensor) for name, tensor in crops._asdict().items()},
        "modules": {name: module.state_dict() for name, module in trainer.modules().items()},
    }
    try:
        folder.mkdir(exist_ok=True)
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        path.unlink(missing_ok=True)
        return f"; its dump could not be written ({str(error).splitlines()[0]})"
    return f"; replay it with: {as_called('python train/replay.py')} {path}"


def read_dump(path: Path) -> dict[str, Any]:
    """A dump as `write_dump` wrote it; reading it runs no code.

    Raises:
        ValueError: a file that is cut, or something else.
    """
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
        if dump.keys() >= FIELDS:
            return dump
        reason = f"it lacks {', '.join(sorted(FIELDS - dump.keys()))}"
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
    raise ValueError(f"{path}: expected the dump of a bad step, got something else ({reason})")


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
