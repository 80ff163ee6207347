"""The published ViT-7B/16 in its three stages: pretraining, Gram anchoring, high resolution.

Source of all numbers: the reference configurations of DINOv3 for the 7B model, with the schedules
and options as executed (DINOv3 paper, sections 3 to 5). None of the three was run by us. What they
need beyond these fields is not in this project: weights and optimizer sharded over processes,
activation checkpointing and 8-bit blocks. Until then a process holds the whole of 6.7 billion
weights several times, so the recipes are numbers to read and to derive from.

Numbers of schedules are in epochs of 1000 steps, learning rates before the factor 4 sqrt(images /
1024).
"""

from dataclasses import replace

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.data.sizes import CropSizes
from dinov3core.models.head import HeadSettings
from dinov3core.models.rope import RopeSettings
from dinov3core.models.vit import VitSettings
from dinov3core.train.engine.config import (
    Data,
    Earlier,
    GramAnchor,
    Loss,
    Optim,
    Pretrain,
    Run,
    Snapshot,
    Teacher,
)
from dinov3core.train.engine.schedules import PhasedSchedule, constant

# The published Gram stage is the pretraining run continued. Its schedules are written from that
# run's first step and switch the Gram term on at step 1,000,000; a stage here counts from 0.
GRAM_WEIGHT = PhasedSchedule(start=0.0, peak=0.0, end=2.0, cosine_epochs=1.0)
LOCAL_WEIGHT = PhasedSchedule(start=1.0, peak=1.0, end=0.5, cosine_epochs=1.0)


# As published, for patches of 16: 0.3 of the steps have crops of 512, 112 and (Gram) 768 px,
# the others these. Local crops of the second row have 168 px there, of which the
# patch embedding reads 10 x 10 patches and drops the last 8 pixels: 160 here.
HIGH_RESOLUTION = CropSettings(
    global_size=512,
    local_size=112,
    other_sizes=(
        CropSizes(0.30, 768, 112, 1152),
        CropSizes(0.30, 768, 160, 1152),
        CropSizes(0.05, 768, 224, 1152),
        CropSizes(0.05, 768, 336, 1152),
    ),
    flip=False,
)
HIGH_RESOLUTION_GRAM = 768


def vit7b16_pretrain() -> Pretrain:
    """Published pretraining of ViT-7B/16: 256 GPUs of 16 images, 1,000,000 steps; not run by us.

    Learning rate 4e-4 after a warm-up of 100,000 steps, then constant. Published cost of all
    stages: 61,440 hours of an H100. Blur probabilities and bf16 RoPE tables are as executed there;
    the clipping threshold may have been tuned when gradients were summed over processes.
    Missing here: sharding, activation checkpointing, 8-bit blocks.
    Command: torchrun --nnodes 32 --nproc-per-node 8 ... train/pretrain.py vit7b16_pretrain
    --data.source images
    """
    return Pretrain(
        name="vit7b16_pretrain",
        backbone=VitSettings(
            width=4096,
            depth=40,
            heads=32,
            ffn="swiglu64",
            ffn_ratio=3.0,
            qkv_bias=False,
            untie_local_cls_norm=True,
            drop_path=0.4,
            rope=RopeSettings(rescale=2.0, dtype="bf16"),
        ),
        dino=HeadSettings(prototypes=262144, hidden=8192, bottleneck=512),
        ibot=HeadSettings(prototypes=98304, hidden=4096, bottleneck=384),
        loss=Loss(),
        crops=CropSettings(global_size=256, local_size=112, local_count=8, flip=False),
        masks=MaskSettings(),
        data=Data(source="images", workers=10),
        optim=Optim(
            lr=PhasedSchedule(start=0.0, peak=5e-5, end=5e-5, warmup_epochs=100.0),
            lr_scaling="sqrt_wrt_1024",
            weight_decay=constant(0.04),
            beta2=0.99,
            clip=30.0,
            layer_decay=0.98,
            freeze_last_layer_epochs=5.0,
        ),
        teacher=Teacher(
            momentum=constant(0.994),
            temperature=PhasedSchedule(start=0.04, peak=0.07, end=0.07, warmup_epochs=100.0),
        ),
        run=Run(
            epochs=1000,
            epoch_steps=1000,
            batch_size=16,
            compile=True,
            eval_every=12500,
            checkpoint_every=1000,
            keep_every=50_000,
        ),
    )


def vit7b16_gram() -> Pretrain:
    """Published Gram anchoring of ViT-7B/16: 200,000 steps after pretraining; not run by us.

    Continues student, teacher, heads and optimizer. Learning rate 2.4e-4 and momentum 0.999 from
    the first step, as there; the Gram weight rises to 2 within 1000 steps while that of local crops
    falls to 0.5. The Gram teacher sees crops of 512 px and is taken anew from the EMA teacher after
    10,000, 20,000 and 30,000 steps. Before that it is an earlier teacher of pretraining, here that
    after 200,000 steps: the configuration leaves it open. Give as --gram.teacher.step where patches
    were at their best.
    Command: torchrun --nnodes 32 --nproc-per-node 8 ... train/pretrain.py vit7b16_gram
    --data.source images
    """
    base = vit7b16_pretrain()
    return replace(
        base,
        name="vit7b16_gram",
        loss=replace(base.loss, local_weight=LOCAL_WEIGHT),
        gram=GramAnchor(Earlier(step=200_000, every=10_000, at_most=3), GRAM_WEIGHT, crop_size=512),
        optim=replace(base.optim, lr=constant(3e-5), freeze_last_layer_epochs=0.0),
        teacher=Teacher(momentum=constant(0.999), temperature=constant(0.07)),
        run=replace(base.run, from_=base.name, epochs=200),
    )


def vit7b16_highres() -> Pretrain:
    """Published high-resolution adaptation of ViT-7B/16: 30,000 steps, 8 images a GPU; not run.

    Student and teacher begin as the teacher of the Gram stage, which is the Gram teacher as well,
    with crops 1.5 times the side. The learning rate rises to 7.07e-5 in the shape of half a cosine
    over 10,000 steps. KoLeo searches among the images of two processes.
    The sizes of a step are drawn anew every time (`HIGH_RESOLUTION`).
    Command: torchrun --nnodes 32 --nproc-per-node 8 ... train/pretrain.py vit7b16_highres
    --data.source images
    """
    base = vit7b16_gram()
    return replace(
        base,
        name="vit7b16_highres",
        loss=replace(
            base.loss,
            local_weight=constant(0.5),
            koleo_distributed=True,
            koleo_group_size=16,
        ),
        gram=GramAnchor(Snapshot(), constant(1.5), crop_size=HIGH_RESOLUTION_GRAM),
        crops=HIGH_RESOLUTION,
        optim=replace(
            base.optim,
            lr=PhasedSchedule(start=0.0, peak=0.0, end=1.25e-5, cosine_epochs=10.0),
        ),
        run=replace(
            base.run, from_=base.name, take="teacher", epochs=30, batch_size=8, checkpoint_every=250
        ),
    )
