"""Schedules against their formulas and against values printed by the published training code."""

import dataclasses
import math

import numpy as np
import pytest

from dinov3core.bounds import Bounds
from dinov3core.train.engine.config import GramAnchor, Run, Snapshot
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import (
    CosineSchedule,
    PhasedSchedule,
    Schedule,
    constant,
    first_outside,
    lr_factor,
    scaled,
    values,
)
from dinov3core.train.engine.teacher import Refreshes
from dinov3core.train.recipes.imagenet import vitl16_im1k

STEPS, EPOCH = 90, 10


def test_cosine_warmup_includes_its_end_and_the_cosine_stops_one_short() -> None:
    made = values(CosineSchedule(base=2.0, final=0.5, start=0.2, warmup_epochs=2), STEPS, EPOCH)
    assert made[0] == 0.2
    assert made[19] == made[20] == 2.0  # the end of the warm-up, and again the start of the cosine
    for step in range(20, STEPS):
        assert made[step] == pytest.approx(
            0.5 + 0.75 * (1 + math.cos(math.pi * (step - 20) / 70)), abs=1e-15
        )
    assert made[-1] > 0.5


def test_truncated_cosine_ends_at_its_final_value() -> None:
    made = values(
        CosineSchedule(base=2.0, final=0.5, warmup_epochs=1, truncate_extra=0.25), STEPS, EPOCH
    )
    points = int(1.25 * 80)
    full = [0.5 * (1 + math.cos(math.pi * i / (points - 1))) for i in range(80)]
    expected = [0.5 + 1.5 * (value - full[-1]) / (1 - full[-1]) for value in full]
    np.testing.assert_allclose(made[10:], expected, rtol=0, atol=1e-14)
    assert made[10] == 2.0 and made[-1] == 0.5


def test_phases_exclude_the_end_of_the_warmup_and_include_both_ends_of_the_cosine() -> None:
    made = values(
        PhasedSchedule(start=0.1, peak=1.0, end=0.3, warmup_epochs=2, cosine_epochs=4), STEPS, EPOCH
    )
    np.testing.assert_allclose(
        made[:20], [0.1 + 0.9 * i / 20 for i in range(20)], rtol=0, atol=1e-15
    )
    assert made[20] == 1.0 and made[59] == pytest.approx(0.3, abs=1e-15)
    for step in range(20, 60):
        assert made[step] == pytest.approx(
            0.3 + 0.35 * (1 + math.cos(math.pi * (step - 20) / 39)), abs=1e-15
        )
    assert np.all(made[60:] == 0.3)


def test_a_cosine_without_length_fills_the_run() -> None:
    made = values(PhasedSchedule(start=0.0, peak=1.0, end=0.0, warmup_epochs=3), STEPS, EPOCH)
    assert made[30] == 1.0 and made[-1] == 0.0 and len(made) == STEPS


def test_peak_below_end_is_a_smooth_rise() -> None:
    made = values(PhasedSchedule(start=0.0, peak=0.0, end=2.0, cosine_epochs=5), STEPS, EPOCH)
    assert made[0] == 0.0 and np.all(np.diff(made[:50]) > 0) and np.all(made[50:] == 2.0)


def test_constant() -> None:
    assert np.all(values(constant(0.7), STEPS, EPOCH) == 0.7)


@pytest.mark.parametrize("steps", [10, 11])
def test_a_truncated_cosine_of_no_or_one_step(steps: int) -> None:
    schedule = CosineSchedule(base=2.0, final=0.5, warmup_epochs=1, truncate_extra=0.25)
    series = values(schedule, steps, 10)
    assert np.all(np.isfinite(series)) and series[9] == 2.0 and np.all(series[10:] == 0.5)


def test_the_first_step_out_of_bounds_is_named() -> None:
    bounds = Bounds(0, 1)
    assert first_outside(np.array([0.0, 0.5, 1.0]), bounds) is None
    assert first_outside(np.array([0.0, 1.5, -1.0]), bounds) == 1
    assert first_outside(np.array([0.0, 0.5, math.nan]), bounds) == 2
    assert first_outside(np.array([0.0, math.inf]), bounds) == 1
    assert first_outside(np.array([1 + 2**-52, -1e-16]), bounds) is None  # rounding of a sum


