"""What every op means, in plain torch, for the reader and for the tests: the oracle, in any floating dtype.

Slow on purpose. Called with float64 inputs these functions are the reference of the numerics contract; called with the
dtype of a test case they are the plain formula whose error an op may exceed at most twofold.
"""

import torch
from torch import Tensor


def rope_rotate(x: Tensor, sin: Tensor | None, cos: Tensor | None, prefix: int = 0, rotation: str = "half") -> Tensor:
    """Rotate the tokens after `prefix` of x [B, N, H, d] by the first d / 2 columns of sin, cos [N - prefix, d].

    Angle k turns the channel pair (k, k + d / 2) ("half") or (2 k, 2 k + 1) ("interleaved"). x is cast to the dtype of
    the table, rotated there, and cast back; prefix tokens take the casts only (Su et al. 2021, equation 34).
    """
    if sin is None:
        return x
    half = x.shape[-1] // 2
    table_x = x.to(sin.dtype)
    pairs = table_x.unflatten(-1, (half, 2) if rotation == "interleaved" else (2, half))
    a, b = pairs.unbind(-1 if rotation == "interleaved" else -2)
    s, c = sin[:, None, :half], cos[:, None, :half]
    a_patch, b_patch = a[:, prefix:], b[:, prefix:]
    turned = torch.stack(
        [a_patch * c - b_patch * s, b_patch * c + a_patch * s], -1 if rotation == "interleaved" else -2
    )
    return torch.cat([table_x[:, :prefix], turned.flatten(-2)], 1).to(x.dtype)


def rope_attention(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
) -> Tensor:
    """softmax(rope(q) rope(k)^T * scale) v per image and head: qkv [B, N, 3, H, d] -> [B, N, H, d]."""
    q, k, v = qkv.unbind(2)
    q, k = (rope_rotate(x, sin, cos, prefix_tokens, rotation) for x in (q, k))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
