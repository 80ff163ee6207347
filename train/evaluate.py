"""Judge any backbone: `python train/evaluate.py MODEL --data scenes|PATH --out DIR --tasks
knn,linear,...`

MODEL is a file or folder of weights (ours, official, Hugging Face, timm), the folder of a run,
`untrained:NAME`, `pixels`, or `pixels:NAME`, which sees images as that model does: of its size, in
its patches. Labels decide nothing about the features: backbones are frozen throughout.

`--table DIR DIR ...` lays results side by side; `--compare A B` draws what two models see,
`--pictures` what one does. Under torchrun the features for knn, linear and logreg are computed by
all processes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import tyro
from torch import nn

from dinov3core.data.datasets import DataOptions
from dinov3core.data.errors import DataError
from dinov3core.evals.results import (
    VERSION,
    earlier_results,
    read_results,
    set_aside,
    table,
    write_results,
)
from dinov3core.train.engine import parallel, provenance
from dinov3core.train.engine.galleries import draw
from dinov3core.train.engine.named_models import Opened, open_backbone
from dinov3core.train.engine.parallel import World, WorldError
from dinov3core.train.engine.tasks import Settings, check_tasks, evaluate, resolved


@dataclass(frozen=True)
class Command:
    """The command line."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """weights, the folder of a run, untrained:NAME, pixels, or pixels:NAME"""
    data: str = "scenes"
    """scenes, a folder, .tar shards or an .npz"""
    out: Path = Path("runs/evaluation")
    """folder for results.json, pictures and computed features"""
    tasks: str = "knn,linear,logreg"
    """of knn, linear, logreg, segmentation, depth, tracking, correspondence, resolution, dense;
    commas between; empty: none"""
    cache: str = ""
    """folder for computed features; empty: OUT/cache"""
    device: str = "auto"
    """cuda or cpu; auto: cuda where there is one"""
    rgb_channels: tuple[int, ...] = (0, 1, 2)
    """where red, green and blue are among other than three channels, to adapt RGB weights"""
    pixel_patch: int = 16
    """side of the patches of `pixels`"""
    pictures: bool = False
    """also draw what the patches know: OUT/gallery.html and PNG files"""
    compare: tuple[str, ...] = ()
    """draw these models side by side on the same images, and do nothing else"""
    attention_scale: Literal["map", "row"] = "map"
    """of pictures: every attention map on its own range, or all of one model and head on one"""
    table: tuple[Path, ...] = ()
    """print these results (folders or results.json) side by side and do nothing else"""
    how: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    read: DataOptions = field(default_factory=DataOptions)


def judge(command: Command, argv: Sequence[str]) -> int:
    """Open the model, run the tasks, write OUT/results.json after each and print the table.

    Returns:
        How many tasks failed.
    """
    opened = _open(command, command.model)
    tasks = [task.strip() for task in command.tasks.split(",") if task.strip()]
    check_tasks(tasks)
    with parallel.start(command.device) as world:
        backbone = opened.backbone.to(world.device)
        if world.is_main:
            print(opened.report, file=sys.stderr)
        cache = Path(command.cache) if command.cache else command.out / "cache"
        settings, read = resolved(command.how, command.read, backbone, command.data, opened.size)
        book = _Book(command, argv, opened, world)
        where = {"cache": cache, "world": world, "begun": book.open, "done": book.enter}
        found = evaluate(backbone, command.data, tasks, settings, read, **where)
    if not world.is_main:
        return 0
    if tasks:
        print(table([{"model": command.model, "data": command.data, "tasks": found}]))
        print(f"results: {command.out / 'results.json'}")
    for sentence in _remarks(found):
        print(sentence, file=sys.stderr)
    if command.pictures:
        where = {"out": command.out, "size": settings.size, "device": str(world.device)}
        models = {command.model: opened}
        pictures = draw(
            models, command.data, read, **where, attention_scale=command.attention_scale
        )
        print(f"pictures: {pictures}")
    return sum("error" in outcome for outcome in found.values())


def compare(command: Command) -> Path:
    """Pictures of several models side by side, at command.out; returns the page."""
    models = {name: _open(command, name) for name in command.compare}
    with parallel.start(command.device) as world:
        first = next(iter(models.values()))
        largest = max(opened.size for opened in models.values())
        settings, read = resolved(command.how, command.read, first.backbone, command.data, largest)
        where = {"out": command.out, "size": settings.size, "device": str(world.device)}
        return draw(models, command.data, read, **where, attention_scale=command.attention_scale)


def _open(command: Command, name: str) -> Opened:
    return open_backbone(
        name,
        channels=command.read.channels,
        rgb_channels=command.rgb_channels,
        patch_size=command.pixel_patch,
        seed=command.how.seed,
    )


def _remarks(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why tasks failed and how many images were left out, each once with all tasks it is about."""
    tasks_of: dict[str, list[str]] = {}
    for task, outcome in found.items():
        if "error" in outcome:
            tasks_of.setdefault(outcome["error"], []).append(task)
        elif count := outcome.get("unreadable"):
            examples = outcome.get("unreadable_names")
            example = f", such as {examples[0]}" if examples else ""
            tasks_of.setdefault(f"unreadable and left out: {count}{example}", []).append(task)
    return [f"{', '.join(tasks)}: {sentence}" for sentence, tasks in tasks_of.items()]


