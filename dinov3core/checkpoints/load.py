"""Load weights of any known layout: all is checked before the model is touched."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dinov3core.checkpoints.architecture import described, facts_of_model
from dinov3core.checkpoints.errors import WeightsError, reading
from dinov3core.checkpoints.keys import summary
from dinov3core.checkpoints.patch_embed import (
    RAW,
    PatchEmbedding,
    adapt_patch_embed,
    shares_equally,
)
from dinov3core.checkpoints.weights import Weights, fill, read_weights
from dinov3core.models import ConvNeXt, ConvNeXtSettings, ImageStatistics, VitSettings
from dinov3core.models.presets import Backbone

SHOWN_SHAPES = 3
BUILD_ANOTHER = "build the model these weights belong to, as load_model does"
OVERRIDDEN = "leave out the arguments that change sizes"
CONTRADICTORY = "the file is incomplete or not of one model: download or write it again"
_CHECKED_FACTS = (
    "heads",
    "norm",
    "rope_base",
    "rope_min_period",
    "rope_max_period",
    "rope_normalize",
)


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `str()` of it is for people."""

    path: str
    layout: str  # "official", "dinov3core", "huggingface" or "timm"
    loaded: int  # tensors taken from the file
    total: int  # tensors of the model
    filled: dict[str, list[str]]  # tensors the layout does not store: reason -> official names
    aside: list[str]  # tensors of the file that are not this backbone's
    adapted: str  # how the patch embedding was changed, "" if it was not
    statistics: ImageStatistics | None
    assumed: dict[str, Any] = field(default_factory=dict)
    """arguments that the file does not say, as in the released models"""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layout} layout, {self.loaded} of {self.total} tensors loaded"]
        lines += [
            f"  not in the file, {reason}: {summary(keys)}" for reason, keys in self.filled.items()
        ]
        if self.assumed:
            named = ", ".join(f"{name} {value}" for name, value in self.assumed.items())
            lines.append(f"  not in the file, taken from the released models: {named}")
        if self.aside:
            lines.append(f"  in the file, not used: {summary(self.aside)}")
        if self.adapted:
            lines.append(f"  patch embedding: {self.adapted}")
        if self.statistics is None:
            lines.append("  image statistics: not stated")
        else:
            mean, std = (", ".join(f"{v:.3f}" for v in values) for values in self.statistics)
            lines.append(f"  image statistics: mean {mean}; std {std}")
        return "\n".join(lines)


class Loaded(NamedTuple):
    """A model made from a file."""

    model: Backbone
    report: LoadReport


class InputChange(NamedTuple):
    """What a patch embedding is to be changed for, besides the channels and patches of a model."""

    rgb_channels: Sequence[int]
    statistics: ImageStatistics | None = None


class Described(NamedTuple):
    """What a file of weights says of the model they belong to."""

    settings: VitSettings | ConvNeXtSettings
    statistics: ImageStatistics | None
    """that pixels are to be normalised by; None where it does not say"""


def describe(path: str | os.PathLike) -> Described:
    """The model that a file or folder of any known layout holds the weights of.

    What tensors do not show is as in `load_model`.

    Raises:
        ValueError: as `load_model`.
    """
    weights = read_weights(path)
    with reading(path):
        settings = weights.architecture().settings()
    return Described(settings, weights.statistics)


def load_weights(
    model: Backbone,
    path: str | os.PathLike,
    *,
    adapt_input: bool = False,
    rgb_channels: Sequence[int] = (0, 1, 2),
    statistics: ImageStatistics | None = None,
    remedy: str = BUILD_ANOTHER,
) -> LoadReport:
    """Load a file or folder into `model` in place and say what was done.

    Official .pth files (flat, or a run's teacher checkpoint), Hugging Face and timm folders or
    files, and our own; the layout is recognised by its names. Stored bias masks and periods are
    taken as they are. `model.statistics` follows the file where it states them.

    Args:
        adapt_input: let the patch embedding change to the model's channels and patch size; see
            `adapt_patch_embed`.
        rgb_channels: which of the model's channels are red, green and blue, with `adapt_input`;
            empty: every channel gets an equal share.
        statistics: that images are normalised by from now on, with `adapt_input`. Where those of
            the file are others, the patch embedding is restated so that an image keeps its tokens.
        remedy: what to do about weights of another model, for the message.

    Raises:
        ValueError: unless every tensor of the model is in the file or named in the report as
            filled, every tensor of the file is used or named as left aside, all shapes agree and
            all values are finite. The model is unchanged then.
    """
    weights = read_weights(path)
    asked = InputChange(rgb_channels, statistics) if adapt_input else None
    report = _fit(weights, model, asked, remedy)
    _check_facts(weights, facts_of_model(model))
    model.load_state_dict(weights.tensors)
    if asked and asked.statistics:
        model.statistics = asked.statistics
    else:
        _set_statistics(model, weights)
    return report


