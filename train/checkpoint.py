"""Checkpoints of a run: atomic, complete, resumable on another number of processes.

A checkpoint is a folder `step_00001250`: the tensors as a torch.distributed.checkpoint, `state.json` with counters and
shapes, and `teacher.safetensors`, the EMA backbone for everybody else. It is written beside its place and renamed, so a
killed run leaves either the old one or the new one. Random numbers need no state: every step seeds its generators from
(seed, step, rank), and the sample order is a function of the step.
"""

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from dinov3core.checkpoints import save_weights
from dinov3core.train.parallel import World

PREFIX = "step_"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or does not fit; the message says why and what to do."""


def newest(folder: Path) -> Path | None:
    """The latest complete checkpoint under `folder`, None when there is none."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.suffix != ".tmp" and (p / "state.json").is_file()]
    return max(found, default=None)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps a checkpoint has done."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    counters: dict,
    world: World,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXXXX` and drop all but the newest `keep`.

    Raises:
        CheckpointError: when the disk is full or read-only; earlier checkpoints stay.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = final.with_suffix(".tmp")
    try:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        dcp_save(_tensors(modules, optimizer), partial / "tensors", world)
        if world.is_main:
            save_weights(modules["teacher"].backbone, partial / "teacher.safetensors")
            state = {"step": step, "shapes": _shapes(modules), "counters": counters}
            (partial / "state.json").write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _retain(folder, keep)
        world.barrier()
    except (OSError, dcp.CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_write_failure(error, final, step)) from error
    return final


def load(
    checkpoint: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, world: World
) -> tuple[int, dict]:
    """Restore everything in place and return (steps done, counters).

    Raises:
        CheckpointError: when the checkpoint belongs to another architecture.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    ours = _shapes(modules)
    for name in sorted(ours.keys() | state["shapes"].keys()):
        here, there = ours.get(name), state["shapes"].get(name)
        if here != there:
            raise CheckpointError(
                f"{checkpoint} does not fit this recipe: {name} is {_shape_text(there)} in the checkpoint and "
                f"{_shape_text(here)} here; resume with the recipe it was trained with, or give another --run.out"
            )
    _materialise(optimizer)
    tensors = _tensors(modules, optimizer)
    dcp_load(tensors, checkpoint / "tensors", world)
    return state["step"], state["counters"]


def dcp_save(tensors: dict, path: Path, world: World) -> None:
    with warnings.catch_warnings():  # "assuming single process" is what a run without torchrun is
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        dcp.save(tensors, checkpoint_id=path, no_dist=world.size == 1)


def dcp_load(tensors: dict, path: Path, world: World) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        dcp.load(tensors, checkpoint_id=path, no_dist=world.size == 1)


def _tensors(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
    """Every tensor of the run under a stable name; optimizer state by the name of its parameter, not by its index."""
    tensors: dict = {name: dict(module.state_dict()) for name, module in modules.items()}
    names = {parameter: name for name, parameter in modules["student"].named_parameters()}
    tensors["optimizer"] = {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return tensors


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """AdamW makes its state at the first step; a load needs the tensors to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _shapes(modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    return {
        f"{name}.{key}": list(value.shape)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def _shape_text(shape: list[int] | None) -> str:
    return "absent" if shape is None else str(shape)


def _retain(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write_failure(error: Exception, path: Path, step: int) -> str:
    text = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    reason = "the disk is full" if full else text.splitlines()[0]
    return (
        f"could not write checkpoint {path} at step {step}: {reason}; earlier checkpoints are kept: "
        "make room or give another --run.out, then run the same command to continue"
    )
