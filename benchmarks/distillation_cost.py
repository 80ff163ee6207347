"""What students that share a teacher's pass save, beside as many runs with passes of their own.

`python -m benchmarks.distillation_cost`. One, two and three students of `quickstart_distill` in one
process, against one process for each of them, by CPU seconds of one thread: every process takes
every step in turn, so that a slow minute of the machine falls on all. Weights are random, as they
cost what trained ones do. The ideal is what sharing can save at most: k students that share T
seconds and take S_i of their own need T + sum S_i, alone k T + sum S_i. Memory is what a process
held at most. Writes benchmarks/results/distillation_cost.json.
"""

import itertools
import json
import multiprocessing
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
import tyro

from benchmarks import machine
from benchmarks.floors import RESULTS
from benchmarks.learning.results import table
from benchmarks.measure import cpu_timer
from dinov3core.data.batch import Batch
from dinov3core.data.loader import BatchMaker
from dinov3core.models import VitSettings
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.distillation.exchange import Exchange, Plan
from dinov3core.train.engine.distillation.heads import (
    FrozenHeads,
    Share,
    SharedPass,
    Views,
    as_seen_by,
)
from dinov3core.train.engine.distillation.opening import batch_settings
from dinov3core.train.engine.distillation.settings import Distill
from dinov3core.train.engine.loop import open_training_images
from dinov3core.train.engine.methods import HeadDistillation
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.recipes.distill import quickstart_distill
from dinov3core.train.recipes.quickstart import quickstart
from dinov3core.writing import write_whole

FILE = RESULTS / "distillation_cost.json"
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
BACKBONE = quickstart().backbone
TEACHERS = {
    "that of the quick start": BACKBONE,
    "twice as wide and deep": replace(BACKBONE, width=192, depth=8, heads=6),
}
MIB = 2**20


class SharedSteps:
    """The parts of a distillation's step in this one process, each by itself.

    Args:
        distill: its students see what `as_seen_by` makes of the shared views.
        teacher: from whom they learn; None: nobody asks for its pass.
    """

    def __init__(self, distill: Distill, teacher: FrozenHeads | None = None):
        self.distill = distill
        self.recipes = {each.name: each.recipe for each in distill.students_for(1)}
        base = distill.base
        first = next(iter(self.recipes.values()))
        self.temperatures = resolve(first, 1).schedules["teacher_temperature"]
        source, _ = open_training_images(base)
        self.settings = batch_settings(distill, distill.global_batch)
        self.maker = BatchMaker(source, self.settings, 0, 1)
        self.shared = None if teacher is None else self._pass_of(teacher)

    def _pass_of(self, teacher: FrozenHeads) -> SharedPass:
        distill = self.distill
        crops = distill.crops
        return SharedPass(
            teacher,
            Exchange(Plan.even(1, [(0, 1)], distill.global_batch), ALONE),
            ALONE,
            Views(
                crops.global_count,
                crops.local_count,
                distill.patch_size,
                partial(self.settings.masks_at, rank=0),
            ),
            iterations=distill.base.loss.sinkhorn_iterations,
        )

    def load(self, step: int) -> Batch:
        """The views of a step."""
        return self.maker.make(step)

    def share(self, loaded: Batch, step: int) -> Share:
        """The teacher's pass, and the targets that it gives."""
        assert self.shared is not None
        return self.shared(loaded, step, self.temperatures[step])

    def distilled(self, name: str) -> Trainer:
        """A student that learns from the teacher."""
        recipe = self.recipes[name]
        return Trainer(recipe, ALONE, method=HeadDistillation(recipe, ALONE))

    def seen_by(self, name: str, batch: Batch, step: int) -> Batch:
        """The batch in the sizes of a student's views."""
        return as_seen_by(batch, self.recipes[name].crops, self.settings.seed, step)


def random_teacher(recipe: Pretrain, backbone: VitSettings) -> FrozenHeads:
    """With a ViT of those sizes, and the heads of a recipe."""
    networks = build_networks(replace(recipe, backbone=backbone))
    return FrozenHeads(networks, "random", "random", CPU)


@dataclass(frozen=True)
class Command:
    """How long to measure."""

    rounds: int = 9
    """steps of every process that count"""


def serve(pipe: Connection, students: Sequence[str], teacher: VitSettings) -> None:
    """A process of the comparison: for every step it is asked for, CPU seconds of its parts."""
    torch.set_num_threads(1)
    distill = quickstart_distill()
    chosen = tuple(each for each in distill.students if each.name in students)
    steps = SharedSteps(replace(distill, students=chosen), random_teacher(distill.base, teacher))
    trainers = {name: steps.distilled(name) for name in steps.recipes}
    pipe.send(_peak_bytes())

    while (step := pipe.recv()) is not None:
        times = [cpu_timer()]
        loaded = steps.load(step)
        times.append(cpu_timer())
        share = steps.share(loaded, step)
        times.append(cpu_timer())
        for name, trainer in trainers.items():
            trainer.step(steps.seen_by(name, share.batch, step), step, targets=share.targets)
            times.append(cpu_timer())
        seconds = [after - before for before, after in itertools.pairwise(times)]
        pipe.send(dict(zip(("loading", "teacher", *trainers), seconds, strict=True)))
    pipe.send(_peak_bytes())


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


