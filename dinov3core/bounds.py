"""Bounds of settings, declared beside the fields: `depth: Annotated[int, Bounds(1, 1024)] = 12`.

Settings of data, models and runs all state theirs this way, so this file imports no room.
`complaints` walks a tree of dataclasses and says of every field, in one sentence, what was expected
and what came. A number is finite whatever its bounds say, and of the type its field states, so that
settings made in Python are held to the same rules as those of a command line.
"""

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where a number may lie, both ends included.

    Attributes:
        open_low, open_high: exclude that end.
        off: a value outside that is allowed as well, because it switches something off.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    off: float | None = None

    def hold(self, number: float) -> bool:
        """Whether a number is finite and within."""
        if self.off is not None and number == self.off:
            return True
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        ends = []
        if self.low > -math.inf:
            ends.append(f"{'above' if self.open_low else 'at least'} {_digits(self.low)}")
        if self.high < math.inf:
            ends.append(f"{'below' if self.open_high else 'at most'} {_digits(self.high)}")
        text = " and ".join(ends) or "a finite number"
        return text if self.off is None else f"{text}, or {self.off:g}"


# Kinds of numbers that several settings share.
Share = Annotated[float, Bounds(0, 1)]
Width = Annotated[int, Bounds(1, 2**16)]
Count = Annotated[int, Bounds(1, 1024)]
Std = Annotated[float, Bounds(1e-6, 10)]


class Field(NamedTuple):
    """What a field of a dataclass states about its value."""

    name: str
    kind: Any
    bounds: Bounds | None

    @property
    def word(self) -> str:
        """Its name for people, who write `from` where Python has to write `from_`."""
        return self.name.removesuffix("_")


def fields_of(owner: type) -> tuple[Field, ...]:
    """The fields of a dataclass with the types and bounds they state."""
    hints = get_type_hints(owner, include_extras=True)
    return tuple(_field(item.name, hints[item.name]) for item in dataclasses.fields(owner))


def _field(name: str, hint: Any) -> Field:
    if get_origin(hint) is not Annotated:
        return Field(name, hint, None)
    kind, *notes = get_args(hint)
    return Field(name, kind, next((note for note in notes if isinstance(note, Bounds)), None))


def complaints(settings: Any, prefix: str = "") -> Iterator[str]:
    """One sentence for every field whose value is of another type or out of its bounds.

    Args:
        settings: a dataclass; those in its fields, alone or in a tuple, are looked at as well.
        prefix: what stands before the names of the fields.
    """
    for field in fields_of(type(settings)):
        value = getattr(settings, field.name)
        name = prefix + field.word
        if not _fits(value, field.kind):
            yield f"{name}: expected {_described(field.kind)}, got {_shown(value)}"
        elif dataclasses.is_dataclass(value):
            yield from complaints(value, f"{name}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for place, member in enumerate(value):
                yield from complaints(member, f"{name}[{place}].")
        elif field.bounds is not None and not all(map(field.bounds.hold, _numbers(value))):
            yield f"{name}: expected {field.bounds}, got {_shown(value)}"


def _digits(number: float) -> str:
    """A number as people write it."""
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def _numbers(value: Any) -> tuple[Any, ...]:
    """The numbers of a value that has bounds; a schedule has fields of its own instead."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a stated type; whole numbers are numbers, truth values are not."""
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, tuple) and _fit_in_turn(value, inner)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)


def _fit_in_turn(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    """Whether the members of a tuple are of the types stated; an ellipsis repeats the first."""
    if kinds[-1] is Ellipsis:
        return all(_fits(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(map(_fits, values, kinds))


def _described(kind: Any) -> str:
    """A type in words."""
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"({', '.join('...' if one is Ellipsis else _described(one) for one in inner)})"
    return WORDS.get(kind) or f"a {kind.__name__}"


def _shown(value: Any) -> str:
    """A value for people, cut where it is endless."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
