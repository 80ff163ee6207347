"""The layout of timm: its EVA class with DINOv3's rotation, and its ConvNeXt.

The fused projection has no bias of its own: `q_bias` and `v_bias` stand beside it, in the models
named `*_qkvb`. There is no place for the mask token, periods, bias masks, a key bias and the local
CLS norm.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3core.checkpoints.architecture import (
    HEADS,
    Architecture,
    count,
    effective_bias,
    hidden_width,
)
from dinov3core.checkpoints.errors import WeightsError
from dinov3core.checkpoints.files import Source
from dinov3core.checkpoints.keys import KeyTable
from dinov3core.checkpoints.stated import (
    FLAG,
    TABLE,
    TEXT,
    fields,
    image_statistics,
    number,
    whole,
)
from dinov3core.models import ImageStatistics

_VIT_ROWS = [
    ("cls_token", "cls_token"),
    ("storage_tokens", "reg_token"),
    ("patch_embed.proj.*", "patch_embed.proj.*"),
    ("norm.*", "norm.*"),
    ("blocks.#.norm1.*", "blocks.#.norm1.*"),
    ("blocks.#.norm2.*", "blocks.#.norm2.*"),
    ("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.weight"),
    ("blocks.#.attn.proj.*", "blocks.#.attn.proj.*"),
    ("blocks.#.ls1.gamma", "blocks.#.gamma_1"),
    ("blocks.#.ls2.gamma", "blocks.#.gamma_2"),
    ("blocks.#.mlp.w1.*", "blocks.#.mlp.fc1_g.*"),
    ("blocks.#.mlp.w2.*", "blocks.#.mlp.fc1_x.*"),
    ("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
]
MLP = KeyTable([*_VIT_ROWS, ("blocks.#.mlp.fc2.*", "blocks.#.mlp.fc2.*")])
SWIGLU = KeyTable([*_VIT_ROWS, ("blocks.#.mlp.w3.*", "blocks.#.mlp.fc2.*")])
CONVNEXT = KeyTable(
    [
        ("downsample_layers.0.#.*", "stem.#.*"),
        ("downsample_layers.#.#.*", "stages.#.downsample.#.*"),
        ("stages.#.#.gamma", "stages.#.blocks.#.gamma"),
        ("stages.#.#.dwconv.*", "stages.#.blocks.#.conv_dw.*"),
        ("stages.#.#.norm.*", "stages.#.blocks.#.norm.*"),
        ("stages.#.#.pwconv1.*", "stages.#.blocks.#.mlp.fc1.*"),
        ("stages.#.#.pwconv2.*", "stages.#.blocks.#.mlp.fc2.*"),
        ("norm.*", "head.norm.*"),
    ]
)


def to_official(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes; names this layout does not know stay as they are."""
    if "stem.0.weight" in stored:
        return CONVNEXT.to_official(stored)
    table = SWIGLU if "blocks.0.mlp.fc1_g.weight" in stored else MLP
    tensors = table.to_official(stored)
    for block in range(count(stored, "blocks")):
        q, v = (tensors.get(f"blocks.{block}.attn.{kind}_bias") for kind in "qv")
        if q is not None and v is not None:
            tensors[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
            for kind in "qv":
                del tensors[f"blocks.{block}.attn.{kind}_bias"]
    return tensors


def from_official(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """This layout's tensors; biases are multiplied by their mask."""
    if architecture.family == "convnext":
        table = CONVNEXT
    else:
        table = MLP if architecture.arguments["ffn"] == "mlp" else SWIGLU
    translated = table.from_official(tensors)
    for key in [key for key in tensors if key.endswith("attn.qkv.bias")]:
        q, _, v = effective_bias(tensors, key.removesuffix(".bias")).chunk(3)
        translated[key.replace("qkv.bias", "q_bias")] = q
        translated[key.replace("qkv.bias", "v_bias")] = v
    return translated


_RULES = {
    "architecture": TEXT,
    "num_features": whole(1, 2**16),
    "model_args": TABLE,
    "pretrained_cfg": TABLE,
}
_ARGUMENT_RULES = {
    "num_heads": HEADS,
    "rope_type": TEXT,
    "rope_rotate_half": FLAG,
    "rope_temperature": number(1e-6, 1e12),
}
_SIZES = {
    "embed_dim": "width",
    "depth": "depth",
    "in_chans": "in_channels",
    "num_reg_tokens": "registers",
}


def facts(source: Source) -> dict[str, Any]:
    """What config.json states about the model beyond its tensors.

    Raises:
        WeightsError: a model of another kind, one that rotates neighbouring channels, or values
            that no model has.
    """
    config = fields(source.config, _RULES, source.path, "config.json")
    name = config.get("architecture", "")
    if name.startswith("convnext"):
        return {}
    arguments = fields(
        config.get("model_args", {}),
        _ARGUMENT_RULES,
        source.path,
        "model_args of config.json",
    )
    if name and "dinov3" not in name and arguments.get("rope_type") != "dinov3":
        raise WeightsError(
            source.path,
            f"expected a DINOv3 architecture in config.json, got {name!r}; give DINOv3 weights",
        )
    if arguments.get("rope_rotate_half") is False:
        raise WeightsError(
            source.path,
            "expected rotation of channel halves, but config.json says rope_rotate_half=false "
            "(neighbouring channels); loading it would give wrong features without any error",
        )
    stated: dict[str, Any] = {}
    if "num_heads" in arguments:
        stated["heads"] = arguments["num_heads"]
    elif config.get("num_features", 0) >= 64:
        stated["heads"] = config["num_features"] // (128 if "7b" in name else 64)
    if "rope_temperature" in arguments:
        stated["rope_base"] = float(arguments["rope_temperature"])
    return stated


def sizes(source: Source) -> dict[str, int]:
    """Sizes of a ViT that config.json states and the tensors show: by argument."""
    config = fields(source.config, _RULES, source.path, "config.json")
    rules = dict.fromkeys(_SIZES, whole(0, 2**31))
    stated = fields(config.get("model_args", {}), rules, source.path, "model_args of config.json")
    return {_SIZES[name]: value for name, value in stated.items()}


def statistics(source: Source) -> ImageStatistics | None:
    """The normalisation of the pretrained configuration."""
    config = fields(source.config, _RULES, source.path, "config.json")
    pretrained = config.get("pretrained_cfg", {})
    return image_statistics(
        pretrained,
        ("mean", "std"),
        source.path,
        "pretrained_cfg of config.json",
    )


def config(
    tensors: Mapping[str, Tensor], architecture: Architecture, statistics: ImageStatistics | None
) -> dict[str, Any]:
    """config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Every size is spelled out in `model_args`, so the named architecture only chooses the class. The
    CLS token is the pooled output, as in DINOv3 (timm's own default averages patches).
    """
    a = architecture.arguments
    if architecture.family == "convnext":
        name = "convnext_tiny"
        pool = "avg"
        model_args: dict[str, Any] = {"depths": list(a["depths"]), "dims": list(a["widths"])}
        width = a["widths"][-1]
        names = {"first_conv": "stem.0", "classifier": "head.fc"}
    else:
        name = f"vit_small_patch16_dinov3{'_qkvb' if a['qkv_bias'] else ''}"
        pool = "token"
        width = a["width"]
        names = {"first_conv": "patch_embed.proj", "classifier": "head"}
        model_args = {
            "embed_dim": a["width"],
            "depth": a["depth"],
            "num_heads": a["heads"],
            "patch_size": a["patch_size"],
            "mlp_ratio": hidden_width(tensors) / a["width"],
            "swiglu_mlp": a["ffn"] != "mlp",
            "swiglu_align_to": 0 if a["ffn"] == "mlp" else 8,
            "num_reg_tokens": a["registers"],
            "rope_temperature": a["rope_base"],
            "rope_rotate_half": True,
            "global_pool": pool,
        }
    pretrained = {
        "num_classes": 0,
        "input_size": [a["in_channels"], 256, 256],
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        **names,
    }
    if statistics is not None:
        pretrained |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": {**model_args, "in_chans": a["in_channels"]},
        "pretrained_cfg": pretrained,
    }
