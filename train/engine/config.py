"""What a run is: frozen dataclasses, checked as a whole before anything is built.

A recipe (train/recipes) is a function that returns a `Pretrain`; the command line replaces any
field by its dotted name. Settings of crops, masks, backbone and heads are those of `data` and
`models`, the values that these rooms work with. Absence is spelled by a value ("none", 0, -1) named
in the field's text, never by an unread key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from dinov3core.bounds import Bounds, complaints, fields_of
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.models.head import HeadSettings
from dinov3core.models.vit import VitSettings
from dinov3core.train.engine.objective import GramTerm
from dinov3core.train.engine.schedules import (
    CosineSchedule,
    Epochs,
    Schedule,
    constant,
    first_outside,
    lr_factor,
    scaled,
    values,
)

Every = Annotated[int, Bounds(0, 10**9)]  # a number of steps
Weight = Annotated[float, Bounds(0, 1e4)]
# Logits are cosines and published temperatures 0.04 to 0.1; at 0.001 a softmax is one-hot already.
Temperature = Annotated[float, Bounds(1e-3, 10)]
# Schedules state what each of their values may be.
Rates = Annotated[Schedule, Bounds(0, 10)]
Weights = Annotated[Schedule, Bounds(0, 1e4)]
Momenta = Annotated[Schedule, Bounds(0, 1)]
Temperatures = Annotated[Schedule, Bounds(1e-3, 10)]
LONGEST = 10**7  # steps; ten times the longest published run, and 80 MB for each schedule
# begins data.source of a run whose images were handed to `pretrain` as an object
FROM_PYTHON = "from Python: "


class ConfigError(ValueError):
    """A recipe that cannot run; the message says what was expected, what came and what to do."""


@contextmanager
def building(what: str) -> Iterator[None]:
    """Around what is made from a recipe: whatever goes wrong there is an error of the recipe.

    Raises:
        ConfigError: instead of the error of a module that cannot be made.
    """
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{what} of this recipe cannot be built: {reason}") from error


@dataclass(frozen=True)
class Loss:
    """Weights and temperatures of the objective."""

    dino_weight: Weight = 1.0
    """Weight of the CLS term (DINO)."""
    ibot_weight: Weight = 1.0
    """Weight of the masked-patch term (iBOT)."""
    koleo_weight: Weight = 0.1
    """Weight of the term that spreads CLS tokens (KoLeo)."""
    koleo_distributed: bool = False
    """Search neighbours among all processes instead of this one's images."""
    koleo_topk: Annotated[int, Bounds(1, 10**6)] = 1
    """How many nearest neighbours KoLeo pushes away."""
    koleo_group_size: Annotated[int, Bounds(0, 10**9)] = 0
    """Images among which distributed KoLeo searches; 0: the whole global batch."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's softmax."""
    sinkhorn_iterations: Annotated[int, Bounds(1, 1000)] = 3
    """Iterations of the teacher's centering."""
    skip_same_crop: bool = True
    """Do not compare a global crop with itself."""
    local_weight: Weights = field(default_factory=lambda: constant(1.0))
    """Weight of local crops within the CLS term."""


@dataclass(frozen=True)
class Gram:
    """Gram anchoring (DINOv3 paper, section 4.2)."""

    teacher: str = "none"
    """none | ema (patches of the EMA teacher) | snapshot (a frozen copy of it) | file:PATH
    (backbone weights).
    """
    weight: Weights = field(default_factory=lambda: constant(0.0))
    """Weight of the Gram term."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Which patches are compared: all, or those hidden from the student, or the others."""
    normalize: bool = True
    """Compare directions of patches, not lengths."""
    per_image: bool = True
    """One Gram matrix per image; False: one over the batch."""
    negatives: Literal["keep", "clip", "clip_teacher"] = "keep"
    """Negative similarities: kept, set to zero, or set to zero where the teacher's are negative."""
    first_update: Every = 0
    """snapshot: the step before which the EMA teacher is first copied."""
    update_every: Every = 0
    """snapshot and file: copy the EMA teacher again every so many steps; 0: never."""
    max_updates: Every = 0
    """How often at most; 0: no limit."""

    @property
    def enabled(self) -> bool:
        """Whether there is an anchor."""
        return self.teacher != "none"

    @property
    def separate(self) -> bool:
        """Whether a backbone of its own holds the anchor."""
        return self.teacher not in ("none", "ema")

    def term(self) -> GramTerm | None:
        """What the objective is told; None without an anchor."""
        if not self.enabled:
            return None
        return GramTerm(self.tokens, self.normalize, self.per_image, self.negatives)


