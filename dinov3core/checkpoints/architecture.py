"""What model a set of weights belongs to, read off its tensors and the few facts that tensors do not show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3core.models import ConvNeXt, VisionTransformer
from dinov3core.models.layers import SWIGLU_ALIGN, RMSNorm
from dinov3core.models.presets import Backbone, heads_of_size

# What released weights have and tensors do not show (DINOv3 model card).
RELEASED_FACTS: dict[str, Any] = dict(norm="layernormbf16", rope_base=100.0, rope_normalize="separate")


@dataclass(frozen=True)
class Architecture:
    """A family ("vit" or "convnext") and the arguments of its class that change outputs in eval mode."""

    family: str
    arguments: dict[str, Any]

    def build(self, **overrides: Any) -> Backbone:
        """The model on the meta device: shapes without memory, to be filled by `load_state_dict(assign=True)`."""
        kind = ConvNeXt if self.family == "convnext" else VisionTransformer
        arguments = {**self.arguments, **overrides}
        if isinstance(arguments.get("rope_dtype"), str):  # as our header has it
            arguments["rope_dtype"] = getattr(torch, arguments["rope_dtype"])
        with torch.device("meta"):
            return kind(**arguments)


def architecture_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], where: str = "weights") -> Architecture:
    """The architecture of weights in official names.

    Args:
        facts: arguments that tensors do not show: `norm`, `rope_*`, and `heads` where no periods are stored; without
            it, they are those of the named model of that width and depth.
        where: what the message of an error begins with.

    Raises:
        ValueError: when a tensor that fixes a size is missing.
    """
    if "downsample_layers.0.0.weight" in tensors:
        return Architecture("convnext", _convnext_arguments(tensors, where))
    for key in ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        if key not in tensors:
            raise ValueError(f"{where}: expected {key!r}, found no such tensor; the file is incomplete")
    width = tensors["cls_token"].shape[-1]
    patch = tensors["patch_embed.proj.weight"].shape
    first = "blocks.0."
    arguments = dict(
        width=width,
        depth=count(tensors, "blocks"),
        heads=_heads(tensors, width, facts, where),
        patch_size=patch[-1],
        in_channels=patch[1],
        **_ffn_arguments(tensors, width, where),
        registers=tensors["storage_tokens"].shape[1] if "storage_tokens" in tensors else 0,
        qkv_bias=first + "attn.qkv.bias" in tensors,
        proj_bias=first + "attn.proj.bias" in tensors,
        mask_k_bias=first + "attn.qkv.bias_mask" in tensors,
        layer_scale=1e-5 if first + "ls1.gamma" in tensors else None,
        untie_cls_norm="cls_norm.weight" in tensors,
        untie_local_cls_norm="local_cls_norm.weight" in tensors,
        **{key: value for key, value in facts.items() if key != "heads"},
    )
    if first + "norm1.bias" not in tensors:
        arguments["norm"] = "rmsnorm"
    return Architecture("vit", arguments)


def architecture_of_model(model: Backbone) -> Architecture:
    """The architecture of a model in memory."""
    return architecture_of(dict(model.state_dict()), facts_of_model(model))


def facts_of_model(model: Backbone) -> dict[str, Any]:
    """What the tensors of a model do not show."""
    if isinstance(model, ConvNeXt):
        return {}
    rope = model.rope_embed
    if isinstance(model.norm, RMSNorm):
        norm = "rmsnorm"
    else:
        norm = "layernorm" if model.norm.eps == 1e-6 else "layernormbf16"
    return dict(
        heads=model.heads,
        norm=norm,
        rope_base=rope.base,
        rope_min_period=rope.min_period,
        rope_max_period=rope.max_period,
        rope_normalize=rope.normalize,
        rope_dtype=str(rope.dtype).removeprefix("torch."),
    )


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many indices follow `prefix.` among the names."""
    return len({key.split(".")[prefix.count(".") + 1] for key in tensors if key.startswith(prefix + ".")})


def hidden_width(tensors: Mapping[str, Tensor]) -> int:
    """Hidden width of a ViT's feed-forward networks."""
    first = next(key for key in ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1.weight") if key in tensors)
    return tensors[first].shape[0]


def effective_bias(tensors: Mapping[str, Tensor], projection: str) -> Tensor:
    """The bias a qkv projection adds: the stored one times its stored mask."""
    bias = tensors[projection + ".bias"]
    mask = tensors.get(projection + ".bias_mask")
    return bias if mask is None else bias * mask.to(bias.dtype)


def has_key_bias(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any block adds a bias to its keys; with RoPE that changes outputs."""
    names = [key.removesuffix(".bias") for key in tensors if key.endswith("attn.qkv.bias")]
    return any(bool(effective_bias(tensors, name).chunk(3)[1].any()) for name in names)


def _heads(tensors: Mapping[str, Tensor], width: int, facts: Mapping[str, Any], where: str) -> int:
    if "rope_embed.periods" in tensors:
        return width // (4 * len(tensors["rope_embed.periods"]))
    heads = facts.get("heads") or heads_of_size(width, count(tensors, "blocks"))
    if heads is None:
        raise ValueError(
            f"{where}: expected the number of heads, found neither it nor a known size (width {width}, depth "
            f"{count(tensors, 'blocks')}); give the folder with config.json, or heads=H to load_model"
        )
    return heads


def _ffn_arguments(tensors: Mapping[str, Tensor], width: int, where: str) -> dict[str, Any]:
    """ffn, ffn_ratio and ffn_bias that give the stored hidden width."""
    gated = "blocks.0.mlp.w1.weight" in tensors
    first = "blocks.0.mlp.w1" if gated else "blocks.0.mlp.fc1"
    if first + ".weight" not in tensors:
        raise ValueError(f"{where}: expected {first}.weight, found no such tensor; the file is incomplete")
    hidden = tensors[first + ".weight"].shape[0]
    if gated and hidden % SWIGLU_ALIGN["swiglu"]:
        raise ValueError(f"{where}: expected a SwiGLU width that is a multiple of 8, got {hidden}; not supported")
    nominal = hidden * 3 // 2 if gated else hidden
    ratio = nominal / width
    if int(width * ratio) != nominal:  # int() truncates: keep clear of the edge
        ratio = (nominal + 0.5) / width
    return dict(ffn="swiglu" if gated else "mlp", ffn_ratio=ratio, ffn_bias=first + ".bias" in tensors)


def _convnext_arguments(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    stages = range(count(tensors, "stages"))
    for stage in stages:
        if f"stages.{stage}.0.dwconv.weight" not in tensors:
            raise ValueError(f"{where}: expected stages.{stage}.0.dwconv.weight, found none; the file is incomplete")
    return dict(
        depths=tuple(count(tensors, f"stages.{stage}") for stage in stages),
        widths=tuple(tensors[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in stages),
        in_channels=tensors["downsample_layers.0.0.weight"].shape[1],
    )
