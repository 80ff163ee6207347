"""One run per folder, and what becomes of a run whose folder or disk goes away under it."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from forked_runs import ForkedRun
from tiny_runs import tiny_command

from dinov3core.train.engine import checkpoint, folder, loop
from dinov3core.train.engine.checkpoint import CheckpointNotWritten
from dinov3core.train.engine.folder import RunFolder
from dinov3core.train.engine.metrics import MetricsLog, read_rows
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import exit_status, parse

SHORT = ("--run.epoch-steps", "10", "--run.checkpoint-every", "4", "--data.probe", "none")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second of every run."""
    monkeypatch.setattr(Monitor, "report", lambda *_: None)
    monkeypatch.setattr(Monitor, "snapshot_before", lambda *_: None)


def start(out: Path, *more: str) -> dict:
    argv = tiny_command(out, *SHORT, *more)
    return loop.pretrain(parse(argv), argv=argv)


@contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something in the middle of a run, before step `number`."""

    def step(trainer: Trainer, crops: object, step: int, *rest: object) -> object:
        if step == number:
            act()
        return step_of_trainer(trainer, crops, step, *rest)

    step_of_trainer = Trainer.step
    with patch.object(Trainer, "step", step):
        yield


def test_a_second_run_in_a_folder_is_refused_and_names_the_first(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out):
        holder = rf"another run \(process {os.getpid()} on .*\) is writing into"
        with pytest.raises(TrainingStopped, match=holder):
            start(out)
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert start(out)["steps"] == 10


def test_a_killed_run_leaves_no_lock_not_even_with_loader_processes(tmp_path: Path) -> None:
    """Forked loader processes outlive a killed parent by seconds and must not hold its lock."""
    out = tmp_path / "run"
    argv = tiny_command(out, "--run.epoch-steps", "5000", "--data.workers", "1")
    run = ForkedRun(argv, tmp_path / "log")
    run.until(lambda: len(read_rows(out / "metrics.jsonl")) > 3)
    with pytest.raises(TrainingStopped, match=rf"another run \(process {run.pid} on "):
        RunFolder(out)
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    RunFolder(out).close()


def test_the_lock_goes_with_a_folder_that_is_moved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out) as held:
        out.rename(tmp_path / "elsewhere")
        with pytest.raises(TrainingStopped, match="another run"):
            RunFolder(tmp_path / "elsewhere")
        with RunFolder(out):
            with pytest.raises(TrainingStopped, match=r"another run \(process .* in its place"):
                held.restore()


def test_a_finished_run_is_moved_aside_and_its_number_is_not_locked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out):
        (out / "summary.json").write_text("{}")
    with RunFolder(out):
        assert [path.name for path in out.iterdir()] == [".lock"]
        RunFolder(tmp_path / "run.1", resume=True).close()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def none_here(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with patch.object(folder.fcntl, "flock", none_here):
        RunFolder(tmp_path / "run").close()
    assert capsys.readouterr().err.count("has no locks: nothing keeps a second run out") == 1


def test_a_run_whose_folder_is_deleted_says_so_and_keeps_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    with at_step(6, lambda: shutil.rmtree(out)):
        assert start(out, "--run.eval-every", "7")["steps"] == 10
    said = capsys.readouterr().err
    assert said.count("was deleted or moved: it is made again, with all rows") == 1
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert names_in(out / "checkpoints") == ["step_00000008", "step_00000010"]
    assert json.loads((out / "summary.json").read_text())["steps"] == 10


def test_a_folder_deleted_in_the_last_evaluation_gets_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def evaluate(monitor: Monitor, backbone: object, counts: torch.Tensor, done: int) -> dict:
        scores = whole(monitor, backbone, counts, done)
        if done == 10:
            shutil.rmtree(out)
        return scores

    whole = Monitor.evaluate
    with patch.object(Monitor, "evaluate", evaluate):
        start(out)
    assert names_in(out / "checkpoints") == ["step_00000010"]
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, *range(1, 11), 10]


def test_a_run_whose_folder_was_taken_over_stops(tmp_path: Path) -> None:
    out, others = tmp_path / "run", []

    def another_run_begins() -> None:
        out.rename(tmp_path / "first")
        others.append(RunFolder(out))

    with at_step(6, another_run_begins):
        with pytest.raises(TrainingStopped, match="has begun in its place"):
            start(out)
    others[0].close()
    assert names_in(out) == [".lock"]
    assert names_in(tmp_path / "first" / "checkpoints") == ["step_00000004"]


def names_in(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


@contextmanager
def full_at(*steps: int) -> Iterator[None]:
    """Saves of these steps fail."""

    def save(folder: Path, step: int, *rest: object) -> Path:
        if step in steps:
            full = "the disk is full"
            raise CheckpointNotWritten(f"could not write step {step}: {full}", full)
        return whole(folder, step, *rest)

    whole = checkpoint.save
    with patch.object(checkpoint, "save", save):
        yield


def test_after_a_failed_save_training_goes_on_to_the_next(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    with full_at(4):
        assert start(out)["steps"] == 10
    said = capsys.readouterr().err
    assert said.count("step 4: the disk is full; training goes on to the next checkpoint") == 1
    assert names_in(out / "checkpoints") == ["step_00000008", "step_00000010"]


def test_a_failed_last_save_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with full_at(10):
        assert exit_status(tiny_command(tmp_path / "run", *SHORT)) == 1
    assert "error: could not write step 10: the disk is full" in capsys.readouterr().err
    assert exit_status(tiny_command(tmp_path / "run", *SHORT)) == 0


def test_rows_that_cannot_be_written_wait_and_none_is_lost(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    writes = iter([5, None, None])  # the disk takes five bytes more, then none, twice

    def short(file: int, content: bytes) -> int:
        room = next(writes)
        if room is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[:room])

    write = os.write
    with patch.object(os, "write", short):
        log.write({"step": 2})
        assert log.trouble == "No space left on device"
        log.write({"step": 3})
    log.write({"step": 4})
    assert not log.trouble
    log.close()
    assert [row["step"] for row in read_rows(log.path)] == [1, 2, 3, 4]


def test_rows_still_waiting_at_the_end_are_an_error(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    with patch.object(os, "write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        log.write({"step": 1})
        with pytest.raises(OSError, match="No space left"):
            log.close()


def test_a_dump_that_cannot_be_written_stops_no_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    from test_guards import run_with_bad_steps

    def full(content: object, path: object) -> None:
        if "bad_steps" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:820] failed writing file")
        save(content, path)

    save = torch.save
    with patch.object(torch, "save", full):
        assert run_with_bad_steps(tmp_path / "run", 3)["bad_steps"] == 1
    assert "its dump could not be written ([enforce fail" in capsys.readouterr().err
