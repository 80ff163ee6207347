"""A stage of training in this process, judged on the way; the next one begins where it ended."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro

from benchmarks.quickstart import run
from dinov3core.checkpoints import load_model
from dinov3core.data.images import ImageSource
from dinov3core.data.loader import BatchMaker, BatchSettings
from dinov3core.models import VisionTransformer
from dinov3core.train.engine import checkpoint, stages
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.schedules import Schedule
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

    def stage_of(
        self, before: Pretrain, lr: Schedule, take: Literal["run", "teacher"] = "run"
    ) -> Pretrain:
        """The recipe before with the length of a stage, a learning rate, and crops of its own.

        It starts from the run before, of which it takes over what `take` says.
        """
        run = replace(
            before.run,
            seed=STAGE_SEED + before.run.seed,
            steps=0,
            epochs=self.steps / before.run.epoch_steps,
            from_=str(before.folder),
            take=take,
        )
        return replace(before, optim=replace(before.optim, lr=lr), run=run)


def asked(kind: type[Asked], name: str, about: str, argv: Sequence[str]) -> Asked:
    """The trials of a command line, with their threads set; tyro exits with a sentence."""
    prog = f"python -m benchmarks.learning.{name}"
    command = tyro.cli(kind, prog=prog, description=about, args=list(argv))
    torch.set_num_threads(command.threads)
    return command


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


class Course:
    """A stage: the engine's trainer, its batches, and what a judge said of the EMA teacher.

    Steps count from 0 in every stage.

    Args:
        recipe: of the stage; it begins with what it takes over from the run it names, if any.
        source: the images.
    """

    def __init__(self, recipe: Pretrain, source: ImageSource):
        self.recipe = prepare(recipe, CPU)
        self.source = source
        self.trainer = Trainer(self.recipe, World(0, 1, CPU))
        stages.take_over(self.recipe, self.trainer)
        self.rows: list[Row] = []

    @property
    def teacher(self) -> VisionTransformer:
        """The backbone of the EMA teacher, which is what is judged and kept."""
        return self.trainer.teacher.backbone

    def run(self, judge: Judge, every: int, say: Callable[[str], None] = print) -> list[Row]:
        """Train to the end of the recipe, judged before, every so many steps, and after.

        Args:
            say: told every row.
        """
        maker = self._maker()
        sums: dict[str, float] = {}
        self._judge(judge, 0, {}, say)
        for step in range(self.recipe.run.total_steps):
            report = self.trainer.step(maker.make(step), step)
            if not report.finite:
                raise ArithmeticError(f"step {step}: a loss or gradient is not finite")
            for name, value in report.values.items():
                sums[name] = sums.get(name, 0) + value / every
            if (step + 1) % every == 0:
                self._judge(judge, step + 1, sums, say)
                sums = {}
        return self.rows

    def _maker(self) -> BatchMaker:
        recipe = self.recipe
        settings = BatchSettings(
            recipe.crops,
            recipe.masks,
            recipe.run.batch_size,
            recipe.backbone.patch_size,
            recipe.run.seed,
            recipe.gram_crops,
        )
        return BatchMaker(self.source, settings, 0, 1)

    def _judge(self, judge: Judge, step: int, losses: Row, say: Callable[[str], None]) -> None:
        row = {"step": step, **judge(self.teacher), **losses}
        self.rows.append(row)
        say(in_words(row))


def in_words(row: Row) -> str:
    """A row for the terminal."""
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())
