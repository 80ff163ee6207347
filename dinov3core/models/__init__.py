"""Backbones and heads."""

from dinov3core.models.head import ProjectionHead
from dinov3core.models.presets import build, list_models
from dinov3core.models.vit import Features, Tokens, VisionTransformer

__all__ = ["Features", "ProjectionHead", "Tokens", "VisionTransformer", "build", "list_models"]
