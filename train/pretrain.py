"""Pretrain a backbone: `python train/pretrain.py [recipe] [--field.subfield value ...]`, or the same under torchrun.

Without arguments the quick start runs: built-in images, any machine. `--help` lists the recipes, and
`<recipe> --help` every field with its default.
"""

import sys
import threading
from difflib import get_close_matches
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from dinov3core.data.errors import DataError
from dinov3core.train import parallel
from dinov3core.train.checkpoint import CheckpointError
from dinov3core.train.config import ConfigError, Pretrain
from dinov3core.train.loop import pretrain
from dinov3core.train.metrics import report_thread_failure
from dinov3core.train.parallel import WorldError
from dinov3core.train.recipes import RECIPES
from dinov3core.train.stopping import Interrupted, TrainingStopped


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
    scores = [(name, summary[f"knn_{key}"]) for name, key in SCORES]
    knn = ", ".join(f"{name} {score:.1f} %" for name, score in scores if score is not None) or "no labels to judge by"
    lines = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s",
        f"k-NN on held-out images: {knn}",
        summary["collapse_sentence"],
        f"skipped images: {summary['skipped_images']}, bad steps: {summary['bad_steps']}",
        *(f"  skipped {name}" for name in summary["skipped"]),
        *_enlarged(summary["enlarged_images"]),
        f"report: {folder / 'report.html'}",
    ]
    return "\n".join(lines)


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
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        name, reason = error.filename or "writing into the run folder", error.strerror or error
        print(f"error: {name}: {reason}; the same command continues the run", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _say_once("stopped before the run began", 130)


def _say_once(sentence: str, status: int) -> int:
    """Say what is true of all processes on the first one."""
    if parallel.is_first():
        print(sentence, file=sys.stderr)
    return status


if __name__ == "__main__":
    threading.excepthook = report_thread_failure
    sys.exit(exit_status(sys.argv[1:]))
