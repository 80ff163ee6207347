"""Backbones and heads."""

from dinov3core.image_statistics import IMAGENET, NAMED_STATISTICS, SATELLITE, ImageStatistics
from dinov3core.models.convnext import ConvNeXt, ConvNeXtSettings
from dinov3core.models.given import AsBackbone, ModuleSettings
from dinov3core.models.head import HeadSettings, ProjectionHead
from dinov3core.models.outputs import Features, Tokens
from dinov3core.models.presets import build, list_models
from dinov3core.models.rope import RopeSettings
from dinov3core.models.vit import VisionTransformer, VitSettings

__all__ = [
    "IMAGENET",
    "NAMED_STATISTICS",
    "SATELLITE",
    "AsBackbone",
    "ConvNeXt",
    "ConvNeXtSettings",
    "Features",
    "HeadSettings",
    "ImageStatistics",
    "ModuleSettings",
    "ProjectionHead",
    "RopeSettings",
    "Tokens",
    "VisionTransformer",
    "VitSettings",
    "build",
    "list_models",
]
