"""Block masks: exact counts, the published constants, distributions, indices and weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3core.data.masks import (
    BLOCK_ASPECT,
    MaskSettings,
    batch_masks,
    block_mask,
    locate,
    mask_counts,
    masked_total,
)

PUBLISHED = MaskSettings(probability=0.5, ratio_min=0.1, ratio_max=0.5)


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (3, 11), (1, 9), (24, 8), (1, 1)])
def test_masks_exactly_what_is_asked(grid):
    patches = grid[0] * grid[1]
    for count in {0, 1, 2, 3, patches // 3, patches // 2, patches - 1, patches}:
        if 0 <= count <= patches:
            mask = block_mask(grid, count, np.random.default_rng(count))
            assert mask.shape == grid and mask.sum() == count


def test_more_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="expected 0 to 9 patches of a 3 x 3 grid, got 10"):
        block_mask((3, 3), 10, np.random.default_rng(0))


@pytest.mark.parametrize(
    "images, patches, total",
    [
        (64, 196, 3771),
        (16, 256, 1274),
        (40, 256, 3104),
        (24, 256, 1883),
        (8, 1024, 2659),
        (8, 2304, 5987),
    ],
)
def test_total_is_the_published_constant(images, patches, total):
    assert masked_total(2 * images, patches, PUBLISHED) == total


def test_counts_climb_a_staircase_in_single_precision():
    assert mask_counts(10, 64, PUBLISHED) == [11, 16, 21, 26, 32, 0, 0, 0, 0, 0]
    assert mask_counts(8, 36, MaskSettings(0.7, 0.1, 0.45)) == [
        6,
        8,
        11,
        13,
        16,
        0,
        0,
        0,
    ]
    assert mask_counts(2, 36, MaskSettings(0.3, 0.1, 0.5)) == [0, 0]


@pytest.mark.parametrize("circular_shift", [False, True])
def test_batch_bookkeeping(circular_shift):
    drawn = batch_masks(
        10, (8, 8), replace(PUBLISHED, circular_shift=circular_shift), np.random.default_rng(3)
    )
    masks, indices, weights = drawn
    assert masks.shape == (10, 64) and masks.dtype == torch.bool
    assert sorted(masks.sum(1).tolist()) == [0, 0, 0, 0, 0, 11, 16, 21, 26, 32]
    assert torch.equal(indices, masks.flatten().nonzero()[:, 0]) and indices.dtype == torch.int64
    assert len(indices) == masked_total(10, 64, PUBLISHED)
    crops = indices // 64
    assert torch.equal(weights, 1 / masks.sum(1)[crops].float())
    assert torch.equal(
        torch.zeros(10).index_add_(0, crops, weights).round(decimals=5), masks.any(1).float()
    )


def test_locate_of_given_masks():
    masks = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    located = locate(masks)
    assert located.mask_indices.tolist() == [1, 2, 6]
    assert (
        located.mask_weights.tolist() == [0.5, 0.5, 1.0]
        and located.mask_weights.dtype == torch.float32
    )


def test_same_generator_same_masks_and_masked_crops_move_about():
    first, again, other = (
        batch_masks(8, (6, 6), PUBLISHED, np.random.default_rng(seed)).masks for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    rng = np.random.default_rng(5)
    masked = (
        sum(batch_masks(8, (6, 6), PUBLISHED, rng).masks.any(1).float() for _ in range(200)) / 200
    )
    assert (masked - 0.5).abs().max() < 5 * math.sqrt(0.25 / 200)


@pytest.mark.parametrize(
    "bad", [{"ratio_min": 0.6}, {"probability": 1.5}, {"ratio_max": 1.2}, {"ratio_min": -0.1}]
)
def test_impossible_shares_are_refused(bad):
    with pytest.raises(ValueError, match="ratio_min <= ratio_max"):
        batch_masks(4, (4, 4), replace(PUBLISHED, **bad), np.random.default_rng(0))


def _brute_force(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """The published procedure once more, with sets and loops and without scattering the rest."""
    taken: set[tuple[int, int]] = set()
    stuck = False
    while len(taken) < count and not stuck:
        stuck, cap = True, min(count - len(taken), grid[0] * grid[1] / 2)
        for _ in range(10):
            area, aspect = (
                4 + (cap - 4) * rng.random(),
                math.exp(rng.uniform(*np.log(BLOCK_ASPECT))),
            )
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < grid[0] and width < grid[1]:
                top, left = (
                    rng.integers(0, grid[0] - height + 1),
                    rng.integers(0, grid[1] - width + 1),
                )
                cells = {(top + i, left + j) for i in range(height) for j in range(width)}
                if 0 < len(cells - taken) <= cap:
                    taken, stuck = taken | cells, False
                    break
    mask = np.zeros(grid, bool)
    for cell in taken:
        mask[cell] = True
    return mask


@pytest.mark.parametrize("grid, count", [((16, 16), 51), ((6, 12), 30)])
def test_distribution_of_the_procedure(grid, count):
    """Row, column and neighbour statistics of 600 draws are those of the brute force."""
    draws, rng, other = 600, np.random.default_rng(0), np.random.default_rng(1)
    ours = np.stack([block_mask(grid, count, rng) for _ in range(draws)]).astype(float)
    plain = np.stack([_brute_force(grid, count, other) for _ in range(draws)]).astype(float)
    statistics = {
        "rows": lambda m: m.mean(2),
        "columns": lambda m: m.mean(1),
        "neighbours": lambda m: (
            (m[:, 1:] * m[:, :-1]).sum((1, 2)) + (m[..., 1:] * m[..., :-1]).sum((1, 2))
        )[:, None],
    }
    for name, statistic in statistics.items():
        a, b = statistic(ours), statistic(plain)
        error = np.sqrt((a.var(0) + b.var(0)) / draws)
        # 30 comparisons: 4 standard errors; .02: the scattered rest (under a third of a patch per
        # draw on average)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error + 0.02 * b.mean(0)), name


def test_blocks_reach_the_border_less_often_than_the_middle_unless_shifted():
    settings = MaskSettings(probability=1.0, ratio_min=0.2, ratio_max=0.3)
    rolled = replace(settings, circular_shift=True)
    rng = np.random.default_rng(0)
    plain = torch.cat([batch_masks(50, (12, 12), settings, rng).masks for _ in range(8)]).float()
    shifted = torch.cat([batch_masks(50, (12, 12), rolled, rng).masks for _ in range(8)]).float()
    share = [m.view(-1, 12, 12).mean((0, 2)) for m in (plain, shifted)]
    assert share[0][0] < 0.6 * share[0][6]
    assert (share[1] / share[1].mean() - 1).abs().max() < 0.15
