"""Pretrain a backbone: `python train/pretrain.py [recipe] [--field.subfield value ...]`.

With several processes: `torchrun --nproc-per-node 8 train/pretrain.py [recipe] ...`. Without
arguments the quick start runs: built-in images, any machine. `--help` lists the recipes, and
`<recipe> --help` every field with its default.
"""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

from dinov3core.train.engine import command_line
from dinov3core.train.engine.closing import closing
from dinov3core.train.engine.command_line import ChosenRecipe, Ending
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.recipes.registry import chosen

ENDING = Ending(
    writing="writing into the run folder",
    remains="the same command continues the run",
    interrupted="stopped before the run began",
)


def parse(argv: list[str]) -> Pretrain:
    """The recipe a command line asks for."""
    return _chosen(argv).recipe


def _chosen(argv: list[str]) -> ChosenRecipe[Pretrain]:
    both = chosen(argv, __doc__ or "")
    return both._replace(recipe=_in_a_folder_of_its_own(*both))


def _in_a_folder_of_its_own(recipe: Pretrain, standard: Pretrain) -> Pretrain:
    """A recipe of built-in images that reads others must not touch the run on its own ones."""
    source = recipe.data.source
    if recipe.run.out or standard.data.source != "scenes" or source == "scenes":
        return recipe
    label = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(source))).strip("-.")[:60]
    return replace(recipe, run=replace(recipe.run, out=f"runs/{recipe.name}-{label or 'images'}"))


def main(argv: list[str]) -> None:
    """Parse, train, say what came of it and where the report is."""
    recipe, standard = _chosen(argv)
    summary = pretrain(recipe, argv=argv, standard=standard)
    if summary:  # the main process
        print(closing(summary, recipe.folder))


def exit_status(argv: list[str]) -> int:
    """`main`, with every other end as a sentence; see `command_line.exit_status`."""
    return command_line.exit_status(main, argv, ENDING)


if __name__ == "__main__":
    command_line.run(main, ENDING)
