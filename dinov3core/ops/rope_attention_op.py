"""rope_attention as torch sees it: operators with schema, shapes, gradient and FLOPs.

`dinov3core::rope_attention` and its backward hold every form of the op. They save qkv, the output
and one log-sum-exp per row; the backward rotates again.

Shapes: T packed tokens of all groups, H heads, d head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops import rope_attention_cpu
from dinov3core.ops.packing import Packing
from dinov3core.ops.registration import first_order_only


@torch.library.custom_op("dinov3core::rope_attention", mutates_args=())
def rope_attention_op(
    qkv: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    scale: float,
    interleaved: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, d] -> out [T, H, d] and the log-sum-exp of the scores [H, T]."""
    packing = Packing.from_flat(sins, coss, counts, lengths, prefix, interleaved)
    if triton:
        from dinov3core.kernels import rope_attention as kernels

        return kernels.forward(qkv, packing, scale)
    return rope_attention_cpu.forward(qkv, packing, scale)


@rope_attention_op.register_fake
def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, width = qkv.shape
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(tokens, heads, width), qkv.new_empty(heads, tokens, dtype=statistics)


@torch.library.custom_op("dinov3core::rope_attention_backward", mutates_args=())
def rope_attention_backward_op(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    scale: float,
    interleaved: bool,
    triton: bool,
) -> Tensor:
    """d(qkv) [T, 3, H, d] from d(out) [T, H, d]."""
    packing = Packing.from_flat(sins, coss, counts, lengths, prefix, interleaved)
    if triton:
        from dinov3core.kernels import rope_attention_backward as kernels

        return kernels.backward(dout, qkv, out, lse, packing, scale)
    return rope_attention_cpu.backward(dout, qkv, out, lse, packing, scale)


@rope_attention_backward_op.register_fake
def _(dout: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, sins, coss, counts, lengths, prefix, scale, interleaved, triton = inputs
    out, lse = output
    packing = Packing.from_flat(sins, coss, counts, lengths, prefix, interleaved)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, *packing.tables)
    ctx.packing = packing
    ctx.scale = scale
    ctx.triton = triton


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    qkv, out, lse, *tables = ctx.saved_tensors
    flat = ctx.packing.with_tables(tables).flat()
    dqkv = rope_attention_backward_op(
        dout, qkv, out, lse, scale=ctx.scale, triton=ctx.triton, **flat
    )
    none = [None] * (len(tables) // 2)  # for sins, and for coss
    return dqkv, none, none, *(None,) * 6


rope_attention_op.register_autograd(_differentiate, setup_context=_save)
first_order_only(rope_attention_backward_op, "rope_attention")


@register_flop_formula(torch.ops.dinov3core.rope_attention)
def _forward_flops(
    qkv: torch.Size,
    sins: Sequence[torch.Size],
    coss: Sequence[torch.Size],
    counts: Sequence[int],
    lengths: Sequence[int],
    *others: Any,
    **options: Any,
) -> int:
    """Two products of N x N x d per image and head; the rotation is not counted."""
    _, _, heads, width = qkv
    pairs = sum(count * length**2 for count, length in zip(counts, lengths, strict=True))
    return 4 * pairs * heads * width


@register_flop_formula(torch.ops.dinov3core.rope_attention_backward)
def _backward_flops(
    dout: torch.Size,
    qkv: torch.Size,
    out: torch.Size,
    lse: torch.Size,
    sins: Sequence[torch.Size],
    coss: Sequence[torch.Size],
    counts: Sequence[int],
    lengths: Sequence[int],
    *others: Any,
    **options: Any,
) -> int:
    """Five products: the scores again, dV, dP, dQ, dK."""
    return _forward_flops(qkv, sins, coss, counts, lengths) * 5 // 2
