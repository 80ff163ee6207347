"""Do small networks learn more from a teacher than by themselves?

`python -m benchmarks.learning.distillation`. For every seed the students of `quickstart_distill`
learn together from a quick start, by train/distill.py. Then the same networks begin from the same
weights and train by themselves, with the ordinary objective of the quick start and its recipe, on
the very same views in the same order (the ConvNeXt's resized as in the distillation): once for as
many images, and once for as much time.

Time is CPU seconds of one thread, measured in turn in one process. A step of a distilled student
takes its own part, and of the teacher's pass what comes to each of the students; a step from
scratch takes its own, its moving teacher included. Views cost both the same and are not counted,
and neither is the pretraining of the teacher, which is there. What is finished in the folder is not
done again, so a stopped command continues; name another `--out` for other settings.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from benchmarks.distillation_cost import ALONE, CPU, SharedSteps
from benchmarks.learning import results
from benchmarks.learning.course import in_words, pretrained
from benchmarks.measure import cpu_timer
from benchmarks.quickstart import run
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.distillation.heads import FrozenHeads
from dinov3core.train.engine.distillation.settings import Distill, Heads
from dinov3core.train.engine.loop import open_training_images
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.recipes.distill import quickstart_distill
from dinov3core.writing import write_whole

RECIPE = quickstart_distill.__name__
SCORES = {"knn": "20-NN, %", "dense": "dense score, mIoU in %"}
ARMS = {
    "distilled": "distilled",
    "images": "from scratch, as many images",
    "time": "from scratch, as much time",
}
TITLE = "Held-out built-in scenes; bars: one standard deviation over seeds"

Scores = dict[str, dict[str, float]]  # by student, then by score


@dataclass(frozen=True)
class Command:
    """What is trained, and where the results go."""

    out: Path = Path("runs/distillation")
    """folder of runs, results and the picture"""
    teachers: tuple[Path, ...] = ()
    """folders of quick starts, one for each seed; none: they are trained in OUT/teachers"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one trial each"""
    timed: int = 9
    """steps of each kind whose time is measured"""
    threads: int = 1
    """of the CPU"""

    def teacher(self, seed: int) -> Path:
        """The run that is the teacher of a seed."""
        if self.teachers:
            return self.teachers[self.seeds.index(seed)].absolute()
        return pretrained((self.out / "teachers").absolute(), seed).folder

    def distill(self, seed: int) -> Distill:
        """What train/distill.py runs for a seed."""
        distill = quickstart_distill()
        out = self.out.absolute() / f"seed{seed}" / "distilled"

        def of_seed(recipe: Pretrain) -> Pretrain:
            run = replace(recipe.run, seed=seed, threads=self.threads, out=str(out))
            return replace(recipe, run=run)

        students = [replace(each, recipe=of_seed(each.recipe)) for each in distill.students]
        return replace(
            distill,
            teacher=Heads(str(self.teacher(seed))),
            base=of_seed(distill.base),
            students=tuple(students),
        )


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """What a JSON file holds; it is computed and written where there is none."""
    if not path.is_file():
        content = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    return json.loads(path.read_text())


# --- the arms of a trial


def distilled(distill: Distill) -> Scores:
    """All students as train/distill.py leaves them."""
    assert isinstance(distill.teacher, Heads)
    folders = {student.name: distill.folder / student.name for student in distill.students}
    if not all((folder / "summary.json").is_file() for folder in folders.values()):
        run_of_all = distill.base.run
        given = ["--teacher.run", distill.teacher.run, "--run.seed", str(run_of_all.seed)]
        given += ["--run.out", run_of_all.out, "--run.threads", str(run_of_all.threads)]
        run([sys.executable, "train/distill.py", RECIPE, *given])
    return {name: summarised(folder) for name, folder in folders.items()}


