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
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dinov3core.data.batch import Crops
from dinov3core.data.images import ImageSource
from dinov3core.data.loader import ShareLoader
from dinov3core.printable import printable
from dinov3core.train.engine.checkpoint import CheckpointError
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.heads import as_seen_by
from dinov3core.train.engine.distillation.opening import Shared, batch_settings
from dinov3core.train.engine.distillation.settings import Distill, Student
from dinov3core.train.engine.loop import STORAGE, collect_garbage, garbage_frozen
from dinov3core.train.engine.metrics import Progress
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.session import Here, Session
from dinov3core.train.engine.stopping import Interrupted, TrainingStopped

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
        source: the training images.
        shared: of `open_shared`.
        students: all of them, complete.
        seats: of those that this process trains.
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
