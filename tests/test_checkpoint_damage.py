"""A damaged or malicious checkpoint is neither loaded nor run: the newest whole one is taken.

Run as a script, this file is one of two processes that save, fail and load together.
"""

import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the test folder off the path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny_runs import differences, made_up_batch, snapshot, tiny_command, tiny_recipe
from torch import Tensor
from two_processes import joined, run_ranks

from dinov3core.train.engine import checkpoint, loop, tensor_files
from dinov3core.train.engine.checkpoint import (
    Candidate,
    CheckpointError,
    CheckpointNotWritten,
    Contents,
)
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
FUZZ = int(os.environ.get("DINOV3CORE_FUZZ", "1"))
PAYLOAD = "tensors/__0_0.distcp"


def save(folder: Path, trainer: Trainer, step: int, keep: int = 3, world: World = ALONE) -> Path:
    """A checkpoint of a trainer whose `prototype_counts` are a tensor of the run."""
    state = {"counters": {"bad_steps": step}}
    kept = checkpoint.Kept(keep, 0)
    return checkpoint.save(folder, step, contents_of(trainer), state, world, kept)


def contents_of(trainer: Trainer, **more: Tensor) -> Contents:
    buffers = {"prototype_counts": trainer.method.prototype_counts, **more}
    return Contents(trainer.modules(), trainer.optimizer, buffers)


def load(candidate: Candidate, trainer: Trainer, world: World = ALONE) -> dict[str, Tensor]:
    """All tensors of the trainer after a load over values that no checkpoint holds."""
    with torch.no_grad():
        for tensor in snapshot_in_place(trainer).values():
            tensor.fill_(77)
    checkpoint.load(candidate, contents_of(trainer), world)
    return everything(trainer)


