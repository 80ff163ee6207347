"""The rotation as an op of its own, and the attention kernels of others behind it: SDPA and
xformers.

Used where these win: long sequences, wide heads, devices without Triton. `dinov3core::rope_split`
turns the packed projection [T, 3, H, d] into rotated q, rotated k and v [T, H, d] in one pass, and
its backward writes their gradients into one d(qkv): no stacking of three gradients, no rotated copy
beside the projection (which autograd may free).
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops import rope_attention_cpu as plain
from dinov3core.ops.backend import device_problem


def sdpa_attention(
    qkv: Tensor, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool
) -> Tensor:
    """rope_split, then torch's scaled_dot_product_attention per group: [T, 3, H, d] -> [T, H, d]."""
    parts, start, outs = _split(qkv, sins, coss, counts, lengths, prefix, interleaved), 0, []
    for count, length in zip(counts, lengths, strict=True):
        q, k, v = (
            x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for x in parts
        )
        outs.append(
            F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
        )
        start += count * length
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def xformers_attention(
    qkv: Tensor, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool
) -> Tensor:
    """rope_split, then xformers' memory_efficient_attention over all groups at once, under a
    block-diagonal mask.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ValueError(
            f"rope_attention: expected xformers for backend='xformers', got {error}; install it or "
            "use 'auto'"
        ) from None
    q, k, v = (x[None] for x in _split(qkv, sins, coss, counts, lengths, prefix, interleaved))
    mask = _block_diagonal(tuple(counts), tuple(lengths))
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]


@functools.lru_cache(maxsize=64)
def _block_diagonal(counts: tuple[int, ...], lengths: tuple[int, ...]):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(
        [n for count, n in zip(counts, lengths, strict=True) for _ in range(count)]
    )


def _split(
    qkv: Tensor, sins, coss, counts, lengths, prefix: int, interleaved: bool
) -> Sequence[Tensor]:
    if not sins:
        return qkv.unbind(1)
    return rope_split_op(qkv, sins, coss, counts, lengths, prefix, interleaved)


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
    if qkv.is_cuda and _triton_can(qkv, sins):
        from dinov3core.kernels import rope

        return rope.split(qkv, sins, coss, counts, lengths, prefix, interleaved)
    q, k, v = (torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format) for _ in range(3))
    v.copy_(qkv[:, 2])
    views = [[part for part, _, _ in plain.groups(x, sins, coss, counts, lengths)] for x in (q, k)]
    for (part, sin, cos), to_q, to_k in zip(
        plain.groups(qkv, sins, coss, counts, lengths), *views, strict=True
    ):
        turned = plain.rotate(part[:, :, :2], plain.phase(sin, cos, prefix), interleaved)
        to_q.copy_(turned[:, :, 0])
        to_k.copy_(turned[:, :, 1])
    return q, k, v


@rope_split_op.register_fake
def _(qkv, sins, coss, counts, lengths, prefix, interleaved):
    return tuple(
        torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format) for _ in range(3)
    )


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
    if dq.is_cuda and _triton_can(dq, sins):
        from dinov3core.kernels import rope

        return rope.merge(dq, dk, dv, sins, coss, counts, lengths, prefix, interleaved)
    dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
    dqkv[:, 2] = dv
    views = [
        [part for part, _, _ in plain.groups(x, sins, coss, counts, lengths)] for x in (dq, dk)
    ]
    for (part, sin, cos), from_q, from_k in zip(
        plain.groups(dqkv, sins, coss, counts, lengths), *views, strict=True
    ):
        turn = plain.phase(sin, cos, prefix)
        plain.rotate_back(from_q.clone(), turn, interleaved, part[:, :, 0])
        plain.rotate_back(from_k.clone(), turn, interleaved, part[:, :, 1])
    return dqkv


@rope_merge_op.register_fake
def _(dq, dk, dv, sins, coss, counts, lengths, prefix, interleaved):
    return dq.new_empty(dq.shape[0], 3, *dq.shape[1:])


def _save(ctx, inputs, output):
    *_, sins, coss, counts, lengths, prefix, interleaved = inputs
    ctx.rest = counts, lengths, prefix, interleaved
    ctx.save_for_backward(*sins, *coss)


def _tables(ctx) -> tuple[list[Tensor], list[Tensor], list[None]]:
    count = len(ctx.saved_tensors) // 2
    return list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:]), [None] * count


def _backward(ctx, *grads):
    sins, coss, none = _tables(ctx)
    return rope_merge_op(*grads, sins, coss, *ctx.rest), none, none, None, None, None, None


def _backward_merge(ctx, grad):
    sins, coss, none = _tables(ctx)
    return *rope_split_op(grad, sins, coss, *ctx.rest), none, none, None, None, None, None


rope_split_op.register_autograd(_backward, setup_context=_save)
rope_merge_op.register_autograd(_backward_merge, setup_context=_save)


def _triton_can(x: Tensor, sins: Sequence[Tensor]) -> bool:
    if device_problem(x.device) is not None:
        return False
    from dinov3core.kernels import rope

    return rope.problem(x.dtype, x.shape[-1], sins[0].dtype) is None
