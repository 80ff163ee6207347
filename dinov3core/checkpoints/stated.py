"""What JSON beside or inside weights may state: of every field, the kind and range it must have."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dinov3core.checkpoints.errors import WeightsError
from dinov3core.models import ImageStatistics


class Rule(NamedTuple):
    """What a field must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    """An integer of that range; true and false are none."""
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float, high: float) -> Rule:
    """A finite number of that range."""
    return Rule(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def one_of(*allowed: object) -> Rule:
    return Rule(f"one of {allowed}", lambda value: value in allowed)


def listed(rule: Rule) -> Rule:
    """A list of values that fit `rule`; an empty one counts as absent."""
    return Rule(
        f"a list, each {rule.words}",
        lambda value: isinstance(value, list) and all(rule.fits(item) for item in value),
    )


TEXT = Rule("text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
PAIR = Rule("two lists", lambda value: isinstance(value, list) and len(value) == 2)
TABLE = Rule("a JSON object", lambda value: isinstance(value, dict))


def fields(
    content: Mapping[str, Any], rules: Mapping[str, Rule], path: str | os.PathLike, inside: str
) -> dict[str, Any]:
    """Those fields of `content` that `rules` name and that are stated: not null, not empty.

    Args:
        path, inside: what a message begins with, and the part of the file or folder it names.

    Raises:
        WeightsError: a field of another kind or outside its range.
    """
    stated = {}
    for name, rule in rules.items():
        value = content.get(name)
        if value is None or value in ("", [], {}):
            continue
        if not rule.fits(value):
            raise WeightsError(
                path,
                f"expected {name} in {inside} to be {rule.words}, got {shown(value)}; "
                "take the original file or correct it",
            )
        stated[name] = value
    return stated


def shown(value: Any) -> str:
    """A value of a file for a message, however large it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


MEAN = listed(number(-1e3, 1e3))
STD = listed(number(1e-6, 1e3))


def image_statistics(
    content: Mapping[str, Any], names: tuple[str, str], path: str | os.PathLike, inside: str
) -> ImageStatistics | None:
    """The mean and standard deviation called `names`; None when neither is stated.

    Raises:
        WeightsError: other than two lists of equally many numbers, the deviations positive.
    """
    mean_name, std_name = names
    stated = fields(content, {mean_name: MEAN, std_name: STD}, path, inside)
    if not stated:
        return None
    mean, std = (tuple(stated.get(name, ())) for name in names)
    if len(mean) != len(std):
        raise WeightsError(
            path,
            f"expected as many values of {mean_name} as of {std_name} in {inside}, got {len(mean)} "
            f"and {len(std)}; take the original file or correct it",
        )
    return ImageStatistics(mean, std)
