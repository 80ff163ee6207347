"""A step with a NaN or an Inf changes nothing; a few in a row end the run with a sentence.

Run as a script, this file is one of two processes of which only the second sees a NaN.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import differences, made_up_batch, snapshot, tiny_command, tiny_recipe
from two_processes import joined, run_ranks

from dinov3core.data.batch import Batch
from dinov3core.data.loader import BatchLoader
from dinov3core.train import replay as replay_module
from dinov3core.train.engine import loop, optim
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.schedules import constant
from dinov3core.train.engine.session import MAX_DUMPS
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.teacher import update_ema
from dinov3core.train.engine.trainer import StepReport, Trainer, prepare
from dinov3core.train.pretrain import parse
from dinov3core.train.replay import replay


def poisoned(batch: Batch, value: float, view: str = "global_crops") -> Batch:
    images = getattr(batch, view).clone()
    images[0, 0, 0, 0] = value
    return replace(batch, **{view: images})


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


def step_with_nan_pixel(
    trainer: Trainer, step: int, value: float = math.nan, view: str = "global_crops"
):
    return trainer.step(poisoned(made_up_batch(trainer.recipe, 4), value, view), step)


def step_with_bad_gradient(trainer: Trainer, step: int, value: float, module: str):
    with poisoned_gradient(trainer, module, value):
        report = trainer.step(made_up_batch(trainer.recipe, 4), step)
    assert math.isfinite(report.values["loss"])
    return report


BAD_STEPS: dict[str, Callable] = {
    "NaN in a global crop": step_with_nan_pixel,
    "Inf in a global crop": lambda trainer, step: step_with_nan_pixel(trainer, step, math.inf),
    "NaN in a local crop": lambda trainer, step: step_with_nan_pixel(
        trainer, step, view="local_crops"
    ),
    "NaN in a backbone gradient": lambda trainer, step: step_with_bad_gradient(
        trainer, step, math.nan, "backbone"
    ),
    "Inf in a backbone gradient": lambda trainer, step: step_with_bad_gradient(
        trainer, step, math.inf, "backbone"
    ),
    "Inf in a head gradient": lambda trainer, step: step_with_bad_gradient(
        trainer, step, -math.inf, "ibot_head"
    ),
}


@pytest.fixture
def trainer() -> Trainer:
    """After one good step: the optimizer has a state to lose."""
    trainer = Trainer(tiny_recipe(), World(0, 1, torch.device("cpu")))
    assert trainer.step(made_up_batch(trainer.recipe, 4), 0).finite
    return trainer


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
    assert trainer.step(made_up_batch(trainer.recipe, 4), 1).finite
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
        batch = made_up_batch(trainer.recipe, 4, seed=world.rank)
        assert trainer.step(batch, 0).finite
        before = snapshot(trainer)
        report = trainer.step(
            poisoned(batch, math.nan, "local_crops") if world.rank == 1 else batch, 1
        )
        assert not report.finite
        assert not differences(before, snapshot(trainer))
        assert trainer.counters.bad_steps == 1
        assert trainer.step(batch, 1).finite
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
        step = batch.positions.start // batch.images
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
    dump["crops"]["host_indices"] = dump["crops"]["mask_indices"]  # as earlier versions wrote
    torch.save(dump, path)
    assert replay(path).finite
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] is None for row in rows if "loss" in row] == [
        step == 3 for step in range(8)
    ]


def test_a_replay_has_the_precision_of_the_run(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert prepare(tiny_recipe(), torch.device("cuda")) == tiny_recipe()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    run_with_bad_steps(tmp_path / "run", 3)
    (path,) = (tmp_path / "run" / "bad_steps").iterdir()
    with patch.object(replay_module, "prepare", wraps=prepare) as prepared:
        replay(path)
    assert prepared.call_args.args[1].type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_bad_steps_in_a_row_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingStopped,
        match=r"^3 steps in a row had a NaN or Inf \(.*loss.*\).*lower optim\.lr",
    ):
        run_with_bad_steps(tmp_path / "run", 1, 3, 4, 5, 6, more=("--run.checkpoint-every", "1"))
    assert names_in(tmp_path / "run" / "checkpoints") == [f"step_{step:08d}" for step in (1, 3)]
    assert len(list((tmp_path / "run" / "bad_steps").iterdir())) == MAX_DUMPS


def test_retrying_a_diverged_run_keeps_every_healthy_checkpoint(tmp_path: Path) -> None:
    """Each retry takes as many bad steps as the first run, and saves none."""
    out = tmp_path / "run"
    often = ("--run.checkpoint-every", "1", "--run.keep-checkpoints", "2")
    for attempt in range(4):
        reason = r"^3 steps in a row .* newest checkpoint is .*00000003"
        with pytest.raises(TrainingStopped, match=reason):
            run_with_bad_steps(out, *range(3, 8), more=often)
        names = names_in(out / "checkpoints")
        assert names == ["step_00000002", "step_00000003"], attempt


def test_a_checkpoint_due_at_a_bad_step_is_written_after_the_next_good_one(tmp_path: Path) -> None:
    run_with_bad_steps(tmp_path / "run", 3, 4, more=("--run.checkpoint-every", "4"))
    assert names_in(tmp_path / "run" / "checkpoints") == ["step_00000006", "step_00000008"]


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    """Faulty memory, say: no gradient and no update brought it there."""

    def spoil(trainer: Trainer, batch: Batch, step: int, *rest: object) -> StepReport:
        report = step_of_trainer(trainer, batch, step, *rest)
        if step == 4:
            next(trainer.student.parameters()).data.view(-1)[0] = math.inf
        return report

    step_of_trainer = Trainer.step
    argv = tiny_command(tmp_path / "run", "--data.probe", "none")
    with patch.object(Trainer, "step", spoil):
        reason = r"^the weights hold a NaN or Inf after step 5, so they are not saved"
        with pytest.raises(TrainingStopped, match=reason):
            loop.pretrain(parse(argv), argv=argv)
    with patch.object(Trainer, "step", spoil):
        argv += ["--run.checkpoint-every", "2"]
        reason = r"^the weights hold a NaN or Inf at step 5.*step_00000004"
        with pytest.raises(TrainingStopped, match=reason):
            loop.pretrain(parse(argv), argv=argv)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


UNBOUNDED = {
    "rate of infinity": ({"lr": constant(math.inf)}, "lr"),
    "rate beyond float32": ({"lr": constant(1e30)}, "lr"),
    "rate that is no number": ({"lr": constant(math.nan)}, "lr"),
    "division by zero": ({"eps": 0.0}, "eps"),
    "division by less than float32 has": ({"eps": 1e-60}, "eps"),
    "squares beyond float32": ({"clip": 1e30}, "clip"),
    "decay past zero": ({"lr": constant(1.0), "weight_decay": constant(5.0)}, "weight_decay"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_settings_that_can_bring_a_nan_into_the_weights_are_refused(name: str) -> None:
    settings, field = UNBOUNDED[name]
    recipe = tiny_recipe()
    recipe = replace(recipe, optim=replace(recipe.optim, **settings))
    with pytest.raises(ConfigError, match=rf"optim\.{field}"):
        Trainer(recipe, World(0, 1, torch.device("cpu")))


EXTREMES = {
    "a high rate": {"lr": constant(10.0), "weight_decay": constant(0.1)},
    "a small eps": {"eps": 1e-15},
    "large gradients": {"clip": 1e9},
    "no memory of gradients": {"beta1": 0.0, "beta2": 0.0},
    "all decay": {"lr": constant(1.0), "weight_decay": constant(1.0)},
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e18])
def test_what_is_allowed_leaves_the_weights_finite(name: str, size: float) -> None:
    """Gradients of any size, also none at all, through the true optimizer and EMA."""
    recipe = tiny_recipe()
    recipe = replace(recipe, optim=replace(recipe.optim, **EXTREMES[name]))
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")))
    torch.manual_seed(0)
    for step in range(4):
        for parameter in trainer.student.parameters():
            parameter.grad = size * torch.randn_like(parameter)
        norms = optim.gradient_norms(trainer.student)
        optim.clip_gradients(trainer.student, norms, recipe.optim.clip)
        now = trainer.resolved.at(step)
        optim.set_rates(trainer.optimizer, now["lr"], now["last_layer_lr"], now["weight_decay"])
        trainer.optimizer.step()
        update_ema(trainer.teacher, trainer.student, now["momentum"])
        assert trainer.weights_are_finite(), step


def test_weights_are_finite_looks_everywhere(trainer: Trainer) -> None:
    assert trainer.weights_are_finite()
    moments = next(iter(trainer.optimizer.state.values()))["exp_avg_sq"]
    weights = [next(module.parameters()) for module in trainer.modules().values()]
    assert len(weights) == 3  # student, teacher, Gram teacher
    for tensor in (moments, *weights):
        before = tensor.data.view(-1)[0].clone()
        tensor.data.view(-1)[0] = math.nan
        assert not trainer.weights_are_finite()
        tensor.data.view(-1)[0] = before
    assert trainer.weights_are_finite()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning:torch")  # as it should
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x04cos\nsystem\n.", None])
def test_what_is_no_dump_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "dump.pt"
    if content is None:
        torch.save({"step": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="expected the dump of a bad step, got something else"):
        replay(path)


if __name__ == "__main__":
    main()
