"""A small network on a CPU: built-in scenes, or a first look at images of your own."""

from dataclasses import replace

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.data.sizes import CropSizes
from dinov3core.models.head import HeadSettings
from dinov3core.models.vit import VitSettings
from dinov3core.train.engine.config import (
    Data,
    Earlier,
    GramAnchor,
    Loss,
    Optim,
    Pretrain,
    Run,
    Teacher,
)
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule, constant


def quickstart() -> Pretrain:
    """Watch it learn on a laptop: built-in scenes, two CPU cores, five minutes, no downloads.

    The objective, the masks and the loop are DINOv3's. These numbers are for a five-minute CPU run
    only: the network (0.5 M parameters, 8-px patches) and its crops; LayerScale 1 and wide initial
    weights, which start far from the uniform point; 256 prototypes, a sharp teacher (0.02) and a
    fast one (0.98); iBOT at 0.2 (at 1 the CLS token learns later: k-NN 30.5 after 200 steps against
    40.5); strong colour jitter without blur or solarisation, as the class of a scene is its
    texture.
    Result: the table in README.md (seeds 0, 1, 2). Command: python train/pretrain.py
    """
    head = HeadSettings(
        prototypes=256, hidden=256, bottleneck=64, init_std=0.08, prototype_std=0.125
    )
    return Pretrain(
        name="quickstart",
        backbone=VitSettings(
            width=96,
            depth=4,
            heads=3,
            patch_size=8,
            registers=2,
            mask_k_bias=True,
            layer_scale=1.0,
            init_std=0.1,
        ),
        dino=head,
        ibot=head,
        loss=Loss(ibot_weight=0.2, koleo_weight=0.1),
        crops=CropSettings(
            global_size=48,
            local_size=24,
            local_count=2,
            global_scale=(0.4, 1.0),
            local_scale=(0.2, 0.5),
            brightness=0.6,
            contrast=0.6,
            saturation=0.8,
            hue=0.4,
            solarize=0.0,
            blur="off",
        ),
        masks=MaskSettings(),
        data=Data(source="scenes", workers=0, probe_bank=3600, probe_queries=1200),
        optim=Optim(
            lr=CosineSchedule(3e-3, 3e-5, warmup_epochs=0.5),
            lr_scaling="none",
            weight_decay=constant(0.04),
            beta2=0.99,
            layer_decay=1.0,
            patch_embed_lr=1.0,
            freeze_last_layer_epochs=0.0,
        ),
        teacher=Teacher(momentum=constant(0.98), temperature=constant(0.02)),
        run=Run(
            epochs=6,
            epoch_steps=100,
            batch_size=64,
            precision="fp32",
            eval_every=200,
            checkpoint_every=200,
            keep_every=100,  # the Gram teacher of quickstart_gram is among them
            log_every=5,
        ),
    )


def quickstart_gram() -> Pretrain:
    """Gram anchoring after the quick start: two minutes on two CPU cores.

    Student, teacher, heads and optimizer of runs/quickstart go on. The Gram teacher is that run's
    teacher after 100 steps, whose patches agree best with the objects of a scene: from then on
    images are told apart better and patches worse. The weight is 20, where 2 is published: at 2
    patches mend too, but less within so few steps.
    Result: the trial of 2026-11-24 in LOG.md (three seeds).
    Command: python train/pretrain.py quickstart_gram, after python train/pretrain.py quickstart
    """
    base = quickstart()
    return replace(
        base,
        name="quickstart_gram",
        optim=replace(base.optim, lr=constant(1e-3)),
        run=replace(base.run, from_=base.name, epochs=1, eval_every=50),
        gram=GramAnchor(Earlier(step=100), PhasedSchedule(0.0, 20.0, 20.0, warmup_epochs=0.2)),
    )


def quickstart_highres() -> Pretrain:
    """High-resolution adaptation after quickstart_gram: two minutes on two CPU cores.

    Student and teacher both begin as the teacher of runs/quickstart_gram, with its heads, and the
    optimizer is new. What couples sizes is that one image is seen at two of them within a step: in
    two of three steps the teacher sees crops of 48 px and the student's local ones are enlarged to
    72 or 144 px. The EMA teacher is fast, as it has to follow within a short stage.
    Result: the trial of 2026-11-24 in LOG.md (three seeds).
    Command: python train/pretrain.py quickstart_highres, after quickstart_gram
    """
    base = quickstart()
    sizes = (CropSizes(0.4, 48, 72), CropSizes(0.25, 48, 144), CropSizes(0.2, 96, 24))
    return replace(
        base,
        name="quickstart_highres",
        crops=replace(base.crops, other_sizes=sizes),
        data=replace(base.data, scene_size=96),  # so that no global crop is enlarged
        optim=replace(base.optim, lr=CosineSchedule(3e-3, 3e-5, warmup_epochs=0.1)),
        teacher=replace(base.teacher, momentum=constant(0.95)),
        run=replace(
            base.run,
            from_="quickstart_gram",
            take="teacher",
            epochs=1,
            batch_size=32,
            eval_every=50,
        ),
    )


def photos() -> Pretrain:
    """A first look at your own images on a CPU or a small GPU: a small network, small crops.

    Source: the trial on real images of 2026-11-22 in LOG.md, whose settings these are: the quick
    start with larger crops, a wider network, the published colour jitter, blur as executed, and
    iBOT and the teacher set for a longer run. On Imagenette at 128 px, 1500 steps (10 passes over
    9469 images) took a little over 30 minutes of one CPU core: 20-NN 31.9 before, 44.0 after (raw
    pixels 31.5; one standard error is 1.6 points). A start, not a result.
    Command: python train/pretrain.py photos --data.source /path/to/images
    """
    base = quickstart()
    head = replace(base.dino, prototypes=1024)
    return replace(
        base,
        name="photos",
        backbone=replace(base.backbone, width=128, heads=4),
        dino=head,
        ibot=head,
        loss=replace(base.loss, ibot_weight=0.5),
        crops=replace(
            base.crops,
            global_size=64,
            local_size=32,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            blur="executed",
        ),
        data=Data(source="images", workers=0),
        optim=replace(base.optim, lr=CosineSchedule(2e-3, 2e-5, warmup_epochs=0.5)),
        teacher=replace(base.teacher, momentum=constant(0.99)),
        run=replace(base.run, epochs=15, eval_every=300, checkpoint_every=300),
    )
