"""What one model sees in a few images: patch features, their norms and the attention, on one grid.

Shapes: n images, C channels, H x W pixels, D width, A attention heads, R registers, h x w cells of
the grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.evals.features import IMAGENET_MEAN, IMAGENET_STD, frozen, normalise
from dinov3core.models import ConvNeXt, VisionTransformer
from dinov3core.models.attention_maps import attention_maps

Place = tuple[
    float, float
]  # (y, x) as shares of an image's height and width: the same for every model and grid


class Sight(NamedTuple):
    """Everything on the CPU in fp32; None, with a sentence in `skipped`, for what a model does not
    have.
    """

    patches: Tensor  # [n, D, h, w], as the evaluations use them
    norms: (
        Tensor | None
    )  # [n, h, w]: length of the last block's patch tokens, before the final norm
    prefix_norms: (
        Tensor | None
    )  # [n, 1 + R]: of CLS and registers; a ConvNeXt has the pooled vector alone
    cls_attention: Tensor | None  # [n, A, h, w]: last block, from the CLS token
    patch_attention: Tensor | None  # [n, A, h, w]: last block, from the patch at each image's place
    seen: tuple[int, int]  # height and width in pixels the model was given
    skipped: tuple[str, ...]


def look(
    model: nn.Module,
    images: Tensor,
    places: Sequence[Place],
    *,
    patches: int = 32,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
) -> Sight:
    """Run a frozen model over a few images.

    Args:
        model: anything with `.features(images)` and `patch_size`; for `statistics` see
            `statistics_of`.
        images: [n, C, H, W] of one size, uint8 or float in [0, 1].
        places: one per image, for `patch_attention`.
        patches: the images are resized so that their shorter side holds as many; the ratio of sides
            is kept.

    Raises:
        ValueError: images, places or settings that do not fit, and models whose image statistics
            are unknown.
    """
    _check(images, places, patches)
    pixels = _fitted(images, model, patches)
    inputs = normalise(pixels, *statistics_of(model, pixels.shape[1]))
    norms, prefix_norms, attention, skipped = None, None, (None, None), []
    with frozen(model):
        found = _batched(lambda x, _: model.features(x).patches, inputs, device, batch_size)
        if isinstance(model, VisionTransformer | ConvNeXt):
            lengths = _batched(lambda x, _: _lengths(model, x), inputs, device, batch_size)
            prefix, area = lengths.shape[1] - found[0, 0].numel(), found.shape[-2:]
            prefix_norms, norms = lengths[:, :prefix], lengths[:, prefix:].unflatten(1, area)
        else:
            skipped.append(
                f"Norms need a ViT or ConvNeXt of this project; {type(model).__name__} is none."
            )
        if isinstance(model, VisionTransformer):
            maps = _batched(
                lambda x, at: _attention(model, x, places[at : at + len(x)]),
                inputs,
                device,
                batch_size,
            )
            attention = maps.unbind(1)
        else:
            skipped.append(
                f"Attention maps need a ViT of this project; {type(model).__name__} is none."
            )
    return Sight(found, norms, prefix_norms, *attention, tuple(pixels.shape[-2:]), tuple(skipped))


def cell_at(place: Place, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the cell of a grid that holds a place."""
    return min(int(place[0] * grid[0]), grid[0] - 1), min(int(place[1] * grid[1]), grid[1] - 1)


def statistics_of(model: nn.Module, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std a model's pixels are normalised by: its `statistics`; zeros and ones for a model
    without the attribute, which takes plain pixels in [0, 1].

    Raises:
        ValueError: when `statistics` is None, that is not known.
    """
    if not hasattr(model, "statistics"):
        return (0.0,) * channels, (1.0,) * channels
    if model.statistics is None:
        raise ValueError(
            "image statistics: expected the model to state them, got none; set model.statistics "
            f"to those it was trained with, e.g. ImageStatistics({IMAGENET_MEAN}, {IMAGENET_STD}) "
            "for ImageNet"
        )
    return model.statistics


def _check(images: Tensor, places: Sequence[Place], patches: int) -> None:
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images: expected a stack [n, C, H, W] with n >= 1, got {list(images.shape)}"
        )
    if len(places) != len(images) or any(not (0 <= y <= 1 and 0 <= x <= 1) for y, x in places):
        raise ValueError(
            f"places: expected one (y, x) from 0 to 1 for each of {len(images)} images, got "
            f"{list(places)}; give shares of height and width"
        )
    if patches < 2:
        raise ValueError(
            f"patches: expected at least 2 along the shorter side, got {patches}; 32 make a good "
            "picture"
        )


def _fitted(images: Tensor, model: nn.Module, patches: int) -> Tensor:
    """Float pixels in [0, 1] whose shorter side holds `patches` cells, both sides multiples of the
    patch size.
    """
    pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
    stride = getattr(model, "map_stride", None) or model.patch_size
    scale = patches * stride / min(pixels.shape[-2:])
    unit = model.patch_size
    size = [max(unit, round(side * scale / unit) * unit) for side in pixels.shape[-2:]]
    if size == list(pixels.shape[-2:]):
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _batched(
    answer: Callable[[Tensor, int], Tensor],
    inputs: Tensor,
    device: torch.device | str,
    batch_size: int,
) -> Tensor:
    """answer(inputs of a batch, index of its first image) for all batches, fp32 on the CPU."""
    starts = range(0, len(inputs), batch_size)
    return torch.cat(
        [answer(inputs[at : at + batch_size].to(device), at).float().cpu() for at in starts]
    )


def _lengths(model: nn.Module, inputs: Tensor) -> Tensor:
    """Lengths [b, 1 + R + h * w] of all tokens of the last block, before the final norm."""
    tokens = model.features(inputs, norm=False)
    rows = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches.flatten(2).mT], 1)
    return rows.float().norm(dim=2)


def _attention(model: VisionTransformer, inputs: Tensor, places: Sequence[Place]) -> Tensor:
    """Attention of CLS and of the patch at each image's place: [b, 2, A, h, w]."""
    grid = (inputs.shape[2] // model.patch_size, inputs.shape[3] // model.patch_size)
    maps = attention_maps(
        model, inputs, queries=["cls", *(cell_at(place, grid) for place in places)]
    ).patches
    own = torch.arange(len(inputs), device=maps.device)
    return torch.stack([maps[:, 0], maps[own, 1 + own]], 1)
