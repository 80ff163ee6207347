"""What a distillation is: one frozen teacher, several students, and what they share.

A student is a complete `Pretrain`, run by the same machinery as one that trains alone. What all
students have to share, because one teacher looks at one set of views for all of them, is stated
once, in `Distill.base`: a student that says something else is refused by name, and nothing
overrides in silence. All else is the student's own.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro

from dinov3core.bounds import Bounds, complaints
from dinov3core.data.crops import CropSettings
from dinov3core.data.sizes import in_text, pair
from dinov3core.train.engine.config import RUNS, ConfigError, Pretrain, Weight
from dinov3core.train.engine.provenance import dotted
from dinov3core.train.engine.resolved import resolve

# Fields of `Run` that concern the whole: length, seed, and what the processes do together.
WHOLE_RUN = (
    "epochs",
    "epoch_steps",
    "steps",
    "seed",
    "device",
    "threads",
    "timeout_minutes",
    "requeue",
    "resume",
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# What a command line of train/distill.py says beside the fields of `Distill`; no student's name.
COMMAND_WORDS = ("students", "plan", "plan_ranks", "help")

Ranks = tuple[int, int]  # [first, past the last)


@dataclass(frozen=True)
class Heads:
    """The teacher is the EMA teacher of a run of this project, with its heads."""

    run: str = ""
    """Folder of the run, a name for runs/NAME, or one of its checkpoints."""

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return Path(self.run) if "/" in self.run else RUNS / self.run

    def check(self) -> None:
        """Whether the run is there, before anything is computed.

        Raises:
            ConfigError: it is not; the message says which command makes it.
        """
        if not self.folder.exists():
            words = ["python", "train/pretrain.py", self.run]
            if "/" in self.run:
                words[2:] = ["RECIPE", "--run.out", self.run]
            raise ConfigError(
                f"teacher.run: there is no run in {self.folder}; make it first: "
                f"{shlex.join(words)}, or give another one with --teacher.run RUN"
            )


@dataclass(frozen=True)
class FeatureTeacher:
    """A teacher without heads, on a command line as WEIGHTS[,size=PIXELS][,share=NUMBER]."""

    weights: str = ""
    """A file or folder of weights in any known layout, the folder of a run, timm:NAME or
    timm:NAME=FILE, or transformers:FOLDER."""
    size: Annotated[int, Bounds(0, 16384)] = 0
    """Side in pixels its input is resized to; 0: that at which its patch grid is the students'."""
    share: Annotated[float, Bounds(0, 1e4, open_low=True)] = 1.0
    """Its share among several teachers; only proportions count."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From WEIGHTS[,size=PIXELS][,share=NUMBER].

        Raises:
            ValueError: another text.
        """
        weights, *rest = text.split(",")
        options = dict(part.partition("=")[::2] for part in rest)
        try:
            if not weights or len(options) < len(rest) or not options.keys() <= {"size", "share"}:
                raise ValueError
            return cls(weights, int(options.get("size", 0)), float(options.get("share", 1)))
        except ValueError:
            raise ValueError(
                f"expected a teacher as WEIGHTS[,size=PIXELS][,share=NUMBER], got {text!r}"
            ) from None

    def __str__(self) -> str:
        size = f",size={self.size}" if self.size else ""
        share = f",share={self.share:g}" if self.share != 1 else ""
        return f"{self.weights}{size}{share}"


@dataclass(frozen=True)
class Features:
    """Teachers without heads: students match their CLS and patch features through adapters."""

    teachers: tuple[FeatureTeacher, ...] = ()
    """One or several, each as WEIGHTS[,size=PIXELS][,share=NUMBER]."""
    cls_weight: Weight = 1.0
    """Weight of the term on CLS tokens; that and the next are shares of a teacher's variance."""
    patch_weight: Weight = 1.0
    """Weight of the term on patches."""


@dataclass(frozen=True)
class Student:
    """One of the students; its run folder is <out>/<name>."""

    name: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    """Of its folder and of its options: --NAME.optim.lr.base 1e-3."""
    recipe: Annotated[Pretrain, tyro.conf.arg(name="")]
    """Complete. `name`, `run.out` and `run.batch_size` follow from the whole; crops of other sizes
    than those of all mean that it sees the shared views resized."""
    ranks: Ranks | None = None
    """First process and the one past the last that train it; None: all of them. Students of the
    same processes are trained there one after the other."""
    start: Literal["random", "first", "spaced"] = "random"
    """Its first weights: random or those of run.init, or the first or evenly spaced layers of the
    teacher."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a global crop."""
        height, width = pair(self.recipe.crops.global_size)
        patch = self.recipe.backbone.patch_size
        return height // patch, width // patch


