"""A backbone's weights in official names, whatever layout they came in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dinov3core.checkpoints import files, huggingface, official, timm, values
from dinov3core.checkpoints.architecture import (
    RELEASED_FACTS,
    Architecture,
    architecture_of,
    has_key_bias,
    stated_architecture,
)
from dinov3core.checkpoints.errors import WeightsError, reading
from dinov3core.checkpoints.stated import PAIR, TABLE, TEXT, fields, image_statistics
from dinov3core.models import ImageStatistics
from dinov3core.models.presets import Backbone
from dinov3core.models.rope import RopeEmbedding

FOREIGN = {"huggingface": huggingface, "timm": timm}

OUR_HEADER = "the header"


@dataclass
class Weights:
    """What a file or folder holds, in official names."""

    path: str
    layout: str  # "official", "dinov3core", "huggingface" or "timm"
    tensors: dict[str, Tensor]
    aside: list[str]  # names outside the backbone: heads, the student, loss state
    facts: dict[str, Any]
    """what the file states about the model beyond its tensors; see architecture_of"""
    statistics: ImageStatistics | None
    family: str = ""
    """vit or convnext where our header describes the model; `facts` is complete then"""
    sizes: dict[str, int] = field(default_factory=dict)
    """that config.json states and tensors show"""

    def architecture(self) -> Architecture:
        """Our header's word, or what tensors, config.json and the released models' facts say.

        Raises:
            WeightsError: tensors that determine no model, or a config.json of another one.
        """
        if self.family:
            return Architecture(self.family, self.facts)
        architecture = architecture_of(self.tensors, RELEASED_FACTS | self.facts, self.path)
        arguments = architecture.arguments
        for name, size in self.sizes.items():
            if arguments.get(name, size) != size:
                raise WeightsError(
                    self.path,
                    f"expected {name} {arguments[name]} in config.json as the tensors show, "
                    f"got {size}; take the config.json of these weights",
                )
        if self.layout in FOREIGN and arguments.get("qkv_bias"):
            arguments["mask_k_bias"] = not has_key_bias(self.tensors)
        return architecture

    def assumed(self, architecture: Architecture) -> dict[str, Any]:
        """What `architecture` has from the released weights alone and no tensor shows."""
        if self.family or architecture.family == "convnext":
            return {}
        arguments = architecture.arguments
        alike = {name: value for name, value in RELEASED_FACTS.items() if arguments[name] == value}
        if "rope_embed.periods" in self.tensors:
            del alike["rope_base"]
        else:
            alike["heads"] = arguments["heads"]
        return {name: value for name, value in alike.items() if name not in self.facts}


def read_weights(path: str | os.PathLike) -> Weights:
    """Read a file or folder and translate its names; names that no table knows stay as they are.

    Raises:
        WeightsError: unreadable, no DINOv3 backbone, another rotation of channels, values that are
            no floats of a size that weights have, or statements outside every model's range.
    """
    with reading(path):
        return _read_weights(path)


_HEADER_RULES = {"rotation": TEXT, "family": TEXT, "arguments": TABLE, "statistics": PAIR}


def _read_weights(path: str | os.PathLike) -> Weights:
    source = files.read(path)
    header = fields(source.header, _HEADER_RULES, path, OUR_HEADER)
    rotation = header.get("rotation", "half")
    if rotation != "half":
        raise WeightsError(
            path,
            f"expected rotation of channel halves, got {rotation!r}; "
            "loading it would give wrong features without any error",
        )
    if header.get("family") == files.OWN_FAMILY:
        raise WeightsError(
            path,
            f"expected a network of this project, got the state dict of one of your own "
            f"({header.get('arguments', {}).get('class')}); make that network as its run did, and "
            "fill it by load_state_dict(safetensors.torch.load_file(FILE))",
        )
    layout, tensors, aside = official.unwrap(source.tensors, path)
    values.check(path, tensors)
    values.check(path, source.extras)
    facts: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    statistics = by_name = None
    if layout in FOREIGN:
        reader = FOREIGN[layout]
        tensors = reader.to_official(tensors) | source.extras
        facts = reader.facts(source)
        sizes = reader.sizes(source)
        statistics = reader.statistics(source)
    else:
        layout = files.HEADER if source.header else layout
        by_name = official.statistics_of_name(source.path.name)
    values.check_periods(path, tensors)
    _refuse_second_norm(path, tensors)
    family = header.get("family", "")
    if "arguments" in header or family:
        facts = stated_architecture(family, header.get("arguments", {}), path, OUR_HEADER).arguments
    if "statistics" in header:
        mean, std = header["statistics"]
        stored = {"mean": mean, "std": std}
        statistics = image_statistics(stored, ("mean", "std"), path, OUR_HEADER)
    _refuse_statistics(path, tensors, statistics)
    return Weights(str(path), layout, tensors, aside, facts, statistics or by_name, family, sizes)


def fill(weights: Weights, model: Backbone) -> dict[str, list[str]]:
    """Add the tensors of `model` that the layout has no place for; returns reason -> names.

    Raises:
        ValueError: when a filled bias mask would hide a stored key bias.
    """
    filled: dict[str, list[str]] = {}
    bias_free = not any(key.endswith("attn.qkv.bias") for key in weights.tensors)
    for key, like in model.state_dict().items():
        if key not in weights.tensors:
            value = _value(key, weights, model, like, bias_free)
            if value is not None:
                reason, weights.tensors[key] = value
                filled.setdefault(reason, []).append(key)
    return filled


def _value(
    key: str, weights: Weights, model: Backbone, like: Tensor, bias_free: bool
) -> tuple[str, Tensor] | None:
    """Why a layout lacks `key`, and the value that gives the same outputs.

    None when the layout should have it.
    """
    tensors = weights.tensors
    if key.startswith("norms.3.") and key.removeprefix("norms.3.") in ("weight", "bias"):
        alias = "norm." + key.removeprefix("norms.3.")
        return ("second name of the final norm", tensors[alias]) if alias in tensors else None
    if weights.layout not in FOREIGN:
        return None
    if key == "rope_embed.periods":
        return "computed from the base in float32", _periods(model.rope_embed)
    if key.endswith("qkv.bias_mask"):
        bias = tensors.get(key.removesuffix("_mask"))
        if bias is not None and bias.chunk(3)[1].any():
            raise WeightsError(
                weights.path,
                "found a key bias, which the model would mask; build it with mask_k_bias=False",
            )
        ones = torch.ones(len(like) // 3)
        return "1 for q and v, 0 for k", torch.cat([ones, 0 * ones, ones])
    final = key.removeprefix("local_cls_")
    if key.startswith("local_cls_norm.") and final in tensors:
        return "copied from the final norm (acts in training only)", tensors[final].clone()
    no_bias = key.endswith("attn.qkv.bias") and bias_free
    if weights.layout == "timm" and (key == "mask_token" or no_bias):
        return "zero", torch.zeros(like.shape)
    return None


def _periods(rope: RopeEmbedding) -> Tensor:
    return RopeEmbedding(rope.head_dim, replace(rope.settings, dtype="fp32")).periods


def _refuse_second_norm(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a ConvNeXt whose final norm, stored under two names, has two values."""
    for name in ("weight", "bias"):
        first = tensors.get(f"norm.{name}")
        second = tensors.get(f"norms.3.{name}")
        if first is not None and second is not None and not torch.equal(first, second):
            raise WeightsError(
                path,
                f"expected norms.3.{name} to equal norm.{name}, got another; the file is damaged",
            )


def _refuse_statistics(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], statistics: ImageStatistics | None
) -> None:
    """One mean and one deviation for every channel of the patch embedding in the same place."""
    for key in ("patch_embed.proj.weight", "downsample_layers.0.0.weight"):
        shape = tensors[key].shape if key in tensors else ()
        if statistics and len(shape) == 4 and shape[1] != len(statistics.mean):
            raise WeightsError(
                path,
                f"expected image statistics of {shape[1]} channels as {key} has, "
                f"got {len(statistics.mean)}; correct or delete what states them",
            )
