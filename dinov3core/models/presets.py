"""The named sizes of the DINOv3 family and `build`, the only place where a name turns into numbers."""

from difflib import get_close_matches
from typing import Any

from dinov3core.models.vit import VisionTransformer

_RELEASED: dict[str, Any] = dict(registers=4, norm="layernormbf16", mask_k_bias=True, layer_scale=1e-5)

# width, depth, heads, ffn, ffn_ratio as released (Simeoni et al. 2025, table 2; so400m, huge2 and giant2 for training)
_VITS: dict[str, dict[str, Any]] = {
    "vits16": dict(width=384, depth=12, heads=6),
    "vits16plus": dict(width=384, depth=12, heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vitb16": dict(width=768, depth=12, heads=12),
    "vitl16": dict(width=1024, depth=24, heads=16),
    "vitl16_sat": dict(width=1024, depth=24, heads=16, untie_local_cls_norm=True),
    "vitl16plus": dict(width=1024, depth=24, heads=16, ffn="swiglu", ffn_ratio=6.0),
    "vith16plus": dict(width=1280, depth=32, heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit7b16": dict(
        width=4096, depth=40, heads=32, ffn="swiglu64", ffn_ratio=3.0, qkv_bias=False, untie_local_cls_norm=True
    ),
    "vitso400m16": dict(width=1152, depth=27, heads=18, ffn_ratio=3.777777778),
    "vithuge216": dict(width=1280, depth=32, heads=20),
    "vitgiant216": dict(width=1536, depth=40, heads=24),
    # Not released: for laptops and tests.
    "vit_nano8": dict(width=96, depth=4, heads=3, patch_size=8, registers=2),
}


def list_models() -> list[str]:
    """The names `build` knows, smallest first within a family."""
    return list(_VITS)


def build(name: str, **overrides: Any) -> VisionTransformer:
    """A freshly initialised backbone.

    Args:
        name: one of `list_models()`.
        overrides: arguments of `VisionTransformer` that replace the preset's, e.g. in_channels=4, drop_path=0.3.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in _VITS:
        near = get_close_matches(name, _VITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(list_models())}.")
    return VisionTransformer(**{**_RELEASED, **_VITS[name], **overrides})
