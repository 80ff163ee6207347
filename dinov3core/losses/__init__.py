"""The terms of the objective.

A term knows features and targets; weights, schedules and processes are train/'s.
"""

from dinov3core.losses.dino import dino_loss, pair_count, pair_rows
from dinov3core.losses.gram import gram_anchor_loss, resize_patches
from dinov3core.losses.ibot import ibot_dense_loss, ibot_loss, mask_weights
from dinov3core.losses.koleo import koleo_per_crop

__all__ = [
    "dino_loss",
    "gram_anchor_loss",
    "ibot_dense_loss",
    "ibot_loss",
    "koleo_per_crop",
    "mask_weights",
    "pair_count",
    "pair_rows",
    "resize_patches",
]
