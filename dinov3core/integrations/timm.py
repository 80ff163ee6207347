"""rope_attention inside timm: the EVA class, shared by DINOv3, EVA-02 and Perception Encoder.

    from dinov3core.integrations import timm as dinov3_timm

    model = timm.create_model("vit_small_patch16_dinov3", ...)
    dinov3_timm.accelerate(model)      # same weights, same outputs, same state dict
    dinov3_timm.restore(model)         # as it was

Checked with timm 1.0.31.
"""

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from dinov3core.integrations.projection import project_qkv
from dinov3core.ops import rope_attention


class _Packed:
    """forward() for an attention class of timm.

    The original runs where more is asked for: a mask, causality, dropout, norms on q and k, grouped
    heads, tables that differ between heads or images.
    """

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or not self._fits(rope):
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        qkv = self._project(x)
        if rope is None:
            sin = cos = None
        else:
            sin, cos = (_first_half(table, self.rotate_half) for table in rope.chunk(2, -1))
        out = rope_attention(
            qkv,
            sin,
            cos,
            prefix_tokens=0 if rope is None else self.num_prefix_tokens,
            scale=self.scale,
            rotation="half" if self.rotate_half else "interleaved",
        )
        out = self.norm(out.flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _fits(self, rope: Tensor | None) -> bool:
        if not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)):
            return False
        if (self.training and self.attn_drop.p) or getattr(self, "num_kv_groups", 1) > 1:
            return False
        return rope is None or (rope.ndim == 2 and rope.shape[1] == 2 * self.head_dim)

    def _project(self, x: Tensor) -> Tensor:
        if self.qkv is None:
            return project_qkv(x, (self.q_proj, self.k_proj, self.v_proj), self.num_heads)
        if getattr(self, "q_bias", None) is None:
            qkv = self.qkv(x)
        else:
            qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        return qkv.unflatten(-1, (3, self.num_heads, -1))


def _first_half(table: Tensor, rotate_half: bool) -> Tensor:
    """A table with angle k in column k; for neighbours timm has it in columns 2 k and 2 k + 1."""
    return table if rotate_half else torch.cat([table[:, ::2]] * 2, -1)


class RopeEvaAttention(_Packed, EvaAttention):
    """timm's EvaAttention on rope_attention."""


class RopeAttentionRope(_Packed, AttentionRope):
    """timm's AttentionRope on rope_attention."""


_REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    EvaAttention: RopeEvaAttention,
    AttentionRope: RopeAttentionRope,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Let every rotary attention inside a timm model run rope_attention; returns the same model.

    Raises:
        ValueError: when there is none.
    """
    attentions = [module for module in model.modules() if isinstance(module, tuple(_REPLACED))]
    if not attentions:
        raise ValueError(
            "accelerate: expected a model with timm's rotary attention inside, got "
            f"{type(model).__name__}"
        )
    for attention in attentions:
        attention.__class__ = _REPLACED.get(type(attention), type(attention))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`; returns the same model."""
    originals = {ours: theirs for theirs, ours in _REPLACED.items()}
    for module in model.modules():
        module.__class__ = originals.get(type(module), type(module))
    return model
