"""AdamW with the published parameter groups, per-module clipping and per-step learning rates.

Groups follow recipe rules by name: layer-wise decay for the backbone, a reduced rate for the patch embedding, no weight
decay on biases, norms and LayerScale, and a last layer whose rate is held at zero for a while.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SUBMODULES = ("backbone", "dino_head", "ibot_head")


@dataclass(frozen=True)
class Multipliers:
    """What a parameter's learning rate and weight decay are multiplied by."""

    lr: float
    weight_decay: float
    is_last_layer: bool


def multipliers(name: str, depth: int | None, layer_decay: float, patch_embed_lr: float) -> Multipliers:
    """The rule for one parameter, by its name within its sub-module.

    Args:
        name: for example "blocks.3.attn.qkv.weight" or "last_layer.weight".
        depth: number of blocks of a ViT backbone; None for a head or a backbone without blocks (rate 1 everywhere).
        layer_decay: block i of L gets decay ** (L - i); tokens and patch embedding decay ** (L + 1); final norms 1.
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


def param_groups(student: nn.Module, layer_decay: float, patch_embed_lr: float) -> list[dict]:
    """Optimizer groups of a student: one per sub-module (backbone, DINO head, iBOT head) and multiplier triple."""
    groups: dict[tuple[str, Multipliers], list[nn.Parameter]] = {}
    for submodule in SUBMODULES:
        module = getattr(student, submodule)
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
        }
        for (_, rule), params in groups.items()
    ]


def make_adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW in its fused form; rates and decay are set by `set_rates` before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, last_layer_lr: float, weight_decay: float) -> None:
    """Write this step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def grad_norms(student: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of the gradients of each sub-module, on its device, without a host synchronisation."""
    return {name: torch.nn.utils.get_total_norm(_gradients(getattr(student, name).parameters())) for name in SUBMODULES}


def clip_gradients(student: nn.Module, norms: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each sub-module's gradients so that its own norm is at most `max_norm`."""
    for name in SUBMODULES:
        torch.nn.utils.clip_grads_with_norm_(getattr(student, name).parameters(), max_norm, norms[name])


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
