"""Square windows over images of any size: where they lie, how they are cut out and joined again.

Shapes: n windows, C channels, H x W pixels, h x w patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3core.evals.views import (
    float_planes,
    resized,
    resized_target,
    shorter_side_to,
    whole_patches,
)

# What a side of None grows to at most; the published segmentation protocol works at 512.
LARGEST_SIDE = 512


class Windows(NamedTuple):
    """How images are seen: their shorter side goes to `side`, then windows slide over them.

    All three are in pixels; `resolve_windows` checks them.
    """

    side: int
    window: int
    stride: int

    def size_of(self, plane: Tensor) -> tuple[int, int]:
        """(height, width) that an image [..., H, W] is resized to."""
        return shorter_side_to(self.side, *plane.shape[-2:])

    def cut_image(self, pixels_CHW: Tensor) -> Tensor:
        """Windows [n, C, window, window] of a resized image."""
        size = self.size_of(pixels_CHW)
        return cut(resized(pixels_CHW, size), self.origins(size), self.window)

    def cut_target(self, target_HW: Tensor) -> Tensor:
        """Windows [n, window, window] of a resized target, in the order of `cut_image`."""
        size = self.size_of(target_HW)
        return cut(resized_target(target_HW, size)[None], self.origins(size), self.window)[:, 0]

    def joined(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps [n, K, h, w] of the windows of a resized image of that size as one, [K, H, W]."""
        return join(maps, self.origins(size), size, self.window)

    def origins(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(top, left) of the windows on a resized image of that size."""
        return window_origins(*size, self.window, self.stride)


def resolve_side(side: int | None, image: Image.Image | Tensor, patch_size: int) -> int:
    """The side that images are resized to; None: that of `image`, on the patch grid, at most 512.

    Raises:
        ValueError: a side off the patch grid.
    """
    if side is None:
        shorter = min(float_planes(image).shape[1:])
        return whole_patches(min(shorter, LARGEST_SIDE), patch_size)
    if side < patch_size or side % patch_size:
        raise ValueError(
            f"side: expected a multiple of the patch size {patch_size}, got {side}; take "
            f"{whole_patches(side, patch_size)}"
        )
    return side


def resolve_windows(side: int, window: int | None, stride: int | None, patch_size: int) -> Windows:
    """Windows and stride; None: the whole shorter side, and two thirds of the window.

    Published for segmentation: windows of 512 at a stride of 341.

    Raises:
        ValueError: a window off the patch grid or larger than the side, a stride that leaves gaps.
    """
    window = side if window is None else window
    if window < patch_size or window % patch_size or window > side:
        raise ValueError(
            f"window: expected a multiple of the patch size {patch_size} up to side={side}, got "
            f"{window}; leave it out for windows as large as the shorter side"
        )
    stride = max(1, math.ceil(window * 2 / 3)) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride: expected 1 to window={window}, got {stride}; pixels would be left out"
        )
    return Windows(side, window, stride)


def window_origins(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of square windows that cover an image of sides >= window.

    The last window of a row and of a column ends at the border.
    """
    return [
        (top, left)
        for top in _starts(height, window, stride)
        for left in _starts(width, window, stride)
    ]


def _starts(length: int, window: int, stride: int) -> list[int]:
    count = math.ceil((length - window) / stride) + 1
    return [min(index * stride, length - window) for index in range(count)]


def cut(planes_CHW: Tensor, origins: Sequence[tuple[int, int]], window: int) -> Tensor:
    """Windows [n, C, window, window] of planes [C, H, W]."""
    return torch.stack(
        [planes_CHW[:, top : top + window, left : left + window] for top, left in origins]
    )


def join(
    maps: Tensor, origins: Sequence[tuple[int, int]], size: tuple[int, int], window: int
) -> Tensor:
    """Window maps [n, K, h, w], enlarged bilinearly to their windows, as one: [K, H, W].

    Where windows overlap, the mean is taken.
    """
    total = maps.new_zeros(maps.shape[1], *size)
    coverage = maps.new_zeros(size)
    for window_map, (top, left) in zip(maps, origins, strict=True):
        rows = slice(top, top + window)
        columns = slice(left, left + window)
        enlarged = F.interpolate(window_map[None], size=(window, window), mode="bilinear")
        total[:, rows, columns] += enlarged[0]
        coverage[rows, columns] += 1
    return total / coverage
