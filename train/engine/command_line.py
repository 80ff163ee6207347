"""What the commands of train/ share: a recipe with overrides, and how a command ends.

A command is a file train/NAME.py: a docstring that is its help, a `main` that gets the arguments,
and `run(main)` at its end.
"""

import functools
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from dinov3core.bounds import fields_of
from dinov3core.data.errors import DataError
from dinov3core.data.sizes import CropSizes
from dinov3core.printable import printable
from dinov3core.train.engine import choices, parallel
from dinov3core.train.engine.calling import as_called, program
from dinov3core.train.engine.checkpoint import CheckpointError
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.settings import FeatureTeacher
from dinov3core.train.engine.metrics import report_thread_failure
from dinov3core.train.engine.parallel import WorldError
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule
from dinov3core.train.engine.stopping import Interrupted, TrainingStopped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Recipe = TypeVar("Recipe", bound="DataclassInstance")
Settings = TypeVar("Settings", bound="DataclassInstance")
Main = Callable[[list[str]], int | None]

# Raised by all processes alike: the first one speaks for all.
ALIKE = (ConfigError, CheckpointError, TrainingStopped)
# May be the trouble of a single process: each says its own.
OF_ONE: tuple[type[Exception], ...] = (DataError, WorldError)


# --- recipes


class ChosenRecipe(NamedTuple, Generic[Recipe]):
    """A recipe from a command line."""

    recipe: Recipe  # with every override applied
    standard: Recipe  # of the same name, as it is without them