def load_model(
    path: str | os.PathLike, *, rgb_channels: Sequence[int] = (0, 1, 2), **overrides: Any
) -> Loaded:
    """The model that a file or folder describes, with its weights, in eval mode.

    Its dtype is that of the file.
    Sizes are read off the tensors; what tensors do not show comes from our header or config.json,
    else it is what the released weights have (LayerNorm eps 1e-5, RoPE base 100, the heads of the
    named model of that width and depth), and the report says so.

    Args:
        overrides: arguments of the model class to change: drop_path=0.3, or in_channels=C and
            patch_size=p, which adapt the patch embedding; `rgb_channels` says where red, green and
            blue go. heads=H where the file does not say.

    Raises:
        ValueError: as `load_weights`, and when the number of heads is unknown.
    """
    weights = read_weights(path)
    if "heads" in overrides:
        _check_facts(weights, {"heads": overrides["heads"]})
        weights.facts.setdefault("heads", overrides["heads"])
    with reading(path):  # without the overrides, so that these are not to blame
        architecture = weights.architecture()
        model = architecture.build()
    assumed = weights.assumed(architecture)
    if overrides:
        model = architecture.build(**overrides)
    changes = {"in_channels", "patch_size"} & overrides.keys()
    asked = InputChange(rgb_channels) if changes else None
    report = _fit(weights, model, asked, OVERRIDDEN if overrides else CONTRADICTORY)
    model.load_state_dict(weights.tensors, assign=True)
    _set_statistics(model, weights)
    return Loaded(model.eval(), replace(report, assumed=assumed))


def _check_facts(weights: Weights, ours: Mapping[str, Any]) -> None:
    """Refuse what would load and compute something else: other norms, heads or rotation."""
    for name in _CHECKED_FACTS:
        if name in ours and weights.facts.get(name, ours[name]) != ours[name]:
            stored = weights.facts[name]
            raise WeightsError(
                weights.path,
                f"expected {name}={ours[name]!r} as in the model, got {stored!r}; "
                f"build the model with {name}={stored!r}",
            )


def _fit(
    weights: Weights,
    model: Backbone,
    asked: InputChange | None,
    remedy: str = BUILD_ANOTHER,
) -> LoadReport:
    """Bring `weights` to exactly the model's tensors, or refuse.

    Args:
        asked: adapt the patch embedding; None: leave it.
        remedy: what to do about weights of another model.
    """
    expected = model.state_dict()
    local_norm = [key for key in weights.tensors if key.startswith("local_cls_norm.")]
    for key in local_norm:  # acts in training only: not every model has one
        if key not in expected:
            weights.aside.append(key)
            del weights.tensors[key]
    stored = len(weights.tensors)
    adapted = "" if asked is None else _adapt_input(weights, model, asked)
    shared = [key for key in expected if key in weights.tensors]
    differing = [key for key in shared if weights.tensors[key].shape != expected[key].shape]
    if differing == [_input_key(model)] and remedy == BUILD_ANOTHER:
        remedy = "pass adapt_input=True to adapt it"
    if differing:
        raise WeightsError(weights.path, f"{_other_shapes(weights, model, differing)}; {remedy}")
    filled = fill(weights, model)
    if weights.tensors.keys() != expected.keys():
        raise WeightsError(weights.path, f"{_other_names(weights, model)}; {remedy}")
    statistics = weights.statistics or model.statistics
    return LoadReport(
        weights.path,
        weights.layout,
        stored,
        len(expected),
        filled,
        weights.aside,
        adapted,
        statistics,
    )


