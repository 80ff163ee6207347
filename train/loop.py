"""The training loop: batches in, one guarded step at a time, checkpoints, online evaluation, a report at the end.

A step whose loss or gradient norm is not finite changes nothing (trainer.py): here it is counted and dumped so that it
can be replayed, and after a few in a row the run stops with the reason.
"""

import gc
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dinov3core.data.images import ImageSource, open_source
from dinov3core.data.loader import Batch, BatchLoader
from dinov3core.train import checkpoint, parallel, provenance
from dinov3core.train.config import Pretrain
from dinov3core.train.metrics import MetricsLog, Progress, peak_memory_bytes
from dinov3core.train.monitor import Monitor
from dinov3core.train.objective import Crops
from dinov3core.train.trainer import Counters, StepReport, Trainer

COLLECT_EVERY = 150  # steps between garbage collections, on all processes alike
MAX_DUMPS = 3  # a dump holds the weights; the first few bad steps tell the story


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


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
        batch.mask_indices,
    )


def open_folder(recipe: Pretrain, world: parallel.World) -> Path:
    """The run folder, made and writable; a finished run in it is kept aside under a number.

    Raises:
        TrainingStopped: when the folder cannot be written.
    """
    folder = recipe.folder
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "summary.json").is_file() or not recipe.run.resume:
                _set_aside(folder)
            (folder / ".writable").write_text("")
            (folder / ".writable").unlink()
        except OSError as error:
            raise TrainingStopped(
                f"cannot write the run folder {folder}: {error.strerror}; give a writable one with --run.out"
            ) from error
    world.barrier()
    return folder


def _set_aside(folder: Path) -> None:
    if not any(folder.iterdir()):
        return
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, kept)
    folder.mkdir(parents=True)
    print(f"the earlier run in {folder} is kept as {kept}", file=sys.stderr)


