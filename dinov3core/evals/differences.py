"""Do two scores differ by more than chance? One rule for every sentence that compares them.

Scores differ when they lie more than two standard errors of their difference apart. Most scores
that are compared are of the same images, so that their difference is surer than the rule takes it
to be: it says "level" too often rather than too rarely.
"""

import math
from typing import NamedTuple

ERRORS = 2.0  # standard errors of a difference beyond which it is no chance
WITHIN = "within two standard errors"


class Measured(NamedTuple):
    """A score and its standard error, in one unit; without an error every difference counts."""

    value: float
    error: float | None = None


def errors_between(a: Measured, b: Measured) -> float:
    """How far two scores are apart, in standard errors of their difference; inf without errors."""
    distance = abs(a.value - b.value)
    error = math.hypot(a.error or 0.0, b.error or 0.0)
    if distance == 0:
        return 0.0
    return distance / error if error else math.inf


def differ(a: Measured, b: Measured) -> bool:
    """Whether two scores differ by more than chance."""
    return errors_between(a, b) > ERRORS


def rose(before: Measured, after: Measured) -> bool:
    """Whether a score is higher than before by more than chance."""
    return after.value > before.value and differ(before, after)


def fell(before: Measured, after: Measured) -> bool:
    """Whether a score is lower than before by more than chance."""
    return after.value < before.value and differ(before, after)


def standing(score: Measured, other: Measured, name: str) -> str:
    """Where a score stands beside another of that name: "4.1 points above raw pixels".

    Of the figures as they are printed, with one digit, so that who subtracts them finds the same.
    """
    gain = round(score.value, 1) - round(other.value, 1)
    if round(gain, 1) == 0:
        return f"level with {name}"
    points = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    if differ(score, other):
        return f"{points} {name}"
    return f"level with {name} ({points}, {WITHIN})"
