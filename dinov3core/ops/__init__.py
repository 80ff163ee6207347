"""Public operations, usable in any model: `from dinov3core.ops import rope_attention, gram_loss, ...` needs torch alone."""

from dinov3core.ops.rope import rope_table
from dinov3core.ops.rope_attention import rope_attention, rope_attention_packed

__all__ = ["rope_attention", "rope_attention_packed", "rope_table"]
