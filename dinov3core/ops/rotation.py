"""The rotation of packed q and k in torch, and its transpose.

Shapes: B images, N tokens each, H heads, d head width, h = d / 2.
"""

import torch
from torch import Tensor

from dinov3core.ops.packing import PackedGroup
from dinov3core.ops.table_cache import while_unchanged

Phase = Tensor | None  # cos + i sin [N, 1, 1, h], or (cos, sin) [2, N, 1, 1, h]; None: no rotation


def phase(group: PackedGroup, prefix: int) -> Phase:
    """The first h columns of a group's tables, and identity rows for the prefix tokens.

    float32 and float64 tables become complex numbers cos + i sin; narrower ones stay (cos, sin),
    stacked.
    """
    if group.sin is None or group.cos is None:
        return None
    return while_unchanged(_phase, (group.sin, group.cos), prefix)


def _phase(sin: Tensor, cos: Tensor, prefix: int) -> Tensor:
    half = sin.shape[1] // 2
    if cos.dtype in (torch.float32, torch.float64):
        turn = torch.complex(cos[:, :half], sin[:, :half])
        return (torch.cat([turn.new_ones(prefix, half), turn]) if prefix else turn)[:, None, None]
    cos = torch.cat([cos.new_ones(prefix, half), cos[:, :half]])
    sin = torch.cat([sin.new_zeros(prefix, half), sin[:, :half]])
    return torch.stack([cos, sin])[:, :, None, None]


def rotate(qk: Tensor, turn: Phase, interleaved: bool) -> Tensor:
    """Rotated q and k of [B, N, 2, H, d].

    The channel pairs may come out in another order, the same for q and k.

    In float32 and float64 a rotation is one multiplication of complex numbers: 0.46 ms, against
    0.77 ms by products of half tensors and 1.33 ms in the usual cat form (32 x 54 tokens, 6 heads
    of 64, 2 Xeon cores, torch 2.13). Narrower tables go step by step, because there every step
    rounds.
    """
    if turn is None:
        return qk
    a, b = _channel_pairs(qk.to(turn.dtype.to_real()), interleaved)
    if turn.is_complex():
        turned = torch.view_as_real(torch.complex(a, b).mul_(turn)).flatten(-2)
    else:
        cos, sin = turn
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.to(qk.dtype)


def rotate_back(dturned: Tensor, turn: Phase, interleaved: bool, out: Tensor) -> None:
    """Write the gradient of the q or k that `rotate` took into `out`, in the channel order of qkv.

    Args:
        dturned: [B, N, H, d], in the channel order of what `rotate` gave; used up.
    """
    if turn is None:
        out.copy_(dturned)
        return
    a, b = _channel_pairs(out, interleaved)
    if turn.is_complex():
        pairs = dturned.to(turn.dtype.to_real()).contiguous().view(*dturned.shape[:-1], -1, 2)
        # conj_physical: conj() is lazy, and a tracer may drop it
        turned = torch.view_as_complex(pairs).mul_(turn[:, 0].conj_physical())
        a.copy_(turned.real)
        b.copy_(turned.imag)
    else:
        cos, sin = turn[:, :, 0]
        da, db = dturned.to(turn.dtype).chunk(2, -1)
        a.copy_(da * cos + db * sin)
        b.copy_(db * cos - da * sin)


def _channel_pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    a, b = x.chunk(2, -1)
    return a, b