@dataclass(frozen=True)
class Data:
    """Where images come from."""

    source: str = "scenes"
    """scenes (built in) | a folder | a .txt or .csv list | .tar shards: a file, a folder, a pattern
    a-{0..9}.tar.
    """
    scenes: Annotated[int, Bounds(1, 10**7)] = 8192
    """Number of distinct built-in images; held-out ones begin beyond ten million."""
    scene_size: Annotated[int, Bounds(8, 4096)] = 64
    """Side of a built-in image in pixels."""
    channel_scale: Annotated[float, Bounds(0, 1e9)] = 0.0
    """What images of other than 3 channels are divided by to reach [0, 1]; 0: the range of their
    number type.
    """
    workers: Annotated[int, Bounds(0, 512)] = 4
    """Loader processes; 0: in a thread of this one."""
    probe: str = "auto"
    """Labelled images for the online k-NN: scenes (held out, built in) | a folder with
    train/<class>/ and val/<class>/, or any other labelled data train/evaluate.py reads | none |
    auto: scenes when training on scenes, else none."""
    probe_bank: Annotated[int, Bounds(2, 10**6)] = 2000
    """Labelled images among which neighbours are sought."""
    probe_queries: Annotated[int, Bounds(1, 10**6)] = 1000
    """Images classified by k-NN, and training images looked at for pictures, RankMe and drift."""


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedules."""

    lr: Rates = field(default_factory=lambda: CosineSchedule(1e-3, 1e-6, warmup_epochs=10.0))
    """Learning rate, before scaling by the batch."""
    lr_scaling: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] = "sqrt_wrt_1024"
    """What the rate is multiplied by: 4 sqrt(global batch / 1024), global batch / 256, or 1."""
    weight_decay: Rates = field(default_factory=lambda: CosineSchedule(0.04, 0.4))
    """Decoupled weight decay."""
    beta1: Annotated[float, Bounds(0, 1, open_high=True)] = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: Annotated[float, Bounds(0, 1, open_high=True)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    eps: Annotated[float, Bounds(1e-15, 1)] = 1e-8
    """What AdamW adds to the root of that mean."""
    clip: Annotated[float, Bounds(1e-6, 1e9)] = 3.0
    """Largest gradient norm of each sub-module (backbone, DINO head, iBOT head)."""
    layer_decay: Annotated[float, Bounds(0, 1, open_low=True)] = 0.9
    """Each block's rate is that of the block above it times this."""
    patch_embed_lr: Annotated[float, Bounds(0, 10)] = 0.2
    """Factor on the rate of the patch embedding."""
    freeze_last_layer_epochs: Epochs = 1.0
    """How long the prototypes are held still."""


@dataclass(frozen=True)
class Teacher:
    """The EMA teacher."""

    momentum: Momenta = field(default_factory=lambda: CosineSchedule(0.992, 1.0))
    """Share of itself the teacher keeps at each step."""
    temperature: Temperatures = field(
        default_factory=lambda: CosineSchedule(0.07, 0.07, start=0.04, warmup_epochs=30.0),
    )
    """Temperature of its targets, 0.04 to 0.07 as published."""


@dataclass(frozen=True)
class Run:
    """Length, batch, precision, output."""

    epochs: Annotated[float, Bounds(0, 1e6, open_low=True)] = 100.0
    """Length of the run, in the epochs that schedules are written in."""
    epoch_steps: Annotated[int, Bounds(1, 10**9)] = 1250
    """Steps called an epoch."""
    steps: Annotated[int, Bounds(0, LONGEST)] = 0
    """Length in steps instead: every schedule is stretched to it, and so are steps of Gram updates;
    steps between log lines, evaluations and checkpoints stay. 0: epochs times epoch_steps."""
    batch_size: Annotated[int, Bounds(1, 2**20)] = 64
    """Images per process and optimizer step."""
    accumulation: Annotated[int, Bounds(1, 2**20)] = 1
    """Micro-batches a process cuts its images into; statistics stay those of the whole batch."""
    init: str = ""
    """Backbone weights to start from, in any known layout; empty: random.

    Heads always start random.
    """
    seed: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    """Of initial weights, order of images, crops and masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast on a GPU, with float32 weights, optimizer state, residual stream, norms, RoPE
    tables, softmax statistics, Sinkhorn, KoLeo, Gram accumulation and losses. A CPU runs fp32.
    float16 is not offered: it overflows.
    """
    compile: bool = False
    """Compile the blocks and the heads with torch.compile."""
    threads: Annotated[int, Bounds(0, 1024)] = 0
    """CPU threads of a process; 0: torch's choice."""
    out: str = ""
    """Run folder; empty: runs/<recipe>, or for a recipe of built-in images on others
    runs/<recipe>-<their name>."""
    resume: bool = True
    """Continue an unfinished run in that folder."""
    accept_changes: bool = False
    """Continue it although the recipe has changed."""
    requeue: bool = False
    """Exit with 0 when stopped by SIGINT or SIGTERM, for a scheduler that starts it again."""
    timeout_minutes: Annotated[float, Bounds(0.01, 10_000)] = 30.0
    """How long a process waits for others or for images; evaluations may take longer."""
    log_every: Annotated[int, Bounds(1, 10**9)] = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Every = 1250
    """Steps between online evaluations; 0: only before and after."""
    checkpoint_every: Every = 1250
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Annotated[int, Bounds(1, 10**9)] = 3
    """How many of the newest are kept."""
    max_bad_steps: Annotated[int, Bounds(1, 10**9)] = 3
    """Steps with a NaN or Inf in a row after which the run stops."""

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.steps or max(int(self.epochs * self.epoch_steps), 1)

    @property
    def epoch_length(self) -> float:
        """Steps of an epoch in this run; the unit of every schedule."""
        return self.steps / self.epochs if self.steps else self.epoch_steps


