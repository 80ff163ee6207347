"""What a run is: frozen dataclasses, checked as a whole before anything is built.

A recipe (recipes.py) is a function that returns a `Pretrain`; the command line replaces any field by its dotted name.
Absence is spelled by a value ("none", 0, -1) named in the field's text, never by an unread key.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from dinov3core.data.crops import CropSettings
from dinov3core.models.head import ProjectionHead
from dinov3core.models.vit import VisionTransformer
from dinov3core.train.objective import GramTerm
from dinov3core.train.schedules import CosineSchedule, Schedule, constant, lr_factor, scaled, values

LOWEST = {  # smallest value of whole-number fields
    "run.epoch_steps": 1,
    "run.batch_size": 1,
    "run.accumulation": 1,
    "run.seed": 0,
    "run.threads": 0,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.checkpoint_every": 0,
    "run.keep_checkpoints": 1,
    "run.max_bad_steps": 1,
    "data.scenes": 1,
    "data.scene_size": 8,
    "data.workers": 0,
    "data.probe_bank": 2,
    "data.probe_queries": 1,
    "loss.sinkhorn_iterations": 1,
    "loss.koleo_topk": 1,
    "loss.koleo_group_size": 0,
    "gram.first_update": 0,
    "gram.update_every": 0,
    "gram.max_updates": 0,
    "backbone.depth": 1,
    "backbone.heads": 1,
    "backbone.patch_size": 1,
    "backbone.in_channels": 1,
    "backbone.registers": 0,
    "dino.layers": 1,
    "ibot.layers": 1,
}

LONGEST_WAIT = 10_000  # minutes


class ConfigError(ValueError):
    """A recipe that cannot run; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the backbone; the last three act in training only and 0 switches them off."""

    base: float = 100.0
    normalize: Literal["separate", "max", "min"] = "separate"
    shift: float = 0.0
    jitter: float = 0.0
    rescale: float = 0.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 reproduces the rounding of the published training runs (there the option for it was never forwarded)."""


@dataclass(frozen=True)
class Backbone:
    """The arguments of `VisionTransformer`."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch_size: int = 16
    in_channels: int = 3
    ffn: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = "mlp"
    ffn_ratio: float = 4.0
    registers: int = 4
    norm: Literal["layernorm", "layernormbf16", "rmsnorm"] = "layernormbf16"
    qkv_bias: bool = True
    mask_k_bias: bool = True
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    untie_cls_norm: bool = False
    untie_local_cls_norm: bool = False
    init_std: float = 0.02
    rope: Rope = field(default_factory=Rope)

    def build(self) -> VisionTransformer:
        sizes = {name: value for name, value in asdict(self).items() if name != "rope"}
        rope = self.rope
        return VisionTransformer(
            **sizes,
            rope_base=rope.base,
            rope_normalize=rope.normalize,
            rope_shift=rope.shift or None,
            rope_jitter=rope.jitter or None,
            rope_rescale=rope.rescale or None,
            rope_dtype=torch.bfloat16 if rope.dtype == "bf16" else torch.float32,
        )


@dataclass(frozen=True)
class Head:
    """A projection head: K prototypes over a normalised bottleneck."""

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    init_std: float = 0.02
    prototype_std: float = 0.02

    def build(self, width: int) -> ProjectionHead:
        return ProjectionHead(width, **asdict(self))


@dataclass(frozen=True)
class Loss:
    """Weights and temperatures of the objective."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_distributed: bool = False
    """Search neighbours among all processes instead of this one's images."""
    koleo_topk: int = 1
    koleo_group_size: int = 0
    """Images among which distributed KoLeo searches; 0: the whole global batch."""
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    skip_same_crop: bool = True
    local_weight: Schedule = field(default_factory=lambda: constant(1.0))


@dataclass(frozen=True)
class Gram:
    """Gram anchoring (DINOv3 paper, section 4.2)."""

    teacher: str = "none"
    """none | ema (patches of the EMA teacher) | snapshot (a frozen copy of it) | file:PATH (backbone weights)."""
    weight: Schedule = field(default_factory=lambda: constant(0.0))
    tokens: Literal["all", "masked", "unmasked"] = "all"
    normalize: bool = True
    per_image: bool = True
    negatives: Literal["keep", "clip", "clip_teacher"] = "keep"
    first_update: int = 0
    """snapshot: the step before which the EMA teacher is first copied."""
    update_every: int = 0
    """snapshot and file: copy the EMA teacher again every so many steps; 0: never."""
    max_updates: int = 0
    """How often at most; 0: no limit."""

    @property
    def enabled(self) -> bool:
        return self.teacher != "none"

    @property
    def separate(self) -> bool:
        """Whether a backbone of its own holds the anchor."""
        return self.teacher not in ("none", "ema")

    def term(self) -> GramTerm | None:
        return GramTerm(self.tokens, self.normalize, self.per_image, self.negatives) if self.enabled else None


