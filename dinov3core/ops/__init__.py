"""Public operations, usable in any model: `from dinov3core.ops import rope_attention, gram_loss, ...` needs torch alone."""
