"""The command line of train/distill.py: whose option it is, and what remains to be read.

`--optim.lr.base 1e-3` is for all students, `--vits.optim.lr.base 1e-3` for the student vits and
wins, whatever the order. `--teacher.run`, `--global-batch` and `--cache` are of the whole.
`--students vits,vitb` trains some of a recipe's students. `--plan` asks for a table of times.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import NamedTuple

from dinov3core.data.crops import CropSettings
from dinov3core.data.sizes import Size, pair
from dinov3core.train.engine import command_line
from dinov3core.train.engine.command_line import Page, RecipeParser
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.features import UNUSED_FIELDS
from dinov3core.train.engine.distillation.settings import (
    COMMAND_WORDS,
    Distill,
    Features,
    Student,
)
from dinov3core.train.engine.provenance import deviations

# Sizes of views: a student that sees the shared ones resized goes on seeing them so.
SIZES = ("crops.global-size", "crops.local-size")
# Groups of a student that a feature-level distillation does not read.
# Options of the whole; those of `base` are given without its name.
OF_WHOLE = {item.name.replace("_", "-") for item in fields(Distill)} - {"base", "students"}
BATCH = (
    "the images of a process follow from those of a step; give --global-batch IMAGES, which every "
    "student sees"
)
MOST_RANKS = 10**5
COMMAND_HELP = """\
besides:
  some of the recipe's students: --students NAME,NAME
  how many processes each student should have so that nobody waits, without training: --plan, from
    times measured here; --plan NAME=SECONDS,... with seconds per image of teacher or students that
    are known; --plan-ranks N for N processes instead of the recipe's"""


@dataclass(frozen=True)
class PlanOptions:
    """What `--plan` asks for.

    Args:
        seconds: per image of the teacher ("teacher") and of students by their names; what is
            missing is measured.
        ranks: processes to divide; 0: those of the recipe, or of this world.
    """

    seconds: Mapping[str, float]
    ranks: int = 0


class Asked(NamedTuple):
    """What a command line of train/distill.py asks for."""

    distill: Distill  # with every option applied
    standard: Distill  # the same students of the recipe as it is
    plan: PlanOptions | None  # None: to train


class Option(NamedTuple):
    """An option of a command line, with what follows it."""

    name: str  # without the dashes before it, words joined by dashes
    words: list[str]  # as given

    @property
    def value(self) -> str:
        """What it is given, as one word; empty for none."""
        _, equals, value = self.words[0].partition("=")
        return value if equals else " ".join(self.words[1:])

    @property
    def first(self) -> str:
        """Up to the first point."""
        return self.name.partition(".")[0]

    def of(self, student: str) -> "Option":
        """`--vits.optim.lr` as an option of that student: `--optim.lr`."""
        name = self.name.removeprefix(f"{_dashed(student)}.")
        dashes = len(student) + 3  # --vits.
        return Option(name, [f"--{self.words[0][dashes:]}", *self.words[1:]])


def parse(
    argv: Sequence[str], recipes: Mapping[str, Callable[[], Distill]], about: str = ""
) -> Asked:
    """What a command line asks for: `[recipe] [--field.subfield value ...]`.

    Args:
        recipes: by name; the first one is taken when none is named.
        about: the head of the help.

    Raises:
        ConfigError: no such recipe or student, an option of somebody else, or a value that cannot
            be read.
        SystemExit: after help, or by tyro after its sentence.
    """
    parser = RecipeParser("distill", about, recipes)
    name, words = parser.named(argv)
    options = _options(words)
    standard = _with_students(recipes[name](), options)
    if command_line.asks_for_help(words):
        _print_help(standard, parser, name)
    page = parser.page(name, parser.about_recipe(name))
    names = ["teacher", *(student.name for student in standard.students)]
    of_fields = [option for option in options if option.name not in map(_dashed, COMMAND_WORDS)]
    return Asked(_with_options(standard, of_fields, page), standard, _plan(options, names))


def _options(words: Sequence[str]) -> list[Option]:
    """The words of a command line by the option they belong to."""
    options: list[Option] = []
    for word in words:
        if word.startswith("--"):
            name = _dashed(word.removeprefix("--").partition("=")[0])
            options.append(Option(name, [word]))
        elif options:
            options[-1].words.append(word)
        elif word != "-h":
            raise ConfigError(f"expected an option that begins with --, got {word!r}")
    return options


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _last(options: Sequence[Option], name: str) -> Option | None:
    """The option of that name; the last one where it is given twice."""
    return next((option for option in reversed(options) if option.name == name), None)


# --- whose option it is


