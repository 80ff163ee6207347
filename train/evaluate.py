"""Judge any backbone: `python train/evaluate.py MODEL --data scenes|PATH --out DIR --tasks knn,...`

MODEL is a file or folder of weights (ours, official, Hugging Face, timm), the folder of a run,
`untrained:NAME`, `pixels`, or `pixels:NAME`, which sees images as that model does: of its size, in
its patches. Labels decide nothing about the features: backbones are frozen throughout.

`--table DIR DIR ...` lays results side by side; `--compare A B` draws what two models see,
`--pictures` what one does. Under torchrun the features for knn, linear and logreg are computed by
all processes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

if not __package__:  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import tyro

from dinov3core.data.datasets import DataOptions
from dinov3core.evals.results import read_results, table
from dinov3core.train.engine import command_line, parallel
from dinov3core.train.engine.calling import as_called, program
from dinov3core.train.engine.command_line import Ending
from dinov3core.train.engine.galleries import draw
from dinov3core.train.engine.named_models import Opened, open_backbone
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.results_book import ResultsBook, remarks
from dinov3core.train.engine.tasks import Settings, check_tasks, evaluate, resolved
from dinov3core.train.recipes.registry import RECIPES

REMAINS = "tasks that ended are in results.json, features of whole splits in the cache"
ENDING = Ending(
    explained=(ValueError,),
    remains=REMAINS,
    interrupted=f"interrupted; {REMAINS}",
    interrupted_status=1,
)


@dataclass(frozen=True)
class Arguments:
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
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    data_options: Annotated[DataOptions, tyro.conf.arg(name="read")] = field(
        default_factory=DataOptions
    )


def judge(arguments: Arguments, argv: Sequence[str]) -> int:
    """Open the model, run the tasks, write OUT/results.json after each and print the table.

    Returns:
        How many tasks failed.
    """
    opened = _open(arguments, arguments.model)
    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    check_tasks(tasks)
    with parallel.start(arguments.device) as world:
        backbone = opened.backbone.to(world.device)
        if world.is_main:
            print(opened.report, file=sys.stderr)
        settings, options = resolved(
            arguments.settings, arguments.data_options, backbone, arguments.data, opened.size
        )
        book = ResultsBook(arguments.out, arguments.model, opened, arguments.data, argv, world)
        outcomes = evaluate(
            backbone,
            arguments.data,
            tasks,
            settings,
            options,
            cache=Path(arguments.cache) if arguments.cache else arguments.out / "cache",
            world=world,
            begun=book.open,
            done=book.enter,
        )
    if not world.is_main:
        return 0

    if tasks:
        print(table([{"model": arguments.model, "data": arguments.data, "tasks": outcomes}]))
        print(f"results: {arguments.out / 'results.json'}")
    for remark in remarks(outcomes):
        print(remark, file=sys.stderr)
    if arguments.pictures:
        page = _draw(arguments, {arguments.model: opened}, settings, options, world)
        print(f"pictures: {page}")
    return sum("error" in outcome for outcome in outcomes.values())


def compare(arguments: Arguments) -> Path:
    """Pictures of several models side by side, at OUT; returns the page."""
    models = {name: _open(arguments, name) for name in arguments.compare}
    first = next(iter(models.values()))
    largest = max(opened.size for opened in models.values())
    with parallel.start(arguments.device) as world:
        settings, options = resolved(
            arguments.settings, arguments.data_options, first.backbone, arguments.data, largest
        )
        return _draw(arguments, models, settings, options, world)


def _open(arguments: Arguments, name: str) -> Opened:
    return open_backbone(
        name,
        channels=arguments.data_options.channels,
        rgb_channels=arguments.rgb_channels,
        patch_size=arguments.pixel_patch,
        seed=arguments.settings.seed,
        recipes=RECIPES,
    )


def _draw(
    arguments: Arguments,
    models: Mapping[str, Opened],
    settings: Settings,
    options: DataOptions,
    world: World,
) -> Path:
    return draw(
        models,
        arguments.data,
        options,
        arguments.out,
        settings.size,
        str(world.device),
        arguments.attention_scale,
    )


def parse(argv: Sequence[str]) -> Arguments:
    """The command line; tyro exits with a sentence."""
    about = as_called(__doc__ or "")
    return tyro.cli(Arguments, prog=program("evaluate"), description=about, args=list(argv))


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 1 when a task failed."""
    arguments = parse(argv)
    if arguments.table:
        print(table([read_results(path) for path in arguments.table]))
        return 0
    if arguments.compare:
        print(f"pictures: {compare(arguments)}")
        return 0
    if not arguments.model:
        raise ValueError(
            "expected a model, got none: a file or folder of weights, a run, pixels, or "
            "untrained:NAME"
        )
    return 1 if judge(arguments, argv) else 0


if __name__ == "__main__":
    command_line.run(main, ENDING)