class Session:
    """A run from start or checkpoint to report: owns the clock, the files and the loop around `Trainer.step`."""

    def __init__(self, recipe: Pretrain, world: parallel.World, source: ImageSource, argv: list[str] | None = None):
        self.recipe, self.world, self.source, self.argv = recipe, world, source, argv or []
        self.folder = open_folder(recipe, world)
        self.trainer = Trainer(recipe, world)
        self.start_step = 0
        self.skipped: list[str] = []
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is not None:
            self.start_step, counters = checkpoint.load(found, self.trainer.modules(), self.trainer.optimizer, world)
            self.trainer.counters = Counters(**counters)
        self.log = MetricsLog(self.folder, self.start_step) if world.is_main else None
        self.monitor = Monitor(recipe, source, self.folder, world.device) if world.is_main else None

    def run(self) -> dict:
        """Train to the end and return the summary."""
        provenance.announce(self.recipe, self.trainer.resolved, self.world, self.folder, self.argv)
        if not self.start_step:
            self._evaluate(0)
        self._freeze_garbage()
        progress = Progress(self.trainer.resolved.steps, self.start_step, self.world.is_main)
        if self.start_step:
            progress.say(f"resuming after step {self.start_step} from {self.folder}")
        try:
            self._loop(progress)
        finally:
            progress.close()
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

    def _loop(self, progress: Progress) -> None:
        run, trainer, counters = self.recipe.run, self.trainer, self.trainer.counters
        images = run.batch_size * self.world.size
        waited, worked, steps = 0.0, 0.0, 0  # since the last row
        with self._loader() as loader:
            batches = iter(loader)
            for step in range(self.start_step, trainer.resolved.steps):
                began = time.perf_counter()
                batch = next(batches)
                arrived = time.perf_counter()
                self._count_skipped(batch)
                done = step + 1
                observe = done % run.log_every == 0 or done == trainer.resolved.steps
                report = trainer.step(to_crops(batch, self.world.device), step, observe)
                ended = time.perf_counter()
                waited, worked, steps = waited + arrived - began, worked + ended - arrived, steps + 1
                counters.seconds += ended - began
                if not report.finite:
                    self._bad_step(batch, step, report, progress)
                progress.advance(report.values["loss"], images / (ended - began), (arrived - began) / (ended - began))
                if observe:
                    if self.log is not None:
                        self.log.write(self._row(done, report, worked / steps, waited / steps, images))
                    waited, worked, steps = 0.0, 0.0, 0
                if done % COLLECT_EVERY == 0:
                    gc.collect()
                if run.checkpoint_every and done % run.checkpoint_every == 0:
                    self._save(done)
                if run.eval_every and done % run.eval_every == 0 and done < trainer.resolved.steps:
                    self._evaluate(done)

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
        self.skipped.extend(name for name in batch.skipped if name not in self.skipped and len(self.skipped) < 1000)

    def _bad_step(self, batch: Batch, step: int, report: StepReport, progress: Progress) -> None:
        """Dump what is needed to replay the step; stop after too many in a row."""
        counters, limit = self.trainer.counters, self.recipe.run.max_bad_steps
        bad = ", ".join(name for name, value in report.values.items() if not np.isfinite(value)) or "another process"
        where = ""
        if counters.bad_steps <= MAX_DUMPS:
            path = self.folder / "bad_steps" / f"step_{step:08d}_rank{self.world.rank}.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save(
                {
                    "step": step,
                    "argv": self.argv,
                    "values": report.values,
                    "crops": to_crops(batch, torch.device("cpu"))._asdict(),
                    "modules": {name: module.state_dict() for name, module in self.trainer.modules().items()},
                },
                path,
            )
            where = f"; replay it with: python train/replay.py {path}"
        progress.say(f"step {step}: NaN or Inf in {bad}; the step was skipped, weights are unchanged{where}")
        if counters.bad_in_a_row >= limit:
            self._save(step + 1)
            raise TrainingStopped(
                f"{counters.bad_in_a_row} steps in a row had a NaN or Inf ({bad}); the weights of the last good step "
                f"are in {self.folder / 'checkpoints'}: lower optim.lr or raise teacher.temperature, or replay the "
                f"dump in {self.folder / 'bad_steps'}"
            )

    def _save(self, done: int) -> None:
        trainer = self.trainer
        checkpoint.save(
            self.folder / "checkpoints", done, trainer.modules(), trainer.optimizer, asdict(trainer.counters),
            self.world, self.recipe.run.keep_checkpoints,
        )  # fmt: skip

    def _evaluate(self, done: int) -> None:
        """k-NN, RankMe, prototype usage and patch drift of the teacher, on the main process."""
        if self.monitor is not None:
            backbone = self.trainer.teacher.backbone
            found = self.monitor.evaluate(backbone, self.trainer.prototype_counts, done)
            self.log.write({"step": done, "event": "eval", **found})
            if done == 0:
                self.trainer.counters.knn_before = found["knn"]
                self.monitor.snapshot_before(backbone)
        self.trainer.prototype_counts.zero_()
        self.world.barrier()

    def _finish(self) -> dict:
        """Last checkpoint and evaluation, summary.json and the report."""
        done, run = self.trainer.resolved.steps, self.recipe.run
        if not (run.checkpoint_every and done % run.checkpoint_every == 0) and done > self.start_step:
            self._save(done)
        self._evaluate(done)
        counters = self.trainer.counters
        counted = torch.tensor([counters.skipped_images, counters.enlarged_images], device=self.world.device)
        skipped, enlarged = self.world.total(counted).tolist()
        names = sorted(set(self.world.gather_texts(self.skipped)))
        summary: dict = {}
        if self.monitor is not None:
            summary = self._summary(done, skipped, enlarged, names)
            self.log.close()
            text = provenance.config_text(self.recipe, self.trainer.resolved, self.world)
            self.monitor.report(self.trainer.teacher.backbone, summary, text)
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.world.barrier()
        return summary

    def _summary(self, done: int, skipped: int, enlarged: int, names: list[str]) -> dict:
        counters, verdict = self.trainer.counters, self.monitor.verdict()
        images = done * self.recipe.run.batch_size * self.world.size
        return {
            "recipe": self.recipe.name,
            "steps": done,
            "seconds": round(counters.seconds, 1),
            "images_per_second": round(images / max(counters.seconds, 1e-9), 1),
            "knn_pixels": self.monitor.knn_pixels,
            "knn_before": counters.knn_before,
            "knn_after": self.monitor.last.get("knn"),
            "collapse": verdict.kind,
            "collapse_sentence": verdict.sentence,
            "skipped_images": skipped,
            "skipped": names[:100],
            "enlarged_images": enlarged,
            "bad_steps": counters.bad_steps,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "environment": provenance.environment(self.world),
        }


def open_training_images(recipe: Pretrain) -> ImageSource:
    """The source a recipe names."""
    data = recipe.data
    return open_source(
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
    """
    recipe.resolve(parallel.processes())  # a recipe that cannot work is refused before processes meet
    with parallel.start(recipe.run.device, recipe.run.threads) as world:
        if world.device.type == "cpu" and recipe.run.precision == "bf16":
            recipe = replace(recipe, run=replace(recipe.run, precision="fp32"))
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if source is None:
            source = open_training_images(recipe)
        return Session(recipe, world, source, argv).run()