def summarised(folder: Path) -> dict[str, float]:
    """The scores at the end of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    scores = {name: summary[f"{name}_after"] for name in SCORES}
    return scores | {"steps": summary["steps"]}


def from_scratch(distill: Distill, name: str, length: int) -> dict[str, float]:
    """A student trained by itself for so many steps, to which its schedules are stretched."""
    steps = SharedSteps(distill)
    recipe = steps.recipes[name]
    recipe = replace(recipe, run=replace(recipe.run, steps=length))
    trainer = Trainer(recipe, ALONE)
    for step in range(length):
        report = trainer.step(steps.seen_by(name, steps.load(step), step), step)
        if not report.finite:
            raise ArithmeticError(f"{name}, step {step}: a loss or gradient is not finite")

    # The figures of a run's own evaluation, of the running average.
    source, _ = open_training_images(distill.base)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(recipe, source, Path(folder), CPU)
        figures = monitor.evaluate(trainer.teacher.backbone, torch.zeros(0), 0)
    return {"knn": figures["knn"], "dense": figures["dense_miou"], "steps": length}


# --- time


def seconds_of_steps(distill: Distill, rounds: int) -> dict[str, Any]:
    """Median CPU seconds of the parts of a step, each kind in turn in every round."""
    assert isinstance(distill.teacher, Heads)
    steps = SharedSteps(distill, FrozenHeads.open(distill.teacher.folder, ALONE, print))
    learning = {name: steps.distilled(name) for name in steps.recipes}
    alone = {name: Trainer(recipe, ALONE) for name, recipe in steps.recipes.items()}
    labels = ["loading", "teacher"]
    labels += [f"{name}.{kind}" for name in steps.recipes for kind in ("distilled", "scratch")]
    taken: list[list[float]] = []
    for step in range(rounds + 1):
        times = [cpu_timer()]
        loaded = steps.load(step)
        times.append(cpu_timer())
        share = steps.share(loaded, step)
        times.append(cpu_timer())
        for name in steps.recipes:
            views = steps.seen_by(name, share.batch, step)
            learning[name].step(views, step, targets=share.targets)
            times.append(cpu_timer())
            alone[name].step(steps.seen_by(name, share.batch, step), step)
            times.append(cpu_timer())
        taken.append([after - before for before, after in itertools.pairwise(times)])
    counted = zip(*taken[1:], strict=True)  # the first step also warms up
    return dict(zip(labels, map(median, counted), strict=True))


def same_time(distill: Distill, seconds: Mapping[str, float], steps: int) -> dict[str, int]:
    """How many steps from scratch take as long as the distillation of each student."""
    each = seconds["teacher"] / len(distill.students)
    return {
        student.name: round(
            steps
            * (seconds[f"{student.name}.distilled"] + each)
            / seconds[f"{student.name}.scratch"]
        )
        for student in distill.students
    }


def trial(command: Command, seed: int) -> dict[str, Any]:
    """One seed: scores of the teacher and of every arm."""
    distill = command.distill(seed)
    folder = command.out / f"seed{seed}"
    count = distill.base.run.total_steps
    seconds = once(command.out / "seconds.json", partial(seconds_of_steps, distill, command.timed))
    names = [student.name for student in distill.students]
    lengths = {
        "images": dict.fromkeys(names, count),
        "time": same_time(distill, seconds, count),
    }
    outcome: dict[str, Any] = {"seed": seed, "seconds": seconds}
    outcome["teacher"] = summarised(Path(distill.teacher.run))
    outcome["distilled"] = distilled(distill)
    for arm, steps_of in lengths.items():
        outcome[arm] = {
            name: once(folder / f"{name}_{arm}.json", partial(from_scratch, distill, name, steps))
            for name, steps in steps_of.items()
        }
    for arm, name in itertools.product(ARMS, names):
        print(f"seed {seed}, {ARMS[arm]}, {name}: {in_words(outcome[arm][name])}", flush=True)
    return outcome


# --- what is shown


def spread(
    trials: Sequence[Mapping[str, Any]], arm: str, student: str, score: str
) -> results.Spread:
    """Of a score of a student over the seeds."""
    return results.Spread.of([trial[arm][student][score] for trial in trials])


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Every student with its scores in each arm, and the teacher."""
    lines = []
    for name in trials[0]["distilled"]:
        for score, label in SCORES.items():
            cells = [spread(trials, arm, name, score).text(1) for arm in ARMS]
            lines.append([name, label, *cells])
    for score, label in SCORES.items():
        of_teacher = results.Spread.of([trial["teacher"][score] for trial in trials])
        lines.append(["teacher", label, of_teacher.text(1), "", ""])
    return results.table(["", "", *ARMS.values()], lines)


def time_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of a step of each student, and how many steps take as long."""
    first = trials[0]
    seconds = first["seconds"]
    students = list(first["distilled"])
    each = seconds["teacher"] / len(students)
    lines = [
        [
            name,
            f"{seconds[f'{name}.distilled']:.3f} + {each:.3f}",
            f"{seconds[f'{name}.scratch']:.3f}",
            *(f"{first[arm][name]['steps']:.0f}" for arm in ARMS),
        ]
        for name in students
    ]
    heads = ["CPU seconds a step", "distilled + its share of the teacher", "from scratch"]
    return results.table([*heads, *(f"steps {label}" for label in ARMS.values())], lines)


def picture(trials: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of every student and arm with the deviation over seeds, and the teacher as a line."""
    from matplotlib.figure import Figure

    students = list(trials[0]["distilled"])
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    colours = ("#2a7f9e", "#c0573f", "#d9a441")
    for axes, (score, label) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
        for place, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
            spreads = [spread(trials, arm, name, score) for name in students]
            axes.bar(
                [number + 0.27 * (place - 1) for number in range(len(students))],
                [each.mean for each in spreads],
                0.25,
                yerr=[each.deviation for each in spreads],
                color=colour,
                error_kw={"linewidth": 0.8, "capsize": 2},
                label=ARMS[arm],
            )
        of_teacher = results.Spread.of([trial["teacher"][score] for trial in trials])
        axes.axhline(of_teacher.mean, color="#444444", linewidth=1, linestyle="--", label="teacher")
        axes.set_xticks(range(len(students)), students, fontsize=8)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(top=1.35 * of_teacher.mean)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")
    figure.suptitle(TITLE, fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    """The command line; tyro exits with a sentence."""
    prog = "python -m benchmarks.learning.distillation"
    command = tyro.cli(Command, prog=prog, description=__doc__, args=list(argv))
    if command.teachers and len(command.teachers) != len(command.seeds):
        raise SystemExit(
            f"error: expected a teacher for each of {len(command.seeds)} seeds, got "
            f"{len(command.teachers)}; give as many --teachers as --seeds"
        )
    torch.set_num_threads(command.threads)
    trials = [trial(command, seed) for seed in command.seeds]
    without_folders = replace(command, teachers=())
    results.write(command.out / "results.json", without_folders, trials)
    picture(trials, command.out / "bars.png")
    print(table(trials))
    print(time_table(trials))


if __name__ == "__main__":
    main(sys.argv[1:])
