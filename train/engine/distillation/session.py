"""Several students in one pass: every step, the teacher looks once and each student trains.

A step: every process loads its share of the images, the teacher sees them once, rows and crops
travel to who trains on them, and every student of this process trains, one after the other. Each
student is a run of its own (`Session`): folder, checkpoints, scores and report are as if it trained
alone.

Every student counts its own steps. The loop begins at the smallest count, and a student takes part
once its step has come. So students that were saved at different steps go on exactly, one that is
added begins at 0 while the others wait, and one that was removed is just not there.

A student that fails is named and left as its own run would leave it; its processes go on loading,
asking the teacher and passing rows on, so that nobody waits for them. What all processes do
together at a step (the images, the lesson, a vote) is therefore the same whoever has failed.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinov3core.data.batch import Crops
from dinov3core.data.images import ImageSource
from dinov3core.data.loader import ShareLoader
from dinov3core.data.sizes import pair
from dinov3core.printable import printable
from dinov3core.train.engine import changes, checkpoint, parallel
from dinov3core.train.engine.checkpoint import CheckpointError
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.heads import as_seen_by
from dinov3core.train.engine.distillation.opening import Shared, batch_settings, open_shared
from dinov3core.train.engine.distillation.page import (
    Costs,
    Outcome,
    StudentOutcome,
    TeacherOutcome,
    write_page,
)
from dinov3core.train.engine.distillation.settings import Distill, Features, Heads, Student
from dinov3core.train.engine.folder import open_folder
from dinov3core.train.engine.loop import (
    STORAGE,
    collect_garbage,
    garbage_frozen,
    open_training_images,
    started,
)
from dinov3core.train.engine.metrics import Progress
from dinov3core.train.engine.named_models import NO_RECIPES, Recipes
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.session import Here, Session, by_main
from dinov3core.train.engine.stopping import Interrupted, TrainingStopped
from dinov3core.train.engine.trainer import prepare

# By which a student fails, on all processes that train it.
FAILURES = (TrainingStopped, CheckpointError, ConfigError, OSError)


@dataclass
class Seat:
    """A student in the loop, on a process that trains it.

    Args:
        student: complete.
        session: its run; None once it is over or has failed.
        done: its steps so far.
    """

    student: Student
    session: Session | None
    done: int
    failure: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # that it worked, since this process began
    steps: int = 0  # in them

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Within, what goes wrong ends this student alone."""
        session = self.session
        assert session is not None
        try:
            yield
        except FAILURES as error:
            self.failure = str(error) or type(error).__name__
            session.say(f"failed at step {self.done}: {self.failure}; other students go on")
            self.session = None
            if session.log is not None:
                with contextlib.suppress(OSError):
                    session.log.close()