SHAPES = [
    CosineSchedule(base=2.0, final=0.5, start=0.2, warmup_epochs=2),
    CosineSchedule(base=2.0, final=0.5, warmup_epochs=1, truncate_extra=0.25),
    PhasedSchedule(start=0.1, peak=1.0, end=0.3, warmup_epochs=2, cosine_epochs=4),
    PhasedSchedule(start=0.0, peak=1.0, end=0.0, warmup_epochs=3),
    constant(0.7),
]


@pytest.mark.parametrize("schedule", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [33, 450, 1800])
def test_another_length_stretches_every_schedule(schedule: Schedule, steps: int) -> None:
    """At equal shares of the run the values are equal, to within one step of the coarser one."""
    run = Run(epochs=9, epoch_steps=100)
    stretched = dataclasses.replace(run, steps=steps)
    whole = values(schedule, run.total_steps, run.epoch_length)
    other = values(schedule, stretched.total_steps, stretched.epoch_length)
    shares = np.linspace(0, 1, 200, endpoint=False)
    nearest = whole[(shares * len(whole)).astype(int)]
    coarser = whole if len(whole) < len(other) else other
    tolerance = np.abs(np.diff(coarser)).max() + 1e-12
    np.testing.assert_allclose(other[(shares * steps).astype(int)], nearest, rtol=0, atol=tolerance)


def test_a_short_run_is_a_shrunken_copy() -> None:
    recipe = vitl16_im1k()
    recipe = dataclasses.replace(
        recipe, gram=GramAnchor(Snapshot(first=50_000, every=5000, at_most=3))
    )
    short = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=250))
    long, resolved = resolve(recipe, 32), resolve(short, 32)
    assert (long.steps, resolved.steps) == (125_000, 250)
    assert resolved.schedules["lr"].argmax() == 24  # 10 of 100 epochs, the end of the warm-up
    assert resolved.schedules["lr"].max() == long.schedules["lr"].max()
    assert np.flatnonzero(resolved.schedules["last_layer_lr"])[0] == 2  # 1 of 100 epochs
    assert resolved.refreshes == Refreshes(first=100, every=10, at_most=3)
    assert long.refreshes == Refreshes(first=50_000, every=5000, at_most=3)
    assert np.flatnonzero(resolved.schedules["gram_weight"])[0] == 100  # no snapshot, no anchor
    assert (short.run.eval_every, short.run.checkpoint_every) == (12_500, 3750)  # as they are


def test_the_length_of_the_recipe_changes_nothing() -> None:
    recipe = vitl16_im1k()
    same = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=125_000))
    for name, series in resolve(recipe, 32).schedules.items():
        assert np.array_equal(series, resolve(same, 32).schedules[name]), name


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shortest_runs_resolve(steps: int) -> None:
    recipe = vitl16_im1k()
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=steps))
    resolved = resolve(recipe, 1)
    assert {len(series) for series in resolved.schedules.values()} == {steps}


@pytest.mark.parametrize(
    "schedule", [CosineSchedule(1.0, 0.0, warmup_epochs=10), PhasedSchedule(0, 1, 0, 10)]
)
def test_a_warmup_longer_than_the_run_is_refused(schedule: CosineSchedule | PhasedSchedule) -> None:
    with pytest.raises(ValueError, match=r"warm-up of 10 epochs is 100 steps but the run has 90"):
        values(schedule, STEPS, EPOCH)


def test_warmup_and_cosine_longer_than_the_run_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"warm-up \(50 steps\) and cosine \(50 steps\) exceed the run's 90"
    ):
        values(PhasedSchedule(0, 1, 0, 5, 5), STEPS, EPOCH)


@pytest.mark.parametrize(
    ("rule", "batch", "factor"),
    [
        ("sqrt_wrt_1024", 1024, 4.0),  # the published rule carries this factor
        ("sqrt_wrt_1024", 2048, 4 * math.sqrt(2)),
        ("linear_wrt_256", 1024, 4.0),
        ("none", 1024, 1.0),
    ],
)
def test_lr_factor(rule: str, batch: int, factor: float) -> None:
    assert lr_factor(rule, batch) == pytest.approx(factor, rel=1e-15)


