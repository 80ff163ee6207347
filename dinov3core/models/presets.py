"""The named sizes of the DINOv3 family and `build`, the only place where a name turns into numbers."""

from difflib import get_close_matches
from typing import Any

from dinov3core.image_statistics import IMAGENET, SATELLITE, ImageStatistics
from dinov3core.models.convnext import ConvNeXt
from dinov3core.models.vit import VisionTransformer

Backbone = VisionTransformer | ConvNeXt

_RELEASED: dict[str, Any] = dict(
    registers=4, norm="layernormbf16", mask_k_bias=True, layer_scale=1e-5
)
_LARGE: dict[str, Any] = dict(width=1024, depth=24, heads=16)
_7B: dict[str, Any] = dict(
    width=4096,
    depth=40,
    heads=32,
    ffn="swiglu64",
    ffn_ratio=3.0,
    qkv_bias=False,
    untie_local_cls_norm=True,
)

# width, depth, heads, ffn, ffn_ratio as released (Simeoni et al. 2025, table 2; so400m, huge2 and
# giant2 for training)
_VITS: dict[str, dict[str, Any]] = {
    "vits16": dict(width=384, depth=12, heads=6),
    "vits16plus": dict(width=384, depth=12, heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vitb16": dict(width=768, depth=12, heads=12),
    "vitl16": _LARGE,
    "vitl16_sat": dict(**_LARGE, untie_local_cls_norm=True),
    "vitl16plus": dict(**_LARGE, ffn="swiglu", ffn_ratio=6.0),
    "vith16plus": dict(width=1280, depth=32, heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit7b16": _7B,
    "vit7b16_sat": _7B,
    "vitso400m16": dict(width=1152, depth=27, heads=18, ffn_ratio=3.777777778),
    "vithuge216": dict(width=1280, depth=32, heads=20),
    "vitgiant216": dict(width=1536, depth=40, heads=24),
    # Not released: for laptops and tests.
    "vit_nano8": dict(width=96, depth=4, heads=3, patch_size=8, registers=2),
}

# DINOv3 paper, section 5.2; sizes of Liu et al. 2022
_CONVNEXTS: dict[str, dict[str, Any]] = {
    "convnext_tiny": dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
    "convnext_small": dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
    "convnext_base": dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
    "convnext_large": dict(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
}


def list_models() -> list[str]:
    """The names `build` knows, smallest first within a family."""
    return [*_VITS, *_CONVNEXTS]


def heads_of_size(width: int, depth: int) -> int | None:
    """The number of heads of the named ViTs with that width and depth, None when no name has them."""
    found = {
        size["heads"] for size in _VITS.values() if (size["width"], size["depth"]) == (width, depth)
    }
    return found.pop() if len(found) == 1 else None


def build(name: str, **overrides: Any) -> Backbone:
    """A freshly initialised backbone.

    Its `statistics` are those of the released weights of that name, and None for other channel
    counts than three.

    Args:
        name: one of `list_models()`.
        overrides: arguments of `VisionTransformer` or `ConvNeXt` that replace the preset's, e.g.
            in_channels=4.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in _VITS and name not in _CONVNEXTS:
        near = get_close_matches(name, list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(list_models())}.")
    if name in _CONVNEXTS:
        model: Backbone = ConvNeXt(**{**_CONVNEXTS[name], **overrides})
    else:
        model = VisionTransformer(**{**_RELEASED, **_VITS[name], **overrides})
    model.statistics = statistics_of(name, model.in_channels)
    return model


def statistics_of(name: str, in_channels: int) -> ImageStatistics | None:
    """The image statistics the released weights of that name were trained with (DINOv3 model card)."""
    if in_channels != 3:
        return None
    return SATELLITE if name.endswith("_sat") else IMAGENET
