"""Several students in one pass: resume, failure, and who joins or leaves, as runs of their own.

What every student comes to is compared, bit for bit, with what it comes to where nothing happened.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from forked_runs import exit_status_without_pictures, several_ranks
from tiny_runs import HEAD_SIZES, checkpoint_of, metrics_of, tensors_of, tiny_command
from torch import Tensor

from dinov3core.train.distill import exit_status
from dinov3core.train.engine import tensor_files
from dinov3core.train.engine.distillation import outcome
from dinov3core.train.engine.distillation.heads import FrozenHeads
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.session import Session

STEPS = 8
SAVED_EVERY = 3
STUDENTS = ("vit64", "vit48")
SECONDS = 120  # processes that wait for each other would do so for ever


def command(teacher: Path, out: Path, *more: str) -> list[str]:
    fields = {
        "teacher.run": teacher,
        "global-batch": 4,
        **{
            f"{head}.{name}": size for head in ("dino", "ibot") for name, size in HEAD_SIZES.items()
        },
        "crops.global-size": 24,
        "crops.local-size": 16,
        "crops.local-count": 2,
        "data.scenes": 64,
        "data.probe-bank": 24,
        "data.probe-queries": 12,
        "data.dense-images": 12,
        "data.workers": 0,
        "run.steps": STEPS,
        "run.log-every": 1,
        "run.eval-every": 4,
        "run.checkpoint-every": SAVED_EVERY,
        "run.threads": 1,
        "run.out": out,
    }
    options = (text for name, value in fields.items() for text in (f"--{name}", str(value)))
    students = () if "--students" in more else ("--students", ",".join(STUDENTS))
    return ["quickstart_distill", *options, *students, *more]


def distil(argv: list[str]) -> int:
    """A run that draws nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Monitor, "report", lambda *_: None))
        stack.enter_context(patch.object(Monitor, "snapshot_before", lambda *_: None))
        stack.enter_context(patch.object(outcome, "write_page", page_in_words))
        return exit_status(argv)


def page_in_words(folder: Path, ended: Any, device: torch.device) -> dict[str, Any]:
    students = {
        one.name: {"failure": one.failure, "folder": str(one.folder), "knn": None}
        for one in ended.students
    }
    (folder / "summary.json").write_text(json.dumps(students))
    return {"students": students}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert exit_status_without_pictures(tiny_command(out, "--run.epoch-steps", "2")) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both students, from start to end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert distil(command(teacher, out)) == 0
    return out


