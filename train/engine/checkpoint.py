"""Checkpoints of a run: atomic, verified, resumable on another number of processes.

A checkpoint is a folder `step_00001250`: the tensors as a torch.distributed.checkpoint,
`state.json` with whatever else the run must remember, an index of the tensors and a digest of each
of their files, and `teacher.safetensors`, the EMA backbone for everybody else. It is written beside
its place and renamed, so a killed run leaves either the old one or the new one. Random numbers need
no state: every step seeds its generators from (seed, step, rank), and the sample order is a
function of the step.

A checkpoint is whole when `state.json` has its own digest and every file of tensors the one that
`state.json` names. Nothing of a checkpoint that is not whole is loaded, and nothing in a checkpoint
is run. What a resume does not read (`teacher.safetensors`, torch's `.metadata`) is no part of being
whole: both can be made again from the tensors.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn

from dinov3core.checkpoints import save_weights
from dinov3core.models.interface import FeatureModule
from dinov3core.train.engine import tensor_files
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.tensor_files import Nested
from dinov3core.writing import flush

NAME = re.compile(r"step_[0-9]{8}")
UNFINISHED = ".tmp"
LEFTOVER = re.compile(r"step_[0-9]{8}(\.old)?\.tmp")
DIGEST = "sha256"  # 1.7 GB/s on a CPU with SHA instructions, where blake2b does 0.7
DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says why and what to do."""


class CheckpointNotWritten(CheckpointError):
    """A save that failed, on every process alike; earlier checkpoints stay and training may go on.

    Attributes:
        reason: why, in a few words ("the disk is full").
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Contents(NamedTuple):
    """Whose tensors a checkpoint holds."""

    modules: Mapping[str, nn.Module]  # "student", with the optimizer's parameters, "teacher", ...
    optimizer: torch.optim.Optimizer | None
    buffers: Mapping[str, Tensor]  # of the run and no module, the same on all processes


class Kept(NamedTuple):
    """Which checkpoints stay: the newest ones, and for good those of every so many steps."""

    newest: int
    every: int = 0  # steps; 0: none


class Candidate(NamedTuple):
    """A whole checkpoint, verified."""

    path: Path
    state: dict[str, Any]  # step, what the run gave to `save`, index and digests of the tensors
    passed_over: list[str]  # each newer checkpoint that is damaged, and why


def newest_whole(folder: Path, world: World) -> Candidate | None:
    """The latest checkpoint under `folder` that is whole, the same one on every process.

    Every process reads its share of the files.

    Returns:
        None when the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or the folder cannot be read.
    """
    try:
        names = _from_main(world, lambda: _names(folder))
    except _Failed as failure:
        raise CheckpointError(
            f"cannot look for checkpoints: {failure}; make it readable, or give another --run.out"
        ) from failure
    passed_over: list[str] = []
    for name in reversed(names):
        try:
            return Candidate(folder / name, _verified(folder / name, world), passed_over)
        except _Failed as failure:
            passed_over.append(f"{name}: {failure}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({'; '.join(passed_over)}): restore one from a "
            "copy, or start anew with another --run.out, from the weights in a "
            "teacher.safetensors with --run.init"
        )
    return None


def whole(path: Path, world: World) -> Candidate:
    """This very checkpoint; every process reads its share of the files.

    Raises:
        CheckpointError: on every process, when it is damaged.
    """
    try:
        return Candidate(path, _verified(path, world), [])
    except _Failed as failure:
        raise CheckpointError(
            f"{path} is damaged ({failure}); restore it from a copy, or name another checkpoint"
        ) from failure


def newest_stated(folder: Path) -> Candidate | None:
    """The latest checkpoint under `folder` by what its state.json says; its tensors are not read.

    Returns:
        None when there is none, or when that file cannot be read or is damaged.
    """
    try:
        names = _names(folder)
        return Candidate(folder / names[-1], _read_state(folder / names[-1]), []) if names else None
    except (OSError, _Failed):
        return None


def early(folder: Path, step: int) -> Path | None:
    """The newest checkpoint of at most so many steps, else the oldest; None: there is none."""
    paths = [folder / name for name in _names(folder)]
    reached = [path for path in paths if step_of(path) <= step]
    return (reached[-1:] or paths[:1] or [None])[0]


def fingerprint(state: Mapping[str, Any]) -> str:
    """What tells the tensors of one checkpoint from those of another; 16 characters."""
    return _seal(state["digests"])[:16]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps a checkpoint has done."""
    return int(checkpoint.name.removeprefix("step_"))


