"""AdamW with the published parameter groups, per-module clipping and per-step learning rates.

Groups follow recipe rules by name: layer-wise decay for the backbone, a reduced rate for the patch
embedding, no weight decay on biases, norms and LayerScale, and a last layer whose rate is held at
zero for a while.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SMALLEST = 1e-37  # float32 has smaller numbers, but GPUs may round those to 0
ROOM = 1e37  # a tenth of the largest float32 is left for the weights themselves


@dataclass(frozen=True)
class Multipliers:
    """What a parameter's learning rate and weight decay are multiplied by."""

    lr: float
    weight_decay: float
    is_last_layer: bool


def multipliers(
    name: str, depth: int | None, layer_decay: float, patch_embed_lr: float
) -> Multipliers:
    """The rule for one parameter, by its name within its sub-module.

    Args:
        name: for example "blocks.3.attn.qkv.weight" or "last_layer.weight".
        depth: number of blocks of a ViT backbone; None for a head, whose rate is 1 everywhere.
        layer_decay: block i of L gets decay ** (L - i), tokens and patch embedding decay **
            (L + 1), final norms 1.
        patch_embed_lr: an additional factor on the patch embedding.
    """
    lr = 1.0
    if depth is not None:
        if name.startswith("blocks."):
            lr = layer_decay ** (depth - int(name.split(".")[1]))
        elif name.startswith(("cls_token", "mask_token", "storage_tokens", "patch_embed.")):
            lr = layer_decay ** (depth + 1)
    if "patch_embed" in name:
        lr *= patch_embed_lr
    undecayed = name.endswith("bias") or "norm" in name or "gamma" in name
    return Multipliers(lr, 0.0 if undecayed else 1.0, "last_layer" in name)


def submodules(student: nn.Module) -> dict[str, nn.Module]:
    """What has its own parameter groups and is clipped by itself: "backbone", each head."""
    children = student.named_children()
    return {name: child for name, child in children if any(True for _ in child.parameters())}


def param_groups(student: nn.Module, layer_decay: float, patch_embed_lr: float) -> list[dict]:
    """Optimizer groups of a student: one per sub-module and `Multipliers`."""
    groups: dict[tuple[str, Multipliers], list[nn.Parameter]] = {}
    for submodule, module in submodules(student).items():
        depth = len(module.blocks) if hasattr(module, "blocks") else None
        for name, parameter in module.named_parameters():
            rule = multipliers(name, depth, layer_decay, patch_embed_lr)
            groups.setdefault((submodule, rule), []).append(parameter)
    return [
        {
            "params": params,
            "lr_multiplier": rule.lr,
            "wd_multiplier": rule.weight_decay,
            "is_last_layer": rule.is_last_layer,
            "is_backbone": submodule == "backbone",
        }
        for (submodule, rule), params in groups.items()
    ]


def make_adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW in its fused form; rates and decay are set by `set_rates` before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def largest_multiplier(depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    """At least the largest rate multiplier that `multipliers` gives to any parameter."""
    with np.errstate(over="ignore"):
        decay = np.float64(max(1.0, layer_decay)) ** (depth + 1)
        return float(decay * max(1.0, patch_embed_lr))


def unbounded_update(
    schedules: Mapping[str, np.ndarray],
    multiplier: float,
    clip: float,
    eps: float,
) -> str:
    """Why these settings could take finite weights to NaN or Inf; empty when they cannot.

    Gradients are clipped to the norm `clip`, so AdamW's running means, corrected for their bias,
    are at most clip and clip^2, and a weight moves by at most rate * clip / eps in a step. Decay
    multiplies a weight by 1 - rate * decay, which shrinks it when rate * decay is from 0 to 1. So
    over a run no weight moves further than the sum of rate * clip / eps. The EMA teacher lies
    between weights of the student. What is left to check is that these numbers fit float32.

    Args:
        schedules: one value per step: "lr", "weight_decay" and "momentum" are read.
        multiplier: the largest of any parameter's rate.
        clip: largest gradient norm of a sub-module.
        eps: of AdamW.
    """
    if not 0 < clip < ROOM**0.5:
        return f"optim.clip: expected above 0 and below {ROOM**0.5:.3g}, got {clip}"
    if not eps >= SMALLEST:
        return f"optim.eps: expected at least {SMALLEST}, or AdamW divides by zero, got {eps}"
    rates = schedules["lr"] * multiplier
    with np.errstate(over="ignore"):
        travel = rates.sum() * clip / eps
    if not (rates >= 0).all() or not travel < ROOM:
        return (
            f"optim.lr: expected 0 or more and, with optim.clip {clip:g} and optim.eps {eps:g}, "
            "small enough that weights stay in the range of float32, got up to "
            f"{rates.max():g} over {len(rates)} steps"
        )
    if not _all_within_0_and_1(rates * schedules["weight_decay"]):
        return (
            "optim.lr times optim.weight_decay: expected 0 to 1, as a step multiplies weights by 1 "
            f"minus that, got up to {(rates * schedules['weight_decay']).max():g}"
        )
    if not _all_within_0_and_1(schedules["momentum"]):
        return f"teacher.momentum: expected 0 to 1, got up to {schedules['momentum'].max():g}"
    return ""


def _all_within_0_and_1(series: np.ndarray) -> bool:
    return bool(((series >= 0) & (series <= 1)).all())


def backbone_shares(steps: int, frozen: int, ramp: int) -> np.ndarray:
    """What the backbone's rate is multiplied by at each step: 0, then a line up to 1.

    Args:
        steps: of the run.
        frozen: first steps, at which the backbone is held still.
        ramp: steps after them over which its rate grows; the last of them has all of it.
    """
    since = np.arange(1, steps + 1) - frozen
    return np.clip(since / max(ramp, 1), 0.0, 1.0)


def set_rates(
    optimizer: torch.optim.Optimizer,
    lr: float,
    last_layer_lr: float,
    weight_decay: float,
    backbone_share: float = 1.0,
) -> None:
    """Write this step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        rate = last_layer_lr if group["is_last_layer"] else lr
        share = backbone_share if group["is_backbone"] else 1.0
        group["lr"] = rate * share * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def gradient_norms(student: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of each sub-module's gradients, on its device: the host does not wait.

    It is 0 for a sub-module that has none, as it is held still.
    """
    return {name: _norm(module) for name, module in submodules(student).items()}


def clip_gradients(student: nn.Module, norms: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each sub-module's gradients so that its own norm is at most `max_norm`."""
    for name, module in submodules(student).items():
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norms[name])


def _norm(module: nn.Module) -> Tensor:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return next(module.parameters()).new_zeros(())
    return torch.nn.utils.get_total_norm(gradients)