@dataclass(frozen=True)
class Masks:
    """Which patches the student does not see (block masks, half of the crops, 10 to 50 percent as published)."""

    probability: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 0.5
    circular_shift: bool = False


@dataclass(frozen=True)
class Data:
    """Where images come from."""

    source: str = "scenes"
    """scenes (built in) | a folder | a .txt or .csv list | .tar shards: a file, a folder, a pattern a-{0..9}.tar."""
    scenes: int = 8192
    """Number of distinct built-in images."""
    scene_size: int = 64
    channel_scale: float = 0.0
    """What images of other than 3 channels are divided by to reach [0, 1]; 0: the range of their number type."""
    workers: int = 4
    """Loader processes; 0: in a thread of this one."""
    probe: str = "scenes"
    """Images for the online k-NN: scenes | a folder with train/<class>/ and val/<class>/ | none (no k-NN)."""
    probe_bank: int = 2000
    probe_queries: int = 1000


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedules."""

    lr: Schedule = field(default_factory=lambda: CosineSchedule(1e-3, 1e-6, warmup_epochs=10))
    lr_scaling: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] = "sqrt_wrt_1024"
    weight_decay: Schedule = field(default_factory=lambda: CosineSchedule(0.04, 0.4))
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 3.0
    """Largest gradient norm of each sub-module (backbone, DINO head, iBOT head)."""
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    freeze_last_layer_epochs: float = 1.0


@dataclass(frozen=True)
class Teacher:
    """The EMA teacher."""

    momentum: Schedule = field(default_factory=lambda: CosineSchedule(0.992, 1.0))
    temperature: Schedule = field(default_factory=lambda: CosineSchedule(0.07, 0.07, start=0.04, warmup_epochs=30))


@dataclass(frozen=True)
class Run:
    """Length, batch, precision, output."""

    epochs: float = 100.0
    epoch_steps: int = 1250
    """Steps called an epoch; schedules are written in epochs."""
    batch_size: int = 64
    """Images per process and optimizer step."""
    accumulation: int = 1
    """Micro-batches a process cuts its images into; statistics stay those of the whole batch."""
    init: str = ""
    """Backbone weights to start from, in any known layout; empty: random. Heads always start random."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast on a GPU, with float32 weights, optimizer state, residual stream, norms, RoPE tables, softmax
    statistics, Sinkhorn, KoLeo, Gram accumulation and losses. A CPU runs fp32. float16 is not offered: it overflows."""
    compile: bool = False
    threads: int = 0
    """CPU threads of a process; 0: torch's choice."""
    out: str = ""
    """Run folder; empty: runs/<recipe>."""
    resume: bool = True
    """Continue an unfinished run in that folder."""
    accept_changes: bool = False
    """Continue it although the recipe has changed."""
    requeue: bool = False
    """Exit with 0 when stopped by SIGINT or SIGTERM, for a scheduler that starts it again."""
    timeout_minutes: float = 30.0
    """How long a process waits for others or for images; evaluations may take longer."""
    log_every: int = 10
    eval_every: int = 1250
    """Steps between online evaluations; 0: only before and after."""
    checkpoint_every: int = 1250
    keep_checkpoints: int = 3
    max_bad_steps: int = 3
    """Steps with a NaN or Inf in a row after which the run stops."""

    @property
    def steps(self) -> int:
        return max(int(self.epochs * self.epoch_steps), 1)


