"""Block masks for masked-patch prediction: which patches the student does not see (iBOT; BEiT-style
blocks).

Shapes: n crops, P = rows * columns patches, M masked patches in all. M depends on the settings
alone, never on the draw, so a training step has static shapes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_BLOCK = 4  # patches
MAX_BLOCK_SHARE = 0.5  # of the grid
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height over width
ATTEMPTS = 10


class BatchMasks(NamedTuple):
    """The masks of a batch and where they are set."""

    masks: Tensor  # bool [n, P], True: masked
    mask_indices: Tensor  # int64 [M], flat positions in `masks`, ascending
    mask_weights: Tensor  # fp32 [M], 1 / masked patches of that crop


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of exactly `count` patches, mostly in rectangular blocks, the last few scattered if
    blocks no longer fit.

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
    masked, largest = 0, MAX_BLOCK_SHARE * rows * columns
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
    """Mask one block of at most `cap` new patches in place; how many it added, 0 when ten attempts
    found none.
    """
    rows, columns = mask.shape
    log_low, log_high = math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])
    for _ in range(ATTEMPTS):
        area = MIN_BLOCK + (cap - MIN_BLOCK) * rng.random()
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        new = height * width - int(np.count_nonzero(block))
        if 0 < new <= cap:
            block[:] = True
            return new
    return 0


def mask_counts(
    n_crops: int, patches: int, *, probability: float, ratio_min: float, ratio_max: float
) -> list[int]:
    """Patches to mask per crop, before shuffling: a staircase of ratios for int(n * probability)
    crops, then zeros.
    """
    masked_crops = int(n_crops * probability)
    ratios = torch.linspace(ratio_min, ratio_max, masked_crops + 1)[
        1:
    ]  # fp32, as published: truncation depends on it
    return [int(patches * ratio) for ratio in ratios] + [0] * (n_crops - masked_crops)


def masked_total(
    n_crops: int, patches: int, *, probability: float, ratio_min: float, ratio_max: float
) -> int:
    """M, the masked patches of a batch: the same in every step and on every process."""
    return sum(
        mask_counts(
            n_crops, patches, probability=probability, ratio_min=ratio_min, ratio_max=ratio_max
        )
    )


def batch_masks(
    n_crops: int,
    grid: tuple[int, int],
    *,
    probability: float,
    ratio_min: float,
    ratio_max: float,
    rng: np.random.Generator,
    circular_shift: bool = False,
) -> BatchMasks:
    """Masks for the global crops of a batch, shuffled over the crops.

    Args:
        n_crops: global crops of this process, crop-major.
        grid: rows and columns of the patch grid.
        probability: share of crops with a mask.
        ratio_min, ratio_max: share of patches masked; one crop each at equal steps, the first just
            above `ratio_min`.
        circular_shift: roll every mask by a random offset, so that borders are masked as often as
            the middle.

    Raises:
        ValueError: shares outside [0, 1] or in the wrong order.
    """
    if not 0 <= ratio_min <= ratio_max <= 1 or not 0 <= probability <= 1:
        raise ValueError(
            f"expected 0 <= ratio_min <= ratio_max <= 1 and a probability, got {ratio_min}, "
            f"{ratio_max} and probability {probability}"
        )
    patches = grid[0] * grid[1]
    counts = mask_counts(
        n_crops, patches, probability=probability, ratio_min=ratio_min, ratio_max=ratio_max
    )
    masks = np.zeros((n_crops, patches), bool)
    for crop, count in zip(rng.permutation(n_crops), counts):
        mask = block_mask(grid, count, rng)
        if circular_shift:
            mask = np.roll(
                mask, (int(rng.integers(grid[0])), int(rng.integers(grid[1]))), axis=(0, 1)
            )
        masks[crop] = mask.ravel()
    return locate(torch.from_numpy(masks))


def locate(masks: Tensor) -> BatchMasks:
    """Indices and weights of given masks, bool [n, P]."""
    weights = 1 / masks.sum(1, keepdim=True).clamp(min=1).float()
    return BatchMasks(masks, masks.flatten().nonzero()[:, 0], weights.expand(masks.shape)[masks])
