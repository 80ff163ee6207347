"""rope_attention on CPUs: the rotation in front of torch's flash kernel, forward and backward.

Shapes: B images, N tokens each, T packed tokens of all groups, H heads, d head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.ops.packing import Packing
from dinov3core.ops.rotation import Phase, phase, rotate, rotate_back


class Saved(NamedTuple):
    """What the backward of one group needs of its forward."""

    q: Tensor  # rotated [B, H, N, d]
    k: Tensor
    lse: Tensor  # [B, H, N], the log-sum-exp of the scores


def attend(qkv: Tensor, packing: Packing, scale: float) -> tuple[Tensor, list[Saved]]:
    """out [T, H, d] of qkv [T, 3, H, d], and what every group may save for its backward."""
    outs = []
    saved = []
    for group, part in zip(packing.groups, packing.views(qkv), strict=True):
        q, k, v = _heads_first(part, phase(group, packing.prefix), packing.interleaved)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        saved.append(Saved(q, k, lse))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)), saved


def forward(qkv: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse [H, T] of qkv [T, 3, H, d]."""
    out, saved = attend(qkv, packing, scale)
    return out, packed_lse(saved)


def packed_lse(saved: Sequence[Saved]) -> Tensor:
    """[H, T], as the op gives it."""
    return torch.cat([group.lse.transpose(0, 1).flatten(1) for group in saved], 1)


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packing: Packing, scale: float
) -> Tensor:
    """d(qkv) [T, 3, H, d] from what the op saves: q and k are rotated a second time."""
    saved = []
    for group, part, rows in zip(
        packing.groups, packing.views(qkv), packing.views(lse.t()), strict=True
    ):
        q, k, _ = _heads_first(part, phase(group, packing.prefix), packing.interleaved)
        saved.append(Saved(q, k, rows.transpose(1, 2)))
    return backward_from(saved, dout, qkv, out, packing, scale)


def backward_from(
    saved: Sequence[Saved], dout: Tensor, qkv: Tensor, out: Tensor, packing: Packing, scale: float
) -> Tensor:
    """d(qkv) [T, 3, H, d] from what `attend` saved."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = (packing.views(x) for x in (qkv, dqkv, dout.contiguous(), out))
    for group, (q, k, lse), x, dx, do, o in zip(packing.groups, saved, *parts, strict=True):
        v = _unit_stride(x[:, :, 2]).transpose(1, 2)
        dq, dk, dv = _flash_backward(do.transpose(1, 2), q, k, v, o.transpose(1, 2), lse, scale)
        turn = phase(group, packing.prefix)
        rotate_back(dq.transpose(1, 2), turn, packing.interleaved, dx[:, :, 0])
        rotate_back(dk.transpose(1, 2), turn, packing.interleaved, dx[:, :, 1])
        dx[:, :, 2] = dv.transpose(1, 2)
    return dqkv


def _heads_first(part: Tensor, turn: Phase, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k, and v, as [B, H, N, d] of qkv [B, N, 3, H, d].

    Their last stride is 1, which is all that the flash kernel asks for.
    """
    q, k = rotate(part[:, :, :2], turn, interleaved).unbind(2)
    q, k, v = (_unit_stride(x).transpose(1, 2) for x in (q, k, part[:, :, 2]))
    return q, k, v


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# The narrow backward of torch's CPU flash attention loses to its float32 one on upcast inputs while
# N * d is small: 17.9 against 2.2 ms at N = 41, d = 64; 9.1 / 6.9 at 261, 64; 17.8 / 8.5 at 261,
# 32; then 9.0 / 9.1 at 401, 64 and 5.5 / 5.9 at 201, 128 (bfloat16, about 1500 tokens of width 384,
# 2 cores, torch 2.13).
_UPCAST_BACKWARD_UP_TO = 21_000


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors: tuple[Tensor, ...] = (dout, q, k, v, out)
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    if narrow and q.shape[2] * q.shape[3] <= _UPCAST_BACKWARD_UP_TO:
        tensors = tuple(x.float() for x in tensors)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, False, scale=scale
    )
    return dq, dk, dv