class _Book:
    """OUT/results.json: earlier results that still hold, and those of this call as they come."""

    def __init__(self, command: Command, argv: Sequence[str], opened: Opened, world: World):
        self.folder, self.argv, self.world = command.out, list(argv), world
        self.backbone = opened.backbone
        self.head = {
            "version": VERSION,
            "model": command.model,
            "data": command.data,
            "report": opened.report,
        }
        self.earlier: dict[str, dict] = {}
        self.tasks: dict[str, dict] = {}

    def open(self, judged: Callable[[str], dict]) -> None:
        """See which earlier results hold; of a file with others there is a copy first."""
        self.call = {"command": self.argv, "environment": provenance.environment(self.world)}
        self.earlier, dropped = earlier_results(self.folder, judged)
        self.tasks = dict(self.earlier)
        if dropped:
            reasons = "; ".join(f"{', '.join(tasks)} ({why})" for why, tasks in dropped.items())
            print(
                f"warning: {self.folder / 'results.json'} holds results that are not of this call: "
                f"{reasons}; they stay in {set_aside(self.folder)}",
                file=sys.stderr,
            )

    def enter(self, found: dict[str, dict]) -> None:
        """Write the file with the result of one more task."""
        for task, outcome in found.items():
            succeeded = task in self.earlier and "error" not in self.earlier[task]
            if not ("error" in outcome and succeeded):  # what once worked is worth more
                self.tasks[task] = outcome | self.call
            digest = outcome["judged"]["weights"]
        backbone = _described(self.backbone) | {"digest": digest}
        result = self.head | {"backbone": backbone, "tasks": self.tasks}
        write_results(result, self.folder / "results.json")


def _described(backbone: nn.Module) -> dict[str, Any]:
    return {
        "class": type(backbone).__name__,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "statistics": backbone.statistics,
    }


def parse(argv: Sequence[str]) -> Command:
    """The command line; tyro exits with a sentence."""
    return tyro.cli(Command, prog="train/evaluate.py", description=__doc__, args=list(argv))


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 1 when a task failed."""
    command = parse(argv)
    if command.table:
        print(table([read_results(path) for path in command.table]))
        return 0
    if command.compare:
        print(f"pictures: {compare(command)}")
        return 0
    if not command.model:
        raise ValueError(
            "expected a model, got none: a file or folder of weights, a run, pixels, or "
            "untrained:NAME"
        )
    return 1 if judge(command, argv) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, WorldError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(
            "interrupted; tasks that ended are in results.json, features of whole splits in the "
            "cache"
        )
