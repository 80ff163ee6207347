"""Every recipe by name: functions that return a complete, typed run.

Derive your own with `dataclasses.replace`. The number of processes is not part of a recipe: batch
sizes are per process.
"""

import functools
from collections.abc import Callable, Sequence

from dinov3core.train.engine.command_line import ChosenRecipe, RecipeParser
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.recipes.adapt import adapt
from dinov3core.train.recipes.imagenet import vitl16_im1k, vits16_1gpu
from dinov3core.train.recipes.quickstart import photos, quickstart

RECIPES: dict[str, Callable[[], Pretrain]] = {
    recipe.__name__: recipe for recipe in (quickstart, photos, adapt, vits16_1gpu, vitl16_im1k)
}


def chosen(argv: Sequence[str], about: str = "") -> ChosenRecipe[Pretrain]:
    """The recipe that a command line of train/pretrain.py asks for.

    `adapt` has the network of the weights that `--run.init` names, so it is made for them once they
    are known; fields given besides change that one.

    Args:
        argv: the recipe's name and its options.
        about: the head of the help.

    Raises:
        ConfigError, SystemExit: as `RecipeParser.parse`.
    """
    first = RecipeParser("pretrain", about, RECIPES).parse(argv)
    init = first.recipe.run.init
    if first.standard.name != adapt.__name__ or not init:
        return first

    @functools.wraps(adapt)
    def of_these_weights() -> Pretrain:
        return adapt(init)

    return RecipeParser("pretrain", about, RECIPES | {adapt.__name__: of_these_weights}).parse(argv)
