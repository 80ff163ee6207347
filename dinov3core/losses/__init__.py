"""The terms of the objective.

A term knows features and targets; weights, schedules and processes are train/'s.
"""

from dinov3core.losses.dino import CropPairs, dino_losses
from dinov3core.losses.features import (
    FeatureStatistics,
    feature_sums,
    finite_total,
    restored,
    standardised,
    statistics_of,
    unexplained_share,
)
from dinov3core.losses.gram import compared_rows, gram_anchor_loss, resize_patches
from dinov3core.losses.ibot import ibot_loss
from dinov3core.losses.koleo import koleo_per_crop

__all__ = [
    "CropPairs",
    "FeatureStatistics",
    "compared_rows",
    "dino_losses",
    "feature_sums",
    "finite_total",
    "gram_anchor_loss",
    "ibot_loss",
    "koleo_per_crop",
    "resize_patches",
    "restored",
    "standardised",
    "statistics_of",
    "unexplained_share",
]
