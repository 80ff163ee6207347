"""Pretrain a backbone: `python train/pretrain.py [recipe] [--field.subfield value ...]`, or the
same under torchrun.

Without arguments the quick start runs: built-in images, any machine. `--help` lists the recipes,
and `<recipe> --help` every field with its default.
"""

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import tyro

from dinov3core.data.errors import DataError
from dinov3core.printable import printable
from dinov3core.train.engine import parallel
from dinov3core.train.engine.checkpoint import CheckpointError
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.metrics import report_thread_failure
from dinov3core.train.engine.parallel import WorldError
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule
from dinov3core.train.engine.stopping import Interrupted, TrainingStopped
from dinov3core.train.recipes.registry import RECIPES

PROGRAM = "train/pretrain.py" if __package__ in (None, "") else "dinov3core pretrain"


def parse(argv: list[str]) -> Pretrain:
    """The recipe named first (quickstart when none is), with every override applied; tyro exits
    with a sentence.
    """
    name, overrides = (
        ("quickstart", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    )
    if argv in (["--help"], ["-h"]):
        print(_overview())
        raise SystemExit(0)
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}{hint} Known: {', '.join(RECIPES)}.")
    default = RECIPES[name]()
    for complaint in _groups_given_a_value(default, overrides):
        raise ConfigError(complaint)
    recipe = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(Pretrain),
        prog=f"{PROGRAM} {name}",
        description=(RECIPES[name].__doc__ or "").strip(),
        default=default,
        args=overrides,
    )
    return _in_a_folder_of_its_own(recipe, default)


def _groups_given_a_value(default: Pretrain, overrides: list[str]) -> Iterator[str]:
    """What to write instead of `--optim.lr 1e-3`, where optim.lr is not one number but several."""
    for place, argument in enumerate(overrides):
        option, equals, given = argument.partition("=")
        value = given if equals else "".join(overrides[place + 1 : place + 2])
        group: object = default
        for part in option.removeprefix("--").replace("-", "_").split("."):
            group = getattr(group, part, None) if is_dataclass(group) else None
        if argument.startswith("--") and is_dataclass(group):
            yield f"{option} is {_group_in_words(option, group, value)}"


def _group_in_words(option: str, group: object, value: str) -> str:
    options = [f"{option}.{field.name.replace('_', '-')}" for field in fields(group)]
    if isinstance(group, CosineSchedule):
        return f"a schedule: give {options[0]} {value} at its top; others: {', '.join(options[1:])}"
    if isinstance(group, PhasedSchedule):
        held = " ".join(f"{one} {value}" for one in options[:3])
        return f"a schedule: give {held} to hold it; others: {', '.join(options[3:])}"
    return f"a group of fields, give one of them: {', '.join(options)}"


def _in_a_folder_of_its_own(recipe: Pretrain, default: Pretrain) -> Pretrain:
    """A recipe of built-in images that reads others must not touch the run on its own ones."""
    source = recipe.data.source
    if recipe.run.out or default.data.source != "scenes" or source == "scenes":
        return recipe
    label = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(source))).strip("-.")[:60]
    return replace(recipe, run=replace(recipe.run, out=f"runs/{recipe.name}-{label or 'images'}"))


def _overview() -> str:
    docs = {name: (recipe.__doc__ or "").strip() for name, recipe in RECIPES.items()}
    rows = [f"  {name:14} {doc.splitlines()[0]}" for name, doc in docs.items()]
    about = (__doc__ or "").strip()
    return "\n".join([about, "", "recipes:", *rows, "", f"Every field: {PROGRAM} <recipe> --help"])


def main(argv: list[str]) -> None:
    """Parse, train, say what came of it and where the report is."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a name the terminal's encoding lacks is escaped and ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    recipe = parse(argv)
    summary = pretrain(recipe, argv=argv)
    if summary:  # the main process
        print(_closing(summary, recipe.folder))


def _enlarged(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image smaller than its global crop was enlarged; a smaller "
        "--crops.global_size avoids it"
    ]


SCORES = (("pixels", "pixels"), ("untrained", "before"), ("trained", "after"))


def _closing(summary: dict, folder: Path) -> str:
    images = summary["images"]
    scores = [(name, summary[f"knn_{key}"], summary[f"knn_{key}_error"]) for name, key in SCORES]
    measured = [
        f"{name} {score:.1f} +- {error:.1f} %" for name, score, error in scores if score is not None
    ]
    lines = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:.0f} images/s",
        f"trained on: {images['trained']}",
        f"pictures, RankMe, drift: {images['shown']}",
        f"k-NN: {images['knn']}",
        *([f"  {', '.join(measured)} (+- one standard error)"] if measured else []),
        summary["collapse_sentence"],
        f"skipped images: {summary['skipped_images']}, bad steps: {summary['bad_steps']}",
        *(f"  skipped {name}" for name in summary["skipped"]),
        *_enlarged(summary["enlarged_images"]),
        f"report: {folder / 'report.html'}",
    ]
    return "\n".join(printable(line) for line in lines)


def exit_status(argv: list[str]) -> int:
    """`main`, with every end but the good one as a sentence on stderr; the status to exit with.

    0: done, or stopped by a signal and to be requeued. 130 and 143: stopped by SIGINT, SIGTERM.
    """
    try:
        main(argv)
        return 0
    except Interrupted as asked:
        return _say_once(str(asked), asked.code)
    except (ConfigError, CheckpointError, TrainingStopped) as error:  # alike on all processes
        return _say_once(f"error: {error}", 1)
    except (DataError, WorldError) as error:
        return _say(f"error: {error}", 1)
    except OSError as error:
        where = os.fsdecode(error.filename or "writing into the run folder")
        return _say(
            f"error: {where}: {error.strerror or error}; the same command continues the run", 1
        )
    except KeyboardInterrupt:
        return _say_once("stopped before the run began", 130)


def _say_once(sentence: str, status: int) -> int:
    """Say what is true of all processes on the first one."""
    return _say(sentence, status) if parallel.is_first() else status


def _say(sentence: str, status: int) -> int:
    print(printable(sentence), file=sys.stderr)
    return status


if __name__ == "__main__":
    threading.excepthook = report_thread_failure
    sys.exit(exit_status(sys.argv[1:]))
