"""Every recipe by name: functions that return a complete, typed run.

Derive your own with `dataclasses.replace`. The number of processes is not part of a recipe: batch
sizes are per process.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from dinov3core.train.engine.command_line import ChosenRecipe, RecipeParser
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.distillation import command
from dinov3core.train.engine.distillation.command import Asked
from dinov3core.train.engine.distillation.plan import Example, plan_in_words
from dinov3core.train.engine.distillation.settings import Distill
from dinov3core.train.recipes.adapt import adapt
from dinov3core.train.recipes.distill import distill_convnext, distill_vit, quickstart_distill
from dinov3core.train.recipes.imagenet import (
    vitl16_im1k,
    vits16_1gpu,
    vits16_gram,
    vits16_highres,
)
from dinov3core.train.recipes.quickstart import (
    photos,
    quickstart,
    quickstart_gram,
    quickstart_highres,
)
from dinov3core.train.recipes.vit7b16 import vit7b16_gram, vit7b16_highres, vit7b16_pretrain

# Recipes of which each starts from the run of the one before it (its `run.from_`).
CHAINS = (
    (quickstart, quickstart_gram, quickstart_highres),
    (vits16_1gpu, vits16_gram, vits16_highres),
    (vit7b16_pretrain, vit7b16_gram, vit7b16_highres),
)

RECIPES: dict[str, Callable[[], Pretrain]] = {
    recipe.__name__: recipe
    for recipe in (*CHAINS[0], photos, adapt, *CHAINS[1], vitl16_im1k, *CHAINS[2])
}

DISTILLATIONS: dict[str, Callable[[], Distill]] = {
    recipe.__name__: recipe for recipe in (quickstart_distill, distill_vit, distill_convnext)
}


def following(name: str) -> list[str]:
    """The recipes after that one in its chain, in order; none for the last, or outside a chain."""
    for chain in CHAINS:
        names = [recipe.__name__ for recipe in chain]
        if name in names:
            return names[names.index(name) + 1 :]
    return []


def chosen(argv: Sequence[str], about: str = "", note: str = "") -> ChosenRecipe[Pretrain]:
    """The recipe that a command line of train/pretrain.py asks for.

    `adapt` has the network of the weights that `--run.init` names, so it is made for them once they
    are known; fields given besides change that one.

    Args:
        argv: the recipe's name and its options.
        about: the head of the help.
        note: stands in the help of every recipe.

    Raises:
        ConfigError, SystemExit: as `RecipeParser.parse`.
    """
    parser = RecipeParser("pretrain", about, RECIPES, note)
    first = parser.parse(argv)
    init = first.recipe.run.init
    if first.standard.name != adapt.__name__ or not init:
        return first

    @functools.wraps(adapt)
    def of_these_weights() -> Pretrain:
        return adapt(init)

    return replace(parser, recipes=RECIPES | {adapt.__name__: of_these_weights}).parse(argv)


def distillation(argv: Sequence[str], about: str = "") -> Asked:
    """What a command line of train/distill.py asks for; see `command.parse`.

    Raises:
        ConfigError, SystemExit: as there.
    """
    asked = command.parse(argv, DISTILLATIONS, about)
    base = in_folder_of_its_images(asked.distill.base, asked.standard.base)
    return asked._replace(distill=replace(asked.distill, base=base))


def in_folder_of_its_images(recipe: Pretrain, standard: Pretrain) -> Pretrain:
    """A recipe of built-in images that reads others must not touch the run on its own ones.

    Nor does a stage continue that one: it starts from the run on the same images.

    Args:
        standard: the recipe without changes.
    """
    source = recipe.data.source
    if standard.data.source != "scenes" or source == "scenes":
        return recipe
    label = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(source))).strip("-.")[:60]
    label = label or "images"
    run = recipe.run
    if not run.out:
        run = replace(run, out=f"runs/{recipe.name}-{label}")
    if run.from_ and run.from_ == standard.run.from_:
        run = replace(run, from_=f"runs/{run.from_}-{label}")
    return replace(recipe, run=run)


def planned(asked: Asked) -> str:
    """The answer to `--plan`, with the published layout of ViTs as its example.

    Raises:
        ConfigError: see `plan_in_words`.
    """
    assert asked.plan is not None
    example = Example(distill_vit(), vit7b16_highres())
    return plan_in_words(asked.distill, asked.plan, example)
