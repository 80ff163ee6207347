"""The published ImageNet-1k recipe, and a smaller network trained like it on one GPU."""

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.models.head import HeadSettings
from dinov3core.models.rope import RopeSettings
from dinov3core.models.vit import VitSettings
from dinov3core.train.engine.config import Data, Loss, Optim, Pretrain, Run, Teacher
from dinov3core.train.engine.schedules import CosineSchedule


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
        run=Run(epochs=100, epoch_steps=1250, batch_size=64, compile=True),
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
