"""Patch agreement: the definition in float64, its labels, and a rule for what is chance."""

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from dinov3core.data.labelled import IGNORE
from dinov3core.evals.agreement import agreement, agreements, patch_labels
from dinov3core.evals.differences import Measured, differ, errors_between, fell, rose, standing


def by_definition(patches_DP: Tensor, labels_P: Tensor) -> float:
    """Every pair of one class against every pair of two, one by one."""
    vectors = [patches_DP[:, place].double() for place in range(patches_DP.shape[1])]
    labels = labels_P.tolist()
    alike, others = [], []
    for a, b in itertools.combinations(range(len(labels)), 2):
        if IGNORE in (labels[a], labels[b]):
            continue
        cosine = float(vectors[a] @ vectors[b] / (vectors[a].norm() * vectors[b].norm()))
        (alike if labels[a] == labels[b] else others).append(cosine)
    if not alike or not others:
        return math.nan
    wins = [float(x > y) + 0.5 * (x == y) for x in alike for y in others]
    return 100 * statistics.fmean(wins)


def drawn(images: int, grid: tuple[int, int], classes: int, signal: float) -> tuple[Tensor, Tensor]:
    """Patches that lean to their classes; some labels are unknown."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images, *grid), generator=generator)
    axes = signal * torch.randn(classes, 8, generator=generator)
    patches = axes[labels].movedim(3, 1) + torch.randn(images, 8, *grid, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    return patches, labels


@pytest.mark.parametrize(("grid", "signal"), [((3, 4), 0.0), ((4, 3), 0.7), ((2, 2), 3.0)])
def test_against_the_definition(grid: tuple[int, int], signal: float) -> None:
    patches, labels = drawn(12, grid, 3, signal)
    scores = agreements(patches, labels)
    wanted = [by_definition(p.flatten(1), c.flatten()) for p, c in zip(patches, labels)]
    assert scores.dtype == torch.double
    torch.testing.assert_close(
        scores, torch.tensor(wanted, dtype=torch.double), rtol=0, atol=1e-9, equal_nan=True
    )

    known = [score for score in wanted if not math.isnan(score)]
    mean = agreement(patches, labels)
    assert mean is not None and mean.error is not None
    assert mean.value == pytest.approx(statistics.fmean(known), abs=1e-9)
    assert mean.error == pytest.approx(statistics.stdev(known) / len(known) ** 0.5, abs=1e-9)


def test_the_best_the_worst_and_the_blind() -> None:
    labels = torch.tensor([[[0, 0, 1], [1, 1, 0]]])
    classes = torch.eye(2)[labels].movedim(3, 1)
    assert agreement(classes, labels) == Measured(100.0, None)  # a single image has no error
    assert agreement(-7 * classes, labels) == Measured(100.0, None)  # lengths do not matter
    crossed = torch.eye(2)[torch.tensor([[[0, 1, 0], [1, 0, 1]]])].movedim(3, 1)
    assert agreement(crossed, labels).value < 50
    # features that are all alike, exactly: every case is a tie
    assert agreement(torch.ones(1, 4, 2, 3), labels) == Measured(50.0, None)

    patches, labels = drawn(300, (4, 4), 3, 0.0)
    blind = agreement(patches, labels)
    assert abs(blind.value - 50) < 3 * blind.error


def test_images_without_both_kinds_of_pairs_do_not_count() -> None:
    patches = torch.randn(4, 8, 2, 2)
    one_class = torch.full((2, 2), 3)
    all_unlike = torch.tensor([[0, 1], [2, 3]])
    unknown = torch.full((2, 2), IGNORE)
    both = torch.tensor([[0, 0], [1, 1]])
    labels = torch.stack([one_class, all_unlike, unknown, both])
    assert agreements(patches, labels).isnan().tolist() == [True, True, True, False]
    assert agreement(patches, labels).error is None
    assert agreement(patches[:3], labels[:3]) is None


def test_a_patch_has_the_class_of_most_of_its_pixels() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[0, :2, :3] = 5
    mask[0, 3, 5] = 7
    mask[0, 2:, :3] = IGNORE
    assert patch_labels(mask, (2, 2), 8).tolist() == [[[5, 0], [IGNORE, 0]]]
    mask[0, 3, 0] = 2  # the only pixel with a class decides
    assert patch_labels(mask, (2, 2), 8).tolist() == [[[5, 0], [2, 0]]]


# ---- what is chance


def test_two_standard_errors_of_a_difference() -> None:
    start = Measured(55.9, 1.43)
    for after, is_lower in ((53.6, False), (51.9, False), (51.8, True)):
        end = Measured(after, 1.44)
        assert fell(start, end) == differ(end, start) == rose(end, start) == is_lower
        assert not rose(start, end) and not fell(end, start)
    assert errors_between(start, Measured(52.9, 1.43)) == pytest.approx(3 / 1.43 / 2**0.5)
    assert errors_between(Measured(1.0), Measured(2.0)) == math.inf
    assert errors_between(Measured(1.0), Measured(1.0)) == 0


def test_words_respect_the_errors() -> None:
    end = Measured(53.6, 1.4)
    assert standing(end, Measured(55.9, 1.4), "its start") == (
        "level with its start (2.3 points below, within two standard errors)"
    )
    assert standing(end, Measured(35.2, 1.4), "raw pixels") == "18.4 points above raw pixels"
    assert standing(Measured(35.2, 1.4), end, "x") == "18.4 points below x"
    assert standing(end, Measured(53.62, 1.4), "its start") == "level with its start"
    assert standing(end, Measured(53.7), "its start").startswith("level with its start (0.1 points")
    assert standing(Measured(53.6), Measured(53.7), "its start") == "0.1 points below its start"
