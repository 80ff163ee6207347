"""Every recipe by name: functions that return a complete, typed run.

Derive your own with `dataclasses.replace`. The number of processes is not part of a recipe: batch
sizes are per process.
"""

from collections.abc import Callable

from dinov3core.train.engine.config import Pretrain
from dinov3core.train.recipes.imagenet import vitl16_im1k, vits16_1gpu
from dinov3core.train.recipes.quickstart import photos, quickstart

RECIPES: dict[str, Callable[[], Pretrain]] = {
    recipe.__name__: recipe for recipe in (quickstart, photos, vits16_1gpu, vitl16_im1k)
}
