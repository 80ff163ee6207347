"""Pretrain a backbone: `python train/pretrain.py [recipe] [--field.subfield value ...]`, or the same under torchrun.

Without arguments the quick start runs: built-in images, any machine. `--help` lists the recipes, and
`<recipe> --help` every field with its default.
"""

import io
import os
import sys
from difflib import get_close_matches
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from dinov3core.data.errors import DataError
from dinov3core.data.names import printable
from dinov3core.train.checkpoint import CheckpointError
from dinov3core.train.config import ConfigError, Pretrain
from dinov3core.train.loop import TrainingStopped, pretrain
from dinov3core.train.parallel import WorldError
from dinov3core.train.recipes import RECIPES


def parse(argv: list[str]) -> Pretrain:
    """The recipe named first (quickstart when none is), with every override applied; tyro exits with a sentence."""
    name, overrides = ("quickstart", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    if argv in (["--help"], ["-h"]):
        print(_overview())
        raise SystemExit(0)
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}{hint} Known: {', '.join(RECIPES)}.")
    made = RECIPES[name]()
    return tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)(Pretrain),
        prog=f"train/pretrain.py {name}",
        description=(RECIPES[name].__doc__ or "").strip(),
        default=made,
        args=overrides,
    )


def _overview() -> str:
    rows = [f"  {name:14} {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in RECIPES.items()]
    return "\n".join(
        [(__doc__ or "").strip(), "", "recipes:", *rows, "", "Every field: train/pretrain.py <recipe> --help"]
    )


def main(argv: list[str]) -> None:
    """Parse, train, say what came of it and where the report is."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name the terminal's encoding lacks is escaped and ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    recipe = parse(argv)
    summary = pretrain(recipe, argv=argv)
    if summary:  # the main process
        print(_closing(summary, recipe.folder))


def _enlarged(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image smaller than its global crop was enlarged; a smaller --crops.global_size avoids it"
    ]


SCORES = (("pixels", "pixels"), ("untrained", "before"), ("trained", "after"))


def _closing(summary: dict, folder: Path) -> str:
    images = summary["images"]
    scores = [(name, summary[f"knn_{key}"], summary[f"knn_{key}_error"]) for name, key in SCORES]
    measured = [f"{name} {score:.1f} +- {error:.1f} %" for name, score, error in scores if score is not None]
    lines = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s",
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, CheckpointError, TrainingStopped, WorldError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except OSError as error:
        where = printable(os.fsdecode(error.filename or "writing"))
        sys.exit(f"error: {where}: {error.strerror}; the same command continues the run")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to continue from the last checkpoint")
