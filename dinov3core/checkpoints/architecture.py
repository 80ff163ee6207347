"""What model a set of weights belongs to: its tensors, and the few facts that they do not show."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3core.checkpoints.errors import WeightsError
from dinov3core.checkpoints.stated import FLAG, Rule, fields, listed, number, one_of, whole
from dinov3core.models import ConvNeXt, ConvNeXtSettings, VitSettings
from dinov3core.models.layers import SWIGLU_ALIGN
from dinov3core.models.presets import (
    Backbone,
    BackboneSettings,
    backbone_of,
    heads_of_size,
    overridden,
)

# What released weights have and tensors do not show (DINOv3 model card).
RELEASED_FACTS: dict[str, Any] = dict(
    norm="layernormbf16", rope_base=100.0, rope_normalize="separate"
)

# Far above any model there is (ViT-22B: width 6144, 48 blocks, 48 heads), and built in a second.
WIDTHS, DEPTHS, HEADS = whole(4, 2**16), whole(1, 512), whole(1, 2**10)
_PERIOD = number(1e-6, 1e12)
_VIT_RULES: dict[str, Rule] = dict(
    width=WIDTHS,
    depth=DEPTHS,
    heads=HEADS,
    patch_size=whole(1, 2**10),
    in_channels=whole(1, 2**12),
    ffn=one_of("mlp", *SWIGLU_ALIGN),
    ffn_ratio=number(1e-3, 64),
    ffn_bias=FLAG,
    registers=whole(0, 2**12),
    qkv_bias=FLAG,
    proj_bias=FLAG,
    mask_k_bias=FLAG,
    layer_scale=number(0, 1e3),
    untie_cls_norm=FLAG,
    untie_local_cls_norm=FLAG,
    norm=one_of("layernorm", "layernormbf16", "rmsnorm"),
    rope_base=_PERIOD,
    rope_min_period=_PERIOD,
    rope_max_period=_PERIOD,
    rope_normalize=one_of("separate", "max", "min"),
    rope_dtype=one_of("float32", "float64", "float16", "bfloat16"),
)
# What a header leaves out or states as null; the first files had no rope_dtype.
_UNSTATED = dict(
    layer_scale=None,
    rope_base=None,
    rope_min_period=None,
    rope_max_period=None,
    rope_dtype="float32",
)
_CONVNEXT_RULES: dict[str, Rule] = dict(
    depths=listed(DEPTHS), widths=listed(whole(1, 2**16)), in_channels=whole(1, 2**12)
)
_RULES = {"vit": _VIT_RULES, "convnext": _CONVNEXT_RULES}


@dataclass(frozen=True)
class Architecture:
    """A family ("vit" or "convnext") and its settings that change outputs in eval mode.

    `arguments` are as our header has them: flat names as `build` takes them, null for what is off,
    and number types by torch's name.
    """

    family: str
    arguments: dict[str, Any]

    def settings(self, **overrides: Any) -> BackboneSettings:
        """The settings that a model of this architecture is made of."""
        arguments = {**self.arguments, **overrides}
        if isinstance(arguments.get("rope_dtype"), str):
            arguments["rope_dtype"] = getattr(torch, arguments["rope_dtype"])
        family = ConvNeXtSettings() if self.family == "convnext" else VitSettings()
        return overridden(family, arguments)

    def build(self, **overrides: Any) -> Backbone:
        """The model on the meta device, to be filled by `load_state_dict(assign=True)`."""
        with torch.device("meta"):
            return backbone_of(self.settings(**overrides))


def stated_architecture(
    family: str,
    stated: Mapping[str, Any],
    path: str | os.PathLike,
    inside: str,
) -> Architecture:
    """The architecture that a header of ours states.

    Raises:
        WeightsError: an argument too many, too few, of another kind or outside its range.
    """
    if family not in _RULES:
        raise WeightsError(
            path,
            f"expected family vit or convnext in {inside}, got {family!r}; take the original file",
        )
    rules = _RULES[family]
    arguments: dict[str, Any] = dict(_UNSTATED) if family == "vit" else {}
    arguments |= fields(stated, rules, path, inside)
    missing = sorted(rules.keys() - arguments.keys())
    unknown = sorted(stated.keys() - rules.keys())
    if missing or unknown:
        differences = [f"missing {', '.join(missing)}"] * bool(missing)
        differences += [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise WeightsError(
            path,
            f"expected the {len(rules)} arguments of a {family} in {inside}, got others "
            f"({'; '.join(differences)}); load it with the dinov3core that wrote it",
        )
    if family == "convnext":  # JSON knows no tuples
        arguments |= {name: tuple(arguments[name]) for name in ("depths", "widths")}
    return Architecture(family, arguments)


def architecture_of(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], path: str | os.PathLike = "weights"
) -> Architecture:
    """The architecture of weights in official names.

    Args:
        facts: arguments that tensors do not show: `norm`, `rope_*`, and `heads` where no periods
            are stored; without it, they are those of the named model of that width and depth.
        path: what the message of an error begins with.

    Raises:
        WeightsError: a tensor that fixes a size is missing or has other dimensions, or a size is
            beyond all models.
    """
    if "downsample_layers.0.0.weight" in tensors:
        return Architecture("convnext", _convnext_arguments(tensors, path))
    width = _shape(tensors, "cls_token", 3, path)[-1]
    patch = _shape(tensors, "patch_embed.proj.weight", 4, path)
    _shape(tensors, "blocks.0.attn.qkv.weight", 2, path)
    registers = "storage_tokens" in tensors
    first = "blocks.0."
    sizes = dict(
        width=width,
        depth=count(tensors, "blocks"),
        patch_size=patch[-1],
        in_channels=patch[1],
        registers=_shape(tensors, "storage_tokens", 3, path)[1] if registers else 0,
    )
    fields(sizes, _VIT_RULES, path, "its tensors")
    arguments = dict(
        **sizes,
        heads=_heads(tensors, width, facts, path),
        **_ffn_arguments(tensors, width, path),
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
    """What the tensors of a model do not show, as our header has it."""
    if isinstance(model, ConvNeXt):
        return {}
    rope = model.settings.rope
    return dict(
        heads=model.heads,
        norm=model.settings.norm,
        rope_base=rope.base or None,
        rope_min_period=rope.min_period or None,
        rope_max_period=rope.max_period or None,
        rope_normalize=rope.normalize,
        rope_dtype=str(model.rope_embed.dtype).removeprefix("torch."),
    )


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many indices follow `prefix.` among the names."""
    return len(
        {key.split(".")[prefix.count(".") + 1] for key in tensors if key.startswith(prefix + ".")}
    )


