"""What `replay` needs to run a bad step again, written beside the run."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3core.data.batch import Batch
from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.trainer import Trainer

FIELDS = {"argv", "crops", "modules", "step"}  # that a replay needs


def write_dump(
    folder: Path,
    trainer: Trainer,
    batch: Batch,
    step: int,
    values: dict[str, float],
    argv: list[str],
) -> str:
    """Write weights, batch and values of a step; what to say about it, also when that fails.

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
        "crops": {"gram_crops": None} | batch.to(torch.device("cpu")).tensors(),
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


def dumped_batch(crops: dict[str, Tensor | None], images: int) -> Batch:
    """The batch of a dump; which images they were it does not say.

    Args:
        crops: of the dump; names of other versions are left out.
        images: per process.
    """
    names = (
        "global_crops",
        "local_crops",
        "gram_crops",
        "masks",
        "mask_indices",
        "mask_weights",
    )
    return Batch(**{name: crops[name] for name in names}, positions=range(images))