@dataclass(frozen=True)
class RecipeParser(Generic[Recipe]):
    """Reads `[recipe] [--field.subfield value ...]`.

    Args:
        command: NAME of train/NAME.py.
        about: its docstring, the head of its help.
        recipes: by name; the first one is taken when none is named.
        note: stands in the help of every recipe, below what that says of itself.
    """

    command: str
    about: str
    recipes: Mapping[str, Callable[[], Recipe]]
    note: str = ""

    def parse(self, argv: Sequence[str]) -> ChosenRecipe[Recipe]:
        """The recipe named first, with every override applied.

        Raises:
            ConfigError: no such recipe, a value for a group of fields, or a choice there is not.
            SystemExit: by tyro after its help or its sentence; after the overview of all recipes.
        """
        name, overrides = self.named(argv)
        standard = self.recipes[name]()
        start, overrides = with_choices(standard, overrides)
        about = self.about_recipe(name)
        if asks_for_help(overrides):
            about = "\n".join([about, *choices_in_words(start)])
        return ChosenRecipe(with_options(start, overrides, self.page(name, about)), standard)

    def named(self, argv: Sequence[str]) -> tuple[str, list[str]]:
        """The name of the recipe that a command line asks for, and its options.

        Raises:
            ConfigError: there is none of that name.
            SystemExit: after the overview of all recipes.
        """
        if list(argv) in (["--help"], ["-h"]):
            print(self._overview())
            raise SystemExit(0)

        name, overrides = next(iter(self.recipes)), list(argv)
        if argv and not argv[0].startswith("-"):
            name, *overrides = argv
        if name not in self.recipes:
            near = get_close_matches(name, self.recipes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown recipe {name!r}{hint} Known: {', '.join(self.recipes)}.")
        return name, overrides

    def about_recipe(self, name: str) -> str:
        """What the help of a recipe says first."""
        return "\n\n".join(filter(None, ((self.recipes[name].__doc__ or "").strip(), self.note)))

    def page(self, name: str, about: str) -> "Page":
        """The help page of a recipe."""
        return Page(f"{program(self.command)} {name}", about)

    def _overview(self) -> str:
        rows = []
        width = max(14, *map(len, self.recipes))
        for name, recipe in self.recipes.items():
            summary = (recipe.__doc__ or "").strip().splitlines()[0]
            rows.append(f"  {name:{width}} {summary}")
        every_field = f"Every field: {program(self.command)} <recipe> --help"
        return "\n".join([as_called(self.about.strip()), "", "recipes:", *rows, "", every_field])


class Page(NamedTuple):
    """The head of a help page, and of what is said about unreadable options."""

    program: str
    about: str


def asks_for_help(options: Sequence[str]) -> bool:
    """Whether a command line asks for the page of all options."""
    return not {"--help", "-h"}.isdisjoint(options)


def with_choices(start: Settings, options: Sequence[str]) -> tuple[Settings, list[str]]:
    """Settings of the classes that a command line asks for, and the options that remain.

    Raises:
        ConfigError: a value for a group of fields, or a choice there is not.
    """
    start, rest = choices.choose(start, options)
    if asks_for_help(rest):
        start = choices.with_everything(start)
    for complaint in _groups_given_a_value(start, rest):
        raise ConfigError(complaint)
    return start, rest


def with_options(start: Settings, options: Sequence[str], page: Page) -> Settings:
    """Settings with every option applied.

    Raises:
        ConfigError: a value of several parts that cannot be read.
        SystemExit: by tyro after its help or its sentence.
    """
    settings = tyro.conf.configure(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    try:
        return tyro.cli(
            settings(type(start)),
            prog=page.program,
            description=as_called(page.about),
            default=start,
            args=options,
            registry=_values_of_several_parts(),
        )
    except _UnreadableValue as error:
        raise ConfigError(str(error)) from error


def choices_in_words(settings: object) -> list[str]:
    """Lines on the fields that are one of several classes, for a help page."""
    lines = list(choices.in_words(settings))
    return ["", "choices:", *lines] if lines else []


class _UnreadableValue(Exception):
    """What is wrong with a value; tyro would say that none of many readings fits."""


class _Written(NamedTuple):
    """How a dataclass that stands for one value is given as a word."""

    option: str  # by which it is given, for a sentence
    metavar: str


# By their class, which has `from_text` and `__str__`.
WRITTEN = {
    CropSizes: _Written("crops.other_sizes", "SHARE:GLOBAL/LOCAL[/GRAM]"),
    FeatureTeacher: _Written("teacher.teachers", "WEIGHTS[,size=PIXELS][,share=NUMBER]"),
}


def _values_of_several_parts() -> ConstructorRegistry:
    """How dataclasses that stand for one value each are read from a word, and written."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        cls: Any = info.type
        if cls not in WRITTEN:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=WRITTEN[cls].metavar,
            instance_from_str=functools.partial(_from_words, cls),
            is_instance=lambda value: isinstance(value, cls),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _from_words(cls: Any, words: list[str]) -> Any:
    try:
        return cls.from_text(words[0])
    except ValueError as error:
        raise _UnreadableValue(f"{WRITTEN[cls].option}: {error}") from error


def _groups_given_a_value(start: object, overrides: Sequence[str]) -> Iterator[str]:
    """What to write instead of `--optim.lr 1e-3`, where optim.lr is not one number but several."""
    for place, argument in enumerate(overrides):
        option, equals, given = argument.partition("=")
        value = given if equals else "".join(overrides[place + 1 : place + 2])
        group: object = start
        for part in option.removeprefix("--").replace("-", "_").split("."):
            group = getattr(group, part, None) if is_dataclass(group) else None
        if argument.startswith("--") and is_dataclass(group):
            yield f"{option} is {_group_in_words(option, group, value)}"


def _group_in_words(option: str, group: Any, value: str) -> str:
    words = [field.word.replace("_", "-") for field in fields_of(type(group))]
    options = [f"{option}.{word}" for word in words]
    if isinstance(group, CosineSchedule):
        return f"a schedule: give {options[0]} {value} at its top; others: {', '.join(options[1:])}"
    if isinstance(group, PhasedSchedule):
        held = " ".join(f"{one} {value}" for one in options[:3])
        return f"a schedule: give {held} to hold it; others: {', '.join(options[3:])}"
    return f"a group of fields, give one of them: {', '.join(options)}"


# --- ends


@dataclass(frozen=True)
class Ending:
    """What a command says when it does not come to its good end.

    Args:
        explained: errors whose words are meant for the user, besides those of every command.
        writing: what the command does when the disk fails under it.
        remains: what there is after that, and how to go on.
        interrupted: after Ctrl-C, when nothing else is to be said.
        interrupted_status: the exit status then.
    """

    explained: tuple[type[Exception], ...] = ()
    writing: str = "writing"
    remains: str = ""
    interrupted: str = "interrupted"
    interrupted_status: int = 130


def exit_status(main: Main, argv: list[str], ending: Ending) -> int:
    """`main`, with every end but the good one as a sentence on stderr; the status to exit with.

    0: done, or stopped by a signal and to be requeued; 1: an error, or what `main` returns.
    128 + the number of a signal that stopped training: 130 SIGINT, 143 SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is escaped and ends nothing.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except Interrupted as asked:
        return _say_once(str(asked), asked.code)
    except ALIKE as error:
        return _say_once(f"error: {error}", 1)
    except OF_ONE + ending.explained as error:
        return _say(f"error: {error}", 1)
    except OSError as error:
        where = os.fsdecode(error.filename or ending.writing)
        remains = f"; {ending.remains}" if ending.remains else ""
        return _say(f"error: {where}: {error.strerror or error}{remains}", 1)
    except KeyboardInterrupt:
        return _say_once(ending.interrupted, ending.interrupted_status)


def run(main: Main, ending: Ending = Ending()) -> NoReturn:
    """End this process with what `main` comes to with its command line."""
    threading.excepthook = report_thread_failure
    sys.exit(exit_status(main, sys.argv[1:], ending))


def _say_once(sentence: str, status: int) -> int:
    """Say what is true of all processes on the first one."""
    return _say(sentence, status) if parallel.is_first() else status


def _say(sentence: str, status: int) -> int:
    print(printable(as_called(sentence)), file=sys.stderr)
    return status
