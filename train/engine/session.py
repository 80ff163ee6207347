"""A run of one network, from start or checkpoint to its report: its trainer, its files, its scores.

Whoever drives a session gives it batches, and decides when to stop: see `loop` for a run by itself.

A step whose loss or gradient norm is not finite changes nothing (trainer.py): here it is counted
and dumped so that it can be replayed, and after a few in a row the run stops with the reason.

A checkpoint of a step is written before that step is evaluated. So nothing is lost when a kill
falls into an evaluation, and a resumed run begins with the evaluation of the step it starts from
when metrics.jsonl has no row of it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from dinov3core.data.batch import Batch
from dinov3core.data.images import ImageSource
from dinov3core.printable import printable
from dinov3core.train.engine import changes, checkpoint, parallel, provenance, stages
from dinov3core.train.engine.best import BestTeacher
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.dump import write_dump
from dinov3core.train.engine.environment import environment
from dinov3core.train.engine.folder import RunFolder, stop_all
from dinov3core.train.engine.image_tally import ImageTally, ImageTotals
from dinov3core.train.engine.methods import Method
from dinov3core.train.engine.metrics import MetricsLog, StepClock, peak_memory_bytes
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.savepoints import Savepoints
from dinov3core.train.engine.stopping import Interrupted, StopSignals, TrainingStopped
from dinov3core.train.engine.trainer import StepReport, Trainer, no_stop
from dinov3core.writing import write_whole

MAX_DUMPS = 3  # a dump holds the weights; the first few bad steps tell the story

T = TypeVar("T")


class Here(NamedTuple):
    """This process among the others, and the signals by which it is asked to stop."""

    world: parallel.World
    signals: StopSignals


class Session:
    """Owns the trainer of a run and everything the run writes.

    Args:
        recipe: of `prepare`.
        here: the processes of this run; signals end an evaluation.
        source: the training images.
        folder: the run folder; None on other processes than the main one.
        origin: where the recipe comes from; its command line is kept with dumps.
        say: shows a line to the user; asked on the main process alone.
        method: how the network learns; None: by self-distillation.

    Attributes:
        start_step: the steps it had done when it was opened.
        stopped: why the guard stopped the run, on all processes alike; empty while it goes on.
    """

    def __init__(
        self,
        recipe: Pretrain,
        here: Here,
        source: ImageSource,
        folder: RunFolder | None,
        origin: Origin,
        say: Callable[[str], None],
        method: Method | None = None,
    ):
        self.recipe = recipe
        self.world, self.signals = here
        self.source = source
        self.origin = origin
        self.folder = folder
        self.path = recipe.folder
        self.trainer = Trainer(recipe, self.world, method=method)
        self.tally = ImageTally(self.world)
        identity = changes.identity(recipe, source, self.world)
        self.savepoints = Savepoints(recipe, self.trainer, self.tally, identity)
        self.clock = StepClock()
        self.owed = False  # a checkpoint that fell on a bad step, due after the next good one
        self.stopped = ""
        self._show = say
        self.start_step = self.savepoints.resume(self.say)
        self.log: MetricsLog | None = None
        self.monitor: Monitor | None = None
        self.best: BestTeacher | None = None
        by_main(self.world, self._open)

    def _open(self) -> None:
        """On the main process; images that cannot be looked at are refused before any file."""
        self.monitor = Monitor(self.recipe, self.source, self.path, self.world.device)
        self.log = MetricsLog(self.path, self.start_step)
        self.best = BestTeacher(self.path, self.recipe.run.keep_best, self.say)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.trainer.resolved.steps

    def say(self, text: str) -> None:
        """A line of the main process."""
        if self.world.is_main:
            self._show(text)

    def announce(self) -> None:
        """Say what is run, save it as config.json, and say what the guard watches."""
        by_main(self.world, self._announce)

    def _announce(self) -> None:
        began = stages.in_words(self.recipe, self.savepoints.beginning)
        provenance.announce(self.recipe, self.trainer.resolved, self.world, self.origin, began)
        labelled = self.monitor.probe.bank_labels is not None
        words = self.recipe.guard.in_words(labelled, self.recipe.run.eval_every)
        if words:
            self.say(words)

    # --- steps

    def train(
        self,
        batch: Batch,
        step: int,
        waited: Mapping[str, float],
        stop: Callable[[], int] = no_stop,
        targets: Any = None,
    ) -> StepReport:
        """One step, its row of metrics.jsonl and, where it is due, its checkpoint.

        Args:
            batch: of this process.
            step: 0-based.
            waited: seconds that went before, by the name of their column: "data_seconds", ...
            stop, targets: as for `Trainer.step`.
        """
        self.tally.count(batch)
        small = self.tally.small_images()
        if small:
            self.say(small)
        self.world.watch.note(f"training step {step}")
        done = step + 1
        with self.clock.working(waited):
            report = self.trainer.step(batch, step, self._is_logged(done), stop, targets)
        self.trainer.counters.seconds += self.clock.seconds
        if not report.finite:
            self._bad_step(batch, step, report, replayable=targets is None)
        self._record(done, batch, report)
        self.owed = self.owed or self._is_checkpoint(done)
        if self.owed and report.finite:
            self.save(done)
        return report

    def _is_logged(self, done: int) -> bool:
        return done % self.recipe.run.log_every == 0 or done == self.steps

    def _is_in_turn(self, done: int, every: int) -> bool:
        """Whether what is done every so many steps (0: never) is due in mid-run."""
        return every > 0 and done % every == 0 and done < self.steps

    def _is_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due in mid-run."""
        run = self.recipe.run
        return any(
            self._is_in_turn(done, every) for every in (run.checkpoint_every, run.keep_every)
        )

    def is_evaluated(self, done: int) -> bool:
        """Whether scores are due after so many steps, before the last one."""
        return done == 0 or self._is_in_turn(done, self.recipe.run.eval_every)

    def _record(self, done: int, batch: Batch, report: StepReport) -> None:
        """A row of metrics.jsonl, when the step's turn is."""
        if not self._is_logged(done):
            return
        seconds = self.clock.means()
        values = report.values
        if "target_entropy" in values:
            values = values | {"log_k": math.log(self.recipe.dino.prototypes)}
        self._write(
            {
                "step": done,
                **self._size_of(batch),
                **values,
                **self.trainer.resolved.at(done - 1),
                **seconds,
                "images_per_second": self.images / sum(seconds.values()),
                "bad_steps": self.trainer.counters.bad_steps,
            }
        )

    @property
    def images(self) -> int:
        """Of a step, over all processes."""
        return self.recipe.run.batch_size * self.world.size

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
            self.say(f"{trouble}: rows wait in memory until it can")

    def _bad_step(self, batch: Batch, step: int, report: StepReport, replayable: bool) -> None:
        """Dump what is needed to replay the step; stop after too many in a row.

        Args:
            replayable: whether batch and weights are all that is needed.
        """
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
        if replayable and counters.bad_steps <= MAX_DUMPS:
            argv = self.origin.argv or []
            dumped = write_dump(folder, self.trainer, batch, step, report.values, argv)
        skipped = f"step {step}: NaN or Inf in {bad}; it was skipped, weights are unchanged"
        self.say(f"{skipped}{dumped}")
        if counters.bad_in_a_row >= self.recipe.run.max_bad_steps:
            replay = f", or replay the dump in {folder}" if replayable else ""
            raise TrainingStopped(
                f"{counters.bad_in_a_row} steps in a row had a NaN or Inf ({bad}); "
                f"{newest}: lower optim.lr or raise teacher.temperature, with "
                f"--run.accept-changes True{replay}"
            )

    # --- checkpoints

    def save(self, done: int, required: bool = False) -> None:
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
            self.say(f"{error}; training goes on to the next checkpoint")

    def keep(self, done: int) -> None:
        """See to it that the newest checkpoint is the one after `done` steps.

        Raises: as `save`, which is required.
        """
        if not self.savepoints.holds(done):
            self.save(done, required=True)

    def _restore_folder(self) -> None:
        """Make the run folder again when it was deleted or moved away during the run."""
        problem = restored = ""
        if self.folder is not None:
            try:
                if self.folder.restore() and self.log.restore():
                    restored = "yes"
                    self.say(
                        f"the run folder {self.path} was deleted or moved: it is made again, with "
                        "all rows of metrics.jsonl; checkpoints that were in it are gone"
                    )
            except TrainingStopped as error:
                problem = str(error)
            except OSError as error:
                self.say(f"the run folder {self.path} cannot be made again: {error.strerror}")
        stop_all(self.world, problem)
        if self.world.from_main(restored):
            self.savepoints.newest = None

    # --- scores

    def evaluate(self, done: int) -> None:
        """Scores of the teacher, which may be the best so far; by the main process alone.

        A signal ends it at once, without a row. Nothing is done when its row is there from before a
        kill. The guard looks at the scores.
        """
        self._restore_folder()
        counts = self.world.total(self.trainer.method.prototype_counts)
        with self.signals.deferred():
            by_main(self.world, lambda: self._judge(done, counts))
            if self.world.from_main("yes" if self._has_row(done) else ""):
                self._heed_guard(done)
                self.trainer.method.prototype_counts.zero_()

    def _judge(self, done: int, counts: Tensor) -> None:
        if self._has_row(done):
            return
        with contextlib.suppress(Interrupted), self.signals.deferred(False):
            backbone = self.trainer.teacher.backbone
            scores = self.monitor.evaluate(backbone, counts, done)
            if done == 0:
                self.trainer.counters.knn_before = scores["knn"]
                self.trainer.counters.rankme_before = scores["rankme"]
                self.monitor.snapshot_before(backbone)
            with self.signals.deferred():
                self.best.offer(backbone, done, scores)
            self._write({"step": done, "event": "eval", **scores})

    def _heed_guard(self, done: int) -> None:
        """Note, on all processes alike, whether the guard stops the run at these scores."""
        before = self.stopped
        complaint = ""
        if self._has_row(done):
            counters = self.trainer.counters
            start = {"knn": counters.knn_before, "rankme": counters.rankme_before}
            complaint = self.recipe.guard.complaint(start, self.log.evaluation)
        complaint = self.world.from_main(complaint)
        best = self.path / "best"
        weights = f"the best weights are in {best}" if best.is_dir() else self.savepoints.in_words()
        when = f"after step {done} of {self.steps}" if done < self.steps else "after the last step"
        self.stopped = complaint and f"stopped by the guard {when}: {complaint}; {weights}"
        if self.stopped and not before:
            self.say(self.stopped)

    def _has_row(self, done: int) -> bool:
        """Whether the scores of a step are there, maybe from before a kill."""
        if self.log is None or self.log.evaluation is None:
            return False
        return self.log.evaluation["step"] == done

    # --- the end

    def finish(self, done: int) -> dict:
        """summary.json and the report, with the last checkpoint; the summary on the main process.

        The step has been evaluated.
        """
        self._restore_folder()
        self.keep(done)
        images = self.tally.totals()
        return by_main(self.world, lambda: self._conclude(done, images)) or {}

    def _conclude(self, done: int, images: ImageTotals) -> dict:
        summary = self._summary(done, images)
        self.log.close()
        text = provenance.config_text(self.recipe, self.trainer.resolved, self.world)
        self.monitor.report(self.trainer.teacher.backbone, summary, text)
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _summary(self, done: int, images: ImageTotals) -> dict:
        counters = self.trainer.counters
        last = self.log.evaluation or {}
        best = self.best.summary(last)
        return {
            "recipe": self.recipe.name,
            "steps": done,
            "began": stages.in_words(self.recipe, self.savepoints.beginning),
            "beginning": self.savepoints.beginning and asdict(self.savepoints.beginning),
            "stopped": self.stopped,
            "seconds": round(counters.seconds, 1),
            "images_per_second": round(done * self.images / max(counters.seconds, 1e-9), 1),
            **self.monitor.summary(counters.knn_before, last, best),
            "skipped_images": images.skipped,
            "skipped": [printable(name) for name in images.names[:100]],
            "enlarged_images": images.enlarged,
            "bad_steps": counters.bad_steps,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "environment": environment(self.world.device),
        }


def by_main(world: parallel.World, work: Callable[[], T]) -> T | None:
    """What the main process alone works out while the others wait; None on these.

    Raises:
        TrainingStopped: on the others, when it fails on the main one, which raises what it met.
    """
    result: T | None = None
    failure: Exception | None = None
    if world.is_main:
        with world.watch.paused():
            try:
                result = work()
            except Exception as error:  # whatever it is, the others must not wait for ever
                failure = error
    world.wait_for_main()
    said = world.from_main("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    if said:
        raise TrainingStopped(said)
    return result
