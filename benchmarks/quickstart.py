"""The two tables of the quick start, all from one file: `python -m benchmarks.quickstart`.

Trains the quick start with seeds 0, 1 and 2, one after the other; judges raw pixels, the untrained
and the trained network of each seed on the same images; writes benchmarks/results/quickstart.json
and renders it into README.md after `<!-- quickstart -->` and into docs/judge.md after
`<!-- quickstart tasks -->`. What is finished in the folder of runs is not done again, so a stopped
command continues. It needs a quarter of an hour without other work on the machine.
"""

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from benchmarks import machine
from benchmarks.floors import RESULTS
from benchmarks.report import update
from dinov3core.data.scenes import CLASS_NAMES
from dinov3core.evals.knn import standard_error
from dinov3core.evals.results import read_results

ROOT = Path(__file__).parents[1]
FILE = RESULTS / "quickstart.json"
PAGES = {"quickstart": ROOT / "README.md", "quickstart tasks": ROOT / "docs" / "judge.md"}
SEEDS = (0, 1, 2)
OPTIONS = ("--iterations", "2000", "--train-images", "600", "--test-images", "300")
MODELS = {"pixels": "raw pixels", "untrained": "untrained", "trained": "quick start"}
# What a run itself says of them, in its summary.json.
KEYS = {"pixels": "knn_pixels", "untrained": "knn_before", "trained": "knn_after"}
PLUS_MINUS = "\u00b1"


class Metric(NamedTuple):
    """A row of the second table: where its number stands in results.json."""

    label: str
    task: str
    keys: tuple[str, ...]

    def of(self, tasks: Mapping) -> float:
        """The number itself, from the results by task."""
        value = tasks[self.task]
        for key in self.keys:
            value = value[key]
        return value


KNN = Metric("20-NN", "knn", ("top1", "20"))
METRICS = (
    KNN,
    Metric("linear probe", "linear", ("top1",)),
    Metric("segmentation, mIoU", "segmentation", ("miou",)),
    Metric("depth within 1.25", "depth", ("a1",)),
    Metric("tracking, J&F", "tracking", ("j_and_f",)),
)
TASKS = tuple(metric.task for metric in METRICS)


def run(command: Sequence[str]) -> None:
    """Run a command of the repository to its end.

    Raises:
        SystemExit: when it fails.
    """
    text = shlex.join(command)
    print(f"$ {text}", flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    if code:
        raise SystemExit(f"error: {text} ended with {code}; start this again to go on from there")


def train(folder: Path, seed: int) -> dict:
    """The summary of the run of a seed, which is trained if it is not there."""
    out = folder / f"seed{seed}"
    if not (out / "summary.json").is_file():
        before = machine.load()
        given = ["--run.seed", str(seed), "--run.out", str(out)]
        run([sys.executable, "train/pretrain.py", "quickstart", *given])
        (out / "load.json").write_text(json.dumps([before, machine.load()]))
    summary = json.loads((out / "summary.json").read_text())
    load = out / "load.json"
    return summary | {"load": json.loads(load.read_text()) if load.is_file() else None}


def judge(folder: Path, name: str, seed: int) -> dict:
    """The results of a model of MODELS by task; what is missing is judged first."""
    out = folder / f"judged-{name}{seed}"
    known = {"pixels": "pixels:quickstart", "untrained": "untrained:quickstart"}
    missing = [task for task in TASKS if not _succeeded(out, task)]
    if missing:
        model = known.get(name, str(folder / f"seed{seed}"))
        given = ["--out", str(out), "--cache", str(folder / "cache"), "--seed", str(seed)]
        command = [sys.executable, "train/evaluate.py", model, "--tasks", ",".join(missing)]
        run([*command, *given, *OPTIONS])
    return read_results(out)["tasks"]


def _succeeded(out: Path, task: str) -> bool:
    try:
        outcome = read_results(out)["tasks"].get(task, {})
    except ValueError:
        return False
    return bool(outcome) and "error" not in outcome


def collect(folder: Path, seeds: Sequence[int]) -> dict:
    """Everything the tables say, trained and judged as far as it is not there yet.

    Raises:
        SystemExit: a run and `train/evaluate.py` disagree about the same network.
    """
    runs = [train(folder, seed) for seed in seeds]
    scores: dict[str, dict[str, list[float]]] = {}
    for name in MODELS:
        judged = [judge(folder, name, seed) for seed in seeds]
        scores[name] = {metric.label: [metric.of(tasks) for tasks in judged] for metric in METRICS}
        _check_agreement(name, runs, scores[name][KNN.label], judged[0]["knn"]["test_images"])
    return {
        "date": datetime.date.today().isoformat(),
        **machine.describe(torch.device("cpu")),
        "options": " ".join(OPTIONS),
        "test_images": judged[0]["knn"]["test_images"],
        "classes": len(CLASS_NAMES),
        "seeds": list(seeds),
        "seconds": [summary["seconds"] for summary in runs],
        "peak_memory_bytes": [summary["peak_memory_bytes"] for summary in runs],
        "load": [summary["load"] for summary in runs],
        "ran_on": [summary["environment"]["device"] for summary in runs],
        "scores": scores,
    }


def _check_agreement(
    name: str,
    runs: Sequence[Mapping],
    scores: Sequence[float],
    images: int,
) -> None:
    """The run judges on the same images by the same rule; rounding may turn a single image."""
    for summary, score in zip(runs, scores, strict=True):
        own = summary[KEYS[name]]
        if abs(own - score) > 100 / images + 1e-9:
            raise SystemExit(
                f"error: {MODELS[name]}: the run's own 20-NN is {own:.2f}, train/evaluate.py says "
                f"{score:.2f} of the same {images} images; were the runs made by another version? "
                "Name a new folder with --runs"
            )


def runs_table(results: Mapping) -> str:
    """The first block: 20-NN, time and memory of every seed."""
    images = results["test_images"]
    lines = [
        f"20-NN accuracy on {images:,} held-out scenes, in percent ({results['classes']} classes, "
        f"chance {100 / results['classes']:.1f}; {PLUS_MINUS}: one standard error):",
        "",
        "| seed | raw pixels | untrained | trained | training | peak memory |",
        "|---" * 6 + "|",
    ]
    for row, seed in enumerate(results["seeds"]):
        scores = [results["scores"][name][KNN.label][row] for name in MODELS]
        errors = [standard_error(score, images) for score in scores]
        cells = [f"{s:.1f} {PLUS_MINUS} {e:.1f}" for s, e in zip(scores, errors, strict=True)]
        cells[-1] = f"**{cells[-1]}**"
        cells.append(f"{results['seconds'][row]:.0f} s")
        cells.append(f"{results['peak_memory_bytes'][row] / 2**30:.2f} GiB")
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(results)])


