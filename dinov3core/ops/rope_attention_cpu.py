"""rope_attention in torch: the rotation of packed q and k, and the CPU forward and backward on torch's flash kernel.

Shapes: B images, N tokens each, T packed tokens, H heads, d head width, h = d / 2.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Phase = tuple[Tensor, Tensor] | None  # (cos, sin) [N, 1, 1, h]; None: no rotation


def groups(
    packed: Tensor, sins: Sequence[Tensor], coss: Sequence[Tensor], counts: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Views [images, length, ...] of packed tokens [T, ...], each with its tables."""
    start = 0
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        part = packed[start : start + count * length].unflatten(0, (count, length))
        yield part, *((sins[index], coss[index]) if sins else (None, None))
        start += count * length


def phase(sin: Tensor | None, cos: Tensor | None, prefix: int) -> Phase:
    """The first h columns of the tables, with identity rows for the prefix tokens so that no token is special."""
    if sin is None:
        return None
    half = sin.shape[1] // 2
    cos = torch.cat([cos.new_ones(prefix, half), cos[:, :half]])
    sin = torch.cat([sin.new_zeros(prefix, half), sin[:, :half]])
    return cos[:, None, None], sin[:, None, None]


def rotate(qk: Tensor, turn: Phase, interleaved: bool) -> Tensor:
    """Rotated q and k of [B, N, 2, H, d]. The channel pairs may come out in another order, the same for q and k.

    In float32 and float64 a rotation is one multiplication of complex numbers: 0.46 ms, against 0.77 ms by products of
    half tensors and 1.33 ms in the usual cat form (32 x 54 tokens, 6 heads of 64, 2 Xeon cores, torch 2.13).
    Narrower tables go step by step, because there every step rounds.
    """
    if turn is None:
        return qk
    cos, sin = turn
    a, b = (x.to(cos.dtype) for x in _channel_pairs(qk, interleaved))
    if cos.dtype in (torch.float32, torch.float64):
        turned = torch.view_as_real(torch.complex(a, b).mul_(torch.complex(cos, sin))).flatten(-2)
    else:
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.to(qk.dtype)


def rotate_back(grad: Tensor, turn: Phase, interleaved: bool, into: Tensor) -> None:
    """Gradient of `rotate` for q or k: grad [B, N, H, d] in its channel order; `into` is in the original one."""
    if turn is None:
        into.copy_(grad)
        return
    cos, sin = (x[:, 0] for x in turn)
    grad = grad.to(cos.dtype)
    a, b = _channel_pairs(into, interleaved)
    if cos.dtype in (torch.float32, torch.float64):
        turned = torch.view_as_complex(grad.contiguous().unflatten(-1, (-1, 2))) * torch.complex(cos, -sin)
        a.copy_(turned.real)
        b.copy_(turned.imag)
    else:
        da, db = grad.chunk(2, -1)
        a.copy_(da * cos + db * sin)
        b.copy_(db * cos - da * sin)


def _channel_pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def forward(qkv: Tensor, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool):
    """(out [T, H, d], lse [H, T]) of qkv [T, 3, H, d]."""
    outs, lses = [], []
    for part, sin, cos in groups(qkv, sins, coss, counts, lengths):
        q, k, v = _heads_first(part, phase(sin, cos, prefix), interleaved)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    return (outs[0], lses[0].contiguous()) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses, 1))


def backward(grad, qkv, out, lse, sins, coss, counts, lengths, prefix: int, scale: float, interleaved: bool) -> Tensor:
    """d(qkv) [T, 3, H, d]. q and k are rotated a second time: nothing but qkv, out and lse was kept."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad, start = grad.contiguous(), 0
    dparts = [part for part, _, _ in groups(dqkv, sins, coss, counts, lengths)]
    for (part, sin, cos), dpart in zip(groups(qkv, sins, coss, counts, lengths), dparts, strict=True):
        images, length = part.shape[:2]
        rows = slice(start, start + images * length)
        start = rows.stop
        turn = phase(sin, cos, prefix)
        q, k, v = _heads_first(part, turn, interleaved)
        dout, o = (x[rows].unflatten(0, (images, length)).transpose(1, 2) for x in (grad, out))
        lse_BHN = lse[:, rows].unflatten(1, (images, length)).transpose(0, 1)
        dq, dk, dv = _flash_backward(dout, q, k, v, o, lse_BHN, scale)
        rotate_back(dq.transpose(1, 2), turn, interleaved, dpart[:, :, 0])
        rotate_back(dk.transpose(1, 2), turn, interleaved, dpart[:, :, 1])
        dpart[:, :, 2] = dv.transpose(1, 2)
    return dqkv


def _heads_first(part: Tensor, turn: Phase, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (rotated) and v as [B, H, N, d] with unit stride along d, which is all the flash kernel asks for."""
    q, k = rotate(part[:, :, :2], turn, interleaved).unbind(2)
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, part[:, :, 2]))


# The narrow backward of torch's CPU flash attention loses to its float32 one on upcast inputs while N * d is small:
# 17.9 against 2.2 ms at N = 41, d = 64; 9.1 / 6.9 at 261, 64; 17.8 / 8.5 at 261, 32; then 9.0 / 9.1 at 401, 64 and
# 5.5 / 5.9 at 201, 128 (bfloat16, about 1500 tokens of width 384, 2 cores, torch 2.13).
_UPCAST_BACKWARD_UP_TO = 21_000


def _flash_backward(dout, q, k, v, out, lse, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (dout, q, k, v, out)
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    if narrow and q.shape[2] * q.shape[3] <= _UPCAST_BACKWARD_UP_TO:
        tensors = tuple(x.float() for x in tensors)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, False, scale=scale)