def save(
    folder: Path,
    step: int,
    contents: Contents,
    state: dict[str, Any],
    world: World,
    kept: Kept,
) -> Path:
    """Write `folder/step_XXXXXXXX`, and drop earlier ones.

    Args:
        folder: made when it is not there; the run folder around it has to be.
        state: what the run must remember besides tensors, as JSON; the main process's is written.
        kept: which ones stay.

    Raises:
        CheckpointNotWritten: the disk is full, read-only or gone; earlier checkpoints stay.
    """
    final = folder / f"step_{step:08d}"
    partial = final.with_suffix(UNFINISHED)
    tensors = _tensors(contents)
    try:
        _on_main(world, lambda: _make_empty(partial))
        index = _together(world, lambda: tensor_files.write(tensors, partial / "tensors", world))
        digests = _shared_digests(partial / "tensors", tensor_files.files_of(index), world)
        record = {**state, "step": step, "digests": digests, "tensors": index}
        teacher: Any = contents.modules["teacher"]
        _on_main(world, lambda: _write_rest(partial, teacher.backbone, record))
        _on_main(world, lambda: _publish(partial, final, kept))
    except _Failed as failure:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointNotWritten(
            f"could not write checkpoint {final} at step {step}: {failure}; earlier checkpoints "
            "are kept: make room or give another --run.out, then run the same command to continue",
            reason=str(failure),
        ) from failure
    return final


def load(candidate: Candidate, contents: Contents, world: World) -> None:
    """Restore everything in place.

    Raises:
        CheckpointError: the checkpoint belongs to another architecture; or it holds something else
            than tensors, and what was to be filled may be half filled.
    """
    tensors = _tensors(contents)
    there = tensor_files.described_by(candidate.state["tensors"])
    unlike = _first_unlike(candidate, tensors, tensor_files.described(tensors) | there)
    if unlike:
        raise CheckpointError(
            f"{unlike}; resume with the recipe it was trained with, or give another --run.out"
        )
    _fill(candidate, tensors, world)


def load_part(candidate: Candidate, contents: Contents, world: World) -> None:
    """Fill these tensors in place from a checkpoint that may hold more.

    Raises:
        CheckpointError: it lacks some of them, or they are of another shape; or it holds something
            else than tensors, and what was to be filled may be half filled.
    """
    tensors = _tensors(contents)
    unlike = _first_unlike(candidate, tensors, tensor_files.described(tensors))
    if unlike:
        raise CheckpointError(unlike)
    _fill(candidate, tensors, world)


def _first_unlike(candidate: Candidate, tensors: Nested, names: Iterable[str]) -> str:
    """What is said of the first of these tensors that differs from the checkpoint's, or ""."""
    here = tensor_files.described(tensors)
    there = tensor_files.described_by(candidate.state["tensors"])
    for name in names:
        if here.get(name) != there.get(name):
            return (
                f"{candidate.path} does not fit this recipe: {name} is "
                f"{there.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} here"
            )
    return ""


def _fill(candidate: Candidate, tensors: Nested, world: World) -> None:
    files = candidate.path / "tensors"
    index = candidate.state["tensors"]
    try:
        _together(world, lambda: tensor_files.read(tensors, files, index, world))
    except _Failed as failure:
        raise CheckpointError(
            f"{candidate.path} cannot be loaded: {failure}; move it out of its folder to continue "
            "from an earlier checkpoint"
        ) from failure


def _tensors(contents: Contents) -> Nested:
    """Every tensor of the run under a stable name; the optimizer's by that of their parameter."""
    tensors: Nested = {name: dict(module.state_dict()) for name, module in contents.modules.items()}
    if contents.buffers:
        tensors["buffers"] = dict(contents.buffers)
    if contents.optimizer is not None:
        tensors["optimizer"] = _of_optimizer(contents.optimizer, contents.modules["student"])
    return tensors


def _of_optimizer(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Tensor]:
    _materialise(optimizer)
    names: dict[Tensor, str] = {weights: name for name, weights in student.named_parameters()}
    return {
        f"{names[weights]}.{key}": value
        for weights, state in optimizer.state.items()
        for key, value in state.items()
    }


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """AdamW makes its state at the first step; before it, zeros are what it would start from."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _names(folder: Path) -> list[str]:
    """Names of the checkpoints under `folder`, oldest first; what is named otherwise is none."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(path.name for path in named if path.is_dir())


