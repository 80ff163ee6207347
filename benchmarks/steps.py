"""Whole training steps: ours against the same algorithm written plainly, on random crops of a
recipe's shapes.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines
from benchmarks.comparison import Disagreement, Drive, Setting
from benchmarks.measure import Interleaved, loop, peak_memory, plan
from dinov3core.data.masks import batch_masks
from dinov3core.train.engine import optim
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.objective import Crops
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.recipes.imagenet import vitl16_im1k, vits16_1gpu
from dinov3core.train.recipes.quickstart import quickstart

ROOM = 8  # times the seconds of a single op: a step lasts long


def recipes(scale: str) -> list[Pretrain]:
    """A ViT-S and a ViT-L recipe: as they are on a GPU, smaller elsewhere; on a CPU also the quick
    start as it is.
    """
    small, large = vits16_1gpu(), vitl16_im1k()
    if scale == "gpu":
        return [small, large]
    if scale == "dry":
        return [
            _scaled(small, 32, 2, 2, 3, 48, 16, (32, 16)),
            _scaled(large, 64, 2, 2, 2, 48, 16, (32, 16)),
        ]
    return [
        quickstart(),
        _scaled(small, 384, 6, 6, 4, 16384, 1024),
        _scaled(large, 512, 8, 8, 3, 16384, 1024),
    ]


def _scaled(
    recipe: Pretrain,
    width: int,
    depth: int,
    heads: int,
    images: int,
    prototypes: int,
    hidden: int,
    pixels: tuple[int, int] = (224, 96),
) -> Pretrain:
    head = {"prototypes": prototypes, "hidden": hidden}
    return replace(
        recipe,
        backbone=replace(recipe.backbone, width=width, depth=depth, heads=heads),
        dino=replace(recipe.dino, **head),
        ibot=replace(recipe.ibot, **head),
        crops=replace(recipe.crops, global_size=pixels[0], local_size=pixels[1]),
        run=replace(recipe.run, batch_size=images, compile=False, precision="fp32"),
    )


def label(recipe: Pretrain) -> str:
    """The name of a recipe's step in results."""
    shape = recipe.backbone
    family = recipe.name.split("_")[0]
    size = f"width {shape.width} depth {shape.depth}"
    return f"training_step {family} {size}, {recipe.run.batch_size} images"


def random_crops(recipe: Pretrain, device: torch.device) -> Crops:
    """Noise in the shapes of the recipe's batch, with its masks."""
    torch.manual_seed(0)
    crops, images = recipe.crops, recipe.run.batch_size
    count, side = crops.global_count * images, crops.global_size // recipe.backbone.patch_size
    masks = recipe.masks
    drawn = batch_masks(
        count,
        (side, side),
        probability=masks.probability,
        ratio_min=masks.ratio_min,
        ratio_max=masks.ratio_max,
        rng=np.random.default_rng(0),
    )
    return Crops(
        torch.randn(count, 3, crops.global_size, crops.global_size, device=device),
        torch.randn(
            crops.local_count * images, 3, crops.local_size, crops.local_size, device=device
        ),
        None,
        *(part.to(device) for part in drawn),
    )


def ours(recipe: Pretrain, device: torch.device, crops: Crops) -> Callable[[], float]:
    """A step of `Trainer`; returns the loss."""
    trainer = Trainer(recipe, World(0, 1, device))
    step = _middle(trainer)
    return lambda: trainer.step(crops, step).values["loss"]


def _middle(trainer: Trainer) -> int:
    """A step at which no rate is zero."""
    return trainer.resolved.steps // 2


