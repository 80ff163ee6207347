"""The layout of transformers' DINOv3 models: separate q, k and v, no key bias, a config.json.

Two generations of names are read: bare `layer.*` (hub files) and `model.layer.*` (modules of
transformers 5); the bare ones, which every version loads, are written. The layout has no place for
periods, bias masks and the local CLS norm.
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
    has_key_bias,
    hidden_width,
)
from dinov3core.checkpoints.errors import WeightsError
from dinov3core.checkpoints.files import Source
from dinov3core.checkpoints.keys import KeyTable
from dinov3core.checkpoints.stated import TEXT, fields, image_statistics, number, one_of, whole
from dinov3core.models import ImageStatistics

_VIT_ROWS = [
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    ("norm.*", "norm.*"),
    ("blocks.#.norm1.*", "layer.#.norm1.*"),
    ("blocks.#.norm2.*", "layer.#.norm2.*"),
    ("blocks.#.attn.proj.*", "layer.#.attention.o_proj.*"),
    ("blocks.#.ls1.gamma", "layer.#.layer_scale1.lambda1"),
    ("blocks.#.ls2.gamma", "layer.#.layer_scale2.lambda1"),
]
_MLP_ROWS = [
    ("blocks.#.mlp.fc1.*", "layer.#.mlp.up_proj.*"),
    ("blocks.#.mlp.fc2.*", "layer.#.mlp.down_proj.*"),
]
_SWIGLU_ROWS = [
    ("blocks.#.mlp.w1.*", "layer.#.mlp.gate_proj.*"),
    ("blocks.#.mlp.w2.*", "layer.#.mlp.up_proj.*"),
    ("blocks.#.mlp.w3.*", "layer.#.mlp.down_proj.*"),
]
MLP = KeyTable(_VIT_ROWS + _MLP_ROWS)
SWIGLU = KeyTable(_VIT_ROWS + _SWIGLU_ROWS)
CONVNEXT = KeyTable(
    [
        ("downsample_layers.#.#.*", "stages.#.downsample_layers.#.*"),
        ("stages.#.#.gamma", "stages.#.layers.#.gamma"),
        ("stages.#.#.dwconv.*", "stages.#.layers.#.depthwise_conv.*"),
        ("stages.#.#.norm.*", "stages.#.layers.#.layer_norm.*"),
        ("stages.#.#.pwconv1.*", "stages.#.layers.#.pointwise_conv1.*"),
        ("stages.#.#.pwconv2.*", "stages.#.layers.#.pointwise_conv2.*"),
        ("norm.*", "layer_norm.*"),
    ]
)


def to_official(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes; names this layout does not know stay as they are."""
    stored = {
        key.removeprefix("model.") if _gained_prefix(key) else key: value
        for key, value in stored.items()
    }
    if "stages.0.downsample_layers.0.weight" in stored:
        return CONVNEXT.to_official(stored)
    table = SWIGLU if "layer.0.mlp.gate_proj.weight" in stored else MLP
    tensors = table.to_official(stored)
    if "storage_tokens" in tensors and not tensors["storage_tokens"].numel():
        del tensors["storage_tokens"]  # this layout stores them even when there are none
    if "embeddings.mask_token" in tensors:
        tensors["mask_token"] = tensors.pop("embeddings.mask_token").reshape(1, -1)
    for block in range(count(stored, "layer")):
        _merge_qkv(tensors, block)
    return tensors


def _gained_prefix(key: str) -> bool:
    return key.startswith(("model.layer.", "model.stages."))


