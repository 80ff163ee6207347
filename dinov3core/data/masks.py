"""Block masks for masked-patch prediction: which patches the student does not see (iBOT, BEiT).

Shapes: n crops, P = rows * columns patches, M masked patches in all. M depends on the settings
alone, never on the draw, so a training step has static shapes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov3core.bounds import Share

MIN_BLOCK = 4  # patches
MAX_BLOCK_SHARE = 0.5  # of the grid
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height over width
ATTEMPTS = 10


@dataclass(frozen=True)
class MaskSettings:
    """Which patches the student does not see: blocks, by default as published."""

    probability: Share = 0.5
    """Share of the global crops that are masked."""
    ratio_min: Share = 0.1
    """Share of patches hidden in the least masked crop."""
    ratio_max: Share = 0.5
    """Share of patches hidden in the most masked crop."""
    circular_shift: bool = False
    """Shift every mask by a random offset around the borders."""


class BatchMasks(NamedTuple):
    """The masks of a batch and where they are set."""

    masks: Tensor  # bool [n, P], True: masked
    mask_indices: Tensor  # int64 [M], flat positions in `masks`, ascending
    mask_weights: Tensor  # fp32 [M], 1 / masked patches of that crop


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of exactly `count` patches: rectangular blocks, then single patches where none fits.

    Args:
        grid: rows and columns of the patch grid.

    Returns:
        bool [rows, columns].
    """
    rows, columns = grid
    if not 0 <= count <= rows * columns:
        raise ValueError(
            f"count: expected 0 to {rows * columns} patches of a {rows} x {columns} grid, got "
            f"{count}"
        )
    mask = np.zeros(grid, bool)
    largest = MAX_BLOCK_SHARE * rows * columns
    masked = 0
    while masked < count:
        added = _add_block(mask, min(count - masked, largest), rng)
        if not added:
            break
        masked += added
    if masked < count:
        free = np.flatnonzero(~mask.ravel())
        mask.ravel()[rng.choice(free, count - masked, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, cap: float, rng: np.random.Generator) -> int:
    """Mask one block of at most `cap` new patches in place.

    Returns:
        How many it added; 0 when none of ten attempts fits.
    """
    rows, columns = mask.shape
    log_low, log_high = map(math.log, BLOCK_ASPECT)
    for _ in range(ATTEMPTS):
        area = MIN_BLOCK + (cap - MIN_BLOCK) * rng.random()
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top = int(rng.integers(rows - height + 1))
        left = int(rng.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        new = height * width - int(np.count_nonzero(block))
        if 0 < new <= cap:
            block[:] = True
            return new
    return 0


def mask_counts(n_crops: int, patches: int, settings: MaskSettings) -> list[int]:
    """Patches to mask per crop, before shuffling.

    A staircase of ratios for int(n * probability) crops, then zeros.
    """
    masked_crops = int(n_crops * settings.probability)
    # fp32, as published: the truncation of each product depends on it
    stairs = torch.linspace(settings.ratio_min, settings.ratio_max, masked_crops + 1)
    return [int(patches * ratio) for ratio in stairs[1:]] + [0] * (n_crops - masked_crops)


def masked_total(n_crops: int, patches: int, settings: MaskSettings) -> int:
    """M, the masked patches of a batch: the same in every step and on every process."""
    return sum(mask_counts(n_crops, patches, settings))


def batch_masks(
    n_crops: int, grid: tuple[int, int], settings: MaskSettings, rng: np.random.Generator
) -> BatchMasks:
    """Masks for the global crops of a batch, shuffled over the crops.

    One crop each has one of the shares at equal steps between `ratio_min` and `ratio_max`, the
    first just above `ratio_min`. `circular_shift` masks borders as often as the middle.

    Args:
        n_crops: global crops of this process, crop-major.
        grid: rows and columns of the patch grid.

    Raises:
        ValueError: shares outside [0, 1] or in the wrong order.
    """
    low = settings.ratio_min
    high = settings.ratio_max
    if not 0 <= low <= high <= 1 or not 0 <= settings.probability <= 1:
        raise ValueError(
            f"expected 0 <= ratio_min <= ratio_max <= 1 and a probability, got {low}, {high} and "
            f"probability {settings.probability}"
        )
    patches = grid[0] * grid[1]
    counts = mask_counts(n_crops, patches, settings)
    masks = np.zeros((n_crops, patches), bool)
    for crop, count in zip(rng.permutation(n_crops), counts, strict=True):
        mask = block_mask(grid, count, rng)
        if settings.circular_shift:
            offset = (int(rng.integers(grid[0])), int(rng.integers(grid[1])))
            mask = np.roll(mask, offset, axis=(0, 1))
        masks[crop] = mask.ravel()
    return locate(torch.from_numpy(masks))


def locate(masks: Tensor) -> BatchMasks:
    """Indices and weights of given masks, bool [n, P]."""
    weights = 1 / masks.sum(1, keepdim=True).clamp(min=1).float()
    return BatchMasks(masks, masks.flatten().nonzero()[:, 0], weights.expand(masks.shape)[masks])
