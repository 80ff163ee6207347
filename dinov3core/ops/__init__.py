"""Public operations for any model: `from dinov3core.ops import ...` needs torch alone."""

from dinov3core.ops.cross_entropy import soft_cross_entropy
from dinov3core.ops.gram import gram_loss
from dinov3core.ops.koleo import koleo_loss
from dinov3core.ops.linear_cross_entropy import linear_soft_cross_entropy
from dinov3core.ops.rope import rope_table
from dinov3core.ops.rope_attention import rope_attention, rope_attention_packed
from dinov3core.ops.sinkhorn import Assignment, sinkhorn

__all__ = [
    "Assignment",
    "gram_loss",
    "koleo_loss",
    "linear_soft_cross_entropy",
    "rope_attention",
    "rope_attention_packed",
    "rope_table",
    "sinkhorn",
    "soft_cross_entropy",
]
