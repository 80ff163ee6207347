"""What one model sees in a few images: patch features, their norms and attention, on one grid.

Shapes: n images, C channels, H x W pixels, D width, A attention heads, R registers, h x w cells of
the grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.data.pixels import checked_pixels
from dinov3core.evals.backbones import known_statistics
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.views import resized, whole_patches
from dinov3core.image_statistics import ImageStatistics
from dinov3core.models import ConvNeXt, VisionTransformer
from dinov3core.models.attention_maps import attention_maps

# (y, x) as shares of an image's height and width: the same for every model and grid.
Place = tuple[float, float]


class Sight(NamedTuple):
    """Everything on the CPU in float32; what a model does not have is None."""

    patches: Tensor  # [n, D, h, w], as the evaluations use them
    # [n, h, w]: length of the last block's patch tokens, before the final norm
    norms: Tensor | None
    # [n, 1 + R]: of CLS and registers; a ConvNeXt has the pooled vector alone
    prefix_norms: Tensor | None
    cls_attention: Tensor | None  # [n, A, h, w]: last block, from the CLS token
    patch_attention: Tensor | None  # [n, A, h, w]: last block, from the patch at each image's place
    seen: tuple[int, int]  # height and width in pixels the model was given
    skipped: tuple[str, ...]  # a sentence for everything that is None


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
        model: anything with `.features(images)` and `patch_size`; for its statistics see
            `encoder_of`.
        images: [n, C, H, W] of one size, uint8 or float in [0, 1].
        places: one per image, for `patch_attention`.
        patches: the images are resized so that their shorter side holds as many; the ratio of sides
            stays.

    Raises:
        ValueError: images, places or settings that do not fit, and models whose image statistics
            are unknown.
    """
    _check(images, places, patches)
    pixels = _fitted(images, model, patches)
    encoder = encoder_of(model, pixels.shape[1], device)
    starts = range(0, len(pixels), batch_size)

    def each_batch(answer: Callable[[Tensor, int], Tensor]) -> Tensor:
        """answer(pixels of a batch, index of its first image) of all batches, on the CPU."""
        answers = [answer(pixels[start : start + batch_size], start) for start in starts]
        return torch.cat([tensor.float().cpu() for tensor in answers])

    maps = each_batch(lambda batch, _: encoder(batch).patches)
    norms: Tensor | None = None
    prefix_norms: Tensor | None = None
    attention: tuple[Tensor | None, ...] = (None, None)
    skipped: list[str] = []
    if isinstance(model, VisionTransformer | ConvNeXt):
        lengths = each_batch(lambda batch, _: _lengths(encoder, batch))
        prefix = lengths.shape[1] - maps[0, 0].numel()  # tokens before the patches
        prefix_norms = lengths[:, :prefix]
        norms = lengths[:, prefix:].unflatten(1, maps.shape[-2:])
    else:
        skipped.append(
            f"Norms need a ViT or ConvNeXt of this project; {type(model).__name__} is none."
        )
    if isinstance(model, VisionTransformer):
        both = each_batch(
            lambda batch, first: _attention(encoder, batch, places[first : first + len(batch)])
        )
        attention = both.unbind(1)
    else:
        skipped.append(
            f"Attention maps need a ViT of this project; {type(model).__name__} is none."
        )
    return Sight(maps, norms, prefix_norms, *attention, tuple(pixels.shape[-2:]), tuple(skipped))


def encoder_of(
    model: nn.Module, channels: int, device: torch.device | str = "cpu"
) -> FrozenEncoder:
    """The encoder of a model; one without the attribute `statistics` takes plain pixels in [0, 1].

    Raises:
        ValueError: `statistics` is None, so what the model expects is not known.
    """
    plain = ImageStatistics((0.0,) * channels, (1.0,) * channels)
    statistics = known_statistics(model) if hasattr(model, "statistics") else plain
    return FrozenEncoder(model, device=device, statistics=statistics)


def cell_at(place: Place, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the cell of a grid that holds a place."""
    row, column = (min(int(at * count), count - 1) for at, count in zip(place, grid, strict=True))
    return row, column


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
    """Float pixels in [0, 1] whose shorter side holds `patches` cells, on the patch grid."""
    stride = getattr(model, "map_stride", None) or model.patch_size
    scale = patches * stride / min(images.shape[-2:])
    height, width = (whole_patches(side * scale, model.patch_size) for side in images.shape[-2:])
    return resized(checked_pixels(images), (height, width))


def _lengths(encoder: FrozenEncoder, pixels: Tensor) -> Tensor:
    """Lengths [b, 1 + R + h * w] of all tokens of the last block, before the final norm."""
    tokens = encoder(pixels, norm=False)
    rows = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches.flatten(2).mT], 1)
    return rows.norm(dim=2)


def _attention(encoder: FrozenEncoder, pixels: Tensor, places: Sequence[Place]) -> Tensor:
    """Attention of CLS and of the patch at each image's place: [b, 2, A, h, w]."""
    grid = (pixels.shape[2] // encoder.patch_size, pixels.shape[3] // encoder.patch_size)
    queries = ["cls", *(cell_at(place, grid) for place in places)]
    with encoder.running():
        maps = attention_maps(encoder.backbone, encoder.inputs(pixels), queries=queries).patches
    own = torch.arange(len(pixels), device=maps.device)  # an image's own query follows CLS
    return torch.stack([maps[:, 0], maps[own, 1 + own]], 1)