@dataclass(frozen=True)
class Pretrain:
    """A pretraining run."""

    name: str
    backbone: Backbone
    dino: Head
    ibot: Head
    loss: Loss
    gram: Gram
    crops: CropSettings
    masks: Masks
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
        steps, epoch = self.run.steps, self.run.epoch_steps
        factor = lr_factor(self.optim.lr_scaling, self.run.batch_size * world_size)
        try:
            made = {
                "lr": values(scaled(self.optim.lr, factor), steps, epoch),
                "weight_decay": values(self.optim.weight_decay, steps, epoch),
                "momentum": values(self.teacher.momentum, steps, epoch),
                "teacher_temperature": values(self.teacher.temperature, steps, epoch),
                "local_weight": values(self.loss.local_weight, steps, epoch),
                "gram_weight": values(self.gram.weight, steps, epoch),
            }
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if made["teacher_temperature"].min() <= 0:
            raise ConfigError(
                f"teacher.temperature falls to {made['teacher_temperature'].min():g}; every value must be above 0, "
                "0.04 to 0.07 as published"
            )
        made["last_layer_lr"] = made["lr"].copy()
        made["last_layer_lr"][: int(self.optim.freeze_last_layer_epochs * epoch)] = 0.0
        return Resolved(steps, factor, made)

    def _complaints(self, world_size: int) -> Iterator[str]:
        for name, lowest in LOWEST.items():
            part, field_name = name.split(".")
            value = getattr(getattr(self, part), field_name)
            if value < lowest:
                yield f"{name}: expected at least {lowest}, got {value}"
        yield from self._backbone_complaints()
        try:
            self.crops.validate(self.backbone.patch_size)
        except ValueError as error:
            yield str(error)
        world_images = self.run.batch_size * world_size
        for label, head in (("dino", self.dino), ("ibot", self.ibot)):
            if head.prototypes < max(world_images, 2):
                yield (
                    f"{label}.prototypes is {head.prototypes} for {world_images} images a step: centering gives every "
                    "prototype an equal share, so different images would have to share a target; give at least "
                    f"{max(world_images, 2)} prototypes or a smaller batch"
                )
        if self.run.batch_size % self.run.accumulation:
            yield (
                f"run.batch_size {self.run.batch_size} must be a multiple of run.accumulation {self.run.accumulation}"
            )
        if not 0 <= self.masks.ratio_min <= self.masks.ratio_max <= 1 or not 0 <= self.masks.probability <= 1:
            yield f"masks: expected 0 <= ratio_min <= ratio_max <= 1 and a probability, got {self.masks}"
        yield from self._gram_complaints()
        if self.data.source == "scenes" and self.backbone.in_channels != 3:
            yield f"the built-in scenes have 3 channels but backbone.in_channels is {self.backbone.in_channels}"
        if self.data.probe == "scenes" and self.backbone.in_channels != 3:
            yield (
                f"data.probe=scenes shows 3 channels to a backbone of {self.backbone.in_channels}; name a folder with "
                "train/<class>/ and val/<class>/, or none"
            )
        group = self.loss.koleo_group_size
        if group and (group % self.run.batch_size or world_images % group):
            yield (
                f"loss.koleo_group_size {group} must be a multiple of the {self.run.batch_size} images per process "
                f"and divide the {world_images} images of a step"
            )
        if self.crops.mean and len(self.crops.mean) != self.backbone.in_channels:
            yield (
                f"crops.mean has {len(self.crops.mean)} channels but backbone.in_channels is "
                f"{self.backbone.in_channels}; give one mean and std per channel"
            )
        if self.run.epochs <= 0 or self.loss.student_temperature <= 0:
            yield (
                "run.epochs and loss.student_temperature must be positive, got "
                f"{self.run.epochs} and {self.loss.student_temperature}"
            )
        if not 0 < self.run.timeout_minutes <= LONGEST_WAIT:
            minutes = self.run.timeout_minutes
            yield f"run.timeout_minutes: expected above 0 and at most {LONGEST_WAIT}, got {minutes}"
        neighbours = self.loss.koleo_topk
        if self.loss.koleo_weight and self.run.batch_size > 1 and neighbours >= self.run.batch_size:
            yield f"loss.koleo_topk {neighbours} must be below the {self.run.batch_size} images it chooses among"
        if self.optim.clip <= 0 or not math.isfinite(self.optim.clip):
            yield f"optim.clip must be a positive number, got {self.optim.clip}"

    def _backbone_complaints(self) -> Iterator[str]:
        backbone = self.backbone
        if backbone.width < 1 or backbone.width % (4 * backbone.heads):
            yield (
                f"backbone.width {backbone.width} must be a multiple of 4 * backbone.heads = {4 * backbone.heads}: "
                "RoPE turns pairs of channels for two axes"
            )
        if not 0 <= backbone.drop_path < 1:
            yield f"backbone.drop_path: expected 0 or more and less than 1, got {backbone.drop_path}"
        if backbone.untie_local_cls_norm and not self.crops.local_count:
            yield "backbone.untie_local_cls_norm is a norm of local crops, but crops.local_count is 0"

    def _gram_complaints(self) -> Iterator[str]:
        gram = self.gram
        if gram.teacher not in ("none", "ema", "snapshot") and not gram.teacher.startswith("file:"):
            yield f"gram.teacher: expected none, ema, snapshot or file:PATH, got {gram.teacher!r}"
        if gram.tokens != "all" and gram.per_image:
            yield f"gram.tokens={gram.tokens} keeps another count of patches in every crop; set gram.per_image=False"
        if gram.enabled and not gram.per_image and self.run.accumulation > 1:
            yield (
                "gram.per_image=False is one Gram matrix over the batch, which run.accumulation would cut; use "
                "gram.per_image=True or run.accumulation=1"
            )
        if self.crops.gram_size and not gram.separate:
            yield (
                f"crops.gram_size makes crops for a Gram teacher of its own, but gram.teacher is {gram.teacher!r}; "
                "set gram.teacher to snapshot or file:PATH, or drop crops.gram_size"
            )
        if gram.update_every and not gram.separate:
            yield f"gram.update_every needs gram.teacher snapshot or file:PATH, got {gram.teacher!r}"


@dataclass(frozen=True)
class Resolved:
    """The numbers a run follows."""

    steps: int
    lr_factor: float
    schedules: dict

    def at(self, step: int) -> dict[str, float]:
        """All scheduled scalars at one step."""
        return {name: float(series[step]) for name, series in self.schedules.items()}