@dataclass(frozen=True)
class Cost:
    """What a process took: median CPU seconds of each part of a step, and memory at its worst."""

    seconds: dict[str, float]
    start_bytes: int  # with networks and images opened, before the first step
    peak_bytes: int

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def measured(
    groups: Sequence[tuple[str, ...]], teacher: VitSettings, rounds: int
) -> dict[tuple[str, ...], Cost]:
    """The cost of each group of students in a process of its own, all taking turns."""
    spawning = multiprocessing.get_context("spawn")
    pipes = {}
    processes = []
    for group in groups:
        pipes[group], theirs = spawning.Pipe()
        processes.append(spawning.Process(target=serve, args=(theirs, group, teacher)))
        processes[-1].start()
        theirs.close()
    starts = {group: pipe.recv() for group, pipe in pipes.items()}

    parts: dict[tuple[str, ...], list[dict[str, float]]] = {group: [] for group in groups}
    for step in range(rounds + 1):
        for group, pipe in pipes.items():
            pipe.send(step)
            parts[group].append(pipe.recv())
    costs = {}
    for group, pipe in pipes.items():
        pipe.send(None)
        counted = parts[group][1:]  # the first step also warms up
        seconds = {name: median(part[name] for part in counted) for name in counted[0]}
        costs[group] = Cost(seconds, starts[group], pipe.recv())
    for process in processes:
        process.join()
    return costs


def compared(names: Sequence[str], costs: Mapping[tuple[str, ...], Cost]) -> list[dict[str, Any]]:
    """A row for the first one, two ... students: together, alone, and what sharing can save."""
    rows = []
    for count in range(1, len(names) + 1):
        together = costs[tuple(names[:count])]
        alone = [costs[name,] for name in names[:count]]
        seconds_alone = sum(cost.step for cost in alone)
        shared = median(cost.seconds["loading"] + cost.seconds["teacher"] for cost in alone)
        own = sum(cost.seconds[name] for cost, name in zip(alone, names))
        rows.append(
            {
                "students": list(names[:count]),
                "seconds_together": together.step,
                "seconds_alone": seconds_alone,
                "shared_part": shared / (shared + own),
                "saving": seconds_alone / together.step,
                "ideal": (count * shared + own) / (shared + own),
                "parts": together.seconds,
                "start_bytes_together": together.start_bytes,
                "peak_bytes_together": together.peak_bytes,
                "peak_bytes_alone": [cost.peak_bytes for cost in alone],
            }
        )
    return rows


def rendered(results: Mapping[str, Any]) -> str:
    """All rows as one table."""
    heads = [
        "teacher",
        "students",
        "shared part of a step",
        "together, s a step",
        "alone, s",
        "saving",
        "ideal",
        "peak memory together, MiB",
        "alone, side by side",
        "alone, in turn",
    ]
    lines = [
        [
            label,
            " + ".join(row["students"]),
            f"{row['shared_part']:.0%}",
            f"{row['seconds_together']:.2f}",
            f"{row['seconds_alone']:.2f}",
            f"{row['saving']:.2f} x",
            f"{row['ideal']:.2f} x",
            f"{row['peak_bytes_together'] / MIB:.0f}",
            f"{sum(row['peak_bytes_alone']) / MIB:.0f}",
            f"{max(row['peak_bytes_alone']) / MIB:.0f}",
        ]
        for label, rows in results["rows"].items()
        for row in rows
    ]
    return table(heads, lines)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    prog = "python -m benchmarks.distillation_cost"
    command = tyro.cli(Command, prog=prog, description=__doc__, args=list(argv))
    torch.set_num_threads(1)
    distill = quickstart_distill()
    names = [student.name for student in distill.students]
    together = [tuple(names[:count]) for count in range(1, len(names) + 1)]
    groups = list(dict.fromkeys([*together, *((name,) for name in names)]))
    results = {
        "date": date.today().isoformat(),
        **machine.describe(CPU),
        "load": [machine.load()],
        "rounds": command.rounds,
        "images": distill.global_batch,
        "rows": {
            label: compared(names, measured(groups, teacher, command.rounds))
            for label, teacher in TEACHERS.items()
        },
    }
    results["load"].append(machine.load())
    write_whole(FILE, json.dumps(results, indent=1) + "\n")
    print(rendered(results))


if __name__ == "__main__":
    main(sys.argv[1:])
