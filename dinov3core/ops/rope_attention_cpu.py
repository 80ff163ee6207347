"""rope_attention in torch: the rotation of packed q and k, and the CPU forward and backward on
torch's flash kernel.

Shapes: B images, N tokens each, T packed tokens, H heads, d head width, h = d / 2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Phase = Tensor | None  # cos + i sin [N, 1, 1, h], or (cos, sin) [2, N, 1, 1, h]; None: no rotation


def groups(
    packed: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Views [images, length, ...] of packed tokens [T, ...], each with its tables."""
    start, rest = 0, packed.shape[1:]
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        part = packed if len(counts) == 1 else packed[start : start + count * length]
        # view: unflatten costs 4 us more, 3 % of a small call
        yield (
            part.view(count, length, *rest),
            *((sins[index], coss[index]) if sins else (None, None)),
        )
        start += count * length


def phase(sin: Tensor | None, cos: Tensor | None, prefix: int) -> Phase:
    """The first h columns of the tables, with identity rows for the prefix tokens so that no token
    is special.

    float32 and float64 tables become complex numbers cos + i sin; narrower ones stay (cos, sin),
    stacked. The result is kept on `cos` while neither table changes: all blocks of a model read the
    same ones, and at 41 tokens building it took 40 of 200 us.
    """
    if sin is None:
        return None
    if sin.is_inference() or cos.is_inference():  # these cannot tell whether they have changed
        return _phase(sin, cos, prefix)
    state = (sin, sin._version, sin.data_ptr(), cos._version, cos.data_ptr(), prefix)
    kept = getattr(cos, "_dinov3core_phase", None)
    if kept is None or kept[0][0] is not sin or kept[0][1:] != state[1:]:
        kept = cos._dinov3core_phase = (state, _phase(sin, cos, prefix))
    return kept[1]


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


def rotate_back(grad: Tensor, turn: Phase, interleaved: bool, into: Tensor) -> None:
    """Gradient of `rotate` for q or k: grad [B, N, H, d], in its channel order, is used up; `into`
    is in qkv's.
    """
    if turn is None:
        into.copy_(grad)
        return
    a, b = _channel_pairs(into, interleaved)
    if turn.is_complex():
        pairs = grad.to(turn.dtype.to_real()).contiguous().unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(pairs).mul_(
            turn[:, 0].conj_physical()
        )  # conj() is lazy: a tracer may drop it
        a.copy_(turned.real)
        b.copy_(turned.imag)
    else:
        cos, sin = turn[:, :, 0]
        da, db = grad.to(turn.dtype).chunk(2, -1)
        a.copy_(da * cos + db * sin)
        b.copy_(db * cos - da * sin)


def _channel_pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


class Kept(NamedTuple):
    """What the forward of one group may keep for its backward."""

    q: Tensor  # rotated [B, H, N, d]
    k: Tensor
    lse: Tensor  # [B, H, N]


def attend(qkv: Tensor, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool):
    """(out [T, H, d], Kept of every group) of qkv [T, 3, H, d]."""
    outs, kept = [], []
    for part, sin, cos in groups(qkv, sins, coss, counts, lengths):
        q, k, v = _heads_first(part, phase(sin, cos, prefix), interleaved)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        kept.append(Kept(q, k, lse))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)), kept


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """(out [T, H, d], lse [H, T]) of qkv [T, 3, H, d]; arguments of `attend`."""
    out, kept = attend(*arguments)
    return out, packed_lse(kept)


def packed_lse(kept: Sequence[Kept]) -> Tensor:
    """[H, T], as the op gives it."""
    return torch.cat([one.lse.transpose(0, 1).flatten(1) for one in kept], 1)


def backward(
    grad, qkv, out, lse, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool
) -> Tensor:
    """d(qkv) [T, 3, H, d] from what the op keeps: q and k are rotated a second time."""
    kept, start = [], 0
    for part, sin, cos in groups(qkv, sins, coss, counts, lengths):
        images, length = part.shape[:2]
        q, k, _ = _heads_first(part, phase(sin, cos, prefix), interleaved)
        rows = lse[:, start : start + images * length]
        kept.append(Kept(q, k, rows.unflatten(1, (images, length)).transpose(0, 1)))
        start += images * length
    return backward_from(
        kept, grad, qkv, out, sins, coss, counts, lengths, prefix, scale, interleaved
    )


def backward_from(
    kept: Sequence[Kept],
    grad,
    qkv,
    out,
    sins,
    coss,
    counts,
    lengths,
    prefix: int,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """d(qkv) [T, 3, H, d] from what `attend` kept."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    each = [groups(x, sins, coss, counts, lengths) for x in (qkv, dqkv, grad.contiguous(), out)]
    for (q, k, lse), (part, sin, cos), (dpart, *_), (dout, *_), (o, *_) in zip(
        kept, *each, strict=True
    ):
        v, o, dout = (x.transpose(1, 2) for x in (_unit_stride(part[:, :, 2]), o, dout))
        dq, dk, dv = _flash_backward(dout, q, k, v, o, lse, scale)
        turn = phase(sin, cos, prefix)
        rotate_back(dq.transpose(1, 2), turn, interleaved, dpart[:, :, 0])
        rotate_back(dk.transpose(1, 2), turn, interleaved, dpart[:, :, 1])
        dpart[:, :, 2] = dv.transpose(1, 2)
    return dqkv


def _heads_first(part: Tensor, turn: Phase, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (rotated) and v as [B, H, N, d] with unit stride along d, which is all the flash kernel
    asks for.
    """
    q, k = rotate(part[:, :, :2], turn, interleaved).unbind(2)
    return tuple(_unit_stride(x).transpose(1, 2) for x in (q, k, part[:, :, 2]))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# The narrow backward of torch's CPU flash attention loses to its float32 one on upcast inputs while
# N * d is small: 17.9 against 2.2 ms at N = 41, d = 64; 9.1 / 6.9 at 261, 64; 17.8 / 8.5 at 261,
# 32; then 9.0 / 9.1 at 401, 64 and 5.5 / 5.9 at 201, 128 (bfloat16, about 1500 tokens of width 384,
# 2 cores, torch 2.13).
_UPCAST_BACKWARD_UP_TO = 21_000


def _flash_backward(dout, q, k, v, out, lse, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (dout, q, k, v, out)
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    if narrow and q.shape[2] * q.shape[3] <= _UPCAST_BACKWARD_UP_TO:
        tensors = tuple(x.float() for x in tensors)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, False, scale=scale
    )