def _other_shapes(weights: Weights, model: Backbone, differing: Sequence[str]) -> str:
    """The two models in words, if words tell them apart, and the first shapes that differ."""
    expected = model.state_dict()
    shown = [
        f"{key} of shape {list(expected[key].shape)}, got {list(weights.tensors[key].shape)}"
        for key in differing[:SHOWN_SHAPES]
    ]
    more = len(differing) - len(shown)
    shapes = f"expected {'; '.join(shown)}" + (f"; and {more} more of other shapes" if more else "")
    sides = _both_sides(weights, model)
    return f"{sides} ({shapes})" if sides and differing != [_input_key(model)] else shapes


def _other_names(weights: Weights, model: Backbone) -> str:
    """The two models in words, if words tell them apart, and the names that differ."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights.tensors]
    unexpected = [key for key in weights.tensors if key not in expected]
    names = [f"missing {summary(missing)}"] * bool(missing)
    names += [f"unexpected {summary(unexpected)}"] * bool(unexpected)
    others = f" and {len(unexpected)} others" if unexpected else ""
    counts = (
        f"expected the {len(expected)} tensors of the model, got {len(expected) - len(missing)} "
        f"of them{others} from the {weights.layout} layout"
    )
    return f"{_both_sides(weights, model) or counts} ({'; '.join(names)})"


def _both_sides(weights: Weights, model: Backbone) -> str:
    """The model beside the one the weights belong to; "" where they read alike."""
    heads = None if isinstance(model, ConvNeXt) else model.heads
    ours = described(model.state_dict(), heads)
    theirs = described(weights.tensors, weights.facts.get("heads") or heads)
    if not theirs or ours == theirs:
        return ""
    return f"expected weights of {ours}, got those of {theirs}"


def _input_key(model: Backbone) -> str:
    return (
        "downsample_layers.0.0.weight" if isinstance(model, ConvNeXt) else "patch_embed.proj.weight"
    )


def _adapt_input(weights: Weights, model: Backbone, asked: InputChange) -> str:
    """Change the patch embedding of `weights` to the model's, and say how."""
    key = _input_key(model)
    bias_key = key.replace("weight", "bias")
    if key not in weights.tensors or bias_key not in weights.tensors:
        return ""
    before = weights.tensors[key]
    channels, side = model.state_dict()[key].shape[1:3]
    seen = weights.statistics or RAW
    now = (weights.statistics and asked.statistics) or seen
    if before.shape[1:3] == (channels, side) and seen == now:
        return ""

    embedding = PatchEmbedding(before, weights.tensors[bias_key])
    if now == seen:  # normalised pixels are what the channels share
        seen = RAW
        now = RAW
    # Else raw ones are, as every channel has statistics of its own.
    raw = embedding.restated(seen, RAW)
    weight = adapt_patch_embed(raw.weight, channels, side, asked.rgb_channels)
    after = raw._replace(weight=weight).restated(RAW, now)
    weights.tensors[key] = after.weight
    weights.tensors[bias_key] = after.bias

    changes = [
        f"{before.shape[1]} channels, {before.shape[2]} px -> {channels} channels, {side} px"
    ]
    if before.shape[1] != channels:
        changes.append(_spread_in_words(channels, asked.rgb_channels))
    if now != RAW:
        changes.append("restated for the image statistics of this run")
    return "; ".join(changes)


def _spread_in_words(channels: int, rgb_channels: Sequence[int]) -> str:
    if shares_equally(channels, rgb_channels):
        return "every channel has an equal share, so that grey images keep their response"
    places = ", ".join(map(str, rgb_channels))
    return f"red, green and blue are channels {places}, all others start at zero"


def _set_statistics(model: Backbone, weights: Weights) -> None:
    """The file's word wins: the weights saw images normalised that way."""
    stored = weights.statistics
    if stored is None or len(stored.mean) != model.in_channels:
        return
    if model.statistics not in (None, stored):
        warnings.warn(
            f"{weights.path}: the weights were trained with image mean {stored.mean} and std "
            f"{stored.std}, the model had {model.statistics.mean} and {model.statistics.std}; "
            "model.statistics now holds the former",
            stacklevel=3,
        )
    model.statistics = stored
