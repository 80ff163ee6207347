"""Whether a recipe fits into this machine, asked before anything large is allocated.

The answer is a lower bound (weights, their average, gradients, optimizer state, a batch of crops),
so a recipe that is refused cannot run. One that passes may still need more for its activations:
`explained` says so when it happens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dinov3core.data.crops import CropSettings, GramCrops, sized_crops
from dinov3core.data.sizes import Size, pair
from dinov3core.models import ProjectionHead
from dinov3core.models.presets import backbone_of
from dinov3core.train.engine.config import ConfigError, Pretrain

GIB = 2**30
WEIGHT_BYTES = 4 * 5  # float32: student, gradient, two moments of AdamW, EMA teacher
ALLOCATION_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def check(recipe: Pretrain, device: torch.device) -> None:
    """Compare what a recipe needs at least with what the device has.

    Raises:
        ConfigError: with the sizes, when it cannot fit.
    """
    available = memory_of(device)
    weights = weights_of(recipe)
    needed = WEIGHT_BYTES * sum(weights.values())
    if available is not None and needed > available:
        sizes = ", ".join(f"{name} {count:.3g}" for name, count in weights.items())
        raise ConfigError(
            f"{sizes} weights need at least {needed / GIB:.3g} GiB with gradients, optimizer and "
            f"teacher, {device.type} has {available / GIB:.3g}; make them smaller (backbone.width, "
            "backbone.depth, dino.prototypes, ibot.prototypes)"
        )
    crops = recipe.run.batch_size * image_bytes(recipe)
    if available is not None and needed + crops > available:
        raise ConfigError(
            f"run.batch_size {recipe.run.batch_size}: the crops of a batch need {crops / GIB:.3g} "
            f"GiB with sides of up to {largest_side(recipe)} px, {device.type} has "
            f"{available / GIB:.3g}; make the batch or the crops smaller"
        )


@contextmanager
def explained(recipe: Pretrain, device: torch.device) -> Iterator[None]:
    """Refuse what cannot fit, and turn running out of memory into a sentence."""
    check(recipe, device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise ConfigError(
            f"out of memory ({device.type}) with run.batch_size {recipe.run.batch_size}, "
            f"run.accumulation {recipe.run.accumulation} and crops of up to "
            f"{largest_side(recipe)} px; lower the first, raise the second, or make crops or "
            "networks smaller"
        ) from error


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU torch says so in words alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ALLOCATION_WORDS)


def memory_of(device: torch.device) -> int | None:
    """Bytes of a device's memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def image_bytes(recipe: Pretrain) -> int:
    """Bytes of one image's crops as float32, in the steps with the largest of several sizes."""
    return 4 * recipe.backbone.in_channels * max(map(_pixels, _cut_by(recipe)))


def largest_side(recipe: Pretrain) -> int:
    """The longest side of any crop, in pixels."""
    return max(side for crops in _cut_by(recipe) for size, _ in crops for side in pair(size))


def _cut_by(recipe: Pretrain) -> list[list[tuple[Size, int]]]:
    """(size, count) of every kind of crop, for the steps of each size."""
    return [_crops(*of_size) for of_size in sized_crops(recipe.crops, recipe.gram_crops)]


def _pixels(crops: list[tuple[Size, int]]) -> int:
    """Of one image."""
    return sum(count * pair(size)[0] * pair(size)[1] for size, count in crops)


def _crops(settings: CropSettings, gram: GramCrops | None) -> list[tuple[Size, int]]:
    crops = [(settings.global_size, settings.global_count)]
    crops += [(settings.local_size, settings.local_count)]
    if gram is not None:
        crops += [(gram.size, settings.global_count)]
    return crops


def weights_of(recipe: Pretrain) -> dict[str, int]:
    """How many weights each network has, counted without memory for them."""
    width = recipe.backbone.width
    with torch.device("meta"):
        networks = {
            "backbone": backbone_of(recipe.backbone),
            "DINO head": ProjectionHead(width, recipe.dino),
            "iBOT head": ProjectionHead(width, recipe.ibot),
        }
    return {name: _count(network) for name, network in networks.items()}


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
