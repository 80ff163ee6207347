"""A distillation from its command to its page: processes meet, teacher and students are opened.

The loop is that of `classroom`.
"""

import contextlib
import json
import sys
from dataclasses import replace
from typing import NamedTuple

from dinov3core.data.images import ImageSource
from dinov3core.printable import printable
from dinov3core.train.engine import changes, checkpoint, parallel
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.distillation.classroom import FAILURES, Classroom, Seat
from dinov3core.train.engine.distillation.opening import Shared, open_shared
from dinov3core.train.engine.distillation.outcome import Ended, conclude
from dinov3core.train.engine.distillation.settings import Distill, Heads, Student
from dinov3core.train.engine.folder import open_folder
from dinov3core.train.engine.loop import STORAGE, open_training_images, started
from dinov3core.train.engine.named_models import NO_RECIPES, Recipes
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.session import Here, Session
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import prepare


def distill(
    settings: Distill,
    argv: list[str] | None = None,
    standard: Distill | None = None,
    recipes: Recipes = NO_RECIPES,
) -> Ended:
    """Train all students on this machine (or as one of torchrun's processes).

    Args:
        settings: of train/recipes, or made by `dataclasses.replace`.
        argv: the command line behind them.
        standard: what they were made from; a student's run begins by saying what differs.
        recipes: see `open_backbone`.

    Raises:
        ConfigError: before anything is computed, for what cannot work.
        TrainingStopped: a student's folder cannot be used.
        Interrupted: by SIGINT (Ctrl-C) or SIGTERM, once what there was to save is saved.
    """
    settings.students_for(parallel.processes())
    if isinstance(settings.teacher, Heads):
        settings.teacher.check()
    with started(settings.base.run) as here:
        return _distill(settings, here, argv, standard, recipes)


def _distill(
    settings: Distill,
    here: Here,
    argv: list[str] | None,
    standard: Distill | None,
    recipes: Recipes,
) -> Ended:
    world = here.world

    def say(text: str) -> None:
        if world.is_main:
            print(printable(text), file=sys.stderr, flush=True)

    world.watch.note("opening the training images", STORAGE)
    source, sentence = open_training_images(
        replace(settings.students[0].recipe, data=settings.base.data, run=settings.base.run)
    )
    say(sentence)
    students = tuple(
        replace(student, recipe=_prepared(student, len(source), world))
        for student in settings.students_for(world.size)
    )
    parts = {ranks: world.part(*ranks) for ranks in dict.fromkeys(one.ranks for one in students)}
    part = next(one for one in parts.values() if one is not None)
    world.watch.note("opening the teacher", STORAGE)
    shared = open_shared(settings, students, world, part, say, recipes)
    say(shared.lesson.exchange.plan.in_words())

    over = _over(students, world)
    with contextlib.ExitStack() as stack:
        room: list[Classroom] = []
        sessions = _Sessions(here._replace(world=part), source, shared, room, argv, standard)
        seats: list[Seat] = []
        problem: list[str] = []
        for student in students:
            if parts[student.ranks] is None or problem:
                continue
            if student.name in over:
                seats.append(_passed_over(student, part))
                continue
            try:
                seats.append(sessions.open(student, stack))
            except FAILURES as error:
                problem = [f"student {student.name}: {error}"]
        world.wait_for_all()
        for sentence in world.gather_texts(problem):
            raise TrainingStopped(sentence)

        room.append(Classroom(settings, here, source, shared, students, seats))
        room[0].run()
        return conclude(settings, room[0], part)


class _Sessions(NamedTuple):
    """What the sessions of students on this process have in common."""

    here: Here  # the processes of its range
    source: ImageSource
    shared: Shared
    room: list[Classroom]  # the loop, once there is one
    argv: list[str] | None
    standard: Distill | None

    def open(self, student: Student, stack: contextlib.ExitStack) -> Seat:
        """A student's session; its folder is held until the end of `stack`."""
        recipe = student.recipe
        name = student.name
        held = open_folder(recipe.folder, recipe.run.resume, self.here.world)
        session = Session(
            recipe,
            self.here,
            self.source,
            stack.enter_context(held),
            Origin(self.argv, self._standard(name)),
            lambda text: self._say(f"student {name}: {text}"),
            self.shared.method_of(student),
        )
        return Seat(student, session, session.start_step)

    def _standard(self, name: str) -> Pretrain | None:
        students = () if self.standard is None else self.standard.students
        return next((one.recipe for one in students if one.name == name), None)

    def _say(self, line: str) -> None:
        if self.room:
            self.room[0].say(line)
        else:
            print(printable(line), file=sys.stderr, flush=True)


def _prepared(student: Student, images: int, world: parallel.World) -> Pretrain:
    first, past = student.ranks or (0, world.size)
    return prepare(student.recipe, world.device).for_images(images, past - first)


def _over(students: tuple[Student, ...], world: parallel.World) -> list[str]:
    """The students that came to their ends before, where others did not; the same everywhere."""
    names: list[str] = []
    if world.is_main:
        names = [student.name for student in students if _is_over(student, world)]
        if len(names) == len(students):  # all of it is over: it begins anew
            names = []
    return json.loads(world.from_main(json.dumps(names)))


def _is_over(student: Student, world: parallel.World) -> bool:
    recipe = student.recipe
    last = checkpoint.newest_stated(recipe.folder / "checkpoints")
    if not recipe.run.resume or last is None or not (recipe.folder / "summary.json").is_file():
        return False
    first, past = student.ranks or (0, world.size)
    stated = changes.stated(recipe, past - first)
    return not changes.differences(last.state["recipe"], stated)


def _passed_over(student: Student, world: parallel.World) -> Seat:
    """A student that is over."""
    folder = student.recipe.folder
    if world.is_main:
        said = f"student {student.name}: finished in {folder}; it is passed over"
        print(printable(said), file=sys.stderr, flush=True)
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        summary = {}
    return Seat(student, None, student.recipe.run.total_steps, summary=summary)
