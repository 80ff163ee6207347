"""Depth errors and loss by hand, and backbones that know the answer or nothing."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from dense_stubs import PairList, Stub, diverged, noise

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import Ranged
from dinov3core.evals.depth import DEPTH, BinMean, depth, errors_of, known, sig_loss

FARTHEST = 10.0


def steps(count: int, seed: int = 0) -> PairList:
    """Images of squares on the grid; red is the depth in units of 10 m, a border is unknown."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        metres = (
            (0.5 + 9 * torch.rand(4, 4, generator=generator))
            .repeat_interleave(16, 0)
            .repeat_interleave(16, 1)
        )
        image = torch.stack(
            [metres / FARTHEST, torch.rand(64, 64, generator=generator), torch.zeros(64, 64)]
        )
        target = metres.clone()
        target[:2], target[-2:] = 0, torch.nan
        pairs.append((image, target))
    return PairList(pairs)


def knows_depth() -> Stub:
    """Features that rise one after the other with the depth."""
    places = torch.linspace(0, 1, 12)[None, :, None, None]
    return Stub(lambda means: torch.exp(-0.5 * ((means[:, :1] - places) / 0.09) ** 2))


def test_errors_by_hand():
    predicted, target = (
        torch.tensor([[2.0, 1.0], [9.0, 4.0]]),
        torch.tensor([[1.0, 1.2], [0.0, 4.0]]),
    )
    found = errors_of(predicted, target, FARTHEST)  # the third pixel is unknown
    assert found.rmse == pytest.approx(math.sqrt((1 + 0.04) / 3), rel=1e-6)
    assert found.abs_rel == pytest.approx((1 + 0.2 / 1.2) / 3, rel=1e-6)
    assert found.a1 == pytest.approx(200 / 3)  # ratios 2, 1.2 and 1
    assert all(math.isnan(value) for value in errors_of(predicted, torch.zeros(2, 2), FARTHEST))


def test_unknown_depths():
    target = torch.tensor([0.0, torch.nan, -1.0, 1e-4, 2.0, 10.0, 10.1, torch.inf])
    assert known(target, 10.0).tolist() == [False] * 4 + [True, True, False, False]


def test_loss_by_hand():
    predicted, target = torch.tensor([2.0, 3.0, 7.0, 5.0]), torch.tensor([1.0, 3.0, 4.0, 0.0])
    gaps = [math.log((p + 1e-3) / (t + 1e-3)) for p, t in ((2, 1), (3, 3), (7, 4))]
    mean = sum(gaps) / 3
    variance = sum((gap - mean) ** 2 for gap in gaps) / 2
    mask = known(target, 10.0)
    assert sig_loss(predicted, target, mask).item() == pytest.approx(
        math.sqrt(variance + 0.15 * mean**2), rel=1e-5
    )
    early = sig_loss(predicted, target, mask, with_variance=False)
    assert early.item() == pytest.approx(math.sqrt(0.15) * abs(mean), rel=1e-5)


def test_loss_of_one_known_pixel_has_no_variance():
    found = sig_loss(
        torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    )
    assert found.item() == pytest.approx(math.sqrt(0.15) * math.log(2.001 / 1.001), rel=1e-5)


def test_a_perfect_prediction_has_a_finite_gradient():
    predicted = torch.tensor([2.0, 3.0], requires_grad=True)
    sig_loss(predicted, predicted.detach(), torch.tensor([True, True])).backward()
    assert predicted.grad.isfinite().all()


def test_bins_mix_to_their_mean():
    mean = BinMean(10.0)
    assert mean(torch.zeros(1, 256, 1, 1)).item() == pytest.approx(
        5.0005, rel=1e-5
    )  # all alike: the middle
    outputs = torch.full((1, 256, 2, 3), -5.0)
    outputs[:, 255] = 1e6
    assert mean(outputs).shape == (1, 1, 2, 3)
    assert mean(outputs)[0, 0, 1, 2].item() == pytest.approx(10, abs=1e-2)
    outputs[:, 255] = 1.0  # the last bin weighs 1.1, the others 0.1
    assert mean(outputs)[0, 0, 1, 2].item() == pytest.approx((25.6 * 5.0005 + 10) / 26.6, rel=1e-5)


def test_the_variance_counts_from_the_hundredth_iteration_on(monkeypatch):
    module, seen = sys.modules[sig_loss.__module__], []  # the package's `depth` is the function

    def spy(*args, with_variance: bool):
        seen.append(with_variance)
        return sig_loss(*args, with_variance=with_variance)

    monkeypatch.setattr(module, "sig_loss", spy)
    depth(knows_depth(), Ranged(steps(1), steps(1)), replace(DEPTH, iterations=102, batch_size=1))
    assert seen == [False] * 100 + [True] * 2


def test_a_backbone_that_knows_the_depth_finds_it():
    data = Ranged(steps(12), steps(4, seed=1))
    settings = replace(DEPTH, iterations=400, batch_size=8)
    found, blind = (depth(backbone, data, settings) for backbone in (knows_depth(), noise()))
    # Not all: half a patch around every step is interpolated, three quarters of the area of these
    # 16-pixel squares.
    assert found["a1"] > 75 and found["abs_rel"] < 0.25
    assert blind["a1"] < 30 and blind["rmse"] > 2 * found["rmse"]
    assert 9 < found["protocol"]["farthest"] <= 9.5


def test_broken_images_are_counted_and_unknown_ones_skipped():
    train, test = steps(4), steps(3, seed=1)
    train.pairs[1] = test.pairs[0] = None
    test.pairs[1] = (test.pairs[1][0], torch.zeros(64, 64))
    found = depth(knows_depth(), Ranged(train, test), replace(DEPTH, iterations=2))
    assert found["unreadable"] == 2 and math.isfinite(found["rmse"])


def test_bad_input_gets_one_sentence():
    unknown = PairList([(torch.rand(3, 64, 64), torch.zeros(64, 64))])
    other = PairList([(torch.rand(3, 64, 64), torch.ones(32, 64))])
    cases = [
        (
            unknown,
            steps(1),
            {},
            "depth: expected pixels of a known target in the training split, got none",
        ),
        (steps(1), unknown, {}, "expected test depths from 0.001 to"),
        (other, steps(1), {}, "expected a target of the image's size [64, 64], got [32, 64]"),
        (steps(1), steps(1), {"farthest": 0.0}, "farthest: expected more than 0.001 m, got 0.0"),
        (
            steps(1),
            steps(1),
            {"farthest": 0.1},
            "depth: expected pixels of a known target in the training split",
        ),
    ]
    for train, test, settings, message in cases:
        with pytest.raises(
            ValueError if message.startswith("farthest") else DataError, match=re.escape(message)
        ):
            depth(noise(), Ranged(train, test), replace(DEPTH, iterations=1), **settings)
    with pytest.raises(ValueError, match="NaN or infinity"):
        depth(diverged(), Ranged(steps(1), steps(1)), replace(DEPTH, iterations=1))
