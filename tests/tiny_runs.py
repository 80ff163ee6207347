"""A run small enough for tests: a recipe, batches of noise, a trainer's tensors to compare."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings, batch_masks
from dinov3core.models import ConvNeXtSettings, HeadSettings, VitSettings
from dinov3core.train.engine.config import (
    Data,
    GramAnchor,
    Loss,
    Optim,
    Pretrain,
    Run,
    Snapshot,
    Teacher,
)
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.schedules import constant
from dinov3core.train.engine.trainer import Trainer

TIMING = re.compile("seconds|images_per_second")
HEAD_SIZES = {"prototypes": 24, "hidden": 16, "bottleneck": 8}


def tiny_recipe() -> Pretrain:
    """Two blocks of width 32; every term of the objective is on."""
    head = HeadSettings(**HEAD_SIZES, init_std=0.2, prototype_std=0.3)
    return Pretrain(
        name="tiny",
        backbone=VitSettings(
            width=32,
            depth=2,
            heads=2,
            patch_size=8,
            registers=1,
            layer_scale=1.0,
            untie_local_cls_norm=True,
            init_std=0.2,
        ),
        dino=head,
        ibot=head,
        loss=Loss(koleo_weight=0.5, koleo_distributed=True, local_weight=constant(0.7)),
        gram=GramAnchor(Snapshot(every=2)),
        crops=CropSettings(global_size=24, local_size=16, local_count=3),
        masks=MaskSettings(),
        data=Data(workers=0, probe_bank=24, probe_queries=12, dense_images=12),
        optim=Optim(lr=constant(1e-3), lr_scaling="none", freeze_last_layer_epochs=0.0),
        teacher=Teacher(momentum=constant(0.9), temperature=constant(0.1)),
        run=Run(epochs=1, epoch_steps=8, batch_size=4, device="cpu", precision="fp32"),
    )


def tiny_convnext() -> Pretrain:
    """A ConvNeXt of five narrow blocks; 9 patches of 32 px in a global crop, one in a local one."""
    recipe = tiny_recipe()
    return replace(
        recipe,
        backbone=ConvNeXtSettings((1, 1, 2, 1), (8, 12, 16, 32), layer_scale=0.5),
        crops=CropSettings(global_size=96, local_size=32, local_count=2),
        optim=replace(recipe.optim, layer_decay=1.0, patch_embed_lr=1.0),
    )


def tiny_command(out: Path, *more: str) -> list[str]:
    """The same size as a command line: 20 steps on built-in images, a log line for every step."""
    fields = {
        "backbone.width": 32,
        "backbone.depth": 2,
        "backbone.heads": 2,
        **{
            f"{head}.{name}": size for head in ("dino", "ibot") for name, size in HEAD_SIZES.items()
        },
        "crops.global-size": 24,
        "crops.local-size": 16,
        "crops.local-count": 2,
        "data.scenes": 64,
        "data.probe-bank": 24,
        "data.probe-queries": 12,
        "data.dense-images": 12,
        "run.epochs": 1,
        "run.epoch-steps": 20,
        "run.batch-size": 4,
        "run.log-every": 1,
        "run.eval-every": 0,
        "run.checkpoint-every": 5,
        "run.threads": 1,
        "run.out": out,
    }
    return [
        "quickstart",
        *(text for name, value in fields.items() for text in (f"--{name}", str(value))),
        *more,
    ]


def checkpoint_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:08d}"


def tensors_of(out: Path, step: int, into: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: student, teacher, optimizer, buffers."""
    dcp_to_torch_save(checkpoint_of(out, step) / "tensors", into)
    nested = torch.load(into, weights_only=True)
    tensors: dict[str, Tensor] = {}
    for group, part in nested.items():
        tensors |= {f"{group}.{name}": tensor for name, tensor in part.items()}
    return tensors


def metrics_of(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock says."""
    return [untimed(row) for row in read_rows(out / "metrics.jsonl")]


def summary_of(out: Path) -> dict:
    """summary.json without what a clock says, the peak of memory and where the run is."""
    text = (out / "summary.json").read_text().replace(str(out), "RUN")
    summary = untimed(json.loads(text))
    del summary["peak_memory_bytes"]
    return summary


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if not TIMING.search(name)}


def with_run(recipe: Pretrain, **fields) -> Pretrain:
    return replace(recipe, run=replace(recipe.run, **fields))


def made_up_batch(recipe: Pretrain, images: int, seed: int = 0) -> Batch:
    """A batch of noise with block masks, crop-major."""
    torch.manual_seed(seed)
    crops = recipe.crops
    rng = np.random.default_rng(seed)
    side = crops.global_size // recipe.backbone.patch_size
    masks = batch_masks(crops.global_count * images, (side, side), recipe.masks, rng)
    return Batch(
        torch.randn(crops.global_count * images, 3, crops.global_size, crops.global_size),
        torch.randn(crops.local_count * images, 3, crops.local_size, crops.local_size),
        None,
        *masks,
        positions=range(images),
    )


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights and of the optimizer's state, by name."""
    tensors = {
        f"{which}.{name}": tensor.clone()
        for which, module in trainer.modules().items()
        for name, tensor in module.state_dict().items()
    }
    names = {parameter: name for name, parameter in trainer.student.named_parameters()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {
            f"optimizer.{names[parameter]}.{key}": value.clone() for key, value in state.items()
        }
    return tensors


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    return sorted(a.keys() ^ b.keys()) + [
        name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])
    ]