def plain(
    recipe: Pretrain, device: torch.device, crops: Crops, compiled: bool = False
) -> Callable[[], float]:
    """A step of `baselines.Step` from the same weights."""
    trainer = Trainer(replace(recipe, run=replace(recipe.run, compile=False)), World(0, 1, device))
    shape, now = recipe.backbone, trainer.resolved.at(_middle(trainer))
    backbone = baselines.VisionTransformer(
        shape.width,
        shape.depth,
        shape.heads,
        shape.patch_size,
        shape.registers,
        shape.drop_path,
        eps=1e-6 if shape.norm == "layernorm" else 1e-5,
        rope_dtype=torch.bfloat16 if shape.rope.dtype == "bf16" else torch.float32,
    )
    heads = [
        baselines.Head(shape.width, head.hidden, head.bottleneck, head.prototypes)
        for head in (recipe.dino, recipe.ibot)
    ]
    student = baselines.Networks(backbone, *heads).to(device)
    state = {
        name: value
        for name, value in trainer.student.state_dict().items()
        if "rope_embed" not in name
    }
    missing, unexpected = student.load_state_dict(state, strict=False)
    assert not unexpected and all("bias_mask" in name for name in missing), (missing, unexpected)
    groups = optim.param_groups(student, recipe.optim.layer_decay, recipe.optim.patch_embed_lr)
    optimizer = torch.optim.AdamW(
        groups, betas=(recipe.optim.beta1, recipe.optim.beta2), eps=recipe.optim.eps
    )
    optim.set_rates(optimizer, now["lr"], now["last_layer_lr"], now["weight_decay"])
    step = baselines.Step(
        student,
        optimizer,
        baselines.Weights(
            recipe.crops.global_count,
            recipe.crops.local_count,
            recipe.loss.student_temperature,
            now["teacher_temperature"],
            recipe.loss.dino_weight,
            recipe.loss.ibot_weight,
            recipe.loss.koleo_weight,
        ),
        momentum=now["momentum"],
        clip=recipe.optim.clip,
        autocast=device.type == "cuda" and recipe.run.precision == "bf16",
        compiled=compiled,
    )
    return lambda: step.step(crops)


def variants(
    recipe: Pretrain, device: torch.device, compiled: bool
) -> dict[str, Callable[[], float]]:
    """Ours, plain, and plain compiled, each with weights and optimizer of its own."""
    crops = random_crops(recipe, device)
    found = {"ours": ours(recipe, device, crops), "plain": plain(recipe, device, crops)}
    if compiled:
        found["compiled"] = plain(recipe, device, crops, compiled=True)
    return found


def measure(recipe: Pretrain, setting: Setting, drive: Drive = loop) -> dict:
    """One entry of a results file: ratios, peak memory, images per second, model FLOP utilisation.

    The model's FLOPs are counted on the plain step (matrix products and attention) and held against
    the matrix rate this machine reached in `machine.probe`. Peak memory is that of a step beyond
    weights and optimizer state.

    Raises:
        Disagreement: when our first loss is not that of the plain step.
    """
    device = setting.device
    _check(recipe, device)
    flops = _flops(recipe, device)
    runs = variants(recipe, device, setting.compiled)
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}
    rounds, _ = plan(runs, ROOM * setting.seconds, shortest=0.0, timer=setting.timer)
    interleaved = Interleaved(runs, timer=setting.timer)
    drive(interleaved, rounds)
    times = interleaved.medians()
    images = recipe.run.batch_size
    return {
        "case": label(recipe),
        "op": "training_step",
        "shape": label(recipe).removeprefix("training_step "),
        "direction": "step",
        "dtype": recipe.run.precision if device.type == "cuda" else "float32",
        "rounds": rounds,
        "seconds": times,
        "ratio": interleaved.ratios(),
        "peak_bytes": peaks,
        "flops": flops,
        "images_per_second": {name: images / value for name, value in times.items()},
        "utilisation": {
            name: flops / value / setting.limits.flops_per_second for name, value in times.items()
        },
    }


def _flops(recipe: Pretrain, device: torch.device) -> int:
    step = plain(recipe, device, random_crops(recipe, device))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _check(recipe: Pretrain, device: torch.device) -> None:
    """The first loss of both, without stochastic depth, whose draws differ.

    With LayerScale at 1: at its usual start the CLS tokens of all images agree to 1e-5, and KoLeo,
    the logarithm of their distances, would compare rounding errors.
    """
    backbone = replace(recipe.backbone, drop_path=0.0, layer_scale=1.0)
    recipe = replace(recipe, backbone=backbone, run=replace(recipe.run, compile=False))
    crops = random_crops(recipe, device)
    found, expected = ours(recipe, device, crops)(), plain(recipe, device, crops)()
    tolerance = 1e-4 if recipe.run.precision == "fp32" else 2e-2
    if not abs(found - expected) <= tolerance * abs(expected):
        raise Disagreement(
            f"training step {recipe.name}: our first loss is {found}, that of the plain step "
            f"{expected}"
        )
