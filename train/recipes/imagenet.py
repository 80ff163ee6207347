"""The published ImageNet-1k recipe, and a smaller network in three stages on one GPU."""

from dataclasses import replace

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
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
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule, constant
from dinov3core.train.recipes.vit7b16 import (
    GRAM_WEIGHT,
    HIGH_RESOLUTION,
    HIGH_RESOLUTION_GRAM,
    LOCAL_WEIGHT,
)


def vits16_1gpu() -> Pretrain:
    """ViT-S/16 on your own images with one 24 GB GPU; no published result to compare with.

    Source: the published ViT-L recipe (DINOv3 paper, ImageNet-1k) with a smaller network, one
    process and fewer prototypes: users with small batches report stable runs with those. Not run to
    its end by us: see LOG.md.
    Command: python train/pretrain.py vits16_1gpu --data.source /path/to/images
    """
    return Pretrain(
        name="vits16_1gpu",
        backbone=VitSettings(drop_path=0.1),
        dino=HeadSettings(prototypes=16384),
        ibot=HeadSettings(prototypes=16384),
        loss=Loss(),
        crops=CropSettings(global_size=224, local_size=96),
        masks=MaskSettings(),
        data=Data(source="images", workers=12),
        optim=Optim(lr=CosineSchedule(1e-3, 1e-6, warmup_epochs=10.0)),
        teacher=Teacher(momentum=CosineSchedule(0.994, 1.0)),
        # one checkpoint in five epochs stays: the Gram teacher of vits16_gram is among them
        run=Run(epochs=100, epoch_steps=1250, batch_size=64, compile=True, keep_every=6250),
    )


def vits16_gram() -> Pretrain:
    """Gram anchoring after vits16_1gpu: a fifth of its length, on one GPU; not run by us.

    Source: the published Gram stage of the 7B model in proportion: 20 epochs after 100, 0.6 times
    the learning rate of pretraining, momentum 0.999, Gram crops of twice the side, a Gram teacher
    taken anew after each of 5, 10 and 15 per cent of the stage. Unlike there, pretraining ends at a
    rate near 0, so the rate rises anew over an epoch. The first Gram teacher is that of pretraining
    after a fifth of its steps; give --gram.teacher.step where patches were at their best.
    Command: python train/pretrain.py vits16_gram --data.source /path/to/images
    """
    base = vits16_1gpu()
    return replace(
        base,
        name="vits16_gram",
        loss=replace(base.loss, local_weight=LOCAL_WEIGHT),
        gram=GramAnchor(Earlier(25_000, every=1250, at_most=3), GRAM_WEIGHT, crop_size=448),
        optim=replace(
            base.optim,
            lr=PhasedSchedule(start=0.0, peak=6e-4, end=6e-4, warmup_epochs=1.0),
            weight_decay=constant(0.4),  # where pretraining left it
            freeze_last_layer_epochs=0.0,
        ),
        teacher=Teacher(momentum=constant(0.999), temperature=constant(0.07)),
        run=replace(base.run, from_=base.name, epochs=20),
    )


def vits16_highres() -> Pretrain:
    """High-resolution adaptation after vits16_gram on one GPU; not run by us.

    Source: the published high-resolution stage of the 7B model in proportion: 3 epochs, a learning
    rate that rises to 0.25 times that of pretraining over the first of them, and its sizes. A step
    of 64 images is computed in 8 parts, as crops of 768 px have twelve times the patches of those
    of 224.
    Command: python train/pretrain.py vits16_highres --data.source /path/to/images
    """
    base = vits16_gram()
    return replace(
        base,
        name="vits16_highres",
        loss=replace(base.loss, local_weight=constant(0.5)),
        gram=GramAnchor(Snapshot(), constant(1.5), crop_size=HIGH_RESOLUTION_GRAM),
        crops=replace(HIGH_RESOLUTION, flip=base.crops.flip),
        optim=replace(
            base.optim,
            lr=PhasedSchedule(start=0.0, peak=0.0, end=2.5e-4, cosine_epochs=1.0),
        ),
        run=replace(base.run, from_=base.name, take="teacher", epochs=3, accumulation=8),
    )


def vitl16_im1k() -> Pretrain:
    """The published ViT-L/16 recipe for ImageNet-1k: 32 GPUs of 64 images each, 125,000 steps.

    Source: DINOv3 reference configuration for ImageNet-1k, on 4 nodes of 8 GPUs. Published: about
    14 h on 32 H100, k-NN 82.0, linear 83.5. Not run by us. Blur probabilities, bf16 RoPE tables and
    mean gradients are as executed there; the clipping threshold may have been tuned when gradients
    were summed over processes.
    Command: torchrun --nnodes 4 --nproc-per-node 8 ... train/pretrain.py vitl16_im1k
    --data.source imagenet/train
    """
    return Pretrain(
        name="vitl16_im1k",
        backbone=VitSettings(
            width=1024,
            depth=24,
            heads=16,
            registers=0,
            norm="layernorm",
            mask_k_bias=False,
            drop_path=0.3,
            rope=RopeSettings(dtype="bf16"),
        ),
        dino=HeadSettings(prototypes=65536, hidden=2048, bottleneck=256),
        ibot=HeadSettings(prototypes=65536, hidden=2048, bottleneck=256),
        loss=Loss(),
        crops=CropSettings(global_size=224, local_size=96, local_count=8),
        masks=MaskSettings(),
        data=Data(source="imagenet/train", workers=10),
        optim=Optim(
            lr=CosineSchedule(1e-3, 1e-6, warmup_epochs=10.0),
            lr_scaling="sqrt_wrt_1024",
            weight_decay=CosineSchedule(0.04, 0.4),
        ),
        teacher=Teacher(
            momentum=CosineSchedule(0.992, 1.0),
            temperature=CosineSchedule(0.07, 0.07, start=0.04, warmup_epochs=30.0),
        ),
        run=Run(
            epochs=100,
            epoch_steps=1250,
            batch_size=64,
            compile=True,
            eval_every=12500,
            checkpoint_every=3750,
        ),
    )
