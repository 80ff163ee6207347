"""The training loop: batches in, one guarded step at a time, checkpoints, online evaluation, a
report at the end.

A step whose loss or gradient norm is not finite changes nothing (trainer.py): here it is counted
and dumped so that it can be replayed, and after a few in a row the run stops with the reason.

A checkpoint of a step is written before that step is evaluated. So nothing is lost when a kill
falls into an evaluation, and a resumed run begins with the evaluation of the step it starts from
when metrics.jsonl has no row of it.
"""

import contextlib
import gc
import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.data.batch import Batch
from dinov3core.data.decode import PixelFormat
from dinov3core.data.images import ImageSource, open_readable
from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.scenes import SceneSet
from dinov3core.printable import printable
from dinov3core.train.engine import changes, checkpoint, memory, parallel, provenance, stages
from dinov3core.train.engine.best import BestTeacher
from dinov3core.train.engine.config import FROM_PYTHON, Pretrain, Run
from dinov3core.train.engine.dump import write_dump
from dinov3core.train.engine.environment import environment
from dinov3core.train.engine.folder import RunFolder, open_folder, stop_all
from dinov3core.train.engine.image_tally import ImageTally, ImageTotals
from dinov3core.train.engine.metrics import MetricsLog, Progress, StepClock, peak_memory_bytes
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.savepoints import Savepoints
from dinov3core.train.engine.stopping import Interrupted, StopSignals, TrainingStopped
from dinov3core.train.engine.trainer import StepReport, Trainer, prepare
from dinov3core.writing import write_whole

COLLECT_EVERY = 150  # steps between garbage collections, on all processes alike
MAX_DUMPS = 3  # a dump holds the weights; the first few bad steps tell the story
STORAGE = "the storage that holds them probably hangs"


