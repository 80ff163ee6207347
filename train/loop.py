"""The training loop: batches in, one guarded step at a time, checkpoints, online evaluation, a report at the end.

A step whose loss or gradient norm is not finite changes nothing (trainer.py): here it is counted and dumped so that it
can be replayed, and after a few in a row the run stops with the reason.

A checkpoint of a step is written before that step is evaluated. So nothing is lost when a kill falls into an
evaluation, and a resumed run begins with the evaluation of its first step when metrics.jsonl has no row of it.
"""

import contextlib
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov3core.data.images import ImageSource, open_readable
from dinov3core.data.loader import Batch, BatchLoader
from dinov3core.data.names import printable
from dinov3core.train import changes, checkpoint, memory, parallel, provenance
from dinov3core.train.config import FROM_PYTHON, Pretrain
from dinov3core.train.folder import RunFolder, write_whole
from dinov3core.train.metrics import MetricsLog, Progress, peak_memory_bytes
from dinov3core.train.monitor import Monitor
from dinov3core.train.objective import Crops
from dinov3core.train.stopping import Interrupted, StopSignals, TrainingStopped
from dinov3core.train.trainer import Counters, StepReport, Trainer, prepare

COLLECT_EVERY = 150  # steps between garbage collections, on all processes alike
MAX_DUMPS = 3  # a dump holds the weights; the first few bad steps tell the story
MAX_NAMES = 1000  # of images that could not be read
STORAGE = "the storage that holds them probably hangs"


def to_crops(batch: Batch, device: torch.device) -> Crops:
    """The tensors of a loader batch on the training device."""
    move = {"device": device, "non_blocking": True}
    return Crops(
        batch.global_crops.to(**move),
        batch.local_crops.to(**move),
        None if batch.gram_crops is None else batch.gram_crops.to(**move),
        batch.masks.to(**move),
        batch.mask_indices.to(**move),
        batch.mask_weights.to(**move),
    )


@contextlib.contextmanager
def open_folder(recipe: Pretrain, world: parallel.World) -> Iterator[RunFolder | None]:
    """The run folder, held by the main process while the context lasts; None on the others.

    Raises:
        TrainingStopped: on all processes, when the main one cannot have it.
    """
    folder, problem = None, ""
    if world.is_main:
        try:
            folder = RunFolder(recipe.folder, recipe.run.resume)
        except TrainingStopped as error:
            problem = str(error)
    with folder or contextlib.nullcontext():
        stop_all(world, problem)
        yield folder


def stop_all(world: parallel.World, problem: str) -> None:
    """End the run on all processes when the main one has a problem that it cannot solve."""
    problem = world.from_main(problem)
    if problem:
        raise TrainingStopped(problem)


