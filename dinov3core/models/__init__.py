"""Backbones and heads."""

from dinov3core.image_statistics import IMAGENET, NAMED_STATISTICS, SATELLITE, ImageStatistics
from dinov3core.models.convnext import ConvNeXt
from dinov3core.models.head import ProjectionHead
from dinov3core.models.outputs import Features, Tokens
from dinov3core.models.presets import build, list_models
from dinov3core.models.vit import VisionTransformer

__all__ = [
    "IMAGENET",
    "NAMED_STATISTICS",
    "SATELLITE",
    "ConvNeXt",
    "Features",
    "ImageStatistics",
    "ProjectionHead",
    "Tokens",
    "VisionTransformer",
    "build",
    "list_models",
]
