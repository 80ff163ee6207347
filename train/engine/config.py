"""What a run is: frozen dataclasses, checked as a whole before anything is built.

A recipe (train/recipes) is a function that returns a `Pretrain`; the command line replaces any
field by its dotted name. Settings of crops, masks, backbone and heads are those of `data` and
`models`, the values that these rooms work with. Absence is spelled by a value ("none", 0, -1) named
in the field's text, never by an unread key.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dinov3core.bounds import Bounds
from dinov3core.data.crops import CropSettings, GramCrops
from dinov3core.data.masks import MaskSettings
from dinov3core.data.sizes import Side
from dinov3core.models.given import ModuleSettings
from dinov3core.models.head import HeadSettings
from dinov3core.models.presets import BackboneSettings
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.schedules import (
    CosineSchedule,
    Epochs,
    Schedule,
    constant,
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
    k-NN, or patch agreement (dense), also where no labelled images are named. An untrained network
    is never kept."""
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

    def stretched(self, steps: int) -> int:
        """A number of steps that a run of another length is to keep in proportion; 0 stays 0."""
        if not self.steps or not steps:
            return steps
        usual = self.epoch_steps or SHORTEST_EPOCH
        return max(round(steps * self.epoch_length / usual), 1)


@dataclass(frozen=True)
class Pretrain:
    """A pretraining run."""

    name: str
    """What the run is called."""
    backbone: BackboneSettings | ModuleSettings
    """A vision transformer, a ConvNeXt, or a network of your own."""
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
