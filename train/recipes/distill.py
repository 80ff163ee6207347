"""One teacher, several students: the published layouts of ViTs and ConvNeXts, and a quick start."""

from dataclasses import replace

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.models import ConvNeXtSettings, HeadSettings, RopeSettings, VitSettings
from dinov3core.train.engine.config import Data, Loss, Optim, Pretrain, Run, Teacher
from dinov3core.train.engine.distillation.settings import Distill, Heads, Student
from dinov3core.train.engine.schedules import PhasedSchedule, constant
from dinov3core.train.recipes.quickstart import quickstart
from dinov3core.train.recipes.vit7b16 import vit7b16_highres

# The published run steps 1920 images on 296 processes and scales its learning rate by 6 * 296, as a
# process's share is rounded down there (to 6, where it loads 7). This factor makes the rate of a
# run that counts its images right the executed one: 2.634e-4 at its top.
VIT_IMAGES = 1920
EXECUTED_SHARE = (6 * 296 / VIT_IMAGES) ** 0.5


def quickstart_distill() -> Distill:
    """Three small students learn from the quick start on a laptop: minutes, no downloads.

    The teacher is that of runs/quickstart (0.5 M parameters). Two smaller ViTs see the same views
    in patches of 8 px; a small ConvNeXt of stride 32 sees them resized to 192 px, where its grid is
    theirs: 6 x 6. Loss, heads and optimizer are those of the quick start, as are views and masks;
    the targets come from a teacher that knows already, so a third of its steps takes them further
    than they come by themselves. Result: benchmarks/results/distillation.json.
    Command: python train/distill.py, after python train/pretrain.py quickstart
    """
    start = quickstart()
    base = replace(
        start,
        name="quickstart_distill",
        run=replace(start.run, epochs=2, eval_every=0, checkpoint_every=100, keep_every=0),
    )
    convnext = replace(
        base,
        backbone=ConvNeXtSettings(depths=(1, 1, 2, 1), widths=(8, 16, 48, 96), layer_scale=1.0),
        crops=replace(base.crops, global_size=192, local_size=96),
    )
    return Distill(
        teacher=Heads("quickstart"),
        base=base,
        students=(
            Student("vit64", _with_vit(base, width=64, depth=4, heads=2)),
            Student("vit48", _with_vit(base, width=48, depth=3, heads=3)),
            Student("convnext", convnext),
        ),
        global_batch=64,
    )


def _with_vit(base: Pretrain, **sizes: object) -> Pretrain:
    """A recipe with a ViT of other sizes."""
    return replace(base, backbone=replace(base.backbone, **sizes))


def distill_vit() -> Distill:
    """The published ViT-S, S+, B and L from a 7B teacher: 296 GPUs, 1920 images; not run by us.

    Source: the reference configuration of the distilled ViT-L, which holds the layout of all four
    (48, 48, 80 and 120 GPUs with 40, 40, 24 and 16 images each) and the last stage, of 25,000
    steps. That stage starts from students of earlier ones, which are not published: give them as
    --vits16.run.init FILE and so on, or longer schedules. The learning rate is as executed there
    (`EXECUTED_SHARE`), and so are blur probabilities and bf16 RoPE tables. Missing here: weights
    sharded over processes and activation checkpointing, as for the teacher.
    Command: torchrun --nnodes 37 --nproc-per-node 8 ... train/distill.py distill_vit
    --data.source images --teacher.run RUN
    """
    base = Pretrain(
        name="distill_vit",
        backbone=VitSettings(rope=RopeSettings(rescale=2.0, dtype="bf16")),
        dino=HeadSettings(prototypes=262144, hidden=8192, bottleneck=512),
        ibot=HeadSettings(prototypes=98304, hidden=4096, bottleneck=384),
        loss=Loss(),
        crops=CropSettings(global_size=256, local_size=112, local_count=8, flip=False),
        masks=MaskSettings(),
        data=Data(source="images", workers=2),
        optim=Optim(
            lr=PhasedSchedule(0.0, 0.0, 5e-5 * EXECUTED_SHARE, cosine_epochs=10.0),
            lr_scaling="sqrt_wrt_1024",
            weight_decay=constant(0.04),
            layer_decay=0.99,
            freeze_last_layer_epochs=0.0,
        ),
        teacher=Teacher(
            momentum=PhasedSchedule(start=0.994, peak=0.994, end=1.0),
            temperature=constant(0.07),
        ),
        run=Run(
            epochs=20, epoch_steps=1250, compile=True, eval_every=12_500, checkpoint_every=3750
        ),
    )
    plus = _with_vit(base, ffn="swiglu", ffn_ratio=6.0)
    return Distill(
        teacher=Heads(vit7b16_highres.__name__),
        base=base,
        students=(
            Student("vits16", base, (0, 48)),
            Student("vits16plus", plus, (48, 96)),
            Student("vitb16", _with_vit(base, width=768, heads=12), (96, 176)),
            Student("vitl16", _with_vit(base, width=1024, depth=24, heads=16), (176, 296)),
        ),
        global_batch=VIT_IMAGES,
    )