@dataclass(frozen=True)
class Distill:
    """A distillation: every step shows the same views to the teacher once and to each student."""

    teacher: Heads | Features
    """From whom the students learn."""
    base: Annotated[Pretrain, tyro.conf.Fixed, tyro.conf.Suppress]
    """What all students share: views but for their sizes, masks, images, length, seed, temperature
    and centering of targets, and what the processes do together. Its name and run.out are those of
    the whole."""
    students: Annotated[tuple[Student, ...], tyro.conf.Fixed, tyro.conf.Suppress]
    """Who learns."""
    global_batch: Annotated[int, Bounds(1, 2**24)]
    """Images of a step over all processes; every student sees all of them."""
    cache: str = ""
    """Folder of the teacher's outputs, read instead of computed where a view comes again; empty:
    none."""
    cache_views: Annotated[int, Bounds(0, 10**6)] = 0
    """Views of an image that come again and again; 0: new ones in every pass over the images."""

    @property
    def name(self) -> str:
        """What the whole is called."""
        return self.base.name

    @property
    def folder(self) -> Path:
        """Where the whole writes; students into folders in it."""
        return self.base.folder

    @property
    def crops(self) -> CropSettings:
        """The views that are made and shared: of teachers without heads, global crops alone."""
        if isinstance(self.teacher, Features):
            return replace(self.base.crops, local_count=0)
        return self.base.crops

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a global crop, the same for every student."""
        return self.students[0].grid

    @property
    def patch_size(self) -> int:
        """Side in pixels of what a patch covers in the shared views."""
        return pair(self.crops.global_size)[0] // max(self.grid[0], 1)

    def processes(self, student: Student, world_size: int) -> Ranks:
        """First process and the one past the last that train a student."""
        return student.ranks or (0, world_size)

    def students_for(self, world_size: int) -> tuple[Student, ...]:
        """The students as so many processes train them: complete recipes, and ranks.

        Raises:
            ConfigError: for what cannot work, naming it.
        """
        for complaint in self._complaints(world_size):
            raise ConfigError(complaint)
        return tuple(self._complete(student, world_size) for student in self.students)

    def _complete(self, student: Student, world_size: int) -> Student:
        first, past = self.processes(student, world_size)
        recipe = self._with_shared(student.recipe)
        run = replace(
            recipe.run,
            out=str(self.folder / student.name),
            batch_size=self.global_batch // (past - first),
        )
        crops = replace(recipe.crops, local_count=self.crops.local_count)
        recipe = replace(recipe, name=student.name, crops=crops, run=run)
        return replace(student, recipe=recipe, ranks=(first, past))

    def _with_shared(self, recipe: Pretrain) -> Pretrain:
        """A student's recipe with everything that all students share; the one list of it."""
        base = self.base
        own = recipe.crops
        whole_run = {name: getattr(base.run, name) for name in WHOLE_RUN}
        return replace(
            recipe,
            crops=replace(base.crops, global_size=own.global_size, local_size=own.local_size),
            masks=base.masks,
            data=base.data,
            loss=replace(recipe.loss, sinkhorn_iterations=base.loss.sinkhorn_iterations),
            teacher=replace(recipe.teacher, temperature=base.teacher.temperature),
            run=replace(recipe.run, **whole_run),
        )

    def _complaints(self, world_size: int) -> Iterator[str]:
        """One sentence for everything that cannot work, each field by itself first."""
        yield from complaints(self.base)
        for student in self.students:
            yield from complaints(student.recipe, f"{student.name}.")
        yield from complaints(self)
        yield from self._name_complaints()
        yield from self._teacher_complaints()
        yield from self._rank_complaints(world_size)
        for student in self.students:
            yield from self._student_complaints(student)
        yield from self._view_complaints()
        for student in self.students:
            try:
                complete = self._complete(student, world_size)
                first, past = self.processes(student, world_size)
                resolve(complete.recipe, past - first)
            except ConfigError as error:
                yield f"student {student.name}: {error}"

    def _name_complaints(self) -> Iterator[str]:
        if not self.students:
            yield "a distillation needs a student; give students"
        names = [student.name for student in self.students]
        taken = {item.name for cls in (Distill, Student, Pretrain) for item in fields(cls)}
        for name in names:
            if not NAME.fullmatch(name):
                yield (
                    f"student {name!r}: expected a name of letters, digits, - and _, as it names "
                    "a folder and options"
                )
            if name.replace("-", "_") in taken.union(COMMAND_WORDS):
                yield (
                    f"student {name!r}: --{name} is an option already; give the student another "
                    "name"
                )
        for one, other in combinations(names, 2):
            if one.replace("-", "_").lower() == other.replace("-", "_").lower():
                yield (
                    f"students {one} and {other} would share a folder and options; give each a "
                    "name of its own"
                )

    def _teacher_complaints(self) -> Iterator[str]:
        if isinstance(self.teacher, Heads) and not self.teacher.run:
            yield (
                "teacher.run: expected the run whose teacher the students learn from, got none; "
                "give --teacher.run RUN, or --teacher features for weights without heads"
            )
        if isinstance(self.teacher, Features):
            if not self.teacher.teachers:
                yield (
                    "teacher.teachers: expected weights to learn from, got none; give "
                    "--teacher.teachers FILE"
                )
            for place, teacher in enumerate(self.teacher.teachers):
                if not teacher.weights:
                    yield f"teacher.teachers[{place}].weights: expected a file or folder, got none"
        if self.cache_views and not self.cache:
            yield (
                f"cache_views {self.cache_views} repeats views so that a cache of the teacher's "
                "outputs is of use, and there is none; give --cache DIR, or leave cache_views out"
            )

    def _rank_complaints(self, world_size: int) -> Iterator[str]:
        for student in self.students:
            first, past = self.processes(student, world_size)
            if not 0 <= first < past:
                yield (
                    f"student {student.name}: ranks {first} {past} are no processes; expected the "
                    "first one and the one past the last"
                )
            if past > world_size:
                yield (
                    f"student {student.name} is trained by processes {first} to {past - 1}, and "
                    f"the number of processes is {world_size}; start as many as its recipe has "
                    "with torchrun, or give --ranks None, by which all train all students"
                )
            if self.global_batch % (past - first):
                yield (
                    f"global_batch {self.global_batch} cannot be divided among the {past - first} "
                    f"processes of student {student.name}; expected a multiple of {past - first}"
                )
        yield from self._overlap_complaints(world_size)

    def _overlap_complaints(self, world_size: int) -> Iterator[str]:
        first_of: dict[Ranks, str] = {}  # a student of each range
        for student in self.students:
            first_of.setdefault(self.processes(student, world_size), student.name)
        ranges = sorted(first_of)
        for one, other in pairwise(ranges):
            if other[0] < one[1]:
                yield (
                    f"students {first_of[one]} and {first_of[other]} overlap: processes "
                    f"{one[0]} to {one[1] - 1} and {other[0]} to {other[1] - 1}; give both the "
                    "same processes or none in common"
                )
        covered = 0
        for first, past in [*ranges, (world_size, world_size)]:
            if first > covered:
                which = f"process {covered}"
                if first - covered > 1:
                    which = f"processes {covered} to {first - 1}"
                yield (
                    f"{which} of {world_size} would train no student; give ranks that leave no "
                    "process out, or start fewer"
                )
            covered = max(covered, past)

    def _student_complaints(self, student: Student) -> Iterator[str]:
        recipe = student.recipe
        shared = dict(dotted(self._with_shared(recipe), kinds=True))
        for name, value in dotted(recipe, kinds=True):
            if value != shared.get(name, value):
                yield (
                    f"student {student.name}: {name} is {value}, but {shared[name]} for all; the "
                    f"students share it, so give it once, as --{name.replace('_', '-')}"
                )
        if recipe.gram is not None:
            yield (
                f"student {student.name}: gram anchors a student to an earlier teacher of its own, "
                "and here it learns from a frozen one; give --gram none"
            )
        if recipe.run.from_:
            yield (
                f"student {student.name}: run.from continues a pretraining run, and a distillation "
                f"is none; give --{student.name}.run.init {recipe.run.from_} to start from its "
                "weights"
            )
        if recipe.run.init and student.start != "random":
            yield (
                f"student {student.name}: run.init {recipe.run.init} and start {student.start} "
                "both say what to start from; give one of them"
            )

    def _view_complaints(self) -> Iterator[str]:
        if self.crops.other_sizes:
            yield (
                "crops.other_sizes: the views of a distillation have one size, as students may see "
                "them resized; leave it out"
            )
        for student in self.students[1:]:
            if student.grid != self.grid:
                yield (
                    f"students {self.students[0].name} and {student.name} have patch grids of "
                    f"{in_text(self.grid)} and {in_text(student.grid)}; the teacher has one for "
                    "all, so choose crops.global_size of each student by its patch size"
                )
        height, width = pair(self.crops.global_size)
        rows, columns = self.grid
        if (height, width) != (rows * self.patch_size, columns * self.patch_size):
            yield (
                f"crops.global_size {in_text(self.crops.global_size)} of the views that are made: "
                f"expected square patches in a grid of {in_text(self.grid)}, as the students have"
            )
        crops = self.crops
        if isinstance(self.teacher, Heads) and not crops.local_count and crops.global_count < 2:
            yield (
                "crops.local_count 0 and crops.global_count 1 leave the DINO term nothing to "
                "compare; give local crops or two global ones"
            )
