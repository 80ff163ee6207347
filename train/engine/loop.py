"""The loop of a run by itself: images in, a step of its session at a time, an orderly stop."""

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from dinov3core.data.batch import Batch
from dinov3core.data.decode import PixelFormat
from dinov3core.data.images import ImageSource, open_readable
from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.scenes import SceneSet
from dinov3core.train.engine import memory, parallel, stages
from dinov3core.train.engine.config import FROM_PYTHON, Pretrain, Run
from dinov3core.train.engine.folder import RunFolder, open_folder
from dinov3core.train.engine.metrics import Progress
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.session import Here, Session
from dinov3core.train.engine.stopping import Interrupted, StopSignals
from dinov3core.train.engine.trainer import StepReport, prepare

COLLECT_EVERY = 150  # steps between garbage collections, on all processes alike
STORAGE = "the storage that holds them probably hangs"


class Loop:
    """A run by itself: brings the images to its session, and stops when asked by a signal.

    Args: as for `Session`.
    """

    def __init__(
        self,
        recipe: Pretrain,
        here: Here,
        source: ImageSource,
        folder: RunFolder | None,
        origin: Origin,
    ):
        self.recipe = recipe
        self.world, self.signals = here
        self.source = source
        self.progress: Progress | None = None
        self.session = Session(recipe, here, source, folder, origin, self._say)

    def _say(self, text: str) -> None:
        """A line above the progress bar once there is one."""
        if self.progress is not None:
            self.progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def run(self) -> dict:
        """Train to the end and return the summary.

        Raises:
            Interrupted: by a signal, once what there was to save is saved.
        """
        savepoints = self.session.savepoints
        try:
            return self._run()
        except Interrupted as asked:
            saved = f"{savepoints.in_words()}; the same command continues the run"
            if savepoints.newest is None:
                saved = "no checkpoint exists yet; the same command begins anew"
            name = signal.Signals(asked.number).name
            raise Interrupted(asked.number, f"stopped by {name}: {saved}") from None

    def _run(self) -> dict:
        session = self.session
        start = session.start_step
        session.announce()
        if session.is_evaluated(start):
            self._evaluate(start)
        self.progress = Progress(session.steps, start, self.world.is_main)
        try:
            with garbage_frozen(), self.signals.deferred():
                done = self._loop()
        finally:
            self.progress.close()
        session.keep(done)
        self._evaluate(done)
        return session.finish(done)

    def _loader(self) -> BatchLoader:
        recipe = self.recipe
        settings = BatchSettings(
            recipe.crops,
            recipe.masks,
            recipe.run.batch_size,
            recipe.backbone.patch_size,
            recipe.run.seed,
            recipe.gram_crops,
        )
        return BatchLoader(
            self.source,
            settings,
            rank=self.world.rank,
            world_size=self.world.size,
            start_step=self.session.start_step,
            workers=recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _loop(self) -> int:
        """Train to the end, or until the guard stops the run; the steps done."""
        session = self.session
        if session.stopped:  # a resumed run that it had stopped before
            return session.start_step
        with self._loader() as loader:
            batches = iter(loader)
            for step in range(session.start_step, session.steps):
                done = step + 1
                report = self._step(batches, step)
                collect_garbage(done)
                if report.stop:
                    self._leave(done, report.stop)
                if session.is_evaluated(done):
                    self._evaluate(done)
                if session.stopped:
                    return done
        return session.steps

    def _step(self, batches: Iterator[Batch], step: int) -> StepReport:
        self.world.watch.note(f"waiting for the images of step {step}", STORAGE)
        began = time.perf_counter()
        batch = next(batches)
        waited = {"data_seconds": time.perf_counter() - began}
        report = self.session.train(batch, step, waited, self.signals.asked)
        clock = self.session.clock
        self.progress.advance(
            report.values["loss"],
            images_per_second=self.session.images / clock.seconds,
            data_share=clock.waited / clock.seconds,
        )
        return report

    def _evaluate(self, done: int) -> None:
        self._leave_if_asked(done)
        self.session.evaluate(done)
        with self.signals.deferred():
            self._leave_if_asked(done)

    def _leave_if_asked(self, done: int) -> None:
        """Stop, on all processes alike, when any of them was asked to."""
        number = asked_of_any(self.world, self.signals)
        if number:
            self._leave(done, number)

    def _leave(self, done: int, number: int) -> None:
        """Stop by signal `number`, with this step saved."""
        if done:
            self.session.keep(done)
        raise Interrupted(number)


def asked_of_any(world: parallel.World, signals: StopSignals) -> int:
    """The signal by which some process was asked to stop, 0: none; the same on all of them."""
    vote = torch.tensor(-signals.asked(), device=world.device)
    return -int(world.minimum(vote))


@contextlib.contextmanager
def garbage_frozen() -> Iterator[None]:
    """Within, garbage is collected by `collect_garbage` alone."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def collect_garbage(done: int) -> None:
    """At chosen steps only, on all processes alike: none waits for another's."""
    if done % COLLECT_EVERY == 0:
        gc.collect()


def open_training_images(recipe: Pretrain) -> tuple[ImageSource, str]:
    """The source a recipe names, and a sentence on how many images it has."""
    data = recipe.data
    pixels = PixelFormat(recipe.backbone.in_channels, data.channel_scale or None)
    scenes = SceneSet(data.scenes, data.scene_size, recipe.run.seed)
    return open_readable(data.source, pixels, scenes)


def pretrain(
    recipe: Pretrain,
    source: ImageSource | None = None,
    argv: list[str] | None = None,
    standard: Pretrain | None = None,
) -> dict:
    """Run a recipe on this machine (or as one of torchrun's processes) and return its summary.

    Args:
        recipe: from train/recipes or made by `dataclasses.replace`.
        source: images to train on instead of `recipe.data.source`, for instance
            `dinov3core.data.images.DatasetSource(my_torch_dataset)`.
        argv: the command line behind `recipe`, kept with dumps so that they can be replayed.
        standard: the recipe that `recipe` was made from; the run begins by saying what differs.

    Raises:
        Interrupted: by SIGINT (Ctrl-C) or SIGTERM, once what there was to save is saved.
    """
    if source is not None:
        given = FROM_PYTHON + type(source).__name__
        recipe = replace(recipe, data=replace(recipe.data, source=given))
    resolve(recipe, parallel.processes())  # refused before processes meet if it cannot work
    stages.check(recipe, standard)
    with started(recipe.run) as here:
        return train(recipe, here, Origin(argv, standard), source)


@contextlib.contextmanager
def started(run: Run) -> Iterator[Here]:
    """Meet the other processes, and stop by a signal in an orderly way, while entered.

    Raises:
        Interrupted: by SIGINT or SIGTERM, with what is saved.
    """
    try:
        with StopSignals() as signals:
            with parallel.start(run.device, run.threads, run.timeout_minutes) as world:
                yield Here(world, signals)
    except Interrupted as asked:
        sentence = "stopped before the run began; the same command begins or continues it"
        code = 0 if run.requeue else None
        raise Interrupted(asked.number, str(asked) or sentence, code) from None


def train(recipe: Pretrain, here: Here, origin: Origin, source: ImageSource | None = None) -> dict:
    """`pretrain` among processes that have met."""
    world = here.world
    recipe = prepare(recipe, world.device)
    world.watch.note("opening the training images", STORAGE)
    if source is None:
        source, sentence = open_training_images(recipe)
        if world.is_main:
            print(sentence, file=sys.stderr)
    recipe = recipe.for_images(len(source), world.size)
    world.watch.note("opening the run folder", STORAGE)
    with (
        open_folder(recipe.folder, recipe.run.resume, world) as folder,
        memory.explained(recipe, world.device),
    ):
        return Loop(recipe, here, source, folder, origin).run()