class Session:
    """A run from start or checkpoint to report: owns the clock, the files and the loop around `Trainer.step`.

    Args:
        recipe: of `prepare`.
        world: this process among the others.
        source: the training images.
        folder: the run folder; None on other processes than the main one.
        signals: by which the run is asked to stop.
        argv: the command line, kept with dumps.
    """

    def __init__(
        self,
        recipe: Pretrain,
        world: parallel.World,
        source: ImageSource,
        folder: RunFolder | None,
        signals: StopSignals,
        argv: list[str] | None = None,
    ):
        self.recipe, self.world, self.source, self.argv = recipe, world, source, argv or []
        self.folder, self.signals, self.path = folder, signals, recipe.folder
        self.identity = changes.identity(recipe, source, world)
        self.trainer = Trainer(recipe, world)
        self.start_step = 0
        self.saved: Path | None = None  # the newest checkpoint
        self.skipped: list[str] = []
        self.progress: Progress | None = None
        self._resume()
        self.log = MetricsLog(self.path, self.start_step) if world.is_main else None
        self.monitor = Monitor(recipe, source, self.path, world.device) if world.is_main else None

    def _resume(self) -> None:
        """Continue from the newest checkpoint that is whole, when there is one."""
        resumed = checkpoint.newest_whole(self.path / "checkpoints", self.world)
        if resumed is None:
            return
        self.saved, self.start_step = resumed.path, resumed.state["step"]
        self._compare(resumed.state.get("recipe", {}))
        trainer = self.trainer
        checkpoint.load(
            resumed, trainer.modules(), trainer.optimizer, self.world, self._buffers(trainer.prototype_counts)
        )
        known = {field.name for field in fields(Counters)}
        state = {key: value for key, value in resumed.state["counters"].items() if key in known}
        trainer.counters = Counters(**state)
        trainer.counters.bad_in_a_row = 0
        self.skipped = resumed.state.get("skipped", [])
        if not self.world.is_main:  # what was counted on all processes goes on with the main one
            trainer.prototype_counts.zero_()
            trainer.counters.skipped_images = trainer.counters.enlarged_images = 0
            self.skipped = []
        self._say(f"resuming after step {self.start_step} from {self.path}")
        for damage in resumed.passed_over:
            self._say(f"passed over a damaged checkpoint: {damage}")

    def _compare(self, before: dict[str, object]) -> None:
        """Refuse to continue another run than this."""
        changed = "; ".join(changes.differences(before, self.identity))
        if changed and not self.recipe.run.accept_changes:
            raise TrainingStopped(
                f"{self.saved} is of a run with another recipe: {changed}. Give the earlier values to continue that "
                "run, or give another --run.out to begin a new one, or --run.accept-changes True to go on with the "
                "new values"
            )
        if self.start_step > self.trainer.resolved.steps:
            raise TrainingStopped(
                f"{self.saved} has done {self.start_step} steps, more than the {self.trainer.resolved.steps} of this "
                "recipe; train longer, or give another --run.out"
            )
        if changed:
            self._say(f"continuing with another recipe, as accepted: {changed}")

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
            newest = f"the newest checkpoint is {self.saved}; the same command continues the run"
            nothing = "no checkpoint exists yet; the same command begins anew"
            name = signal.Signals(asked.number).name
            raise Interrupted(asked.number, f"stopped by {name}: {newest if self.saved else nothing}") from None

    def _run(self) -> dict:
        provenance.announce(self.recipe, self.trainer.resolved, self.world, self.path, self.argv)
        if self.start_step == 0 or self._is_due(self.start_step):
            self._evaluate(self.start_step)
        self._freeze_garbage()
        self.progress = Progress(self.trainer.resolved.steps, self.start_step, self.world.is_main)
        try:
            with self.signals.deferred():
                self._loop()
        finally:
            self.progress.close()
            gc.enable()
        return self._finish()

    def _freeze_garbage(self) -> None:
        """Collect at chosen steps only: scanning all objects in the middle of any step is jitter between ranks."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def _loader(self) -> BatchLoader:
        recipe = self.recipe
        return BatchLoader(
            self.source,
            recipe.crops,
            batch_size=recipe.run.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=recipe.run.seed,
            start_step=self.start_step,
            patch_size=recipe.backbone.patch_size,
            mask_probability=recipe.masks.probability,
            mask_ratio_min=recipe.masks.ratio_min,
            mask_ratio_max=recipe.masks.ratio_max,
            mask_circular_shift=recipe.masks.circular_shift,
            workers=recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _is_due(self, done: int) -> bool:
        """Whether a step is evaluated in the middle of the run; the first and the last are in any case."""
        every = self.recipe.run.eval_every
        return every > 0 and done % every == 0 and done < self.trainer.resolved.steps

    def _loop(self) -> None:
        run, trainer, counters, watch = self.recipe.run, self.trainer, self.trainer.counters, self.world.watch
        images = run.batch_size * self.world.size
        waited, worked, steps = 0.0, 0.0, 0  # since the last row
        owed = False  # a checkpoint: one that falls on a bad step is written after the next good one
        with self._loader() as loader:
            batches = iter(loader)
            for step in range(self.start_step, trainer.resolved.steps):
                began = time.perf_counter()
                watch.note(f"waiting for the images of step {step}", STORAGE)
                batch = next(batches)
                arrived = time.perf_counter()
                watch.note(f"training step {step}")
                self._count_skipped(batch)
                done = step + 1
                observe = done % run.log_every == 0 or done == trainer.resolved.steps
                report = trainer.step(to_crops(batch, self.world.device), step, observe, self.signals.asked)
                ended = time.perf_counter()
                waited, worked, steps = waited + arrived - began, worked + ended - arrived, steps + 1
                counters.seconds += ended - began
                if not report.finite:
                    self._bad_step(batch, step, report)
                self.progress.advance(
                    report.values["loss"], images / (ended - began), (arrived - began) / (ended - began)
                )
                if observe:
                    self._write(self._row(done, report, worked / steps, waited / steps, images))
                    waited, worked, steps = 0.0, 0.0, 0
                if done % COLLECT_EVERY == 0:
                    gc.collect()
                owed = owed or (run.checkpoint_every > 0 and done % run.checkpoint_every == 0)
                if owed and report.finite:
                    self._save(done)
                    owed = False
                if report.stop:
                    self._leave(done, report.stop)
                if self._is_due(done):
                    self._evaluate(done)

    def _write(self, row: dict) -> None:
        """A row of metrics.jsonl; says once when that cannot be written."""
        if self.log is None:
            return
        before = self.log.trouble
        self.log.write(row)
        if self.log.trouble and not before:
            self._say(
                f"{self.log.path} cannot be written ({self.log.trouble}): rows wait in memory and are "
                "written as soon as it can"
            )

    def _row(self, done: int, report: StepReport, work: float, wait: float, images: int) -> dict:
        now = self.trainer.resolved.at(done - 1)
        return {
            "step": done,
            **report.values,
            **now,
            "log_k": float(np.log(self.recipe.dino.prototypes)),
            "step_seconds": work,
            "data_seconds": wait,
            "images_per_second": images / (work + wait),
            "bad_steps": self.trainer.counters.bad_steps,
        }

    def _count_skipped(self, batch: Batch) -> None:
        self.trainer.counters.skipped_images += len(batch.skipped)
        self.trainer.counters.enlarged_images += batch.upsampled
        self.skipped.extend(
            name for name in batch.skipped if name not in self.skipped and len(self.skipped) < MAX_NAMES
        )

    def _bad_step(self, batch: Batch, step: int, report: StepReport) -> None:
        """Dump what is needed to replay the step; stop after too many in a row."""
        counters, limit = self.trainer.counters, self.recipe.run.max_bad_steps
        bad = ", ".join(name for name, value in report.values.items() if not np.isfinite(value)) or "another process"
        if not self.trainer.weights_are_finite():
            raise TrainingStopped(
                f"the weights hold a NaN or Inf at step {step}, which no update should bring about and no checkpoint "
                f"will hold: {self._newest()}; check the weights the run started from, and the machine's memory"
            )
        where = self._dump(batch, step, report) if counters.bad_steps <= MAX_DUMPS else ""
        self._say(f"step {step}: NaN or Inf in {bad}; the step was skipped, weights are unchanged{where}")
        if counters.bad_in_a_row >= limit:
            raise TrainingStopped(
                f"{counters.bad_in_a_row} steps in a row had a NaN or Inf ({bad}); {self._newest()}: lower optim.lr "
                "or raise teacher.temperature, with --run.accept-changes True, or replay the dump in "
                f"{self.path / 'bad_steps'}"
            )

    def _newest(self) -> str:
        return f"the newest checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    def _dump(self, batch: Batch, step: int, report: StepReport) -> str:
        """Write what `replay` needs; what to say about it. A dump that cannot be written stops no run."""
        path = self.path / "bad_steps" / f"step_{step:08d}_rank{self.world.rank}.pt"
        content = {
            "step": step,
            "argv": self.argv,
            "values": report.values,
            "crops": to_crops(batch, torch.device("cpu"))._asdict(),
            "modules": {name: module.state_dict() for name, module in self.trainer.modules().items()},
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            path.unlink(missing_ok=True)
            return f"; its dump could not be written ({str(error).splitlines()[0]})"
        return f"; replay it with: python train/replay.py {path}"

    def _save(self, done: int, required: bool = False) -> None:
        """Write a checkpoint of healthy weights; one that cannot be written is said and, unless required, missed.

        Raises:
            TrainingStopped: weights hold a NaN or Inf.
            checkpoint.CheckpointNotWritten: it is required.
        """
        trainer, run = self.trainer, self.recipe.run
        self.world.watch.note(f"saving step {done}")
        if not trainer.weights_are_finite():
            raise TrainingStopped(
                f"the weights hold a NaN or Inf after step {done}; they are not saved: {self._newest()}"
            )
        self._restore_folder()
        counts = self._buffers(self.world.total(trainer.prototype_counts))
        state = self._state()
        try:
            with self.signals.deferred():
                self.saved = checkpoint.save(
                    self.path / "checkpoints", done, trainer.modules(), trainer.optimizer, state, self.world,
                    run.keep_checkpoints, counts,
                )  # fmt: skip
        except checkpoint.CheckpointNotWritten as error:
            if required:
                raise
            self._say(f"{error}; training goes on to the next checkpoint")

    @staticmethod
    def _buffers(prototype_counts: Tensor) -> dict[str, Tensor]:
        """Tensors of the run that a checkpoint holds besides the modules'."""
        return {"prototype_counts": prototype_counts}

    def _state(self) -> dict:
        """What a checkpoint holds besides tensors; images are counted over all processes."""
        skipped, enlarged, names = self._image_counts()
        counters = replace(self.trainer.counters, skipped_images=skipped, enlarged_images=enlarged)
        return {"counters": asdict(counters), "skipped": names, "recipe": self.identity}

    def _image_counts(self) -> tuple[int, int, list[str]]:
        """Images skipped and enlarged on all processes, and names of those skipped."""
        counters = self.trainer.counters
        counted = torch.tensor([counters.skipped_images, counters.enlarged_images], device=self.world.device)
        skipped, enlarged = self.world.total(counted).tolist()
        names = sorted(set(self.world.gather_texts(self.skipped)))
        return skipped, enlarged, names[:MAX_NAMES]

    def _restore_folder(self) -> None:
        """Make the run folder again when it was deleted or moved away during the run."""
        problem = ""
        if self.folder is not None:
            try:
                if self.folder.restore():
                    self.log.restore()
                    self._say(
                        f"the run folder {self.path} was deleted or moved: it is made again, with all rows of "
                        "metrics.jsonl; checkpoints that were in it are gone"
                    )
            except TrainingStopped as error:
                problem = str(error)
            except OSError as error:
                self._say(f"the run folder {self.path} is gone and cannot be made again: {error.strerror}")
        stop_all(self.world, problem)

    def _leave(self, done: int, number: int) -> None:
        """Stop by a signal, with this step saved."""
        if done and (self.saved is None or checkpoint.step_of(self.saved) != done):
            self._save(done, required=True)
        raise Interrupted(number)

    def _leave_if_asked(self, done: int) -> None:
        """Stop when any process was asked to, on all alike."""
        votes = torch.tensor(-self.signals.asked(), device=self.world.device)
        number = -int(self.world.minimum(votes))
        if number:
            self._leave(done, number)

    def _evaluate(self, done: int) -> None:
        """k-NN, RankMe, prototype usage and patch drift of the teacher, on the main process; others wait.

        A signal ends it at once. Nothing is done when the row is there from before a kill.
        """
        self._leave_if_asked(done)
        counts = self.world.total(self.trainer.prototype_counts)
        if self.monitor is not None and not self._has_row(done):
            with contextlib.suppress(Interrupted), self.world.watch.paused(), self.signals.deferred(False):
                self._judge(done, counts)
        with self.signals.deferred():
            self.world.wait_for_main()
            self._leave_if_asked(done)
        self.trainer.prototype_counts.zero_()

    def _has_row(self, done: int) -> bool:
        return self.log.evaluation is not None and self.log.evaluation["step"] == done

    def _judge(self, done: int, counts: Tensor) -> None:
        backbone = self.trainer.teacher.backbone
        scores = self.monitor.evaluate(backbone, counts, done)
        if done == 0:
            self.trainer.counters.knn_before = scores["knn"]
            self.monitor.snapshot_before(backbone)
        self._write({"step": done, "event": "eval", **scores})

    def _finish(self) -> dict:
        """Last checkpoint and evaluation, summary.json and the report."""
        done = self.trainer.resolved.steps
        if self.saved is None or checkpoint.step_of(self.saved) != done:
            self._save(done, required=True)
        self._evaluate(done)
        self._restore_folder()
        skipped, enlarged, names = self._image_counts()
        summary: dict = {}
        if self.monitor is not None:
            with self.world.watch.paused():
                summary = self._summary(done, skipped, enlarged, names)
                self.log.close()
                text = provenance.config_text(self.recipe, self.trainer.resolved, self.world)
                self.monitor.report(self.trainer.teacher.backbone, summary, text)
                write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.world.wait_for_main()
        return summary

    def _summary(self, done: int, skipped: int, enlarged: int, names: list[str]) -> dict:
        counters = self.trainer.counters
        images = done * self.recipe.run.batch_size * self.world.size
        return {
            "recipe": self.recipe.name,
            "steps": done,
            "seconds": round(counters.seconds, 1),
            "images_per_second": round(images / max(counters.seconds, 1e-9), 1),
            **self.monitor.summary(counters.knn_before, self.log.evaluation),
            "skipped_images": skipped,
            "skipped": [printable(name) for name in names[:100]],
            "enlarged_images": enlarged,
            "bad_steps": counters.bad_steps,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "environment": provenance.environment(self.world),
        }


