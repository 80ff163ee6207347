"""Continue from weights that exist, on your images, without ruining what they know."""

from pathlib import Path

from dinov3core.checkpoints import Described, describe
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.models import IMAGENET, ConvNeXtSettings, VitSettings
from dinov3core.models.head import HeadSettings
from dinov3core.train.engine.config import (
    ConfigError,
    Data,
    GramAnchor,
    Loss,
    Optim,
    Pretrain,
    Run,
    Snapshot,
    Teacher,
)
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.named_models import crop_size
from dinov3core.train.engine.schedules import PhasedSchedule, constant
from dinov3core.train.recipes.quickstart import photos

VITS_WIDTH = 384
_RATES_OF_CONVNEXT = {"layer_decay": 1.0, "patch_embed_lr": 1.0}  # one for all layers, as published


def adapt(init: str = "") -> Pretrain:
    """Continue from weights that exist, on your images: heads first, a guard on the features.

    The network is that of the weights, whatever their layout (docs/weights.md): give no backbone
    fields. An epoch is E steps: E = images / batch, but at least 1,000 and at most 10,000, so 1,000
    for 500 images and 10,000 for a million. Heads train alone for E steps (published practice is
    10,000; 1,000 suffice for small sets), then the backbone's rate grows over E more (1,000
    published) to a constant 5e-5 and stays for 2 E. Layers of a ViT near its input have lower
    rates, the EMA teacher is slow, and a Gram loss holds patches to those of the initial weights.
    When k-NN on `data.probe` falls more than 2 points below its start, the run stops; without
    labels RankMe and patch drift are watched instead.
    Result: the trial of 2026-11-24 in LOG.md. Command: python train/pretrain.py adapt --run.init
    FILE --data.source /path/to/images --data.probe /path/to/labelled
    """
    backbone, statistics = _network_of(init)
    side = crop_size(Path(init)) if init else 0
    side = side or 14 * backbone.patch_size
    # Less than a ViT-S has the heads and the sharp teacher of the recipes for small networks.
    small = backbone.width < VITS_WIDTH
    head = photos().dino if small else HeadSettings(prototypes=16384)
    warming = PhasedSchedule(0.04, 0.07, 0.07, warmup_epochs=1.0)
    return Pretrain(
        name="adapt",
        backbone=backbone,
        dino=head,
        ibot=head,
        loss=Loss(),
        gram=GramAnchor(Snapshot(), constant(1.0)),
        crops=CropSettings(
            global_size=side,
            local_size=_local_side(side, backbone.patch_size),
            mean=statistics.mean,
            std=statistics.std,
        ),
        masks=MaskSettings(),
        data=Data(source="images"),
        optim=Optim(
            # of heads alone 1e-3 falling to 5e-5, of all weights 5e-5 from there on
            lr=PhasedSchedule(0.0, 1e-3, 5e-5, warmup_epochs=0.1, cosine_epochs=0.9),
            lr_scaling="none",
            weight_decay=constant(0.04),
            freeze_last_layer_epochs=0.0,
            freeze_backbone_epochs=1.0,
            unfreeze_epochs=1.0,
            **_RATES_OF_CONVNEXT if isinstance(backbone, ConvNeXtSettings) else {},
        ),
        teacher=Teacher(
            momentum=PhasedSchedule(0.99, 0.9995, 0.9995, warmup_epochs=1.0),
            temperature=photos().teacher.temperature if small else warming,
        ),
        run=Run(
            epochs=4,
            epoch_steps=0,
            init=init,
            eval_every=250,
            checkpoint_every=250,
        ),
        guard=Guard(margin=2.0),
    )


def _network_of(init: str) -> Described:
    """The network that weights belong to, and the statistics of the images they saw."""
    if not init:
        return Described(VitSettings(), IMAGENET)
    try:
        described = describe(init)
    except (ValueError, OSError) as error:
        raise ConfigError(f"run.init: {error}") from error
    return described._replace(statistics=described.statistics or IMAGENET)


def _local_side(side: int, patch: int) -> int:
    """Of local crops: 96 for 224, and the nearest number of whole patches in proportion."""
    return max(round(side * 96 / 224 / patch), 1) * patch
