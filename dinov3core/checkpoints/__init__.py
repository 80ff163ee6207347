"""Weights of the DINOv3 family in every layout they come in."""

from dinov3core import extras

if absent := extras.missing("safetensors"):
    raise extras.not_installed(absent)

from dinov3core.checkpoints.load import (
    Described,
    Loaded,
    LoadReport,
    describe,
    load_model,
    load_weights,
)
from dinov3core.checkpoints.patch_embed import adapt_patch_embed
from dinov3core.checkpoints.save import FORMATS, save_weights

__all__ = [
    "FORMATS",
    "Described",
    "LoadReport",
    "Loaded",
    "adapt_patch_embed",
    "describe",
    "load_model",
    "load_weights",
    "save_weights",
]