class Classroom:
    """The loop of all students on this process.

    Args:
        distill: the whole.
        here: all processes.
        part: this process among those of its range.
        source: the training images.
        shared: of `open_shared`.
        seats: of the students that this process trains.
    """

    def __init__(
        self,
        distill: Distill,
        here: Here,
        source: ImageSource,
        shared: Shared,
        students: tuple[Student, ...],
        seats: list[Seat],
    ):
        self.distill = distill
        self.world, self.signals = here
        self.source = source
        self.shared = shared
        self.students = students
        self.seats = seats
        first = students[0].recipe
        self.steps = first.run.total_steps
        self.temperatures = resolve(first, 1).schedules["teacher_temperature"]
        self.progress: Progress | None = None
        self.waited = {"data_seconds": 0.0, "teacher_seconds": 0.0}  # since this process began
        self.lessons = 0

    def say(self, text: str) -> None:
        """A line above the progress bar once there is one."""
        if self.progress is not None and self.world.is_main:
            self.progress.say(text)
        else:
            print(printable(text), file=sys.stderr, flush=True)

    @property
    def live(self) -> list[Seat]:
        """The students that go on."""
        return [seat for seat in self.seats if seat.session is not None]

    def run(self) -> None:
        """Train all students to their ends.

        Raises:
            Interrupted: by a signal, once what there was to save of every student is saved.
        """
        try:
            self._run()
        except Interrupted as asked:
            name = signal.Signals(asked.number).name
            saved = f"students are saved in {self.distill.folder}"
            words = f"stopped by {name}: {saved}; the same command continues the run"
            raise Interrupted(asked.number, words) from None

    def _run(self) -> None:
        for seat in self.live:
            with seat.attempt():
                seat.session.announce()
        self._evaluate([seat for seat in self.live if seat.session.is_evaluated(seat.done)])
        first = self._first_step()
        self.progress = Progress(self.steps, first, self.world.is_main, "distill")
        try:
            with garbage_frozen(), self.signals.deferred():
                self._loop(first)
        finally:
            self.progress.close()
            self.progress = None
        self._end()

    def _first_step(self) -> int:
        """The smallest step of any student, on any process."""
        own = min((seat.done for seat in self.live), default=self.steps)
        return int(self.world.minimum(torch.tensor(own, device=self.world.device)))

    def _loop(self, first: int) -> None:
        plan = self.shared.lesson.exchange.plan
        loader = ShareLoader(
            self.source,
            batch_settings(self.distill, self.distill.global_batch),
            plan.loads(self.world.rank),
            start_step=first,
            workers=self.distill.base.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )
        with loader:
            crops = iter(loader)
            for step in range(first, self.steps):
                if not self._somebody_goes_on():
                    return
                self._step(crops, step)
                collect_garbage(step + 1)
                if self._due(step + 1):
                    due = [seat for seat in self.live if seat.done == step + 1]
                    self._evaluate([one for one in due if one.session.is_evaluated(one.done)])

    def _step(self, crops: Iterator[Crops], step: int) -> None:
        """The lesson of a step, and every student whose turn it is."""
        watch = self.world.watch
        watch.note(f"waiting for the images of step {step}", STORAGE)
        began = time.perf_counter()
        loaded = next(crops)
        arrived = time.perf_counter()
        watch.note(f"the teacher's pass of step {step}")
        share = self.shared.lesson(loaded, step, float(self.temperatures[step]))
        told = time.perf_counter()
        waited = {"data_seconds": arrived - began, "teacher_seconds": told - arrived}
        for name, seconds in waited.items():
            self.waited[name] += seconds
        self.lessons += 1

        loss = float("nan")
        for seat in self.live:
            if seat.done != step:
                continue
            with seat.attempt():
                recipe = seat.session.recipe
                batch = as_seen_by(share.batch, recipe.crops, recipe.run.seed, step)
                targets = share.targets
                seat.done = step + 1
                report = seat.session.train(batch, step, waited, targets=targets)
                clock = seat.session.clock
                seat.seconds += clock.seconds - clock.waited
                seat.steps += 1
                loss = report.values["loss"]
        seconds = time.perf_counter() - began
        self.progress.advance(
            loss,
            images_per_second=self.distill.global_batch / seconds,
            data_share=waited["data_seconds"] / seconds,
        )

    def _somebody_goes_on(self) -> bool:
        """Whether any student does, on any process.

        Raises:
            Interrupted: some process was asked to stop; every student is saved.
        """
        vote = torch.tensor([-self.signals.asked(), -len(self.live)], device=self.world.device)
        asked, live = (-self.world.minimum(vote)).tolist()
        if asked:
            for seat in self.live:
                with seat.attempt():
                    if seat.done:
                        seat.session.keep(seat.done)
            raise Interrupted(asked)
        return live > 0

    def _due(self, done: int) -> bool:
        """Whether scores of any student are due then, as all processes know."""
        every = {student.recipe.run.eval_every for student in self.students}
        return done < self.steps and any(one and done % one == 0 for one in every)

    def _evaluate(self, seats: list[Seat]) -> None:
        """Scores of some students; one that its guard stops is finished.

        Raises:
            Interrupted: as `_somebody_goes_on`.
        """
        with self.signals.deferred():
            self._somebody_goes_on()
        for seat in seats:
            with seat.attempt():
                seat.session.evaluate(seat.done)
        with self.signals.deferred():
            self.world.wait_for_all()
            self._somebody_goes_on()
        for seat in seats:
            if seat.session is not None and seat.session.stopped:
                self._finish(seat)
        with self.signals.deferred():
            self.world.wait_for_all()

    def _end(self) -> None:
        """The last checkpoints, scores and reports."""
        for seat in self.live:
            with seat.attempt():
                seat.session.keep(seat.done)
        self._evaluate(self.live)
        for seat in self.live:
            self._finish(seat)
        self.world.wait_for_all()

    def _finish(self, seat: Seat) -> None:
        with seat.attempt():
            seat.summary = seat.session.finish(seat.done)
            seat.session = None