def _verified(path: Path, world: World) -> dict[str, Any]:
    """What state.json of a whole checkpoint says; every process reads its share of the tensors.

    Raises:
        _Failed: on every process, with what is damaged.
    """
    (text,) = _from_main(world, lambda: [json.dumps(_read_state(path))])
    state = json.loads(text)
    _together(world, lambda: _compare_digests(path, state["digests"], world))
    return state


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    if not file.is_file():
        raise _Failed("state.json is missing")
    try:
        state = json.loads(file.read_bytes())
        seal = state.pop("digest", None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Failed("state.json is cut or garbled") from error
    if seal is None:
        raise _Failed("state.json has no digest to verify it by; an earlier version wrote it")
    if seal != _seal(state):
        raise _Failed("state.json has another digest")
    try:
        tensor_files.metadata_of(state["tensors"])
        digested = set(state["digests"]) == set(tensor_files.files_of(state["tensors"]))
        step = state["step"]
    except (ValueError, TypeError, KeyError) as error:
        raise _Failed(f"state.json describes no checkpoint ({error})") from error
    if not digested or step != step_of(path):
        raise _Failed("state.json is that of another checkpoint")
    return state


def _compare_digests(path: Path, digests: dict[str, str], world: World) -> None:
    for name in sorted(digests)[world.rank :: world.size]:
        file = path / "tensors" / name
        if not file.is_file():
            raise _Failed(f"tensors/{name} is missing")
        if _digest(file) != digests[name]:
            raise _Failed(f"tensors/{name} has another digest")


def _shared_digests(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """The digest of each file; every process reads its share."""
    mine = names[world.rank :: world.size]
    digests = _together(world, lambda: [_digest(folder / name) for name in mine])
    return dict(zip(world.gather_texts(mine), world.gather_texts(digests), strict=True))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, DIGEST).hexdigest()


def _seal(state: dict[str, Any]) -> str:
    """A digest of the content of state.json, however it is laid out."""
    return hashlib.new(DIGEST, json.dumps(state, sort_keys=True).encode()).hexdigest()


def _make_empty(partial: Path) -> None:
    """A folder to write in; what a kill left of earlier saves goes."""
    partial.parent.mkdir(exist_ok=True)  # not its parents: a run folder that was removed stays so
    for path in partial.parent.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()


def _write_rest(partial: Path, backbone: FeatureModule, record: dict[str, Any]) -> None:
    """The files beside the tensors; all of the folder is on the disk afterwards."""
    weights = partial / "teacher.safetensors"
    save_weights(backbone, weights)

    state_file = partial / "state.json"
    state = json.loads(json.dumps(record))  # as it will be read, so that the digest is of that
    state_file.write_text(json.dumps({**state, "digest": _seal(state)}))

    for path in (weights, state_file, partial / "tensors", partial):
        flush(path)


def _publish(partial: Path, final: Path, kept: Kept) -> None:
    """Give a complete folder its name, and drop old ones."""
    _discard(final)
    os.replace(partial, final)
    flush(final.parent)
    # Later ones were passed over as damaged: if they counted, the one just written could go.
    earlier = [name for name in _names(final.parent) if name <= final.name]
    for name in earlier[: -kept.newest]:
        old = final.with_name(name)
        if not kept.every or step_of(old) % kept.every:
            _discard(old)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there; a kill in between leaves none that looks like one."""
    doomed = checkpoint.with_suffix(f".old{UNFINISHED}")
    if checkpoint.exists():
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class _Failed(Exception):
    """Something that a process could not read or write; the text is the reason."""


def _together(world: World, work: Callable[[], T]) -> T:
    """What `work` gives on this process, once it has ended well on all.

    Raises:
        _Failed: on every process, when it failed on one: nobody waits for one that gave up.
    """
    results: list[T] = []
    reasons: list[str] = []
    try:
        results = [work()]
    except (OSError, ValueError, SafetensorError, dcp.CheckpointException, _Failed) as error:
        reasons = [_reason(error)]
    reasons = world.gather_texts(reasons)
    if reasons:
        raise _Failed(reasons[0])
    return results[0]


def _on_main(world: World, work: Callable[[], None]) -> None:
    _together(world, work if world.is_main else lambda: None)


def _from_main(world: World, work: Callable[[], list[str]]) -> list[str]:
    """The texts that the main process gives, on every process."""
    return world.gather_texts(_together(world, work if world.is_main else list))


def _reason(error: BaseException) -> str:
    """Why, in a few words."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
        if not isinstance(error, Exception):
            raise error  # Ctrl-C, which torch catches as well
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than tensors, which was not run"
    code = re.search(r"\(os error (\d+)\)$", str(error))  # how safetensors ends its sentences
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number is None:
        return str(error).partition("\n")[0] or type(error).__name__
    where = getattr(error, "filename", None)
    return DISK_FULL.get(number, os.strerror(number)) + (f" ({where})" if where else "")
