"""The rotation as an op of its own, and the attention kernels of others behind it: SDPA, xformers.

Used where these win: long sequences, wide heads, devices without Triton. `dinov3core::rope_split`
turns the packed projection [T, 3, H, d] into rotated q, rotated k and v [T, H, d] in one pass, and
its backward writes their gradients into one d(qkv): no stacking of three gradients, no rotated copy
beside the projection (which autograd may free).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops.dispatch import runs_kernels
from dinov3core.ops.packing import Packing
from dinov3core.ops.rotation import phase, rotate, rotate_back

Parts = tuple[Tensor, Tensor, Tensor]  # q, k, v or their gradients, each [T, H, d]


def sdpa_attention(qkv: Tensor, packing: Packing, scale: float) -> Tensor:
    """rope_split, then torch's scaled_dot_product_attention: [T, 3, H, d] -> [T, H, d]."""
    q_groups, k_groups, v_groups = (packing.views(x) for x in _split(qkv, packing))
    outs = []
    for q, k, v in zip(q_groups, k_groups, v_groups, strict=True):
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
        outs.append(attended.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def xformers_attention(qkv: Tensor, packing: Packing, scale: float) -> Tensor:
    """rope_split, then xformers' memory_efficient_attention: [T, 3, H, d] -> [T, H, d].

    One call for all groups, under a block-diagonal mask.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ValueError(
            f"rope_attention: expected xformers for backend='xformers', got {error}; install it or "
            "use 'auto'"
        ) from None
    q, k, v = (x[None] for x in _split(qkv, packing))
    lengths = tuple(group.length for group in packing.groups for _ in range(group.images))
    mask = _block_diagonal(lengths)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]
    return out


@functools.lru_cache(maxsize=64)
def _block_diagonal(lengths: tuple[int, ...]) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths)


def _split(qkv: Tensor, packing: Packing) -> Parts:
    if packing.tables:
        return rope_split_op(qkv, **packing.flat())
    q, k, v = qkv.unbind(1)
    return q, k, v


@torch.library.custom_op("dinov3core::rope_split", mutates_args=())
def rope_split_op(
    qkv: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, rotated k, and v: three tensors [T, H, d] of qkv [T, 3, H, d]."""
    packing = Packing.from_flat(sins, coss, counts, lengths, prefix, interleaved)
    if runs_kernels("rope_split", qkv, table=packing.table_dtype):
        from dinov3core.kernels import rope as kernels

        return kernels.split(qkv, packing)
    q, k, v = _empty_parts(qkv)
    v.copy_(qkv[:, 2])
    views = (packing.views(x) for x in (qkv, q, k))
    for group, packed, q_out, k_out in zip(packing.groups, *views, strict=True):
        turned = rotate(packed[:, :, :2], phase(group, packing.prefix), packing.interleaved)
        q_out.copy_(turned[:, :, 0])
        k_out.copy_(turned[:, :, 1])
    return q, k, v


@rope_split_op.register_fake
def _(qkv: Tensor, *others: Any) -> Parts:
    return _empty_parts(qkv)


def _empty_parts(qkv: Tensor) -> Parts:
    q, k, v = (torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format) for _ in "qkv")
    return q, k, v


@torch.library.custom_op("dinov3core::rope_merge", mutates_args=())
def rope_merge_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    interleaved: bool,
) -> Tensor:
    """The transpose of rope_split: three gradients [T, H, d] to d(qkv) [T, 3, H, d]."""
    packing = Packing.from_flat(sins, coss, counts, lengths, prefix, interleaved)
    if runs_kernels("rope_split", dq, table=packing.table_dtype):
        from dinov3core.kernels import rope as kernels

        return kernels.merge(dq, dk, dv, packing)
    dqkv = _empty_packed(dq)
    dqkv[:, 2] = dv
    views = (packing.views(x) for x in (dqkv, dq, dk))
    for group, packed, q_part, k_part in zip(packing.groups, *views, strict=True):
        turn = phase(group, packing.prefix)
        # clones: the gradients belong to autograd, and rotate_back uses up what it is given
        rotate_back(q_part.clone(), turn, packing.interleaved, packed[:, :, 0])
        rotate_back(k_part.clone(), turn, packing.interleaved, packed[:, :, 1])
    return dqkv


@rope_merge_op.register_fake
def _(dq: Tensor, *others: Any) -> Tensor:
    return _empty_packed(dq)


def _empty_packed(part: Tensor) -> Tensor:
    tokens, heads, width = part.shape
    return part.new_empty(tokens, 3, heads, width)


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    _, *flat = inputs
    _save(ctx, Packing.from_flat(*flat))


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, *flat = inputs
    _save(ctx, Packing.from_flat(*flat))


def _save(ctx: Any, packing: Packing) -> None:
    ctx.save_for_backward(*packing.tables)
    ctx.packing = packing


def _backward_of_split(ctx: Any, *dparts: Tensor) -> tuple[Any, ...]:
    packing = ctx.packing.with_tables(ctx.saved_tensors)
    none = [None] * len(packing.groups)
    return rope_merge_op(*dparts, **packing.flat()), none, none, None, None, None, None


def _backward_of_merge(ctx: Any, ddqkv: Tensor) -> tuple[Any, ...]:
    packing = ctx.packing.with_tables(ctx.saved_tensors)
    none = [None] * len(packing.groups)
    return *rope_split_op(ddqkv, **packing.flat()), none, none, None, None, None, None


rope_split_op.register_autograd(_backward_of_split, setup_context=_save_split)
rope_merge_op.register_autograd(_backward_of_merge, setup_context=_save_merge)
