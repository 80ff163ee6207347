"""Scalars over training: learning rate, weight decay, momentum, temperature, loss weights.

Two published shapes exist and differ by one sample at each seam; both are kept because recipes
quote numbers of either. `values(schedule, steps, epoch_steps)` turns a shape into one float64 per
step.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from dinov3core.bounds import Bounds

Value = Annotated[float, Bounds(-1e6, 1e6)]
Epochs = Annotated[float, Bounds(0, 1e6)]


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up that includes its end, then a cosine that ends one sample before `final`."""

    base: Value
    """Value at the end of the warm-up, the highest of a learning rate."""
    final: Value
    """Value the cosine ends at."""
    start: Value = 0.0
    """Value the warm-up starts from."""
    warmup_epochs: Epochs = 0.0
    """Length of the warm-up."""
    truncate_extra: Annotated[float, Bounds(0, 10)] = 0.0
    """Cut a cosine over (1 + this) times the remaining steps, and rescale it to end at `final`."""


@dataclass(frozen=True)
class PhasedSchedule:
    """Linear warm-up that excludes its end, a cosine from `peak` to `end` with both, then `end`."""

    start: Value
    """Value the warm-up starts from."""
    peak: Value
    """Value at the end of the warm-up."""
    end: Value
    """Value the cosine ends at, kept from there on."""
    warmup_epochs: Epochs = 0.0
    """Length of the warm-up."""
    cosine_epochs: Annotated[float, Bounds(0, 1e6, off=-1)] = -1.0
    """Length of the cosine; -1: all that remains."""


Schedule = CosineSchedule | PhasedSchedule


def constant(value: float) -> PhasedSchedule:
    """The same value at every step."""
    return PhasedSchedule(value, value, value)


def values(schedule: Schedule, steps: int, epoch_steps: float) -> np.ndarray:
    """float64 [steps].

    Args:
        epoch_steps: steps of an epoch, not necessarily whole.

    Raises:
        ValueError: when warm-up and cosine do not fit into `steps`.
    """
    warmup = int(schedule.warmup_epochs * epoch_steps)
    if warmup > steps:
        raise ValueError(
            f"a warm-up of {schedule.warmup_epochs} epochs is {warmup} steps but the run has "
            f"{steps}; shorten the warm-up or train longer"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # `first_outside` finds what overflowed
        if isinstance(schedule, CosineSchedule):
            series = _cosine(schedule, steps, warmup)
        else:
            series = _phased(schedule, steps, warmup, epoch_steps)
    assert len(series) == steps, (len(series), steps)
    return series


def first_outside(series: np.ndarray, bounds: Bounds) -> int | None:
    """The first step whose value is not finite or out of bounds; None when there is none."""
    rounded = np.round(series, 12)  # the last digit of a sum may lie beyond its ends
    if bounds.hold(rounded.min()) and bounds.hold(rounded.max()):  # a NaN is the minimum
        return None
    return next(step for step, value in enumerate(rounded) if not bounds.hold(value))


def _cosine(schedule: CosineSchedule, steps: int, warmup: int) -> np.ndarray:
    rising = np.linspace(schedule.start, schedule.base, warmup)
    remaining = steps - warmup
    span = schedule.base - schedule.final
    if schedule.truncate_extra == 0:
        angle = np.pi * np.arange(remaining) / max(remaining, 1)
        falling = schedule.final + 0.5 * span * (1 + np.cos(angle))
        return np.concatenate([rising, falling])
    if remaining < 2:  # nothing to lay a cosine over: the run ends at its final value
        return np.concatenate([rising, np.full(remaining, float(schedule.final))])
    points = int((1 + schedule.truncate_extra) * remaining)
    full = 0.5 * (1 + np.cos(np.linspace(0, np.pi, points)))[:remaining]
    unit = (full - full[-1]) / (1 - full[-1])
    return np.concatenate([rising, schedule.final + span * unit])


def _phased(schedule: PhasedSchedule, steps: int, warmup: int, epoch_steps: float) -> np.ndarray:
    rising = np.linspace(schedule.start, schedule.peak, warmup, endpoint=False)
    room = steps - warmup
    whole = schedule.cosine_epochs < 0
    falling_steps = room if whole else int(schedule.cosine_epochs * epoch_steps)
    if falling_steps > room:
        raise ValueError(
            f"warm-up ({warmup} steps) and cosine ({falling_steps} steps) exceed the run's {steps} "
            "steps; shorten them or train longer"
        )
    angle = np.linspace(0, np.pi, falling_steps)
    falling = schedule.end + 0.5 * (schedule.peak - schedule.end) * (1 + np.cos(angle))
    return np.concatenate([rising, falling, np.full(room - falling_steps, schedule.end)])


def lr_factor(rule: str, global_batch: int) -> float:
    """What a learning rate is multiplied by for a global batch.

    sqrt_wrt_1024 is 4 sqrt(batch / 1024), linear_wrt_256 is batch / 256. The factor 4 is part of
    the published rule: at batch 1024 the rate is four times the written one.
    """
    if rule == "sqrt_wrt_1024":
        return 4 * (global_batch / 1024) ** 0.5
    if rule == "linear_wrt_256":
        return global_batch / 256
    if rule == "none":
        return 1.0
    raise ValueError(
        f"lr_scaling: expected 'sqrt_wrt_1024', 'linear_wrt_256' or 'none', got {rule!r}"
    )


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """A learning rate times a factor: `base`, or `peak` and `end`; not `final` and `start`."""
    if isinstance(schedule, CosineSchedule):
        return replace(schedule, base=schedule.base * factor)
    return replace(schedule, peak=schedule.peak * factor, end=schedule.end * factor)