def test_unknown_lr_rule() -> None:
    with pytest.raises(ValueError, match="lr_scaling: expected 'sqrt_wrt_1024'"):
        lr_factor("sqrt", 1024)


def test_scaling_leaves_start_and_the_cosine_final_alone() -> None:
    assert scaled(CosineSchedule(1.0, 0.1, start=0.2), 3.0) == CosineSchedule(3.0, 0.1, start=0.2)
    assert scaled(PhasedSchedule(0.2, 1.0, 0.1), 3.0) == PhasedSchedule(
        0.2, 3.0, pytest.approx(0.3)
    )


SQRT_2048 = 4 * math.sqrt(2048 / 1024)
SQRT_4096 = 4 * math.sqrt(4096 / 1024)
SQRT_1920 = 4 * math.sqrt(1920 / 1024)


@pytest.mark.parametrize(
    ("schedule", "steps", "epoch", "at", "value"),
    [
        # ViT-L on ImageNet-1k, 32 processes of 64 images
        (
            scaled(CosineSchedule(1e-3, 1e-6, warmup_epochs=10), SQRT_2048),
            125_000,
            1250,
            1,
            4.525845e-7,
        ),
        (
            scaled(CosineSchedule(1e-3, 1e-6, warmup_epochs=10), SQRT_2048),
            125_000,
            1250,
            62_500,
            3.319992e-3,
        ),
        (
            scaled(CosineSchedule(1e-3, 1e-6, warmup_epochs=10), SQRT_2048),
            125_000,
            1250,
            124_999,
            1.0000011e-6,
        ),
        # ViT-7B: constant rate after 100,000 steps of warm-up
        (scaled(PhasedSchedule(0, 5e-5, 5e-5, 100), SQRT_4096), 1_000_000, 1000, 1, 4e-9),
        (
            scaled(PhasedSchedule(0, 5e-5, 5e-5, 100), SQRT_4096),
            1_000_000,
            1000,
            99_999,
            3.99996e-4,
        ),
        (scaled(PhasedSchedule(0, 5e-5, 5e-5, 100), SQRT_4096), 1_000_000, 1000, 500_000, 4e-4),
        # ViT-7B, Gram anchoring: both weights move over 1,000 steps after one million
        (PhasedSchedule(0, 0, 2.0, 1000, 1), 1_200_000, 1000, 1_000_500, 1.001572),
        (PhasedSchedule(1, 1, 0.5, 1000, 1), 1_200_000, 1000, 1_000_500, 0.749607),
        # ViT-7B at high resolution: a half-cosine up over 10,000 steps
        (scaled(PhasedSchedule(0, 0, 1.25e-5, 0, 10), SQRT_2048), 30_000, 1000, 5_000, 3.536090e-5),
        (scaled(PhasedSchedule(0, 0, 1.25e-5, 0, 10), SQRT_2048), 30_000, 1000, 9_999, 7.071068e-5),
        (
            scaled(PhasedSchedule(0, 0, 1.25e-5, 0, 10), SQRT_2048),
            30_000,
            1000,
            20_000,
            7.071068e-5,
        ),
        # distilled ViT-L: the same over 12,500 steps, and a momentum that rises with it
        (
            scaled(PhasedSchedule(0, 0, 2.633913e-4 / SQRT_1920, 0, 10), SQRT_1920),
            25_000,
            1250,
            6_250,
            1.317122e-4,
        ),
        (
            scaled(PhasedSchedule(0, 0, 2.633913e-4 / SQRT_1920, 0, 10), SQRT_1920),
            25_000,
            1250,
            12_499,
            2.633913e-4,
        ),
        (PhasedSchedule(0.994, 0.994, 1.0), 25_000, 1250, 12_500, 0.9970002),
    ],
)
def test_published_values(
    schedule: CosineSchedule | PhasedSchedule, steps: int, epoch: int, at: int, value: float
) -> None:
    assert values(schedule, steps, epoch)[at] == pytest.approx(
        value, rel=5e-7
    )  # printed to seven digits