def hidden_width(tensors: Mapping[str, Tensor]) -> int:
    """Hidden width of a ViT's feed-forward networks."""
    first = next(
        key for key in ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1.weight") if key in tensors
    )
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


def described(tensors: Mapping[str, Tensor], heads: int | None = None) -> str:
    """The model that tensors in official names belong to, in words; "" when they do not show it."""
    try:
        architecture = architecture_of(tensors, {"heads": heads} if heads else {})
    except WeightsError:
        return ""
    a = architecture.arguments
    if architecture.family == "convnext":
        depths, widths = ("-".join(map(str, a[name])) for name in ("depths", "widths"))
        return f"a ConvNeXt of {depths} blocks, widths {widths}, {a['in_channels']} channels"
    return (
        f"a ViT of {a['depth']} blocks, width {a['width']}, {a['heads']} heads, "
        f"patches of {a['patch_size']} px, {a['in_channels']} channels, "
        f"{a['registers']} registers, {a['ffn']} {hidden_width(tensors)}"
    )


def _shape(
    tensors: Mapping[str, Tensor],
    key: str,
    dimensions: int,
    path: str | os.PathLike,
) -> torch.Size:
    """The shape of a tensor that has to be there, with as many dimensions as it has to have."""
    if key not in tensors:
        raise WeightsError(path, f"expected {key!r}, found no such tensor; the file is incomplete")
    shape = tensors[key].shape
    if len(shape) != dimensions:
        raise WeightsError(
            path,
            f"expected {key} of {dimensions} dimensions, got shape {list(shape)}; "
            "the file is damaged or of another model",
        )
    return shape


def _heads(
    tensors: Mapping[str, Tensor],
    width: int,
    facts: Mapping[str, Any],
    path: str | os.PathLike,
) -> int:
    if "rope_embed.periods" in tensors:
        periods = _shape(tensors, "rope_embed.periods", 1, path)[0]
        if not periods or width % (4 * periods):
            raise WeightsError(
                path,
                "expected rope_embed.periods whose number divides a quarter of the width "
                f"{width}, got {periods}; the file is damaged or of another model",
            )
        return width // (4 * periods)
    heads = facts.get("heads") or heads_of_size(width, count(tensors, "blocks"))
    if heads is None:
        raise WeightsError(
            path,
            f"expected the number of heads, found neither it nor a known size (width {width}, "
            f"depth {count(tensors, 'blocks')}); give the folder with config.json, "
            "or heads=H to load_model",
        )
    if width % (4 * heads):
        raise WeightsError(
            path,
            f"expected heads that divide a quarter of width {width}, got {heads}; correct them",
        )
    return heads


def _ffn_arguments(
    tensors: Mapping[str, Tensor],
    width: int,
    path: str | os.PathLike,
) -> dict[str, Any]:
    """ffn, ffn_ratio and ffn_bias that give the stored hidden width."""
    gated = "blocks.0.mlp.w1.weight" in tensors
    first = "blocks.0.mlp.w1" if gated else "blocks.0.mlp.fc1"
    hidden = _shape(tensors, first + ".weight", 2, path)[0]
    if gated and hidden % SWIGLU_ALIGN["swiglu"]:
        raise WeightsError(
            path,
            f"expected a SwiGLU width that is a multiple of 8, got {hidden}; not supported",
        )
    nominal = hidden * 3 // 2 if gated else hidden
    ratio = nominal / width
    if int(width * ratio) != nominal:  # int() truncates: keep clear of the edge
        ratio = (nominal + 0.5) / width
    return dict(
        ffn="swiglu" if gated else "mlp", ffn_ratio=ratio, ffn_bias=first + ".bias" in tensors
    )


def _convnext_arguments(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, Any]:
    stages = range(count(tensors, "stages"))
    widths = [_shape(tensors, f"stages.{stage}.0.dwconv.weight", 4, path)[0] for stage in stages]
    arguments = dict(
        depths=[count(tensors, f"stages.{stage}") for stage in stages],
        widths=widths,
        in_channels=_shape(tensors, "downsample_layers.0.0.weight", 4, path)[1],
    )
    if len(stages) != 4:
        raise WeightsError(
            path,
            f"expected a ConvNeXt of 4 stages, got {len(stages)}; the file is incomplete",
        )
    fields(arguments, _CONVNEXT_RULES, path, "its tensors")
    return arguments | {name: tuple(arguments[name]) for name in ("depths", "widths")}