def tensors(out: Path, name: str, folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    return tensors_of(out / name, step, folder / "tensors.pt")


def same(one: Path, other: Path, name: str, folder: Path) -> bool:
    """Whether a student came to the same weights, optimizer and scores in both."""
    got = tensors(one, name, folder)
    want = tensors(other, name, folder)
    assert got.keys() == want.keys()
    unlike = [key for key in want if not torch.equal(got[key], want[key])]
    assert not unlike, unlike
    return metrics_of(one / name) == metrics_of(other / name)


@contextmanager
def at_step(step: int, name: str, happens: Callable[[Session], None]) -> Iterator[None]:
    """Before a student's step of that number, something happens to it."""
    train = Session.train

    def disturbed(self: Session, batch: Any, number: int, *more: Any, **named: Any) -> Any:
        if number == step and self.recipe.name == name:
            happens(self)
        return train(self, batch, number, *more, **named)

    with patch.object(Session, "train", disturbed):
        yield


def die(session: Session) -> None:
    raise SystemExit(9)


def poison(session: Session) -> None:
    with torch.no_grad():
        next(session.trainer.student.parameters()).fill_(float("nan"))


def killed(argv: list[str], step: int, name: str) -> None:
    with at_step(step, name, die), pytest.raises(SystemExit):
        distil(argv)


def test_a_killed_run_goes_on_bit_for_bit(teacher: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Killed between the saves of two students: they go on from different steps."""
    argv = command(teacher, tmp_path / "run")
    killed(argv, 3, "vit48")
    (checkpoint_of(tmp_path / "run" / "vit48", 3)).rename(tmp_path / "moved")
    assert distil(argv) == 0
    assert all(same(tmp_path / "run", undisturbed, name, tmp_path) for name in STUDENTS)


@pytest.mark.parametrize("spoiled", STUDENTS)
def test_a_student_that_fails_is_named_and_the_other_goes_on(
    teacher: Path,
    undisturbed: Path,
    tmp_path: Path,
    spoiled: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = command(teacher, tmp_path / "run")
    with at_step(4, spoiled, poison):
        assert distil(argv) == 1
    said = capfd.readouterr()
    assert f"student {spoiled}: failed at step 5: the weights hold a NaN or Inf" in said.err
    assert f"student {spoiled}: failed: the weights hold a NaN" in said.out
    assert "Traceback" not in said.err
    (other,) = set(STUDENTS) - {spoiled}
    assert same(tmp_path / "run", undisturbed, other, tmp_path)

    # It goes on from what its own run had left, and the one that is over is passed over.
    written = (tmp_path / "run" / other / "summary.json").stat().st_mtime_ns
    assert distil(argv) == 0
    assert same(tmp_path / "run", undisturbed, spoiled, tmp_path)
    assert (tmp_path / "run" / other / "summary.json").stat().st_mtime_ns == written


def test_losses_that_are_not_finite_end_one_student(
    teacher: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from dinov3core.train.engine.methods import HeadDistillation

    total = HeadDistillation.total

    def spoiled(self: HeadDistillation, terms: Any, now: Any) -> Tensor:
        loss = total(self, terms, now)
        return loss * float("nan") if self.recipe.name == "vit64" else loss

    with patch.object(HeadDistillation, "total", spoiled):
        assert distil(command(teacher, tmp_path / "run")) == 1
    assert "student vit64: failed at step 3: 3 steps in a row had a NaN" in capfd.readouterr().err
    assert not (tmp_path / "run" / "vit64" / "summary.json").exists()
    assert same(tmp_path / "run", undisturbed, "vit48", tmp_path)


def test_the_full_disk_of_one_student_is_its_own(
    teacher: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save = tensor_files.dcp_save

    def full(nested: Any, folder: Path, world: Any) -> Any:
        if "vit64" in folder.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(nested, folder, world)

    with patch.object(tensor_files, "dcp_save", full):
        assert distil(command(teacher, tmp_path / "run")) == 1
    assert "student vit64: failed at step 8: could not write" in capfd.readouterr().err
    assert same(tmp_path / "run", undisturbed, "vit48", tmp_path)


def test_one_student_less_and_one_more(teacher: Path, undisturbed: Path, tmp_path: Path) -> None:
    """vit48 trains alone and is killed; vit64 joins, and begins at 0 while the other waits."""
    out = tmp_path / "run"
    killed(command(teacher, out, "--students", "vit48"), 5, "vit48")
    killed(command(teacher, out), 5, "vit64")
    assert distil(command(teacher, out, "--students", "vit64")) == 0
    assert same(out, undisturbed, "vit64", tmp_path)
    assert [row["step"] for row in read_rows(out / "vit48" / "metrics.jsonl")][-1] < STEPS
    assert distil(command(teacher, out)) == 0
    assert same(out, undisturbed, "vit48", tmp_path)


def test_a_student_learns_together_what_it_learns_alone(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert distil(command(teacher, tmp_path / "run", "--students", "vit64")) == 0
    assert same(tmp_path / "run", undisturbed, "vit64", tmp_path)


def test_the_teacher_looks_once_at_every_image(teacher: Path, tmp_path: Path) -> None:
    looks: list[int] = []
    ask = FrozenHeads.__call__

    def counted(self: FrozenHeads, crops: Tensor, rows: Tensor | None = None) -> Any:
        looks.append(len(crops))
        return ask(self, crops, rows)

    with patch.object(FrozenHeads, "__call__", counted):
        assert distil(command(teacher, tmp_path / "run")) == 0
    assert looks == [2 * 4] * STEPS


def test_a_signal_saves_every_student(
    teacher: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(teacher, tmp_path / "run")

    def ask(session: Session) -> None:
        os.kill(os.getpid(), 15)

    with at_step(4, "vit64", ask):
        assert distil(argv) == 143
    assert f"stopped by SIGTERM: students are saved in {tmp_path}/run" in capfd.readouterr().err
    assert all(checkpoint_of(tmp_path / "run" / name, 5).is_dir() for name in STUDENTS)
    assert distil(argv) == 0
    assert all(same(tmp_path / "run", undisturbed, name, tmp_path) for name in STUDENTS)


def test_a_plan_trains_nothing(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(teacher, tmp_path / "run")
    assert distil([*argv, "--plan", "teacher=1,vit64=1,vit48=1", "--plan-ranks", "4"]) == 0
    assert "proposed for 4 processes" in capsys.readouterr().out.splitlines()[2]
    assert not (tmp_path / "run").exists()


# --- in three processes: two train vit64, one trains vit48


def spoiled_rank(argv: list[str], step: int, name: str) -> int:
    """One of the processes, in which a student is poisoned at a step."""
    with at_step(step, name, poison):
        return distil(argv)


def run_ranks(folder: Path, expected: int, function: Callable[..., int], *arguments: Any) -> str:
    folder.mkdir()
    with several_ranks(3, folder / "log", function, *arguments) as ranks:
        statuses = [rank.wait(SECONDS) for rank in ranks]
        said = "".join(rank.said() for rank in ranks)
    assert statuses == [expected] * 3, said
    return said


RANKS = ("--vit64.ranks", "0", "2", "--vit48.ranks", "2", "3")


@pytest.fixture(scope="module")
def in_processes(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both students, each in processes of its own, from start to end."""
    folder = tmp_path_factory.mktemp("in_processes")
    run_ranks(folder / "logs", 0, distil, command(teacher, folder / "run", *RANKS))
    return folder / "run"


def test_processes_of_a_failed_student_serve_the_others(
    teacher: Path, in_processes: Path, tmp_path: Path
) -> None:
    spoiled, other = "vit64", "vit48"
    argv = command(teacher, tmp_path / "run", *RANKS)
    said = run_ranks(tmp_path / "logs1", 1, spoiled_rank, argv, 4, spoiled)
    assert f"student {spoiled}: failed at step 5: the weights hold a NaN or Inf" in said
    assert same(tmp_path / "run", in_processes, other, tmp_path)
    run_ranks(tmp_path / "logs2", 0, distil, argv)
    assert same(tmp_path / "run", in_processes, spoiled, tmp_path)