def open_training_images(recipe: Pretrain) -> tuple[ImageSource, str]:
    """The source a recipe names, and a sentence on how many images it has."""
    data = recipe.data
    return open_readable(
        data.source,
        channels=recipe.backbone.in_channels,
        scale=data.channel_scale or None,
        scenes=data.scenes,
        scene_size=data.scene_size,
        seed=recipe.run.seed,
    )


def pretrain(recipe: Pretrain, source: ImageSource | None = None, argv: list[str] | None = None) -> dict:
    """Run a recipe on this machine (or as one of torchrun's processes) and return its summary.

    Args:
        recipe: from recipes.py or made by `dataclasses.replace`.
        source: images to train on instead of `recipe.data.source`, for instance
            `dinov3core.data.images.DatasetSource(my_torch_dataset)`.
        argv: the command line behind `recipe`, kept with dumps so that they can be replayed.

    Raises:
        Interrupted: by SIGINT (Ctrl-C) or SIGTERM, once what there was to save is saved.
    """
    if source is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=FROM_PYTHON + type(source).__name__))
    recipe.resolve(parallel.processes())  # a recipe that cannot work is refused before processes meet
    run = recipe.run
    try:
        with StopSignals() as signals, parallel.start(run.device, run.threads, run.timeout_minutes) as world:
            recipe = prepare(recipe, world.device)
            world.watch.note("opening the training images", STORAGE)
            if source is None:
                source, sentence = open_training_images(recipe)
                if world.is_main:
                    print(sentence, file=sys.stderr)
            with open_folder(recipe, world) as folder, memory.explained(recipe, world.device):
                return Session(recipe, world, source, folder, signals, argv).run()
    except Interrupted as asked:
        sentence = str(asked) or "stopped before the run began; the same command begins or continues it"
        raise Interrupted(asked.number, sentence, 0 if run.requeue else None) from None
