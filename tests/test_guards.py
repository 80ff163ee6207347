"""A step with a NaN or an Inf changes nothing, is counted and dumped, and a few in a row end the run with a sentence.

Run as a script, this file is one of two processes of which only the second sees a NaN.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import differences, made_up_crops, snapshot, tiny_command, tiny_recipe
from two_processes import joined, run_ranks

from dinov3core.data.loader import Batch, BatchLoader
from dinov3core.train import checkpoint, loop
from dinov3core.train.objective import Crops
from dinov3core.train.parallel import World
from dinov3core.train.pretrain import parse
from dinov3core.train.replay import replay
from dinov3core.train.trainer import Trainer


def poisoned(crops: Crops, value: float, view: str = "global_crops") -> Crops:
    images = getattr(crops, view).clone()
    images[0, 0, 0, 0] = value
    return crops._replace(**{view: images})


@contextmanager
def poisoned_gradient(trainer: Trainer, module: str, value: float) -> Iterator[None]:
    """One entry of one parameter's gradient; the loss stays finite."""

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    hook = next(trainer.student.get_submodule(module).parameters()).register_hook(poison)
    yield
    hook.remove()


def step_with_nan_pixel(trainer: Trainer, step: int, value: float = math.nan, view: str = "global_crops"):
    return trainer.step(poisoned(made_up_crops(trainer.recipe, 4), value, view), step)


def step_with_bad_gradient(trainer: Trainer, step: int, value: float, module: str):
    with poisoned_gradient(trainer, module, value):
        report = trainer.step(made_up_crops(trainer.recipe, 4), step)
    assert math.isfinite(report.values["loss"])
    return report


BAD_STEPS: dict[str, Callable] = {
    "NaN in a global crop": step_with_nan_pixel,
    "Inf in a global crop": lambda trainer, step: step_with_nan_pixel(trainer, step, math.inf),
    "NaN in a local crop": lambda trainer, step: step_with_nan_pixel(trainer, step, view="local_crops"),
    "NaN in a backbone gradient": lambda trainer, step: step_with_bad_gradient(trainer, step, math.nan, "backbone"),
    "Inf in a backbone gradient": lambda trainer, step: step_with_bad_gradient(trainer, step, math.inf, "backbone"),
    "Inf in a head gradient": lambda trainer, step: step_with_bad_gradient(trainer, step, -math.inf, "ibot_head"),
}


@pytest.fixture
def trainer() -> Trainer:
    """After one good step: the optimizer has a state to lose."""
    made = Trainer(tiny_recipe(), World(0, 1, torch.device("cpu")))
    assert made.step(made_up_crops(made.recipe, 4), 0).finite
    return made


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_step_changes_nothing(trainer: Trainer, name: str) -> None:
    before = snapshot(trainer)
    assert any(key.startswith("optimizer.") for key in before)
    report = BAD_STEPS[name](trainer, 1)  # a good step 1 would also refresh the Gram teacher
    assert not report.finite
    assert not differences(before, snapshot(trainer))
    assert all(p.grad is None for p in trainer.student.parameters())
    assert (trainer.counters.bad_steps, trainer.counters.bad_in_a_row) == (1, 1)


def test_the_next_good_step_trains_again(trainer: Trainer) -> None:
    BAD_STEPS["NaN in a global crop"](trainer, 1)
    before = snapshot(trainer)
    assert trainer.step(made_up_crops(trainer.recipe, 4), 1).finite
    changed = {name.split(".")[0] for name in differences(before, snapshot(trainer))}
    assert changed == {"student", "teacher", "gram_teacher", "optimizer"}
    assert (trainer.counters.bad_steps, trainer.counters.bad_in_a_row) == (1, 0)


def test_a_bad_step_on_one_of_two_processes_is_skipped_on_both() -> None:
    run_ranks(Path(__file__))


def main() -> None:
    with joined() as world:
        assert world.all_true(torch.tensor(True))
        assert not world.all_true(torch.tensor(world.rank == 0))
        trainer = Trainer(tiny_recipe(), world)
        crops = made_up_crops(trainer.recipe, 4, seed=world.rank)
        assert trainer.step(crops, 0).finite
        before = snapshot(trainer)
        report = trainer.step(poisoned(crops, math.nan, "local_crops") if world.rank == 1 else crops, 1)
        assert not report.finite
        assert not differences(before, snapshot(trainer))
        assert trainer.counters.bad_steps == 1
        assert trainer.step(crops, 1).finite
        after = snapshot(trainer)
        assert differences(before, after)
        for name in sorted(after):  # both processes went on with the same weights
            lowest, highest = after[name].clone(), after[name].clone()
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            assert torch.equal(lowest, highest), name


class PoisonedLoader(BatchLoader):
    """A loader whose batches of some steps hold a NaN."""

    bad_steps: frozenset[int]

    def __next__(self) -> Batch:
        batch = super().__next__()
        step = int(batch.positions[0]) // len(batch.positions)
        if step in self.bad_steps:
            batch.global_crops[0, 0, 0, 0] = math.nan
        return batch


def run_with_bad_steps(out: Path, *bad_steps: int, more: tuple[str, ...] = ()) -> dict:
    argv = tiny_command(out, "--run.epoch-steps", "8", "--data.probe", "none", *more)
    with patch.object(PoisonedLoader, "bad_steps", frozenset(bad_steps), create=True):
        with patch.object(loop, "BatchLoader", PoisonedLoader):
            return loop.pretrain(parse(argv), argv=argv)


def test_a_run_counts_and_dumps_a_bad_step_that_can_be_replayed(tmp_path: Path) -> None:
    summary = run_with_bad_steps(tmp_path / "run", 3)
    assert summary["bad_steps"] == 1
    (path,) = (tmp_path / "run" / "bad_steps").iterdir()
    dump = torch.load(path, weights_only=True)
    assert dump["step"] == 3 and dump["crops"]["global_crops"].isnan().any()
    assert all(t.isfinite().all() for module in dump["modules"].values() for t in module.values())
    report = replay(path)
    assert not report.finite and math.isnan(report.values["loss"])
    dump["crops"]["global_crops"].nan_to_num_(0.0)
    torch.save(dump, path)
    assert replay(path).finite
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows if "loss" in row] == [step == 3 for step in range(8)]


def test_bad_steps_in_a_row_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(loop.TrainingStopped, match=r"^3 steps in a row had a NaN or Inf \(.*loss.*\).*lower optim\.lr"):
        run_with_bad_steps(tmp_path / "run", 1, 3, 4, 5, 6)
    found = checkpoint.newest_whole(tmp_path / "run" / "checkpoints", World(0, 1, torch.device("cpu")))
    assert found is not None
    assert found.state["step"] == 6  # stopped at the third in a row, the last good weights kept
    assert len(list((tmp_path / "run" / "bad_steps").iterdir())) == loop.MAX_DUMPS


if __name__ == "__main__":
    main()
