"""What a model's name on a command line stands for: weights, a run, raw pixels, or no training."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from dinov3core.checkpoints import load_model
from dinov3core.checkpoints.files import read_json
from dinov3core.data.sizes import pair
from dinov3core.evals.backbones import PixelBackbone
from dinov3core.models import ImageStatistics, build, list_models
from dinov3core.models.presets import backbone_of
from dinov3core.train.engine.config import Pretrain

Recipes = Mapping[str, Callable[[], Pretrain]]
NO_RECIPES: Recipes = MappingProxyType({})
LARGEST_CROP = 4096  # pixels; what a config.json states beyond it is no size of crops


class Opened(NamedTuple):
    """A backbone in eval mode, fp32."""

    backbone: nn.Module
    size: int  # pixels of the crops it was trained on, 0 when unknown
    report: str  # how it came to be, for people


def open_backbone(
    name: str,
    *,
    channels: int = 3,
    rgb_channels: tuple[int, ...] = (0, 1, 2),
    patch_size: int = 16,
    seed: int = 0,
    recipes: Recipes = NO_RECIPES,
) -> Opened:
    """Open a model by name.

    Args:
        name: a file or folder of weights (ours, official, Hugging Face, timm), the folder of a run
            (its newest EMA backbone), `pixels`, `pixels:NAME` to see images as the model of that
            path or name does, or `untrained:NAME` with the name of a model or a recipe.
        channels: of the images; weights for another number are adapted, red, green and blue at
            `rgb_channels`.
        patch_size: of `pixels`.
        seed: of untrained weights.
        recipes: whose networks `untrained:NAME` may name besides those of the models.

    Raises:
        ValueError: none of these, or weights that cannot be read.
    """
    if name == "pixels":
        return Opened(PixelBackbone(patch_size, channels), 0, "raw pixels, nothing learned")
    kind, _, inner = name.partition(":")
    if kind == "pixels":
        return _pixels_like(inner, channels, recipes)
    if kind == "untrained":
        return _untrained(inner, channels, seed, recipes)
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(_unknown(name, recipes))
    model, report = load_model(path)
    if model.in_channels != channels:
        model, report = load_model(path, in_channels=channels, rgb_channels=rgb_channels)
        model.statistics = None
    return Opened(model.float(), crop_size(path), str(report))


def _pixels_like(name: str, channels: int, recipes: Recipes) -> Opened:
    """Raw pixels as the model of that name sees them."""
    known = name if Path(name).expanduser().exists() else f"untrained:{name}"
    like = open_backbone(known, channels=channels, recipes=recipes)
    backbone = PixelBackbone(like.backbone.patch_size, channels)
    return Opened(backbone, like.size, f"raw pixels as {name} sees them, nothing learned")


def _untrained(name: str, channels: int, seed: int, recipes: Recipes) -> Opened:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in recipes:
            recipe = recipes[name]()
            model = backbone_of(replace(recipe.backbone, in_channels=channels))
            statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
            model.statistics = statistics if channels == 3 else None
            size = min(pair(recipe.crops.global_size))
        elif name in list_models():
            model = build(name, in_channels=channels)
            size = 0
        else:
            raise ValueError(_unknown(f"untrained:{name}", recipes))
    return Opened(model.eval(), size, f"untrained, seed {seed}")


def crop_size(path: Path) -> int:
    """The global crops of the run a path is or lies in; 0 when it is none."""
    for folder in (path, *path.parents[:3]):
        file = folder / "config.json"
        try:
            size = read_json(file)["recipe"]["crops"]["global_size"] if file.is_file() else None
            side = min(pair(size))
        except (OSError, ValueError, LookupError, TypeError):  # somebody else's config.json
            continue
        if isinstance(side, int) and 0 < side <= LARGEST_CROP:
            return side
    return 0


def _unknown(name: str, recipes: Recipes) -> str:
    inner = name.rpartition(":")[2]
    known = [*list_models(), *recipes]
    near = get_close_matches(inner, known, n=1, cutoff=0.7)
    hint = (
        f"did you mean untrained:{near[0]}?" if near else f"names for untrained: {', '.join(known)}"
    )
    return (
        f"model {name!r}: expected a file or folder of weights, the folder of a run, pixels, or "
        f"untrained:NAME, found nothing there; {hint}"
    )