def snapshot_in_place(trainer: Trainer) -> dict[str, Tensor]:
    modules = trainer.modules().items()
    return {f"{name}.{key}": t for name, m in modules for key, t in m.state_dict().items()}


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return snapshot(trainer) | {"counts": trainer.method.prototype_counts.clone()}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(tiny_recipe(), ALONE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    """A folder with checkpoints of steps 5 and 10, and what they hold."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    trainer = Trainer(tiny_recipe(), ALONE)
    content = {}
    for step in (5, 10):
        trainer.step(made_up_batch(trainer.recipe, 4, seed=step), step // 5, observe=True)
        content[step] = everything(trainer)
        save(folder, trainer, step)
    assert differences(content[5], content[10])
    return folder, content


@pytest.fixture
def folder(written: tuple[Path, dict], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "checkpoints"))


def newest(folder: Path) -> Candidate:
    candidate = checkpoint.newest_whole(folder, ALONE)
    assert candidate is not None
    return candidate


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def flipped(content: bytes, position: int | None = None) -> bytes:
    position = len(content) // 2 if position is None else position
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


def zeroed(content: bytes) -> bytes:
    start = len(content) // 3
    return content[:start] + bytes(len(content[start : start + 65536])) + content[start + 65536 :]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: rewrite(file, lambda content: content[: len(content) // 2]),
    "a byte less": lambda file: rewrite(file, lambda content: content[:-1]),
    "a byte flipped": lambda file: rewrite(file, flipped),
    "64 KiB of zeros": lambda file: rewrite(file, zeroed),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [PAYLOAD, "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    written: tuple[Path, dict], folder: Path, trainer: Trainer, file: str, damage: str
) -> None:
    DAMAGES[damage](step_folder(folder, 10) / file)
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 5)
    (reason,) = candidate.passed_over
    assert re.match(f"step_00000010: {re.escape(file)} (is missing|is cut|has another)", reason)
    assert candidate.state["step"] == 5 and candidate.state["counters"] == {"bad_steps": 5}
    assert not differences(load(candidate, trainer), written[1][5])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["tensors/.metadata", "teacher.safetensors"])
def test_what_a_resume_does_not_read_costs_no_step(
    written: tuple[Path, dict], folder: Path, trainer: Trainer, file: str, damage: str
) -> None:
    DAMAGES[damage](step_folder(folder, 10) / file)
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 10) and not candidate.passed_over
    assert not differences(load(candidate, trainer), written[1][10])


@pytest.mark.parametrize("file", [PAYLOAD, "state.json"])
def test_any_flipped_byte_is_seen(folder: Path, file: str) -> None:
    path = step_folder(folder, 10) / file
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 40 * FUZZ).tolist():
        path.write_bytes(flipped(content, position))
        assert newest(folder).path == step_folder(folder, 5), position
    path.write_bytes(content)
    assert newest(folder).path == step_folder(folder, 10)


def test_the_whole_of_a_lost_folder_is_passed_over(folder: Path) -> None:
    shutil.rmtree(step_folder(folder, 10) / "tensors")
    assert newest(folder).passed_over == [f"step_00000010: {PAYLOAD} is missing"]


def test_none_whole_is_one_sentence_that_names_all(folder: Path) -> None:
    DAMAGES["a byte flipped"](step_folder(folder, 10) / PAYLOAD)
    DAMAGES["missing"](step_folder(folder, 5) / "state.json")
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest_whole(folder, ALONE)
    assert f"step_00000010: {PAYLOAD} has another digest" in str(error.value)
    assert "step_00000005: state.json is missing" in str(error.value)
    assert "restore one from a copy, or start anew with another --run.out" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "absent", ALONE) is None
    (tmp_path / "step_00000003.tmp").mkdir()
    assert checkpoint.newest_whole(tmp_path, ALONE) is None


def test_a_folder_that_cannot_be_read_is_a_sentence(folder: Path) -> None:
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    with patch.object(Path, "iterdir", side_effect=refused):
        with pytest.raises(CheckpointError, match=r"cannot look for checkpoints: Permission den"):
            checkpoint.newest_whole(folder, ALONE)


STRANGERS = (
    "step_final",
    "step_1",
    "step_000000011",
    "step_00000011.tmp",
    "step_00000011.old.tmp",
    "step_0000001\u0661",
    "step_00000011 (copy)",
    "xstep_00000011",
)


def test_folders_of_other_names_are_no_checkpoints(folder: Path) -> None:
    for name in STRANGERS:
        shutil.copytree(step_folder(folder, 10), folder / name)
    (folder / "step_00000099").write_text("a file")
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 10) and not candidate.passed_over


def test_a_renamed_checkpoint_is_not_one_of_that_step(folder: Path) -> None:
    shutil.copytree(step_folder(folder, 5), step_folder(folder, 30))
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 10)
    assert candidate.passed_over == ["step_00000030: state.json is that of another checkpoint"]


def edited(path: Path, change: Callable[[dict], Any], *, sealed: bool = True) -> None:
    """state.json as somebody who knows the format would change it."""
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    change(state)
    if sealed:
        text = json.dumps(state, sort_keys=True)
        state["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))


def test_the_seal_is_what_its_description_says(folder: Path) -> None:
    before = newest(folder).state
    edited(step_folder(folder, 10), lambda state: None)
    assert newest(folder).state == before


def test_a_counter_added_by_hand_is_seen(folder: Path) -> None:
    file = step_folder(folder, 10) / "state.json"
    file.write_text(file.read_text().replace('"bad_steps"', '"invented": 1, "bad_steps"'))
    assert newest(folder).passed_over == ["step_00000010: state.json has another digest"]


def test_a_checkpoint_without_digests_is_refused(folder: Path) -> None:
    for step in (5, 10):
        edited(step_folder(folder, step), lambda state: state.pop("digests"), sealed=False)
    with pytest.raises(CheckpointError, match=r"no digest to verify it by; an earlier version"):
        checkpoint.newest_whole(folder, ALONE)


STATES = ("[]", "3", '"text"', "null", "{}", '{"step": 10}', "[" * 100_000, "NaN", "\x00", "\ud800")


@pytest.mark.parametrize("text", STATES, ids=lambda text: ascii(text[:8]))
def test_a_state_file_of_anything_else_is_passed_over(folder: Path, text: str) -> None:
    file = step_folder(folder, 10) / "state.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert newest(folder).path == step_folder(folder, 5)


def first(state: dict) -> dict:
    return next(iter(state["tensors"].values()))


def first_part(state: dict) -> dict:
    return first(state)["parts"][0]


def rename_payload(state: dict, name: str) -> None:
    for entry in state["tensors"].values():
        entry["parts"][0]["file"] = name
    state["digests"] = {name: state["digests"]["__0_0.distcp"]}


FORGERIES: dict[str, Callable[[dict], Any]] = {
    "a file elsewhere": lambda state: rename_payload(state, "../tensors/__0_0.distcp"),
    "a file on the machine": lambda state: rename_payload(state, "/etc/passwd"),
    "a file without digest": lambda state: first_part(state).update(file="other.distcp"),
    "a function for a type": lambda state: first(state).update(dtype="load"),
    "no tensors": lambda state: state.pop("tensors"),
    "tensors in a list": lambda state: state.update(tensors=[1, 2]),
    "no parts": lambda state: first(state).pop("parts"),
    "a shape of text": lambda state: first(state).update(shape="abc"),
    "a shape of shapes": lambda state: first_part(state).update(shape=[[3]]),
    "digests in a number": lambda state: state.update(digests=7),
    "no step": lambda state: state.pop("step"),
    "a step of text": lambda state: state.update(step="10"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_state_with_a_right_digest_is_passed_over(folder: Path, forgery: str) -> None:
    edited(step_folder(folder, 10), FORGERIES[forgery])
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 5)
    assert candidate.passed_over[0].startswith("step_00000010: state.json ")


FORGED_PLACES = (
    {"start": -5},
    {"start": 10**12},
    {"start": "x"},
    {"bytes": 3},
    {"offsets": [9**9]},
)


@pytest.mark.parametrize("place", FORGED_PLACES, ids=str)
def test_a_forged_place_is_a_sentence(folder: Path, trainer: Trainer, place: dict) -> None:
    edited(step_folder(folder, 10), lambda state: first_part(state).update(place))
    with pytest.raises(CheckpointError, match=r"step_00000010 cannot be loaded: .*; move it out"):
        load(newest(folder), trainer)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_the_attack_works_on_a_trusting_reader(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("name", [".metadata", "__0.metadata", "__1.metadata"])
def test_an_index_that_runs_code_is_not_opened(
    written: tuple[Path, dict], folder: Path, trainer: Trainer, tmp_path: Path, name: str
) -> None:
    tensors = step_folder(folder, 10) / "tensors"
    (tensors / ".metadata").unlink()
    (tensors / name).write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    assert not differences(load(newest(folder), trainer), written[1][10])
    assert not (tmp_path / "marker").exists()


def write_pickle(attack: Malicious, file: Path) -> None:
    file.write_bytes(pickle.dumps(attack, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
def test_a_file_of_tensors_that_runs_code_is_refused(
    folder: Path, trainer: Trainer, tmp_path: Path, write: Callable
) -> None:
    path = step_folder(folder, 10)
    attack = Malicious(tmp_path / "marker")
    write(attack, path / PAYLOAD)
    assert newest(folder).passed_over == [f"step_00000010: {PAYLOAD} has another digest"]

    def forge(state: dict) -> None:
        size = (path / PAYLOAD).stat().st_size
        for entry in state["tensors"].values():
            entry["parts"][0].update(start=0, bytes=size)
        state["digests"]["__0_0.distcp"] = hashlib.sha256((path / PAYLOAD).read_bytes()).hexdigest()

    edited(path, forge)
    with pytest.raises(CheckpointError, match=r"something else than tensors, which was not run"):
        load(newest(folder), trainer)
    assert not (tmp_path / "marker").exists()


def test_another_architecture_or_a_missing_buffer_is_named(folder: Path, trainer: Trainer) -> None:
    candidate = newest(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(candidate, contents_of(trainer, more=torch.zeros(3)), ALONE)
    assert "buffers.more is absent in the checkpoint and float32 [3] here" in str(error.value)
    student = trainer.student.backbone
    other = Contents({"student": student}, torch.optim.AdamW(student.parameters()), {})
    with pytest.raises(CheckpointError, match="does not fit this recipe: student"):
        checkpoint.load(candidate, other, ALONE)


# Saving


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_unfinished_folders_do_not_count_and_are_cleared(folder: Path, trainer: Trainer) -> None:
    for leftover in ("step_00000012.tmp", "step_00000003.tmp", "step_00000010.old.tmp"):
        shutil.copytree(step_folder(folder, 5), folder / leftover)
    save(folder, trainer, 11, keep=1)
    assert names_in(folder) == ["step_00000011"]
    assert newest(folder).path == step_folder(folder, 11)


def test_strangers_are_neither_counted_nor_removed(folder: Path, trainer: Trainer) -> None:
    for stranger in ("step_final", "step_1", "step_99999999.tmp.mine"):
        shutil.copytree(step_folder(folder, 5), folder / stranger)
    save(folder, trainer, 11, keep=2)
    assert names_in(folder) == sorted(
        ["step_00000010", "step_00000011", "step_1", "step_99999999.tmp.mine", "step_final"]
    )


def test_a_later_damaged_one_pushes_nothing_out(folder: Path, trainer: Trainer) -> None:
    DAMAGES["cut"](step_folder(folder, 10) / PAYLOAD)
    save(folder, trainer, 6, keep=1)
    candidate = newest(folder)
    assert candidate.path == step_folder(folder, 6) and len(candidate.passed_over) == 1
    save(folder, trainer, 10, keep=1)
    assert names_in(folder) == ["step_00000010"]
    assert not newest(folder).passed_over


def test_a_save_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(), ALONE)
    save(tmp_path / "checkpoints", trainer, 0)
    before = everything(trainer)
    assert not differences(load(newest(tmp_path / "checkpoints"), trainer), before)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_failed_write_in_torch_has_a_reason(folder: Path, trainer: Trainer, share: float) -> None:
    with largest_file(int((step_folder(folder, 10) / PAYLOAD).stat().st_size * share)):
        with pytest.raises(CheckpointNotWritten) as error:
            save(folder, trainer, 11, keep=1)
    assert error.value.reason == "File too large"
    assert re.search(r"step_00000011 at step 11: File too large; earlier .* kept", str(error.value))
    assert names_in(folder) == ["step_00000005", "step_00000010"]
    assert newest(folder).path == step_folder(folder, 10)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_FOR_SAFETENSORS = SafetensorError("I/O error: No space left on device (os error 28)")
PLACES: dict[str, tuple[Any, str, Exception]] = {
    "tensors": (tensor_files, "dcp_save", FULL),
    "weights": (checkpoint, "save_weights", FULL_FOR_SAFETENSORS),
    "state": (Path, "write_text", FULL),
    "flush": (os, "fsync", FULL),
    "rename": (os, "replace", FULL),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_named_wherever_it_shows(folder: Path, trainer: Trainer, place: str) -> None:
    owner, name, error = PLACES[place]
    with patch.object(owner, name, side_effect=error):
        with pytest.raises(CheckpointNotWritten, match="at step 11: the disk is full; earlier"):
            save(folder, trainer, 11, keep=1)
    assert names_in(folder) == ["step_00000005", "step_00000010"]
    save(folder, trainer, 12, keep=1)
    assert names_in(folder) == ["step_00000012"]


def test_a_removed_run_folder_stays_removed(tmp_path: Path, trainer: Trainer) -> None:
    with pytest.raises(CheckpointNotWritten, match=r"No such file or directory \(.*gone"):
        save(tmp_path / "gone" / "checkpoints", trainer, 1)
    assert not (tmp_path / "gone").exists()


def test_an_interrupt_inside_torch_stays_an_interrupt(folder: Path, trainer: Trainer) -> None:
    with patch.object(torch, "save", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            save(folder, trainer, 11)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is cleaned up."""


@contextmanager
def killed_after(changes: int) -> Iterator[None]:
    """The process ends before it changes the file system once more."""
    counter = itertools.count()

    def counted(function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(counter) >= changes:
                raise Killed
            return function(*arguments, **options)

        return call

    with (
        patch.object(os, "replace", counted(os.replace)),
        patch.object(os, "fsync", counted(os.fsync)),
        patch.object(os, "unlink", counted(os.unlink)),
        patch.object(Path, "mkdir", counted(Path.mkdir)),
    ):
        yield


def test_a_kill_anywhere_in_a_save_leaves_whole_ones(folder: Path, trainer: Trainer) -> None:
    """At every change of the file system by a save that replaces two by one."""
    ends = []
    for changes in itertools.count():
        attempt = Path(shutil.copytree(folder, folder.with_name(f"attempt{changes}")))
        try:
            with killed_after(changes):
                save(attempt, trainer, 11, keep=1)
            break
        except Killed:
            candidate = newest(attempt)
            assert not candidate.passed_over, changes
            ends.append(checkpoint.step_of(candidate.path))
            for path in attempt.glob("step_????????"):
                assert (path / "state.json").is_file() and (path / PAYLOAD).is_file(), changes
        save(attempt, trainer, 12, keep=1)
        assert names_in(attempt) == ["step_00000012"]
    assert ends == sorted(ends) and set(ends) == {10, 11} and len(ends) > 10


# Two processes


def test_two_processes_agree(tmp_path: Path, trainer: Trainer) -> None:
    """What they save, what they refuse, and that a save which fails on one fails on both."""
    run_ranks(Path(__file__), tmp_path)
    candidate = newest(tmp_path / "run")
    assert candidate.path == step_folder(tmp_path / "run", 2)
    assert sorted(candidate.state["digests"]) == ["__0_0.distcp", "__1_0.distcp"]
    want = torch.load(tmp_path / "want.pt", weights_only=True)
    assert not differences(load(candidate, trainer), want)


def main(out: Path) -> None:
    with joined() as world:
        trainer = Trainer(tiny_recipe(), world)
        folder = out / "run"
        for step in (1, 2):
            trainer.step(made_up_batch(trainer.recipe, 4, seed=step), step)
            save(folder, trainer, step, world=world)
        want = everything(trainer)
        for rank, failure in ((1, largest_file(20_000)), (0, full_disk_for_weights())):
            with failure if world.rank == rank else nullcontext():
                with pytest.raises(CheckpointNotWritten) as error:
                    save(folder, trainer, 3, keep=1, world=world)
            assert error.value.reason in ("File too large", "the disk is full")
            world.barrier()  # the main process has cleared away what it began
        assert names_in(folder) == ["step_00000001", "step_00000002"]
        both = checkpoint.newest_whole(folder, world)
        assert both is not None and not differences(load(both, trainer, world), want)
        if world.is_main:
            torch.save(want, out / "want.pt")
            shutil.copytree(folder, out / "damaged")
            DAMAGES["a byte flipped"](step_folder(out / "damaged", 2) / "tensors/__1_0.distcp")
        world.barrier()
        damaged = checkpoint.newest_whole(out / "damaged", world)
        assert damaged is not None and damaged.path == step_folder(out / "damaged", 1)
        assert damaged.passed_over == ["step_00000002: tensors/__1_0.distcp has another digest"]


def full_disk_for_weights() -> AbstractContextManager:
    return patch.object(checkpoint, "save_weights", side_effect=FULL_FOR_SAFETENSORS)


# The command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with checkpoints of 10, 15 and 20, killed before its summary."""
    out = tmp_path_factory.mktemp("command") / "run"
    loop.pretrain(parse(tiny_command(out, "--data.probe", "none")))
    (out / "summary.json").unlink()
    return out


def resume(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "train/pretrain.py", *tiny_command(out, "--data.probe", "none")]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": ""}, "timeout": 300}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_command_goes_on_from_the_newest_whole_one(run_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    checkpoints = out / "checkpoints"
    DAMAGES["64 KiB of zeros"](step_folder(checkpoints, 20) / PAYLOAD)
    for path in checkpoints.glob("step_*/tensors"):
        (path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    shutil.copytree(step_folder(checkpoints, 20), checkpoints / "step_final")
    ran = resume(out)
    assert ran.returncode == 0, ran.stderr
    assert "resuming after step 15" in ran.stderr
    assert f"step_00000020: {PAYLOAD} has another digest" in ran.stderr
    assert "Traceback" not in ran.stderr and not (tmp_path / "marker").exists()
    trainer = Trainer(parse(tiny_command(out)), ALONE)
    states = []
    for path in (run_folder, out):
        candidate = newest(path / "checkpoints")
        assert candidate.path.name == "step_00000020" and not candidate.passed_over
        checkpoint.load(candidate, contents_of(trainer), ALONE)
        states.append(snapshot(trainer))
    assert not differences(*states)


def test_a_run_with_none_whole_does_not_start_anew(run_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for path in (out / "checkpoints").iterdir():
        DAMAGES["cut"](path / "state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(step_0+20: state"):
        loop.pretrain(parse(tiny_command(out, "--data.probe", "none")))
    assert len(names_in(out / "checkpoints")) == 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