def _with_students(distill: Distill, options: Sequence[Option]) -> Distill:
    """A recipe with those of its students that `--students` names, in its own order."""
    asked = _last(options, "students")
    if asked is None:
        return distill
    known = [student.name for student in distill.students]
    names = [name for name in asked.value.replace(",", " ").split() if name]
    if not names:
        raise ConfigError(f"--students: expected names of {', '.join(known)}, got none")
    for name in names:
        if name not in known:
            raise ConfigError(f"--students: {_unknown(name, known)}")
    return replace(distill, students=tuple(one for one in distill.students if one.name in names))


def _unknown(name: str, known: Sequence[str], others: Sequence[str] = ()) -> str:
    near = get_close_matches(name, [*known, *others], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no student {name}; {hint}Students: {', '.join(known)}."


def _with_options(standard: Distill, options: Sequence[Option], page: Page) -> Distill:
    """A recipe with every option applied: of the whole, of all students, then of each."""
    own = _by_student(standard, options)
    others = [option for option in options if not _student_of(standard, option)]
    _refuse(standard, others)
    of_all = [option for option in others if not _is_of_whole(option)]
    distill = _read_whole(standard, list(filter(_is_of_whole, others)), page)
    if isinstance(distill.teacher, Features):
        _refuse_of_heads([*of_all, *itertools.chain(*own.values())])
    base = _read_base(distill.base, of_all, page)
    students = [
        _read_student(
            _resized(student, distill.base.crops, base.crops),
            [*_for_each(distill, of_all), *own[student.name]],
            page,
        )
        for student in distill.students
    ]
    return replace(distill, base=base, students=tuple(students))


def _student_of(distill: Distill, option: Option) -> str:
    """The name of the student an option is for; empty where it is for no single one."""
    names = {_dashed(student.name): student.name for student in distill.students}
    return names.get(option.first, "") if "." in option.name else ""


def _by_student(distill: Distill, options: Sequence[Option]) -> dict[str, list[Option]]:
    """The options of every student alone, as options of a recipe.

    Raises:
        ConfigError: what follows from the whole is given for one.
    """
    own: dict[str, list[Option]] = {student.name: [] for student in distill.students}
    for option in options:
        name = _student_of(distill, option)
        if not name:
            continue
        inner = option.of(name)
        if inner.name in ("name", "run.out"):
            raise ConfigError(
                f"--{option.name} follows from the whole: a student writes into the folder of its "
                "name; give --run.out for all"
            )
        if inner.name == "run.batch-size":
            raise ConfigError(f"--{option.name}: {BATCH}")
        own[name].append(inner)
    return own


def _is_of_whole(option: Option) -> bool:
    """Whether an option is one of `Distill`, not of its students; the EMA is a student's."""
    first, _, rest = option.name.partition(".")
    if first == "teacher":
        return rest.partition(".")[0] not in ("momentum", "temperature")
    return first in OF_WHOLE


def _refuse(distill: Distill, options: Sequence[Option]) -> None:
    """Refuse options of a student there is not, and those that follow from others."""
    known = [student.name for student in distill.students]
    groups = OF_WHOLE.union(_dashed(item.name) for item in fields(Pretrain))
    for option in options:
        if "." in option.name and option.first not in groups:
            raise ConfigError(f"--{option.name}: {_unknown(option.first, known, sorted(groups))}")
        if option.name == "run.batch-size":
            raise ConfigError(f"--{option.name}: {BATCH}")


def _refuse_of_heads(options: Sequence[Option]) -> None:
    unused = [_dashed(name) for name in UNUSED_FIELDS]
    for option in options:
        group = next((one for one in unused if f"{option.name}.".startswith(f"{one}.")), "")
        if group:
            raise ConfigError(
                f"--{option.name} is of a distillation of heads, and --teacher features compares "
                "features; leave it out, or give --teacher heads --teacher.run RUN"
            )


def _for_each(distill: Distill, options: Sequence[Option]) -> Iterator[Option]:
    """Of the options for all students, those that each of them reads.

    Raises:
        ConfigError: one that some of them have not.
    """
    for option in options:
        if option.name in ("name", "run.out", *SIZES):
            continue
        having = [one.name for one in distill.students if _has(one, option)]
        lacking = [one.name for one in distill.students if one.name not in having]
        if having and lacking:
            raise ConfigError(
                f"--{option.name} is no option of student {lacking[0]}; give it to those that have "
                f"it: {', '.join(f'--{name}.{option.name}' for name in having)}"
            )
        yield option


def _has(student: Student, option: Option) -> bool:
    """Whether there is such an option in a student's recipe; what may be none has any."""
    own = {item.name for item in fields(Student)} - {"name", "recipe"}
    value: object = student if option.name in own else student.recipe
    for part in option.name.replace("-", "_").split("."):
        if value is None:
            return True
        name = part if hasattr(value, part) else f"{part}_"  # from, which Python writes from_
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


# --- reading


def _words(options: Iterable[Option]) -> list[str]:
    return [word for option in options for word in option.words]


def _read_whole(distill: Distill, options: Sequence[Option], page: Page) -> Distill:
    """A distillation with its own options applied."""
    whole, rest = command_line.with_choices(distill, _words(options))
    return command_line.with_options(whole, rest, page)


def _read_base(base: Pretrain, options: Sequence[Option], page: Page) -> Pretrain:
    """What all students share, with the options it has."""
    known = [option for option in options if _has(Student("", base), option)]
    read = [option for option in known if option.first not in ("ranks", "start")]
    recipe, rest = command_line.with_choices(base, _words(read))
    return command_line.with_options(recipe, rest, page)


def _read_student(student: Student, options: Sequence[Option], page: Page) -> Student:
    """A student with options applied, later ones last."""
    try:
        recipe, rest = command_line.with_choices(student.recipe, _words(options))
        return command_line.with_options(replace(student, recipe=recipe), rest, page)
    except ConfigError as error:
        raise ConfigError(f"student {student.name}: {error}") from error


def _resized(student: Student, before: CropSettings, now: CropSettings) -> Student:
    """A student whose views follow the shared ones in proportion, so that grids stay equal."""
    own = student.recipe.crops
    crops = replace(
        own,
        global_size=_in_proportion(own.global_size, before.global_size, now.global_size),
        local_size=_in_proportion(own.local_size, before.local_size, now.local_size),
    )
    return replace(student, recipe=replace(student.recipe, crops=crops))


def _in_proportion(own: Size, before: Size, now: Size) -> Size:
    """A size that is to a new one as it was to the one before."""
    if before == now:
        return own
    sides = zip(pair(own), pair(before), pair(now), strict=True)
    height, width = (round(side * new / old) for side, old, new in sides)
    return height if height == width else (height, width)


def _plan(options: Sequence[Option], names: Sequence[str]) -> PlanOptions | None:
    """What `--plan` asks for.

    Args:
        names: teacher and students, whose times may be given.

    Raises:
        ConfigError: times of nobody, or no numbers.
    """
    asked = _last(options, "plan")
    ranks = _last(options, "plan-ranks")
    if asked is None:
        if ranks is not None:
            raise ConfigError("--plan-ranks is an option of --plan; give both")
        return None
    return PlanOptions(_seconds(asked.value, names), _whole_number(ranks))


def _seconds(text: str, names: Sequence[str]) -> dict[str, float]:
    seconds = {}
    for part in text.replace(",", " ").split():
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in names or not 0 < value < math.inf:
            raise ConfigError(
                f"--plan: expected seconds per image as NAME=SECONDS,... of {', '.join(names)}, "
                f"got {part!r}"
            )
        seconds[name] = value
    return seconds


def _whole_number(option: Option | None) -> int:
    if option is None:
        return 0
    if not option.value.isdecimal() or not 0 < int(option.value) <= MOST_RANKS:
        raise ConfigError(
            f"--plan-ranks: expected a number of processes, 1 to {MOST_RANKS}, got {option.value!r}"
        )
    return int(option.value)


# --- help


def _print_help(distill: Distill, parser: RecipeParser[Distill], name: str) -> None:
    """The options of the whole, then those of every student with the values of the base."""
    whole, _ = command_line.with_choices(distill, ["--help"])
    lines = command_line.choices_in_words(whole)
    about = [
        parser.about_recipe(name),
        *(line for line in lines if not line.startswith("  --base.")),  # shown for students
        "",
        COMMAND_HELP,
    ]
    of_students = "\n".join(_students_in_words(distill))
    with contextlib.suppress(SystemExit):
        command_line.with_options(whole, ["--help"], parser.page(name, "\n".join(about)))
    command_line.with_options(
        Student("NAME", distill.base), ["--help"], parser.page(name, of_students)
    )


def _students_in_words(distill: Distill) -> Iterator[str]:
    """Lines on the students of a recipe and how each differs from what all share."""
    name = distill.students[0].name
    yield f"Options of students: for all of them, or --{name}.OPTION for {name} alone."
    for student in distill.students:
        yield f"\nstudent {student.name}, trained by {_processes_in_words(student)}:"
        yield from deviations(student.recipe, distill.base)


def _processes_in_words(student: Student) -> str:
    if student.ranks is None:
        return "all processes"
    first, past = student.ranks
    return f"processes {first} to {past - 1}"
