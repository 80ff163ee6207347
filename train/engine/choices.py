"""Fields of a recipe whose value is one of several dataclasses, or none: how a command line says
which.

A class is chosen by its name in small letters (`--gram.teacher snapshot`), without "Settings" at
its end (`--backbone convnext`), and then has options of its own (`--gram.teacher.every 100`). A
field that may be none (`gram`) is there with any option of it, and is dropped by the word none.
Schedules are no such choice: they need arguments to be made, and keep the class that a recipe gives
them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from inspect import getdoc
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from dinov3core.bounds import fields_of
from dinov3core.train.engine.config import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NONE = "none"
Settings = TypeVar("Settings", bound="DataclassInstance")


class Choice(NamedTuple):
    """What a field may be: one of several classes, or one class or none."""

    option: str  # --gram.teacher
    classes: dict[str, type]  # by the word that chooses each
    may_be_none: bool

    def expected(self) -> str:
        """What may follow the option, in words."""
        *others, last = self.classes
        if not self.may_be_none:
            return f"{', '.join(others)} or {last}"
        first_field = fields(self.classes[last])[0].name
        return f"none, or an option of it such as {self.option}.{first_field}"


def choice_of(option: str, kind: Any) -> Choice | None:
    """The choice that a field of that kind leaves to a command line; None: there is none."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else ()
    words = {one: one.__name__.removesuffix("Settings").lower() for one in kinds}
    classes = {word: one for one, word in words.items() if is_dataclass(one)}
    may_be_none = NoneType in kinds
    if not classes or len(kinds) != len(classes) + may_be_none:
        return None
    needs_nothing = all(map(_needs_nothing, classes.values()))
    return Choice(option, classes, may_be_none) if needs_nothing else None


def _needs_nothing(cls: Any) -> bool:
    return all({item.default, item.default_factory} != {MISSING} for item in fields(cls))


def word_of(kind: Any, value: object) -> str | None:
    """The word that chooses a value for a field of that kind; None where no word does."""
    choice = choice_of("", kind)
    if choice is None or choice.may_be_none:
        return None
    return next(word for word, cls in choice.classes.items() if cls is type(value))


def choose(
    settings: Settings, arguments: Sequence[str], prefix: str = "--"
) -> tuple[Settings, list[str]]:
    """Settings of the classes that a command line asks for, and the arguments that remain.

    Raises:
        ConfigError: a word that chooses nothing, or an option of a class that was not chosen.
    """
    rest = list(arguments)
    changes = {}
    for name, option, kind in _options(settings, prefix):
        value = getattr(settings, name)
        choice = choice_of(option, kind)
        if choice is not None:
            value, rest = _chosen(choice, value, rest)
        if is_dataclass(value):
            value, rest = choose(value, rest, f"{option}.")
        changes[name] = value
    return replace(settings, **changes), rest


def _options(settings: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(name, option, kind) of every field."""
    for item in fields_of(type(settings)):
        yield item.name, prefix + item.name.replace("_", "-"), item.kind


def _chosen(choice: Choice, value: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """The value of a field, of the class that is asked for, and the arguments that remain."""
    word, rest = _word_after(choice.option, arguments)
    inner = [name for name in map(_option, rest) if name.startswith(f"{choice.option}.")]
    if choice.may_be_none:
        if word not in (None, NONE):
            raise ConfigError(f"{choice.option}: expected {choice.expected()}, got {word!r}")
        if word == NONE and inner:
            raise ConfigError(f"{choice.option} none leaves no {inner[0]}; drop one of them")
        if word == NONE or (value is None and not inner):
            return None, rest
        (cls,) = choice.classes.values()
    elif word is None:
        cls = type(value)
    elif word in choice.classes:
        cls = choice.classes[word]
    else:
        raise ConfigError(f"{choice.option}: expected {choice.expected()}, got {word!r}")

    for option in inner:
        _refuse_of_another(choice, cls, option)
    return (value if type(value) is cls else cls()), rest


def _word_after(option: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """What an option is given, the last time it is named, and the other arguments."""
    word = None
    others = []
    left = iter(arguments)
    for argument in left:
        if _option(argument) != option:
            others.append(argument)
        elif "=" in argument:
            word = argument.partition("=")[2]
        else:
            word = next(left, "")
    return word, others


def _option(argument: str) -> str:
    """The option an argument names, as a help page spells it; empty for a value."""
    return argument.partition("=")[0].replace("_", "-") if argument.startswith("--") else ""


def _refuse_of_another(choice: Choice, cls: type, option: str) -> None:
    """Refuse an option that another class has, and this one has not."""
    name = option.removeprefix(f"{choice.option}.").partition(".")[0].replace("-", "_")
    having = [word for word, one in choice.classes.items() if name in _names(one)]
    if having and name not in _names(cls):
        raise ConfigError(f"{option} is an option of {choice.option} {having[0]}; give both")


def _names(cls: Any) -> set[str]:
    return {item.name for item in fields(cls)}


def with_everything(settings: Settings) -> Settings:
    """Settings with a value for every field that may be none."""
    changes = {}
    for name, option, kind in _options(settings, ""):
        choice = choice_of(option, kind)
        if choice is not None and getattr(settings, name) is None:
            (cls,) = choice.classes.values()
            changes[name] = cls()
    return replace(settings, **changes)


def in_words(settings: Any, prefix: str = "--") -> Iterator[str]:
    """For a help page: a line for every word, with what it chooses and the options it brings."""
    for name, option, kind in _options(settings, prefix):
        choice = choice_of(option, kind)
        if choice is not None and choice.may_be_none:
            (cls,) = choice.classes.values()
            yield f"  {option}.*: {_summary(cls)} Off unless one is given; {option} none drops it."
        elif choice is not None:
            yield from (_in_words(option, word, cls) for word, cls in choice.classes.items())
        if is_dataclass(getattr(settings, name)):
            yield from in_words(getattr(settings, name), f"{option}.")


def _in_words(option: str, word: str, cls: Any) -> str:
    options = [f"{option}.{item.name.replace('_', '-')}" for item in fields(cls)]
    return f"  {option} {word}: {_summary(cls)}" + (f" ({', '.join(options)})" if options else "")


def _summary(cls: type) -> str:
    return (getdoc(cls) or "").partition("\n")[0]
