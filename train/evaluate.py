"""Judge any backbone: `python train/evaluate.py MODEL --data scenes|PATH --out DIR --tasks knn,linear,...`

MODEL is a file or folder of weights (ours, official, Hugging Face, timm), the folder of a run, `pixels`, or
`untrained:NAME`. Labels decide nothing about the features: backbones are frozen throughout.

`--table DIR DIR ...` lays results side by side; `--compare A B` draws what two models see, `--pictures` what one does.
Under torchrun the features for knn, linear and logreg are computed by all processes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import tyro
from torch import nn

from dinov3core.data.datasets import DataOptions
from dinov3core.data.errors import DataError
from dinov3core.evals.backbones import fingerprint
from dinov3core.evals.results import read_results, table, write_results
from dinov3core.train import parallel, provenance
from dinov3core.train.galleries import draw
from dinov3core.train.named_models import Opened, open_backbone
from dinov3core.train.parallel import World, WorldError
from dinov3core.train.tasks import Settings, check_tasks, evaluate, resolved


@dataclass(frozen=True)
class Command:
    """The command line."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = ""
    """weights, the folder of a run, pixels, or untrained:NAME"""
    data: str = "scenes"
    """scenes, a folder, .tar shards or an .npz"""
    out: Path = Path("runs/evaluation")
    """folder for results.json, pictures and computed features"""
    tasks: str = "knn,linear,logreg"
    """of knn, linear, logreg, segmentation, depth, tracking, correspondence, resolution, dense; commas between; empty:
    none"""
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

        def keep(found: dict[str, dict]) -> None:
            record = _record(command, argv, opened, settings, read, world)
            write_results(record | {"tasks": _earlier(record, command.out) | found}, command.out / "results.json")

        where = {"cache": cache, "device": world.device, "world": world, "done": keep}
        found = evaluate(backbone, command.data, tasks, settings, read, **where)
    if not world.is_main:
        return 0
    if tasks:
        print(table([{"model": command.model, "data": command.data, "tasks": found}]))
        print(f"results: {command.out / 'results.json'}")
    for sentence in _remarks(found):
        print(sentence, file=sys.stderr)
    if command.pictures:
        pictures = draw({command.model: opened}, command.data, read, command.out, settings.size, str(world.device))
        print(f"pictures: {pictures}")
    return sum("error" in outcome for outcome in found.values())


def compare(command: Command) -> Path:
    """Pictures of several models side by side, at command.out; returns the page."""
    models = {name: _open(command, name) for name in command.compare}
    with parallel.start(command.device) as world:
        first = next(iter(models.values()))
        largest = max(opened.size for opened in models.values())
        settings, read = resolved(command.how, command.read, first.backbone, command.data, largest)
        return draw(models, command.data, read, command.out, settings.size, str(world.device))


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


def _record(
    command: Command, argv: Sequence[str], opened: Opened, settings: Settings, read: DataOptions, world: World
) -> dict[str, Any]:
    """All that results depend on."""
    return {
        "model": command.model,
        "data": command.data,
        "backbone": _described(opened.backbone),
        "settings": asdict(settings),
        "read": asdict(read),
        "command": list(argv),
        "environment": provenance.environment(world),
        "report": opened.report,
    }


def _described(backbone: nn.Module) -> dict[str, Any]:
    return {
        "class": type(backbone).__name__,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "statistics": backbone.statistics,
        "digest": fingerprint(backbone),
    }


def _earlier(result: Mapping[str, Any], out: Path) -> dict[str, dict]:
    """Other tasks of an earlier call on the same weights, data and settings."""
    try:
        before = read_results(out)
    except ValueError:
        return {}
    same = all(
        _comparable(before.get(key)) == _comparable(result[key]) for key in ("backbone", "data", "settings", "read")
    )
    return before["tasks"] if same else {}


def _comparable(value: Any) -> Any:
    """As JSON would have it: tuples are lists."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, list | tuple) else value


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
        raise ValueError("expected a model, got none: a file or folder of weights, a run, pixels, or untrained:NAME")
    return 1 if judge(command, argv) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, WorldError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; tasks that ended are in results.json, features of whole splits in the cache")
