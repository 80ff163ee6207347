"""What of an image a frozen backbone is shown: its size, its place, and sides on the patch grid.

Shapes: B images, C channels, H x W pixels.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3core.data.pixels import as_float, to_planes


def central_view(image: Image.Image | Tensor, *, resize: int = 256, crop: int = 224) -> Tensor:
    """The view that k-NN and probes see: shorter side to `resize` (bicubic), then the centre.

    Args:
        image: a Pillow image, or float [C, H, W] in [0, 1] for other channel counts.
        resize: pixels of the shorter side; the longer one is rounded down, as published.
        crop: side of the central square.

    Returns:
        [C, crop, crop]: uint8 for a Pillow image, float in [0, 1] for a tensor.
    """
    if crop > resize:
        raise ValueError(
            f"crop: expected at most resize={resize}, got {crop}; a centre crop cannot exceed the "
            "image"
        )
    if isinstance(image, Tensor):
        size = shorter_side_to(resize, *image.shape[-2:], rounding=math.floor)
        pixels = resized(image.float(), size)
    else:
        size = shorter_side_to(resize, image.height, image.width, rounding=math.floor)
        # Pillow resizes bytes, as the published evaluations do: rounded to whole values.
        rgb = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = to_planes(rgb)
    top = (size[0] - crop + 1) // 2
    left = (size[1] - crop + 1) // 2
    return pixels[:, top : top + crop, left : left + crop].contiguous()


def square(pixels_CHW: Tensor, side: int) -> Tensor:
    """The central square of an image, [C, side, side], as large as its shorter side allows."""
    size = shorter_side_to(side, *pixels_CHW.shape[1:])
    return _centre(resized(pixels_CHW, size), side)


def square_target(target_HW: Tensor, side: int) -> Tensor:
    """The part of a target that `square` shows of its image, [side, side]."""
    return _centre(resized_target(target_HW, shorter_side_to(side, *target_HW.shape)), side)


def _centre(planes: Tensor, side: int) -> Tensor:
    """The central square of planes [..., H, W]."""
    height, width = planes.shape[-2:]
    top = (height - side) // 2
    left = (width - side) // 2
    return planes[..., top : top + side, left : left + side]


def shorter_side_to(
    side: int, height: int, width: int, *, rounding: Callable[[float], int] = round
) -> tuple[int, int]:
    """(height, width) with the shorter one `side` and the proportions kept.

    Args:
        rounding: of the longer side. k-NN and probes round down, as their published protocol does;
            dense tasks take the nearest, which moves targets least.
    """
    shorter = min(height, width)
    tall, wide = (max(side, rounding(length * side / shorter)) for length in (height, width))
    return tall, wide


def whole_patches(length: float, patch_size: int) -> int:
    """The multiple of the patch size nearest to a length in pixels, at least one patch."""
    return max(1, round(length / patch_size)) * patch_size


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Float pixels [C, H, W] or [B, C, H, W]: bicubic, antialiased, clipped to [0, 1]."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    stack = pixels if pixels.ndim == 4 else pixels[None]
    views = F.interpolate(stack, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return views if pixels.ndim == 4 else views[0]


def resized_target(target_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour by pixel centres: classes and depths are never mixed."""
    planes = F.interpolate(target_HW[None, None].float(), size=size, mode="nearest-exact")
    return planes[0, 0].to(target_HW.dtype)


def float_planes(image: Image.Image | Tensor) -> Tensor:
    """What an image source gives as float [C, H, W] in [0, 1]."""
    return as_float(to_planes(image))