class Ended(NamedTuple):
    """What a distillation came to."""

    summary: dict[str, Any]  # of the whole; empty on other than the main process
    failures: dict[str, str]  # by the names of students, on all processes


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
    for words in shared.in_words()[:1]:
        say(words)

    over = _over(students, world)
    with contextlib.ExitStack() as stack:
        seats = [
            _passed_over(student, world) if student.name in over else None for student in students
        ]
        own = [
            (student, seat)
            for student, seat in zip(students, seats, strict=True)
            if parts[student.ranks] is not None
        ]
        origin = _Origins(argv, standard)
        seats_here: list[Seat] = []
        problems: list[str] = []
        room: list[Classroom] = []
        for student, seat in own:
            if seat is not None:
                seats_here.append(seat)
                continue
            try:
                say_of = _Speaker(student.name, room)
                folder = stack.enter_context(
                    open_folder(student.recipe.folder, student.recipe.run.resume, part)
                )
                session = Session(
                    student.recipe,
                    Here(part, here.signals),
                    source,
                    folder,
                    origin.of(student),
                    say_of,
                    shared.method_of(student),
                )
                seats_here.append(Seat(student, session, session.start_step))
            except FAILURES as error:
                problems.append(f"student {student.name}: {error}")
                break
        world.wait_for_all()
        problems = world.gather_texts(problems)
        if problems:
            raise TrainingStopped(problems[0])
        classroom = Classroom(settings, here, source, shared, students, seats_here)
        room.append(classroom)
        classroom.run()
        return _ended(settings, classroom, part)


class _Speaker:
    """Says a student's lines, with its name, through the loop once there is one."""

    def __init__(self, name: str, room: list[Classroom]):
        self.name = name
        self.room = room

    def __call__(self, text: str) -> None:
        line = f"student {self.name}: {text}"
        if self.room:
            self.room[0].say(line)
        else:
            print(printable(line), file=sys.stderr, flush=True)


class _Origins(NamedTuple):
    argv: list[str] | None
    standard: Distill | None

    def of(self, student: Student) -> Origin:
        same = self.standard.students if self.standard is not None else ()
        recipe = next((one.recipe for one in same if one.name == student.name), None)
        return Origin(self.argv, recipe)


def _prepared(student: Student, images: int, world: parallel.World) -> Any:
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


def _ended(settings: Distill, classroom: Classroom, part: parallel.World) -> Ended:
    """Gather what came of every student, and write the page above all of them."""
    world = classroom.world
    own = [
        json.dumps([seat.student.name, seat.failure, seat.summary, _mean(seat.seconds, seat.steps)])
        for seat in classroom.seats
        if part.is_main
    ]
    told = {entry[0]: entry[1:] for entry in map(json.loads, world.gather_texts(own))}
    failures = {name: failure for name, (failure, *_) in told.items() if failure}
    outcomes = tuple(
        StudentOutcome(
            student.name,
            student.recipe.folder,
            summary,
            pair(student.recipe.crops.global_size),
            seconds,
            student.ranks or (0, world.size),
            failure,
        )
        for student in classroom.students
        for failure, summary, seconds in [told[student.name]]
    )
    waited = classroom.waited
    costs = Costs(
        teacher=_mean(waited["teacher_seconds"], classroom.lessons),
        data=_mean(waited["data_seconds"], classroom.lessons),
    )
    notes = classroom.shared.in_words()
    if world.size > 1:
        notes.append("the time of the teacher is with that of rows on their way")
    teachers = _teachers(settings, classroom.shared)
    outcome = Outcome(settings.name, teachers, outcomes, costs, tuple(notes))

    def write() -> dict[str, Any]:
        return write_page(settings.folder, outcome, world.device)

    return Ended(by_main(world, write) or {}, failures)


def _mean(seconds: float, count: int) -> float | None:
    return seconds / count if count else None


def _teachers(settings: Distill, shared: Shared) -> tuple[TeacherOutcome, ...]:
    rows, columns = settings.grid
    if isinstance(settings.teacher, Heads):
        (teacher,) = shared.teachers
        size = (rows * teacher.patch_size, columns * teacher.patch_size)
        folder = settings.teacher.folder
        scores, weights = _of_run(folder)
        return (TeacherOutcome(teacher.name, scores, weights, size),)
    features: Features = settings.teacher
    return tuple(
        TeacherOutcome(
            teacher.name,
            *_of_run(Path(stated.weights)),
            (rows * teacher.patch_size, columns * teacher.patch_size),
        )
        for teacher, stated in zip(shared.teachers, features.teachers, strict=True)
    )


def _of_run(place: Path) -> tuple[dict[str, Any], Path | None]:
    """Scores of a teacher's own run, and its weights, as far as there are any."""
    if not (place / "checkpoints").is_dir():
        return {}, place if place.exists() else None
    files = sorted(place.glob("checkpoints/step_*/teacher.safetensors"))
    names = {
        "knn": "knn_after",
        "knn_error": "knn_after_error",
        "dense_miou": "dense_after",
        "dense_error": "dense_after_error",
    }
    try:
        summary = json.loads((place / "summary.json").read_bytes())
        scores = {name: summary.get(key) for name, key in names.items()}
    except (OSError, ValueError, AttributeError):
        scores = {}
    return scores, files[-1] if files else None
