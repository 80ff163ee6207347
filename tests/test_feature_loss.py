"""The feature-matching term: against its mathematics in float64, and what it must not depend on."""

import numpy as np
import pytest
import torch

from dinov3core.losses import (
    feature_sums,
    finite_total,
    restored,
    standardised,
    statistics_of,
    unexplained_share,
)


def features(rows=257, width=19, offset=3.0, seed=0):
    """Correlated channels of unlike variance, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(0.1, 3, width)
    shift = offset * torch.randn(width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing + shift


def prediction(teacher, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(teacher.shape, generator=generator)


def term(teacher, predicted):
    statistics = statistics_of(feature_sums(teacher))
    return unexplained_share(predicted, standardised(teacher, statistics), len(teacher))


def reference(teacher, predicted):
    """mean over rows and channels of (y - (x - mean) / scale)^2, written out in float64."""
    x = teacher.double().numpy()
    y = predicted.double().numpy()
    mean = x.mean(axis=0)
    scale = np.sqrt(((x - mean) ** 2).sum(axis=1).mean() / x.shape[1])
    return ((y - (x - mean) / scale) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_equals_the_mathematics_in_float64(dtype, offset):
    teacher = features(offset=offset).to(dtype)
    predicted = prediction(teacher).to(dtype)
    want = reference(teacher, predicted)

    # The plain formula in fp32 with torch's own moments is what the error is measured against.
    x, y = teacher.float(), predicted.float()
    plain = (y - (x - x.mean(0)) / x.var(0, correction=0).mean().sqrt()).square().mean()
    rounding = 1e-6 * want
    assert abs(term(teacher, predicted) - want) <= 2 * abs(plain - want) + rounding


def test_gradient_equals_that_of_the_mathematics():
    teacher = features()
    predicted = prediction(teacher).requires_grad_()
    term(teacher, predicted).backward()
    x = teacher.double()
    scale = x.var(0, correction=0).mean().sqrt()
    want = 2 * (predicted.detach().double() - (x - x.mean(0)) / scale) / predicted.numel()
    torch.testing.assert_close(predicted.grad.double(), want, rtol=1e-5, atol=1e-9)


def test_is_one_for_who_knows_the_mean_and_zero_for_who_knows_all():
    teacher = features(offset=50.0)
    statistics = statistics_of(feature_sums(teacher))
    known = standardised(teacher, statistics)
    assert abs(unexplained_share(torch.zeros_like(known), known, len(known)) - 1) < 1e-5
    assert unexplained_share(known, known, len(known)) == 0
    torch.testing.assert_close(restored(known, statistics), teacher)


@pytest.mark.parametrize("factor", [100.0, 1e-4, 1e12])
def test_features_of_another_magnitude_are_the_same_features(factor):
    teacher = features()
    predicted = prediction(teacher)
    assert term(factor * teacher, predicted).item() == pytest.approx(
        term(teacher, predicted).item(), rel=1e-6
    )


def test_angles_and_principal_directions_are_kept():
    """One scale: centred rows keep their cosines, as a scale for each channel would not."""
    teacher = features()
    z = standardised(teacher, statistics_of(feature_sums(teacher)))
    centred = teacher - teacher.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(
        cosine(z[:-1], z[1:]), cosine(centred[:-1], centred[1:]), rtol=1e-4, atol=1e-5
    )


def test_parts_add_up_to_the_whole():
    teacher = features()
    predicted = prediction(teacher)
    parts = teacher.split(100)
    sums = sum(feature_sums(part) for part in parts)
    torch.testing.assert_close(sums, feature_sums(teacher), rtol=1e-12, atol=1e-9)
    statistics = statistics_of(sums)
    shares = [
        unexplained_share(some, standardised(part, statistics), len(teacher))
        for some, part in zip(predicted.split(100), parts, strict=True)
    ]
    torch.testing.assert_close(sum(shares), term(teacher, predicted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_never_reaches_the_statistics(broken):
    before = feature_sums(features())
    teacher = features(seed=2)
    assert not torch.equal(finite_total(before, feature_sums(teacher)), before)
    teacher[3, 4] = broken
    assert torch.equal(finite_total(before, feature_sums(teacher)), before)


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_a_constant_teacher_asks_for_its_mean_alone(value):
    teacher = torch.full((64, 5), value)
    statistics = statistics_of(feature_sums(teacher))
    z = standardised(teacher, statistics)
    assert z.isfinite().all() and z.abs().max() < 1


def test_no_rows_have_no_statistics():
    statistics = statistics_of(feature_sums(torch.empty(0, 4)))
    assert statistics.mean_D.isnan().all() and statistics.scale.isnan()