@dataclass(frozen=True)
class Pretrain:
    """A pretraining run."""

    name: str
    """What the run is called."""
    backbone: VitSettings
    dino: HeadSettings
    ibot: HeadSettings
    loss: Loss
    gram: Gram
    crops: CropSettings
    masks: MaskSettings
    data: Data
    optim: Optim
    teacher: Teacher
    run: Run

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.out or Path("runs") / self.name)

    def resolve(self, world_size: int) -> "Resolved":
        """Every schedule as numbers, the learning rate after scaling.

        Raises:
            ConfigError: for a value that cannot work, naming it.
        """
        for complaint in self._complaints(world_size):
            raise ConfigError(complaint)
        factor = lr_factor(self.optim.lr_scaling, self.run.batch_size * world_size)
        lr = self._series("optim.lr", scaled(self.optim.lr, factor))
        last_layer_lr = lr.copy()
        last_layer_lr[: int(self.optim.freeze_last_layer_epochs * self.run.epoch_length)] = 0.0
        series = {
            "lr": lr,
            "weight_decay": self._series("optim.weight_decay", self.optim.weight_decay),
            "momentum": self._series("teacher.momentum", self.teacher.momentum),
            "teacher_temperature": self._series("teacher.temperature", self.teacher.temperature),
            "local_weight": self._series("loss.local_weight", self.loss.local_weight),
            "gram_weight": self._series("gram.weight", self.gram.weight),
            "last_layer_lr": last_layer_lr,
        }
        return Resolved(
            steps=self.run.total_steps,
            lr_factor=factor,
            schedules=series,
            gram_first_update=self._stretched(self.gram.first_update),
            gram_update_every=self._stretched(self.gram.update_every),
        )

    def _series(self, name: str, schedule: Schedule) -> np.ndarray:
        """A schedule as one float64 per step, each within the bounds of its field."""
        part, field_name = name.split(".")
        owner = fields_of(type(getattr(self, part)))
        bounds = next(field.bounds for field in owner if field.name == field_name)
        try:
            series = values(schedule, self.run.total_steps, self.run.epoch_length)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        step = first_outside(series, bounds)
        if step is not None:
            raise ConfigError(
                f"{name}: expected {bounds} at every step, got {series[step]:g} at step {step} "
                f"of {len(series)}, from {schedule}"
            )
        return series

    def _stretched(self, steps: int) -> int:
        """A number of steps that a run of another length is to keep in proportion; 0 stays 0."""
        if not self.run.steps or not steps:
            return steps
        return max(round(steps * self.run.epoch_length / self.run.epoch_steps), 1)

    def _complaints(self, world_size: int) -> Iterator[str]:
        """One sentence for everything that cannot work, each field by itself first."""
        yield from complaints(self)
        if self.run.total_steps > LONGEST:
            yield (
                f"run.epochs {self.run.epochs:g} of run.epoch_steps {self.run.epoch_steps}: "
                f"expected at most {LONGEST} steps, got {self.run.total_steps}"
            )
        yield from self._backbone_complaints()
        try:
            self.crops.validate(self.backbone.patch_size)
        except ValueError as error:
            yield str(error)
        yield from self._batch_complaints(self.run.batch_size * world_size)
        if self.masks.ratio_min > self.masks.ratio_max:
            ends = f"{self.masks.ratio_min} is above masks.ratio_max {self.masks.ratio_max}"
            yield f"masks.ratio_min {ends}; swap them"
        yield from self._gram_complaints()
        yield from self._channel_complaints()
        yield from self._koleo_complaints(self.run.batch_size * world_size)

    def _batch_complaints(self, world_images: int) -> Iterator[str]:
        for label, head in (("dino", self.dino), ("ibot", self.ibot)):
            if head.prototypes < max(world_images, 2):
                yield (
                    f"{label}.prototypes is {head.prototypes} for {world_images} images a step: "
                    "centering gives every prototype an equal share, so different images would "
                    f"have to share a target; give at least {max(world_images, 2)} prototypes or a "
                    "smaller batch"
                )
        if self.run.batch_size % self.run.accumulation:
            yield (
                f"run.batch_size {self.run.batch_size} must be a multiple of run.accumulation "
                f"{self.run.accumulation}"
            )

    def _channel_complaints(self) -> Iterator[str]:
        channels = self.backbone.in_channels
        if self.data.source == "scenes" and channels != 3:
            yield f"the built-in scenes have 3 channels but backbone.in_channels is {channels}"
        if self.data.probe == "scenes" and channels != 3:
            yield (
                f"data.probe=scenes shows 3 channels to a backbone of {channels}; "
                "name a folder with train/<class>/ and val/<class>/, or leave it at auto"
            )
        if self.crops.mean and len(self.crops.mean) != channels:
            yield (
                f"crops.mean has {len(self.crops.mean)} channels but backbone.in_channels is "
                f"{channels}; give one mean and std per channel"
            )

    def _koleo_complaints(self, world_images: int) -> Iterator[str]:
        loss = self.loss
        images = self.run.batch_size
        group = loss.koleo_group_size
        if group and (group % images or world_images % group):
            yield (
                f"loss.koleo_group_size {group} must be a multiple of the {images} images per "
                f"process and divide the {world_images} images of a step"
            )
        if group and not loss.koleo_distributed:
            yield (
                f"loss.koleo_group_size {group} spans processes, but loss.koleo_distributed is "
                "False; set it to True, or the group size to 0"
            )
        among = (group or world_images) if loss.koleo_distributed else images
        if 1 < among <= loss.koleo_topk:
            yield (
                f"loss.koleo_topk {loss.koleo_topk} must be below the {among} images it "
                "chooses among"
            )

    def _backbone_complaints(self) -> Iterator[str]:
        backbone = self.backbone
        if backbone.width % (4 * backbone.heads):
            yield (
                f"backbone.width {backbone.width} must be a multiple of 4 * backbone.heads = "
                f"{4 * backbone.heads}: RoPE turns pairs of channels for two axes"
            )
        if backbone.width * backbone.ffn_ratio < 1:
            yield (
                f"backbone.ffn_ratio {backbone.ffn_ratio} of a width of {backbone.width} leaves no "
                f"channel; give at least {1 / backbone.width:g}"
            )
        if backbone.untie_local_cls_norm and not self.crops.local_count:
            yield (
                "backbone.untie_local_cls_norm is a norm of local crops, but crops.local_count is 0"
            )
        rope = backbone.rope
        periods = (rope.min_period, rope.max_period)
        if not rope.base and not all(periods):
            yield (
                "backbone.rope.base: expected at least 0.01, or 0 beside both min_period and "
                f"max_period, got {rope.base} beside {rope.min_period} and {rope.max_period}"
            )
        if rope.base and any(periods):
            yield (
                "backbone.rope.min_period, max_period: expected 0 beside a base of "
                f"{rope.base}, got {rope.min_period} and {rope.max_period}; set "
                "backbone.rope.base to 0"
            )

    def _gram_complaints(self) -> Iterator[str]:
        gram = self.gram
        if gram.teacher not in ("none", "ema", "snapshot") and not gram.teacher.startswith("file:"):
            yield f"gram.teacher: expected none, ema, snapshot or file:PATH, got {gram.teacher!r}"
        if gram.tokens != "all" and gram.per_image:
            yield (
                f"gram.tokens={gram.tokens} keeps another count of patches in every crop; set "
                "gram.per_image=False"
            )
        if gram.enabled and not gram.per_image and self.run.accumulation > 1:
            yield (
                "gram.per_image=False is one Gram matrix over the batch, which run.accumulation "
                "would cut; use gram.per_image=True or run.accumulation=1"
            )
        if self.crops.gram_size and not gram.separate:
            yield (
                "crops.gram_size makes crops for a Gram teacher of its own, but gram.teacher is "
                f"{gram.teacher!r}; set gram.teacher to snapshot or file:PATH, or drop "
                "crops.gram_size"
            )
        if gram.update_every and not gram.separate:
            yield (
                f"gram.update_every needs gram.teacher snapshot or file:PATH, got {gram.teacher!r}"
            )


@dataclass(frozen=True)
class Resolved:
    """The numbers a run follows."""

    steps: int
    lr_factor: float
    schedules: dict[str, np.ndarray]
    gram_first_update: int
    gram_update_every: int

    def at(self, step: int) -> dict[str, float]:
        """All scheduled scalars at one step."""
        return {name: float(series[step]) for name, series in self.schedules.items()}