def _merge_qkv(tensors: dict[str, Tensor], block: int) -> None:
    """q, k and v to one projection; a missing bias is zero where another of the three has one."""
    names = [f"layer.{block}.attention.{kind}_proj" for kind in "qkv"]
    if not all(f"{name}.weight" in tensors for name in names):
        return
    weights = [tensors.pop(f"{name}.weight") for name in names]
    tensors[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
    biases = [tensors.pop(f"{name}.bias", None) for name in names]
    if any(bias is not None for bias in biases):
        pairs = zip(biases, weights, strict=True)
        parts = [w.new_zeros(len(w)) if bias is None else bias for bias, w in pairs]
        tensors[f"blocks.{block}.attn.qkv.bias"] = torch.cat(parts)


def from_official(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """This layout's tensors; biases are multiplied by their mask, which has no place here."""
    if architecture.family == "convnext":
        return CONVNEXT.from_official(tensors)
    table = MLP if architecture.arguments["ffn"] == "mlp" else SWIGLU
    translated = table.from_official(tensors)
    translated["embeddings.mask_token"] = tensors["mask_token"][None]
    if "storage_tokens" not in tensors:
        translated["embeddings.register_tokens"] = tensors["cls_token"][:, :0]
    for block in range(architecture.arguments["depth"]):
        name = f"blocks.{block}.attn.qkv"
        for kind, part in zip("qkv", tensors[name + ".weight"].chunk(3), strict=True):
            translated[f"layer.{block}.attention.{kind}_proj.weight"] = part
        if name + ".bias" in tensors:
            for kind, part in zip("qkv", effective_bias(tensors, name).chunk(3), strict=True):
                if kind != "k" or has_key_bias(tensors):
                    translated[f"layer.{block}.attention.{kind}_proj.bias"] = part
    return translated


_RULES = {
    "model_type": TEXT,
    "num_attention_heads": HEADS,
    "rope_theta": number(1e-6, 1e12),
    "layer_norm_eps": one_of(1e-6, 1e-5),
}
_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "num_register_tokens": "registers",
}


def facts(source: Source) -> dict[str, Any]:
    """What config.json states about the model beyond its tensors.

    Raises:
        WeightsError: the configuration of another kind of model, or values that no model has.
    """
    config = fields(source.config, _RULES, source.path, "config.json")
    kind = config.get("model_type", "")
    if kind and kind not in ("dinov3_vit", "dinov3_convnext"):
        raise WeightsError(
            source.path,
            f"expected model_type dinov3_vit or dinov3_convnext in config.json, got {kind!r}",
        )
    stated: dict[str, Any] = {}
    if "num_attention_heads" in config:
        stated["heads"] = config["num_attention_heads"]
    if "rope_theta" in config:
        stated |= {"rope_base": float(config["rope_theta"]), "rope_normalize": "separate"}
    if kind == "dinov3_vit" and "layer_norm_eps" in config:
        stated["norm"] = "layernorm" if config["layer_norm_eps"] == 1e-6 else "layernormbf16"
    return stated


def sizes(source: Source) -> dict[str, int]:
    """Sizes of a ViT that config.json states and the tensors show: by argument."""
    rules = dict.fromkeys(_SIZES, whole(0, 2**31))
    stated = fields(source.config, rules, source.path, "config.json")
    return {_SIZES[name]: value for name, value in stated.items()}


def statistics(source: Source) -> ImageStatistics | None:
    """The normalisation of preprocessor_config.json."""
    names = ("image_mean", "image_std")
    return image_statistics(source.preprocessor, names, source.path, "preprocessor_config.json")


def config(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Any]:
    """config.json for transformers."""
    a = architecture.arguments
    if architecture.family == "convnext":
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "num_channels": a["in_channels"],
            "hidden_sizes": list(a["widths"]),
            "depths": list(a["depths"]),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        }
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "intermediate_size": hidden_width(tensors),
        "use_gated_mlp": a["ffn"] != "mlp",
        "hidden_act": "gelu" if a["ffn"] == "mlp" else "silu",
        "patch_size": a["patch_size"],
        "num_channels": a["in_channels"],
        "num_register_tokens": a["registers"],
        "query_bias": a["qkv_bias"],
        "key_bias": has_key_bias(tensors),
        "value_bias": a["qkv_bias"],
        "proj_bias": a["proj_bias"],
        "mlp_bias": a["ffn_bias"],
        "layer_norm_eps": 1e-6 if a["norm"] == "layernorm" else 1e-5,
        "rope_theta": a["rope_base"],
        "layerscale_value": a["layer_scale"],
    }


def preprocessor(statistics: ImageStatistics) -> dict[str, Any]:
    """preprocessor_config.json for transformers: floats are resized, then normalised."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_normalize": True,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
    }
