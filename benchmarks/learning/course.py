"""A stage of training in this process, judged on the way; the next one begins where it ended."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro

from benchmarks.quickstart import run
from dinov3core.checkpoints import load_model
from dinov3core.data.crops import CropSettings
from dinov3core.data.images import ImageSource
from dinov3core.data.loader import BatchMaker, BatchSettings
from dinov3core.models import VisionTransformer
from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.schedules import Schedule
from dinov3core.train.engine.teacher import copy_parameters
from dinov3core.train.engine.trainer import Trainer, prepare
from dinov3core.train.pretrain import parse

Row = dict[str, float]
Judge = Callable[[VisionTransformer], Row]
CPU = torch.device("cpu")
STAGE_SEED = 1000  # added to the seed: a stage sees other crops than pretraining
KEPT_EVERY = 100  # steps between the checkpoints of a quick start


Asked = TypeVar("Asked", bound="Trials")


@dataclass(frozen=True)
class Trials:
    """What all trials are told: where quick starts are, which of them, how they go on."""

    runs: Path = Path("runs/learning")
    """folder of the quick starts, one per seed; what is missing is trained"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one trial each"""
    steps: int = 100
    """of a stage, and of its control"""
    threads: int = 1
    """of the CPU"""

    def stage_of(self, before: Pretrain, lr: Schedule) -> Pretrain:
        """The recipe before with the length of a stage, a learning rate, and crops of its own."""
        run = before.run
        epochs = self.steps / run.epoch_steps
        run = replace(run, seed=STAGE_SEED + run.seed, steps=0, epochs=epochs)
        return replace(before, optim=replace(before.optim, lr=lr), run=run)


def asked(kind: type[Asked], name: str, about: str, argv: Sequence[str]) -> Asked:
    """The trials of a command line, with their threads set; tyro exits with a sentence."""
    prog = f"python -m benchmarks.learning.{name}"
    command = tyro.cli(kind, prog=prog, description=about, args=list(argv))
    torch.set_num_threads(command.threads)
    return command


def take_run(trainer: Trainer, before: Trainer) -> None:
    """Go on with student, teacher, heads and optimizer, as the published Gram stage does."""
    copy_parameters(trainer.student, before.student)
    copy_parameters(trainer.teacher, before.teacher)
    trainer.optimizer.load_state_dict(before.optimizer.state_dict())


def take_teacher(trainer: Trainer, before: Trainer) -> None:
    """Begin student and teacher as the earlier teacher with its heads, the optimizer anew.

    As the published high-resolution stage does.
    """
    copy_parameters(trainer.student, before.teacher)
    copy_parameters(trainer.teacher, before.teacher)


def pretrained(folder: Path, seed: int) -> Pretrain:
    """The recipe of a quick start that is in `folder`, trained there if it is not.

    Args:
        folder: of runs, one for each seed.

    Raises:
        SystemExit: training fails.
    """
    out = folder / f"seed{seed}"
    given = ["quickstart", "--run.seed", str(seed), "--run.out", str(out)]
    given += ["--run.checkpoint-every", str(KEPT_EVERY), "--run.keep-checkpoints", "1000"]
    if not (out / "summary.json").is_file():
        run([sys.executable, "train/pretrain.py", *given])
    return parse(given)


def kept_teachers(recipe: Pretrain) -> dict[int, VisionTransformer]:
    """The EMA teachers of a run's checkpoints by step, and before them the untrained network."""
    teachers = {0: build_networks(recipe).backbone}
    for path in sorted((recipe.folder / "checkpoints").glob("step_*")):
        teachers[checkpoint.step_of(path)] = load_model(path / "teacher.safetensors").model
    return teachers


def restored(recipe: Pretrain) -> Trainer:
    """The trainer of a finished run, from the newest checkpoint in the recipe's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    world = World(0, 1, CPU)
    trainer = Trainer(prepare(recipe, CPU), world)
    newest = checkpoint.newest_whole(recipe.folder / "checkpoints", world)
    if newest is None:
        raise FileNotFoundError(f"{recipe.folder} has no checkpoint; train the run first")
    buffers = {"prototype_counts": trainer.method.prototype_counts}
    contents = checkpoint.Contents(trainer.modules(), trainer.optimizer, buffers)
    checkpoint.load(newest, contents, world)
    return trainer


class Course:
    """A stage: the engine's trainer, its batches, and what a judge said of the EMA teacher.

    Steps count from 0 in every stage.

    Args:
        recipe: of the stage.
        source: the images.
        before: what it continues; None: nothing.
        take: `take_run` or `take_teacher`.
    """

    def __init__(
        self,
        recipe: Pretrain,
        source: ImageSource,
        before: Trainer | None = None,
        take: Callable[[Trainer, Trainer], None] = take_run,
    ):
        self.recipe = prepare(recipe, CPU)
        self.source = source
        self.trainer = Trainer(self.recipe, World(0, 1, CPU))
        if before is not None:
            take(self.trainer, before)
        self.rows: list[Row] = []

    @property
    def teacher(self) -> VisionTransformer:
        """The backbone of the EMA teacher, which is what is judged and kept."""
        return self.trainer.teacher.backbone

    def run(
        self,
        judge: Judge,
        every: int,
        sizes: Sequence[tuple[float, CropSettings]] = (),
        say: Callable[[str], None] = print,
    ) -> list[Row]:
        """Train to the end of the recipe, judged before, every so many steps, and after.

        Args:
            sizes: (share of the steps, crops) of further sizes of images.
            say: told every row.
        """
        makers = [self._maker(crops) for crops in (self.recipe.crops, *(c for _, c in sizes))]
        shares = [share for share, _ in sizes]
        shares.insert(0, 1 - sum(shares))
        draws = np.random.default_rng((self.recipe.run.seed, 65537)).choice(
            len(makers), self.recipe.run.total_steps, p=shares
        )
        sums: dict[str, float] = {}
        self._judge(judge, 0, {}, say)
        for step, size in enumerate(draws):
            report = self.trainer.step(makers[size].make(step), step)
            if not report.finite:
                raise ArithmeticError(f"step {step}: a loss or gradient is not finite")
            for name, value in report.values.items():
                sums[name] = sums.get(name, 0) + value / every
            if (step + 1) % every == 0:
                self._judge(judge, step + 1, sums, say)
                sums = {}
        return self.rows

    def _maker(self, crops: CropSettings) -> BatchMaker:
        recipe = self.recipe
        settings = BatchSettings(
            crops, recipe.masks, recipe.run.batch_size, recipe.backbone.patch_size, recipe.run.seed
        )
        return BatchMaker(self.source, settings, 0, 1)

    def _judge(self, judge: Judge, step: int, losses: Row, say: Callable[[str], None]) -> None:
        row = {"step": step, **judge(self.teacher), **losses}
        self.rows.append(row)
        say(in_words(row))


def in_words(row: Row) -> str:
    """A row for the terminal."""
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())
