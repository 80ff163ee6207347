"""The named sizes of the DINOv3 family, and `build`, which turns a name into a network."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch

from dinov3core.bounds import fields_of
from dinov3core.image_statistics import IMAGENET, SATELLITE, ImageStatistics
from dinov3core.models.convnext import ConvNeXt, ConvNeXtSettings
from dinov3core.models.rope import TABLE_DTYPES, RopeSettings
from dinov3core.models.vit import VisionTransformer, VitSettings

Backbone = VisionTransformer | ConvNeXt
BackboneSettings = VitSettings | ConvNeXtSettings
ROPE = "rope_"  # begins the flat names of fields of `RopeSettings`

_LARGE = VitSettings(width=1024, depth=24, heads=16)
_7B = VitSettings(
    width=4096,
    depth=40,
    heads=32,
    ffn="swiglu64",
    ffn_ratio=3.0,
    qkv_bias=False,
    untie_local_cls_norm=True,
)

# width, depth, heads, ffn, ffn_ratio as released (Simeoni et al. 2025, table 2; so400m, huge2 and
# giant2 for training); the rest of what was released are the defaults of `VitSettings`.
_VITS = {
    "vits16": VitSettings(width=384, depth=12, heads=6),
    "vits16plus": VitSettings(width=384, depth=12, heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vitb16": VitSettings(width=768, depth=12, heads=12),
    "vitl16": _LARGE,
    "vitl16_sat": replace(_LARGE, untie_local_cls_norm=True),
    "vitl16plus": replace(_LARGE, ffn="swiglu", ffn_ratio=6.0),
    "vith16plus": VitSettings(width=1280, depth=32, heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit7b16": _7B,
    "vit7b16_sat": _7B,
    "vitso400m16": VitSettings(width=1152, depth=27, heads=18, ffn_ratio=3.777777778),
    "vithuge216": VitSettings(width=1280, depth=32, heads=20),
    "vitgiant216": VitSettings(width=1536, depth=40, heads=24),
    # Not released: for laptops and tests.
    "vit_nano8": VitSettings(width=96, depth=4, heads=3, patch_size=8, registers=2),
}

# DINOv3 paper, section 5.2; sizes of Liu et al. 2022
_CONVNEXTS = {
    "convnext_tiny": ConvNeXtSettings(),
    "convnext_small": ConvNeXtSettings((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ConvNeXtSettings((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ConvNeXtSettings((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def list_models() -> list[str]:
    """The names `build` knows, smallest first within a family."""
    return [*_VITS, *_CONVNEXTS]


def heads_of_size(width: int, depth: int) -> int | None:
    """The heads of the named ViTs of that width and depth; None where no name has them."""
    heads = {size.heads for size in _VITS.values() if (size.width, size.depth) == (width, depth)}
    return heads.pop() if len(heads) == 1 else None


def build(name: str, **overrides: Any) -> Backbone:
    """A freshly initialised backbone.

    Its `statistics` are those of the released weights of that name, and None for other channel
    counts than three.

    Args:
        name: one of `list_models()`.
        overrides: fields of `VitSettings` or `ConvNeXtSettings` that replace those of the name,
            such as in_channels=4 or registers=0; those of `RopeSettings` are called rope_base,
            rope_dtype and so on. See `overridden`.

    Raises:
        ValueError: for an unknown name or override, with the nearest one.
    """
    settings = settings_of(name)
    model = backbone_of(overridden(settings, overrides))
    model.statistics = statistics_of(name, model.in_channels)
    return model


def settings_of(name: str) -> BackboneSettings:
    """The settings of a named model, for a recipe: `backbone=settings_of("vits16")`.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    settings = _VITS.get(name) or _CONVNEXTS.get(name)
    if settings is None:
        raise ValueError(f"unknown model {name!r}{_nearest(name, list_models())}")
    return settings


def backbone_of(settings: BackboneSettings) -> Backbone:
    """A freshly initialised backbone of these settings.

    Raises:
        ValueError: settings of which no network can be made.
    """
    if isinstance(settings, ConvNeXtSettings):
        return ConvNeXt(settings)
    return VisionTransformer(settings)


def overridden(settings: BackboneSettings, overrides: Mapping[str, Any]) -> BackboneSettings:
    """Settings with some fields replaced by their flat names, where `rope.base` is `rope_base`.

    None stands for the 0 that switches something off, and `rope_dtype` may be a torch.dtype.

    Raises:
        ValueError: for a name that no field has, with the nearest one.
    """
    kinds = {field.name: field.kind for field in fields_of(type(settings)) if field.name != "rope"}
    if isinstance(settings, VitSettings):
        kinds |= {ROPE + field.name: field.kind for field in fields_of(RopeSettings)}
    for name in overrides:
        if name not in kinds:
            family = "ViT" if isinstance(settings, VitSettings) else "ConvNeXt"
            raise ValueError(f"unknown setting {name!r} of a {family}{_nearest(name, list(kinds))}")

    values = {name: _stated(value, kinds[name]) for name, value in overrides.items()}
    if isinstance(settings, ConvNeXtSettings):
        return replace(settings, **values)
    own = {name: value for name, value in values.items() if not name.startswith(ROPE)}
    rope = {name.removeprefix(ROPE): values[name] for name in values.keys() - own.keys()}
    return replace(settings, **own, rope=replace(settings.rope, **rope))


def _stated(value: Any, kind: Any) -> Any:
    """A value as settings state it: a number for None, a word for a torch.dtype."""
    if value is None and kind is float:
        return 0.0
    if isinstance(value, torch.dtype):
        return next((word for word, dtype in TABLE_DTYPES.items() if dtype == value), str(value))
    return value


def statistics_of(name: str, in_channels: int) -> ImageStatistics | None:
    """The image statistics that the released weights of that name saw (DINOv3 model card)."""
    if in_channels != 3:
        return None
    return SATELLITE if name.endswith("_sat") else IMAGENET


def _nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name."""
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(known)}."
