"""rope_attention inside Hugging Face transformers: DINOv3ViTModel and DINOv3ViTBackbone.

    from dinov3core.integrations import transformers as dinov3_transformers

    model = AutoModel.from_pretrained(...)
    dinov3_transformers.accelerate(model)      # same weights, same outputs, same state dict
    dinov3_transformers.restore(model)         # as it was

Checked with transformers 4.57 and 5.23.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention

from dinov3core.integrations.projection import project_qkv
from dinov3core.ops import rope_attention

NAME = "dinov3core"


class RopeAttention(DINOv3ViTAttention):
    """DINOv3ViTAttention on rope_attention: no rotated copies of q and k.

    The original runs where more is asked for: a mask, dropout, or the attention weights of the
    "eager" implementation.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        original = attention_mask is not None or (self.training and self.dropout)
        if original or position_embeddings is None or self.config._attn_implementation == "eager":
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        cos, sin = position_embeddings
        qkv = project_qkv(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.num_heads)
        out = rope_attention(
            qkv, sin, cos, prefix_tokens=qkv.shape[1] - len(sin), scale=self.scaling
        )
        return self.o_proj(out.flatten(2)), None


def accelerate(model: nn.Module) -> nn.Module:
    """Let every DINOv3 attention inside `model` run rope_attention; returns the same model.

    Parameters, buffers, hooks and the state dict stay what they are, so this works before or after
    training, `torch.compile` and saving.

    Raises:
        ValueError: when there is none, or when the model is set to return attention weights.
    """
    attentions = [module for module in model.modules() if isinstance(module, DINOv3ViTAttention)]
    if not attentions:
        raise ValueError(
            "accelerate: expected a model with DINOv3ViTAttention inside, got "
            f"{type(model).__name__}"
        )
    if attentions[0].config._attn_implementation == "eager":
        raise ValueError(
            'accelerate: expected attn_implementation "sdpa", got "eager", which returns attention '
            'weights; call model.set_attn_implementation("sdpa") first'
        )
    for attention in attentions:
        attention.__class__ = RopeAttention
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`; returns the same model."""
    for module in model.modules():
        if isinstance(module, RopeAttention):
            module.__class__ = DINOv3ViTAttention
    return model


def register() -> str:
    """Offer the op to every transformers model and return the name under which it is offered.

    `model.set_attn_implementation("dinov3core")` takes it. The rotation stays where the model does
    it, so for DINOv3 `accelerate` is the faster of the two.
    """
    AttentionInterface.register(NAME, attention)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q, k, v [B, H, N, d] -> [B, N, H, d], and no weights.

    Raises:
        ValueError: for masks, dropout, causal or grouped attention, which the op does not have.
    """
    causal = kwargs.get("is_causal", getattr(module, "is_causal", False))
    if attention_mask is not None or dropout or causal or query.shape != key.shape:
        raise ValueError(
            f"{NAME}: expected self-attention without mask, dropout, causality or grouped heads in "
            f'{type(module).__name__}; call model.set_attn_implementation("sdpa") for this model'
        )
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)
    return rope_attention(qkv, None, None, scale=scaling), None
