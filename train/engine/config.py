"""What a run is: frozen dataclasses, checked as a whole before anything is built.

A recipe (train/recipes) is a function that returns a `Pretrain`; the command line replaces any
field by its dotted name. Settings of crops, masks, backbone and heads are those of `data` and
`models`, the values that these rooms work with. Absence is spelled by a value ("none", 0, -1) named
in the field's text, never by an unread key.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from dinov3core.bounds import Bounds, complaints, fields_of
from dinov3core.data.crops import CropSettings, GramCrops, validate_gram_crops
from dinov3core.data.masks import MaskSettings, masked_total
from dinov3core.data.sizes import Side, pair
from dinov3core.models.head import HeadSettings
from dinov3core.models.vit import VitSettings
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.optim import backbone_shares
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
from dinov3core.train.engine.teacher import Refreshes

Every = Annotated[int, Bounds(0, 10**9)]  # a number of steps
Weight = Annotated[float, Bounds(0, 1e4)]
# Logits are cosines and published temperatures 0.04 to 0.1; at 0.001 a softmax is one-hot already.
Temperature = Annotated[float, Bounds(1e-3, 10)]
# Schedules state what each of their values may be.
Rates = Annotated[Schedule, Bounds(0, 10)]
Weights = Annotated[Schedule, Bounds(0, 1e4)]
Momenta = Annotated[Schedule, Bounds(0, 1)]
Temperatures = Annotated[Schedule, Bounds(1e-3, 10)]
# What an epoch that follows the number of images is at least and at most: new heads on weights that
# exist need about 1,000 steps for a small set, and 10,000 are published practice for a large one.
SHORTEST_EPOCH = 1_000
LONGEST_EPOCH = 10_000
LONGEST = 10**7  # steps; ten times the longest published run, and 80 MB for each schedule
RUNS = Path("runs")
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
class Ema:
    """The anchor is the EMA teacher of the same step."""


@dataclass(frozen=True)
class Snapshot:
    """The anchor is a frozen copy of the EMA teacher; before the first one there is no anchor."""

    first: Every = 0
    """The step before which the EMA teacher is copied for the first time."""
    every: Every = 0
    """It is copied again after all steps that are a multiple of this; 0: never."""
    at_most: Every = 0
    """How often it is copied again at most; 0: no limit."""


@dataclass(frozen=True)
class File:
    """The anchor is weights of your choice, until the EMA teacher is copied over them."""

    path: str = ""
    """A file of weights in any known layout, the folder of a run, or a checkpoint of one."""
    every: Every = 0
    """The EMA teacher is copied after all steps that are a multiple of this; 0: never."""
    at_most: Every = 0
    """How often it is copied at most; 0: no limit."""


@dataclass(frozen=True)
class Earlier:
    """The anchor is an earlier teacher of the run that this stage starts from, as published."""

    step: Every = 0
    """Its newest checkpoint of at most so many steps, else its oldest (see `run.keep_every`)."""
    every: Every = 0
    """The EMA teacher is copied over it after all steps that are a multiple of this; 0: never."""
    at_most: Every = 0
    """How often it is copied at most; 0: no limit."""


GramTeacher = Ema | Snapshot | File | Earlier


@dataclass(frozen=True)
class GramAnchor:
    """Gram anchoring: similarities among patches are held near those of an earlier teacher.

    Source: DINOv3 paper, section 4.2.
    """

    teacher: GramTeacher = field(default_factory=Ema)
    """Whose similarities they are."""
    weight: Weights = field(default_factory=lambda: constant(2.0))
    """Weight of the Gram term; 2 and 1.5 are published."""
    crop_size: Annotated[int | tuple[int, int] | None, Side] = None
    """Side of crops of the same regions for a snapshot or file, as published twice the side of the
    global views; None: it sees the global views."""
    distorted: bool = False
    """Take these crops from the distorted views instead of the clean ones."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How the teacher's patches come to the student's grid where these crops have another one."""
    antialias: bool = False
    """Average over what a patch of a coarser grid covers."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Which patches are compared: all, or those hidden from the student, or the others."""
    normalize: bool = True
    """Compare directions of patches, not lengths."""
    per_image: bool = True
    """One Gram matrix per image; False: one over the batch."""
    negatives: Literal["keep", "clip", "clip_teacher"] = "keep"
    """Negative similarities: kept, set to zero, or those of the teacher alone set to zero."""

    @property
    def crops(self) -> GramCrops | None:
        """What the teacher sees instead of the global views; None: those."""
        return None if self.crop_size is None else GramCrops(self.crop_size, self.distorted)


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
    dense: str = "auto"
    """Images with masks for the online dense score: scenes (held out, built in) | a folder or .tar
    of images and masks, as the segmentation of train/evaluate.py reads them | none | auto: scenes
    when training on scenes, else none."""
    dense_images: Annotated[int, Bounds(2, 10**6)] = 600
    """Images with masks that the classes of patches are learned from, and as many to report on."""


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
    freeze_backbone_epochs: Epochs = 0.0
    """How long the heads train alone, on a backbone held still; for one that starts from weights.
    """
    unfreeze_epochs: Epochs = 0.0
    """How long the backbone's rate then takes to grow from 0 to that of the heads."""


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
    epoch_steps: Annotated[int, Bounds(1, 10**9, off=0)] = 1250
    """Steps called an epoch; 0: as many as one pass over the images takes, but at least 1,000 and
    at most 10,000."""
    steps: Annotated[int, Bounds(0, LONGEST)] = 0
    """Length in steps instead: every schedule is stretched to it, and so are the steps of a Gram
    teacher. Steps between log lines, evaluations and checkpoints stay. 0: epochs times epoch_steps.
    """
    batch_size: Annotated[int, Bounds(1, 2**20)] = 64
    """Images per process and optimizer step."""
    accumulation: Annotated[int, Bounds(1, 2**20)] = 1
    """Micro-batches a process cuts its images into; statistics stay those of the whole batch."""
    init: str = ""
    """Backbone weights to start from, in any known layout; empty: random.

    Heads always start random.
    """
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """The finished run this stage starts from: its folder, or a name for runs/NAME; empty: none.
    Steps and schedules begin at 0 all the same."""
    take: Literal["run", "teacher"] = "run"
    """What a stage takes over. run: student, teacher, heads and optimizer go on. teacher: student
    and teacher begin as that run's teacher with its heads, the optimizer anew."""
    rgb_channels: Annotated[tuple[int, ...], Bounds(0, 4095)] = ()
    """Where the weights of `init` are for RGB and the images have other channels: which of these
    are red, green and blue; all others start at zero. Empty: every channel gets an equal share, so
    that the response to grey images is kept.
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
    keep_every: Every = 0
    """Besides, a checkpoint every so many steps that is kept for good; 0: none."""
    keep_best: Literal["knn", "dense"] = "knn"
    """The score by which the best teacher so far is kept in the run's folder `best`: the online
    k-NN, or the dense score, also where no labelled images are named."""
    max_bad_steps: Annotated[int, Bounds(1, 10**9)] = 3
    """Steps with a NaN or Inf in a row after which the run stops."""

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.steps or max(int(self.epochs * self.epoch_length), 1)

    @property
    def epoch_length(self) -> float:
        """Steps of an epoch in this run; the unit of every schedule.

        The shortest it can be, while it is to follow the images and these are not counted yet.
        """
        return self.steps / self.epochs if self.steps else self.epoch_steps or SHORTEST_EPOCH


@dataclass(frozen=True)
class Pretrain:
    """A pretraining run."""

    name: str
    """What the run is called."""
    backbone: VitSettings
    dino: HeadSettings
    ibot: HeadSettings
    loss: Loss
    crops: CropSettings
    masks: MaskSettings
    data: Data
    optim: Optim
    teacher: Teacher
    run: Run
    guard: Guard = field(default_factory=Guard)
    gram: GramAnchor | None = None
    """Gram anchoring, off unless an option of it is given; `--gram none` takes it out of a recipe
    that has it."""

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.out or RUNS / self.name)

    @property
    def earlier(self) -> Path | None:
        """The folder of the run that this stage starts from; None: it is no stage of another."""
        given = self.run.from_
        if not given:
            return None
        return Path(given) if "/" in given else RUNS / given

    @property
    def gram_crops(self) -> GramCrops | None:
        """What a Gram teacher sees instead of the global views; None: those, or there is none."""
        return None if self.gram is None else self.gram.crops

    def for_images(self, images: int, world_size: int) -> "Pretrain":
        """This run, with the length of its epoch by the number of images where it asks for that."""
        if self.run.epoch_steps:
            return self
        one_pass = math.ceil(images / (self.run.batch_size * world_size))
        length = min(max(one_pass, SHORTEST_EPOCH), LONGEST_EPOCH)
        return replace(self, run=replace(self.run, epoch_steps=length))

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
        steps = self.run.total_steps
        frozen = min(int(self.optim.freeze_backbone_epochs * self.run.epoch_length), steps)
        ramp = int(self.optim.unfreeze_epochs * self.run.epoch_length)
        series = {
            "lr": lr,
            "weight_decay": self._series("optim.weight_decay", self.optim.weight_decay),
            "momentum": self._series("teacher.momentum", self.teacher.momentum),
            "teacher_temperature": self._series("teacher.temperature", self.teacher.temperature),
            "local_weight": self._series("loss.local_weight", self.loss.local_weight),
            "gram_weight": self._gram_weight(),
            "last_layer_lr": last_layer_lr,
        }
        if frozen or ramp:
            series["backbone_share"] = backbone_shares(steps, frozen, ramp)
        return Resolved(
            steps=steps,
            frozen_steps=frozen,
            lr_factor=factor,
            schedules=series,
            refreshes=self._refreshes(),
        )

    def _gram_weight(self) -> np.ndarray:
        """Of the Gram term: 0 without an anchor, and before there is a first snapshot."""
        if self.gram is None:
            return np.zeros(self.run.total_steps)
        weight = self._series("gram.weight", self.gram.weight)
        refreshes = self._refreshes()
        if refreshes is not None and refreshes.first is not None:
            weight[: refreshes.first] = 0.0
        return weight

    def _refreshes(self) -> Refreshes | None:
        """When a Gram teacher of its own takes the EMA teacher's weights; None: there is none."""
        teacher = None if self.gram is None else self.gram.teacher
        if teacher is None or isinstance(teacher, Ema):
            return None
        first = self._stretched(teacher.first) if isinstance(teacher, Snapshot) else None
        return Refreshes(first, self._stretched(teacher.every), teacher.at_most)

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
        usual = self.run.epoch_steps or SHORTEST_EPOCH
        return max(round(steps * self.run.epoch_length / usual), 1)

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
        if self.run.from_ and self.run.init:
            yield (
                f"run.init {self.run.init} and run.from {self.run.from_} both say what to start "
                "from; give one of them"
            )
        if self.masks.ratio_min > self.masks.ratio_max:
            ends = f"{self.masks.ratio_min} is above masks.ratio_max {self.masks.ratio_max}"
            yield f"masks.ratio_min {ends}; swap them"
        if self.gram is not None:
            yield from self._gram_complaints(self.gram)
        try:
            validate_gram_crops(self.crops, self.gram_crops, self.backbone.patch_size)
        except ValueError as error:
            yield f"gram.crop_size: {error}"
        yield from self._continuing_complaints()
        yield from self._channel_complaints()
        yield from self._best_complaints()
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

    def _continuing_complaints(self) -> Iterator[str]:
        if self.optim.freeze_backbone_epochs and not (self.run.init or self.run.from_):
            yield (
                "optim.freeze_backbone_epochs trains heads on a backbone held still, but run.init "
                "and run.from name no weights it has: give --run.init FILE, in any layout "
                "train/evaluate.py reads"
            )
        if self.guard.margin and not self.run.eval_every:
            yield (
                f"guard.margin {self.guard.margin:g} stops a run whose scores fall, but "
                "run.eval_every is 0, so nothing is measured in mid-run; give steps between "
                "evaluations, or set guard.margin to 0"
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
        if self.data.dense not in ("auto", "none") and channels != 3:
            yield (
                f"data.dense={self.data.dense} shows 3 channels to a backbone of {channels}; set "
                "data.dense to none"
            )
        if self.crops.mean and len(self.crops.mean) != channels:
            yield (
                f"crops.mean has {len(self.crops.mean)} channels but backbone.in_channels is "
                f"{channels}; give one mean and std per channel"
            )

    def _best_complaints(self) -> Iterator[str]:
        data = self.data
        on_scenes = data.source in ("scenes", f"{FROM_PYTHON}Scenes")
        measured = on_scenes if data.dense == "auto" else data.dense != "none"
        if self.run.keep_best == "dense" and not measured:
            yield (
                "run.keep_best=dense needs a dense score, which this run does not measure; name "
                "images with masks by data.dense, or set run.keep_best to knn"
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

    def _gram_complaints(self, gram: GramAnchor) -> Iterator[str]:
        yield from self._gram_teacher_complaints(gram.teacher)
        if gram.crops is not None:
            yield from self._gram_crop_complaints(gram)
        elif (gram.distorted, gram.resize, gram.antialias) != (False, "bicubic", False):
            yield (
                "gram.distorted, gram.resize and gram.antialias say how a Gram teacher sees crops "
                "of its own; give gram.crop_size as well, or leave them out"
            )
        if gram.tokens != "all" and gram.per_image:
            yield (
                f"gram.tokens {gram.tokens} is another count of patches in every crop; set "
                "gram.per_image to False"
            )
        if not self._compared_patches(gram.tokens):
            yield (
                f"gram.tokens {gram.tokens} leaves no patch to compare with masks.probability "
                f"{self.masks.probability:g} and masks.ratio_max {self.masks.ratio_max:g}"
            )
        if not gram.per_image and self.run.accumulation > 1:
            yield (
                "gram.per_image False is one Gram matrix over the batch, which run.accumulation "
                "would cut; use gram.per_image True or run.accumulation 1"
            )

    def _gram_teacher_complaints(self, teacher: GramTeacher) -> Iterator[str]:
        if isinstance(teacher, Ema):
            return
        if isinstance(teacher, File) and not teacher.path:
            yield (
                "gram.teacher.path: expected a file of weights, the folder of a run or of a "
                "checkpoint, got none"
            )
        if isinstance(teacher, Earlier) and self.earlier is None:
            yield (
                "gram.teacher earlier is a teacher of the run this stage starts from, and there is "
                "none; give --run.from RUN, or another gram.teacher: snapshot, file or ema"
            )
        if isinstance(teacher, Snapshot):
            first = self._stretched(teacher.first)
            if first >= self.run.total_steps:
                yield (
                    f"gram.teacher.first: the first snapshot is due before step {first}, and the "
                    f"run ends after {self.run.total_steps} steps; take it earlier"
                )
        if teacher.at_most and not teacher.every:
            yield (
                f"gram.teacher.at_most {teacher.at_most} limits how often the EMA teacher is "
                "copied again, which gram.teacher.every 0 never does; give gram.teacher.every"
            )

    def _gram_crop_complaints(self, gram: GramAnchor) -> Iterator[str]:
        if isinstance(gram.teacher, Ema):
            yield (
                f"gram.crop_size {gram.crop_size}: the EMA teacher sees the global views alone; "
                "give a gram.teacher that has crops of its own (snapshot, file), or leave "
                "gram.crop_size out"
            )

    def _compared_patches(self, tokens: str) -> int:
        """The fewest patches of a process's batch that the Gram term compares at any step."""
        crops = self.crops.global_count * self.run.batch_size
        fewest = crops * min(map(self._patches_of, self.crops.of_each_size))
        masked = masked_total(crops, fewest // crops, self.masks)
        return {"all": fewest, "masked": masked}.get(tokens, fewest - masked)

    def _patches_of(self, crops: CropSettings) -> int:
        """Of a global crop."""
        height, width = pair(crops.global_size)
        return (height // self.backbone.patch_size) * (width // self.backbone.patch_size)


@dataclass(frozen=True)
class Resolved:
    """The numbers a run follows."""

    steps: int
    frozen_steps: int
    """First steps, in which the heads train alone."""
    lr_factor: float
    schedules: dict[str, np.ndarray]
    refreshes: Refreshes | None  # of a Gram teacher of its own

    def at(self, step: int) -> dict[str, float]:
        """All scheduled scalars at one step."""
        return {name: float(series[step]) for name, series in self.schedules.items()}