class Session:
    """A run from start or checkpoint to report: owns the files and the loop around `Trainer.step`.

    Args:
        recipe: of `prepare`.
        world: this process among the others.
        source: the training images.
        folder: the run folder; None on other processes than the main one.
        signals: by which the run is asked to stop.
        origin: where the recipe comes from; its command line is kept with dumps.
    """

    def __init__(
        self,
        recipe: Pretrain,
        world: parallel.World,
        source: ImageSource,
        folder: RunFolder | None,
        signals: StopSignals,
        origin: Origin,
    ):
        self.recipe = recipe
        self.world = world
        self.source = source
        self.origin = origin
        self.folder = folder
        self.signals = signals
        self.path = recipe.folder
        self.trainer = Trainer(recipe, world)
        self.tally = ImageTally(world)
        identity = changes.identity(recipe, source, world)
        self.savepoints = Savepoints(recipe, self.trainer, self.tally, identity)
        self.progress: Progress | None = None
        self.clock = StepClock()
        self.owed = False  # a checkpoint that fell on a bad step, due after the next good one
        self.stopped = ""  # why the guard stopped the run, on all processes alike
        self.start_step = self.savepoints.resume(self._say)
        self.log: MetricsLog | None = None
        self.monitor: Monitor | None = None
        self.best: BestTeacher | None = None
        if world.is_main:
            with world.watch.paused():
                # Images that cannot be looked at are refused before any file is opened.
                self.monitor = Monitor(recipe, source, self.path, world.device)
                self.log = MetricsLog(self.path, self.start_step)
                self.best = BestTeacher(recipe, self._say)
        world.wait_for_main()

    def _say(self, text: str) -> None:
        """A line of the main process, above the progress bar once there is one."""
        if self.progress is not None:
            self.progress.say(text)
        elif self.world.is_main:
            print(text, file=sys.stderr, flush=True)

    def run(self) -> dict:
        """Train to the end and return the summary.

        Raises:
            Interrupted: by a signal, once what there was to save is saved.
        """
        try:
            return self._run()
        except Interrupted as asked:
            saved = f"{self.savepoints.in_words()}; the same command continues the run"
            if self.savepoints.newest is None:
                saved = "no checkpoint exists yet; the same command begins anew"
            name = signal.Signals(asked.number).name
            raise Interrupted(asked.number, f"stopped by {name}: {saved}") from None

    def _run(self) -> dict:
        began = stages.in_words(self.recipe, self.savepoints.beginning)
        provenance.announce(self.recipe, self.trainer.resolved, self.world, self.origin, began)
        self._announce_guard()
        if self.start_step == 0 or self._is_in_turn(self.start_step, self.recipe.run.eval_every):
            self._evaluate(self.start_step)
        self._freeze_garbage()
        self.progress = Progress(self.trainer.resolved.steps, self.start_step, self.world.is_main)
        try:
            with self.signals.deferred():
                done = self._loop()
        finally:
            self.progress.close()
            gc.unfreeze()
            gc.enable()
        return self._finish(done)

    def _announce_guard(self) -> None:
        """Say what the guard watches."""
        if self.monitor is None:
            return
        labelled = self.monitor.probe.bank_labels is not None
        words = self.recipe.guard.in_words(labelled, self.recipe.run.eval_every)
        if words:
            self._say(words)

    def _freeze_garbage(self) -> None:
        """Collect at chosen steps only, on all processes alike: none waits for another's."""
        gc.collect()
        gc.freeze()
        gc.disable()

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
            start_step=self.start_step,
            workers=recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _loop(self) -> int:
        """Train to the end, or until the guard stops the run; the steps done."""
        if self.stopped:  # a resumed run that it had stopped before
            return self.start_step
        with self._loader() as loader:
            batches = iter(loader)
            for step in range(self.start_step, self.trainer.resolved.steps):
                batch = self._next_batch(batches, step)
                report = self._train(batch, step)
                done = step + 1
                self._record(done, batch, report)
                if done % COLLECT_EVERY == 0:
                    gc.collect()
                self.owed = self.owed or self._is_checkpoint(done)
                if self.owed and report.finite:
                    self._save(done)
                if report.stop:
                    self._leave(done, report.stop)
                if self._is_in_turn(done, self.recipe.run.eval_every):
                    self._evaluate(done)
                if self.stopped:
                    return done
        return self.trainer.resolved.steps

    def _next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        self.world.watch.note(f"waiting for the images of step {step}", STORAGE)
        self.clock.start()
        batch = next(batches)
        self.clock.arrived()
        self.tally.count(batch)
        small = self.tally.small_images()
        if small:
            self._say(small)
        return batch

    def _train(self, batch: Batch, step: int) -> StepReport:
        self.world.watch.note(f"training step {step}")
        report = self.trainer.step(batch, step, self._is_logged(step + 1), self.signals.asked)
        self.clock.ended()
        self.trainer.counters.seconds += self.clock.seconds
        if not report.finite:
            self._bad_step(batch, step, report)
        return report

    def _is_logged(self, done: int) -> bool:
        return done % self.recipe.run.log_every == 0 or done == self.trainer.resolved.steps

    def _is_in_turn(self, done: int, every: int) -> bool:
        """Whether what is done every so many steps (0: never) is due in mid-run."""
        return every > 0 and done % every == 0 and done < self.trainer.resolved.steps

    def _is_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due in mid-run."""
        run = self.recipe.run
        return any(
            self._is_in_turn(done, every) for every in (run.checkpoint_every, run.keep_every)
        )

    def _record(self, done: int, batch: Batch, report: StepReport) -> None:
        """Show a step on the progress bar and, when its turn is, in metrics.jsonl."""
        images = self.recipe.run.batch_size * self.world.size
        clock = self.clock
        self.progress.advance(
            report.values["loss"],
            images_per_second=images / clock.seconds,
            data_share=clock.waited / clock.seconds,
        )
        if not self._is_logged(done):
            return
        work, wait = clock.means()
        self._write(
            {
                "step": done,
                **self._size_of(batch),
                **report.values,
                **self.trainer.resolved.at(done - 1),
                "log_k": math.log(self.recipe.dino.prototypes),
                "step_seconds": work,
                "data_seconds": wait,
                "images_per_second": images / (work + wait),
                "bad_steps": self.trainer.counters.bad_steps,
            }
        )

    def _size_of(self, batch: Batch) -> dict[str, int]:
        """The longer side of global crops, in a run with several sizes."""
        several = self.recipe.crops.other_sizes
        return {"global_size": max(batch.global_crops.shape[2:])} if several else {}

    def _write(self, row: dict) -> None:
        """A row of metrics.jsonl; says once when that cannot be written."""
        if self.log is None:
            return
        before = self.log.trouble
        self.log.write(row)
        if self.log.trouble and not before:
            trouble = f"{self.log.path} cannot be written ({self.log.trouble})"
            self._say(f"{trouble}: rows wait in memory until it can")

    def _bad_step(self, batch: Batch, step: int, report: StepReport) -> None:
        """Dump what is needed to replay the step; stop after too many in a row."""
        newest = self.savepoints.in_words()
        if not self.trainer.weights_are_finite():
            raise TrainingStopped(
                f"the weights hold a NaN or Inf at step {step}, which no update should bring about "
                f"and no checkpoint will hold: {newest}; check the weights the run started from, "
                "and the machine's memory"
            )
        counters = self.trainer.counters
        folder = self.path / "bad_steps"
        bad = ", ".join(name for name, value in report.values.items() if not math.isfinite(value))
        bad = bad or "another process"
        dumped = ""
        if counters.bad_steps <= MAX_DUMPS:
            argv = self.origin.argv or []
            dumped = write_dump(folder, self.trainer, batch, step, report.values, argv)
        skipped = f"step {step}: NaN or Inf in {bad}; it was skipped, weights are unchanged"
        self._say(f"{skipped}{dumped}")
        if counters.bad_in_a_row >= self.recipe.run.max_bad_steps:
            raise TrainingStopped(
                f"{counters.bad_in_a_row} steps in a row had a NaN or Inf ({bad}); "
                f"{newest}: lower optim.lr or raise teacher.temperature, with "
                f"--run.accept-changes True, or replay the dump in {folder}"
            )

    def _save(self, done: int, required: bool = False) -> None:
        """Write a checkpoint of healthy weights; when that fails, say so and, if `required`, stop.

        Raises:
            TrainingStopped: weights hold a NaN or Inf.
            checkpoint.CheckpointNotWritten: it is required.
        """
        self.owed = False
        self.world.watch.note(f"saving step {done}")
        if not self.trainer.weights_are_finite():
            problem = f"the weights hold a NaN or Inf after step {done}, so they are not saved"
            raise TrainingStopped(f"{problem}: {self.savepoints.in_words()}")
        self._restore_folder()
        try:
            with self.signals.deferred():
                self.savepoints.save(done)
        except checkpoint.CheckpointNotWritten as error:
            if required:
                raise
            self._say(f"{error}; training goes on to the next checkpoint")

    def _restore_folder(self) -> None:
        """Make the run folder again when it was deleted or moved away during the run."""
        problem = restored = ""
        if self.folder is not None:
            try:
                if self.folder.restore() and self.log.restore():
                    restored = "yes"
                    self._say(
                        f"the run folder {self.path} was deleted or moved: it is made again, with "
                        "all rows of metrics.jsonl; checkpoints that were in it are gone"
                    )
            except TrainingStopped as error:
                problem = str(error)
            except OSError as error:
                self._say(f"the run folder {self.path} cannot be made again: {error.strerror}")
        stop_all(self.world, problem)
        if self.world.from_main(restored):
            self.savepoints.newest = None

    def _leave(self, done: int, number: int) -> None:
        """Stop by signal `number`, with this step saved."""
        if done and not self.savepoints.holds(done):
            self._save(done, required=True)
        raise Interrupted(number)

    def _leave_if_asked(self, done: int) -> None:
        """Stop, on all processes alike, when any of them was asked to."""
        vote = torch.tensor(-self.signals.asked(), device=self.world.device)
        number = -int(self.world.minimum(vote))
        if number:
            self._leave(done, number)

    def _evaluate(self, done: int) -> None:
        """Scores of the teacher, which may be the best so far; by the main process alone.

        A signal ends it at once. Nothing is done when its row is there from before a kill.
        """
        self._leave_if_asked(done)
        self._restore_folder()
        counts = self.world.total(self.trainer.method.prototype_counts)
        if self.monitor is not None and not self._has_row(done):
            with contextlib.suppress(Interrupted):
                with self.world.watch.paused(), self.signals.deferred(False):
                    self._judge(done, counts)
        with self.signals.deferred():
            self.world.wait_for_main()
            self._leave_if_asked(done)
            self._heed_guard(done)
        self.trainer.method.prototype_counts.zero_()

    def _heed_guard(self, done: int) -> None:
        """Note, on all processes alike, whether the guard stops the run at these scores."""
        before = self.stopped
        complaint = ""
        if self._has_row(done):
            counters = self.trainer.counters
            start = {"knn": counters.knn_before, "rankme": counters.rankme_before}
            complaint = self.recipe.guard.complaint(start, self.log.evaluation)
        complaint = self.world.from_main(complaint)
        steps = self.trainer.resolved.steps
        best = self.path / "best"
        weights = f"the best weights are in {best}" if best.is_dir() else self.savepoints.in_words()
        when = f"after step {done} of {steps}" if done < steps else "after the last step"
        self.stopped = complaint and f"stopped by the guard {when}: {complaint}; {weights}"
        if self.stopped and not before:
            self._say(self.stopped)

    def _has_row(self, done: int) -> bool:
        """Whether the scores of a step are there, maybe from before a kill."""
        if self.log is None or self.log.evaluation is None:
            return False
        return self.log.evaluation["step"] == done

    def _judge(self, done: int, counts: Tensor) -> None:
        backbone = self.trainer.teacher.backbone
        scores = self.monitor.evaluate(backbone, counts, done)
        if done == 0:
            self.trainer.counters.knn_before = scores["knn"]
            self.trainer.counters.rankme_before = scores["rankme"]
            self.monitor.snapshot_before(backbone)
        with self.signals.deferred():
            self.best.offer(backbone, done, scores)
        self._write({"step": done, "event": "eval", **scores})

    def _finish(self, done: int) -> dict:
        """Last checkpoint and evaluation, summary.json and the report."""
        if not self.savepoints.holds(done):
            self._save(done, required=True)
        self._evaluate(done)
        self._restore_folder()
        if not self.savepoints.holds(done):
            self._save(done, required=True)
        images = self.tally.totals()
        summary: dict = {}
        if self.monitor is not None:
            with self.world.watch.paused():
                summary = self._summary(done, images)
                self.log.close()
                text = provenance.config_text(self.recipe, self.trainer.resolved, self.world)
                self.monitor.report(self.trainer.teacher.backbone, summary, text)
                write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.world.wait_for_main()
        return summary

    def _summary(self, done: int, images: ImageTotals) -> dict:
        counters = self.trainer.counters
        last = self.log.evaluation or {}
        best = self.best.summary(last)
        seen = done * self.recipe.run.batch_size * self.world.size
        return {
            "recipe": self.recipe.name,
            "steps": done,
            "began": stages.in_words(self.recipe, self.savepoints.beginning),
            "beginning": self.savepoints.beginning and asdict(self.savepoints.beginning),
            "stopped": self.stopped,
            "seconds": round(counters.seconds, 1),
            "images_per_second": round(seen / max(counters.seconds, 1e-9), 1),
            **self.monitor.summary(counters.knn_before, last, best),
            "skipped_images": images.skipped,
            "skipped": [printable(name) for name in images.names[:100]],
            "enlarged_images": images.enlarged,
            "bad_steps": counters.bad_steps,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "environment": environment(self.world.device),
        }


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


class Here(NamedTuple):
    """This process among the others, and the signals by which it is asked to stop."""

    world: parallel.World
    signals: StopSignals


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
        return Session(recipe, world, source, folder, here.signals, origin).run()