def distill_convnext() -> Distill:
    """The published ConvNeXt-T, S, B and L from a 7B teacher: 128 GPUs, 4096 images; not run by us.

    Source: the reference configurations of the four. Views have 512 px, at which networks of stride
    32 have the teacher's grid of 16 x 16; the teacher alone sees them at its own 256 px. (As
    executed there it sees 512 px and its rows are of other places than the students'.) The rates of
    T and S are twice those of B and L, weight decay rises linearly over the run, from half as much
    for B, and so does the momentum. Published are 4096 images on 16 nodes of 8 and a test that
    gives each student a quarter of the processes, as here: --plan says what would wait for whom.
    Command: torchrun --nnodes 16 --nproc-per-node 8 ... train/distill.py distill_convnext
    --data.source images --teacher.run RUN
    """
    epochs = 500.0
    base = Pretrain(
        name="distill_convnext",
        backbone=ConvNeXtSettings(),
        dino=HeadSettings(prototypes=262144),
        ibot=HeadSettings(prototypes=98304),
        loss=Loss(),
        crops=CropSettings(global_size=512, local_size=224, local_count=8),
        masks=MaskSettings(),
        data=Data(source="images", workers=10),
        optim=Optim(
            lr=_convnext_rate(2e-4),
            lr_scaling="sqrt_wrt_1024",
            weight_decay=_linear(0.04, 0.2, epochs),
            # published as 1 and 0.2, of which the second matches no weight of a ConvNeXt
            layer_decay=1.0,
            patch_embed_lr=1.0,
        ),
        teacher=Teacher(
            momentum=_linear(0.994, 1.0, epochs),
            temperature=PhasedSchedule(0.04, 0.07, 0.07, warmup_epochs=120.0),
        ),
        run=Run(
            epochs=epochs, epoch_steps=1250, compile=True, eval_every=12_500, checkpoint_every=3750
        ),
    )
    small = replace(base, backbone=ConvNeXtSettings((3, 3, 27, 3)))
    large = replace(
        base,
        backbone=ConvNeXtSettings((3, 3, 27, 3), (192, 384, 768, 1536)),
        optim=replace(base.optim, lr=_convnext_rate(1e-4)),
    )
    middle = replace(
        large,
        backbone=ConvNeXtSettings((3, 3, 27, 3), (128, 256, 512, 1024)),
        optim=replace(large.optim, weight_decay=_linear(0.02, 0.2, epochs)),
    )
    return Distill(
        teacher=Heads(vit7b16_highres.__name__),
        base=base,
        students=(
            Student("convnext_tiny", base, (0, 32)),
            Student("convnext_small", small, (32, 64)),
            Student("convnext_base", middle, (64, 96)),
            Student("convnext_large", large, (96, 128)),
        ),
        global_batch=4096,
    )


def _convnext_rate(peak: float) -> PhasedSchedule:
    """Up over 80 epochs and down as a cosine over the others."""
    return PhasedSchedule(start=1e-6, peak=peak, end=1e-6, warmup_epochs=80.0)


def _linear(start: float, end: float, epochs: float) -> PhasedSchedule:
    """A straight line over the whole of a run."""
    return PhasedSchedule(start, end, end, warmup_epochs=epochs)