def tasks_table(results: Mapping) -> str:
    """The second block: all tasks, means over the seeds with the lowest and the highest."""
    seeds = ", ".join(map(str, results["seeds"]))
    which = f"seed {seeds}"
    if len(results["seeds"]) > 1:
        which = f"means of seeds {seeds} with the lowest and the highest"
    largest = max(
        standard_error(score, results["test_images"])
        for scores in results["scores"].values()
        for label in ("20-NN", "linear probe")
        for score in scores[label]
    )

    lines = [
        f"On the built-in scenes, {which} (models "
        "`pixels:quickstart`, `untrained:quickstart` and the folder of the run, "
        f"`--seed SEED {results['options']}`):",
        "",
        f"| | {' | '.join(MODELS.values())} |",
        "|---" * (1 + len(MODELS)) + "|",
    ]
    for metric in METRICS:
        columns = [results["scores"][name][metric.label] for name in MODELS]
        cells = [_range(scores) for scores in columns]
        best = columns.index(max(columns, key=_mean))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {metric.label} | {' | '.join(cells)} |")
    note = (
        "One standard error of 20-NN and of the linear probe, from "
        f"{results['test_images']:,} test images, is at most {largest:.1f} points; "
        "the other rows have no error bar but the spread over the seeds."
    )
    return "\n".join([*lines, "", note])


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _range(scores: Sequence[float]) -> str:
    low, mean, high = (f"{value:.1f}" for value in (min(scores), _mean(scores), max(scores)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _conditions(results: Mapping) -> str:
    """What seconds and memory depend on."""
    loads = [load for pair in results["load"] if pair for load in pair]
    load = f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "load unknown"
    ran = ", ".join(dict.fromkeys(results["ran_on"]))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Time and memory depend on the machine, its threads and what else it does, here {load}: "
        f"{results['device']} ({ran}); {versions}; commit {results['commit']}, {results['date']}."
    )


def rendered(results: Mapping) -> dict[Path, str]:
    """The pages with their blocks made of `results`."""
    tables = {"quickstart": runs_table(results), "quickstart tasks": tasks_table(results)}
    return {
        page: update(page.read_text(encoding="utf-8"), tables[mark], mark)
        for mark, page in PAGES.items()
    }


@dataclass(frozen=True)
class Command:
    """What to do."""

    runs: Path = Path("runs/readme")
    """folder of runs and results"""
    seeds: tuple[int, ...] = SEEDS
    """one run of the quick start each"""
    render: bool = False
    """only write the pages anew"""


def main(argv: Sequence[str]) -> None:
    """The command line; tyro exits with a sentence."""
    command = tyro.cli(
        tyro.conf.FlagCreatePairsOff[Command],
        prog="python -m benchmarks.quickstart",
        description=__doc__,
        args=list(argv),
    )
    if not command.render:
        results = collect(command.runs.absolute(), command.seeds)
        FILE.write_text(json.dumps(results, indent=1) + "\n")
    for page, text in rendered(json.loads(FILE.read_text())).items():
        page.write_text(text, encoding="utf-8")
    print(f"{FILE} and its tables in {', '.join(page.name for page in PAGES.values())}")


if __name__ == "__main__":
    main(sys.argv[1:])
