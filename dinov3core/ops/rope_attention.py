"""rope_attention: rotary position embedding and softmax attention straight from the qkv projection.

Shapes: B images, N = prefix + P tokens, T packed tokens of several crop sets, H heads, d head
width, h = d / 2. q, k, v are read from the projection's own [T, 3, H, d] layout and d(qkv) is
written in it: no transposes, no concatenation with the prefix tokens.

Every form is attention over packed groups of equally long sequences (packing.py) and means what
reference.rope_attention says. Here are the public functions, their checks, and the choice of path:

    rope_attention_op.py       the operator, where something has to see it as one
    rope_attention_eager.py    the same around torch's dispatcher
    rope_split.py              the rotation alone, in front of the attention of others

float16 is accepted: whatever could overflow it (scores, softmax statistics, accumulators) is
float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3core.ops.dispatch import (
    check_backend,
    is_plain_eager,
    longest_sequence,
    runs_kernels,
)
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.ops.rope_attention_eager import CpuAttention, TritonAttention
from dinov3core.ops.rope_attention_op import rope_attention_op
from dinov3core.ops.rope_split import sdpa_attention, xformers_attention

BACKENDS = ("auto", "triton", "torch", "xformers")
ROTATIONS = ("half", "interleaved")


def rope_attention(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Attention with rotary positions over equally long sequences.

    Args:
        qkv: [B, N, 3, H, d], as a linear layer of width 3 * H * d gives it.
        sin, cos: [P, d] tables of `rope_table` for the last P = N - prefix_tokens tokens, or both
            None for no rotation. Their first d / 2 columns are read. They get no gradient. q and k
            are rotated in the dtype of the tables, so bfloat16 tables round like bfloat16
            arithmetic.
        prefix_tokens: leading tokens (CLS, registers) that are not rotated.
        scale: factor of the scores, 1 / sqrt(d) by default.
        rotation: which two channels angle k turns, counted from 0: "half": k and k + d / 2;
            "interleaved": 2 k and 2 k + 1.
        backend: "auto" takes the fastest for these shapes; "torch", "triton" or "xformers".

    Returns:
        [B, N, H, d].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"rope_attention: expected qkv [B, N, 3, H, d], got shape {tuple(qkv.shape)}"
        )
    images, length = qkv.shape[:2]
    if (sin is None) != (cos is None):
        raise ValueError(
            "rope_attention: expected sin and cos, or None for both, got only one of them"
        )
    if sin is not None and sin.shape[0] + prefix_tokens != length:
        raise ValueError(
            f"rope_attention: expected N = prefix_tokens + rows of sin, got N={length}, "
            f"prefix_tokens={prefix_tokens} and {sin.shape[0]} rows"
        )
    groups = (PackedGroup(images, length, sin, cos),)
    packing = Packing(groups, prefix_tokens, _is_interleaved(rotation))
    _check(qkv, packing, scale, backend)
    out = _attend(qkv.flatten(0, 1), packing, scale, backend)
    return out.view(images, length, *out.shape[1:])


def rope_attention_packed(
    qkv: Tensor,
    groups: Sequence[tuple[int, Tensor, Tensor]],
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Attention with rotary positions over crop sets of different lengths, in one call.

    Args:
        qkv: [T, 3, H, d], the tokens of all crop sets.
        groups: (count, sin, cos) per crop set: `count` images of prefix_tokens + len(sin) tokens
            each, laid one after the other along T. Tokens see their own image only.

    The other arguments and the errors are those of `rope_attention`.

    Returns:
        [T, H, d].
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"rope_attention_packed: expected qkv [T, 3, H, d], got shape {tuple(qkv.shape)}"
        )
    if not groups or any(sin is None or cos is None for _, sin, cos in groups):
        raise ValueError(
            "rope_attention_packed: expected one or more groups (count, sin, cos) with tables, got "
            "none"
        )
    packed_groups = tuple(
        PackedGroup(count, prefix_tokens + sin.shape[0], sin, cos) for count, sin, cos in groups
    )
    packing = Packing(packed_groups, prefix_tokens, _is_interleaved(rotation))
    _check_length(qkv, packing)
    _check(qkv, packing, scale, backend)
    return _attend(qkv, packing, scale, backend)


def packed_attention(
    qkv: Tensor, packing: Packing, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`rope_attention_packed` for a model, which has a `Packing` for all of its blocks.

    Groups without tables are not rotated; then none may have tables.
    """
    _check_length(qkv, packing)
    _check(qkv, packing, scale, backend)
    return _attend(qkv, packing, scale, backend)


def _check_length(qkv: Tensor, packing: Packing) -> None:
    tokens = sum(group.images * group.length for group in packing.groups)
    if tokens != qkv.shape[0]:
        counts = [group.images for group in packing.groups]
        lengths = [group.length for group in packing.groups]
        raise ValueError(
            f"rope_attention_packed: expected the groups to hold T={qkv.shape[0]} tokens, got "
            f"{tokens} (counts {counts}, lengths {lengths})"
        )


def _is_interleaved(rotation: str) -> bool:
    if rotation not in ROTATIONS:
        raise ValueError(
            f"rope_attention: expected rotation to be one of {ROTATIONS}, got {rotation!r}"
        )
    return rotation == "interleaved"


def _check(qkv: Tensor, packing: Packing, scale: float | None, backend: str) -> None:
    check_backend("rope_attention", backend, BACKENDS)
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"rope_attention: expected a floating dtype, got {qkv.dtype}")
    if packing.prefix < 0:
        raise ValueError(f"rope_attention: expected prefix_tokens >= 0, got {packing.prefix}")
    if scale is not None and scale <= 0:
        raise ValueError(f"rope_attention: expected scale > 0, got {scale}")
    width = qkv.shape[-1]
    if packing.tables and width % 2:
        raise ValueError(
            f"rope_attention: expected an even head width to rotate pairs of channels, got {width}"
        )
    for group in packing.groups:
        if group.sin is not None and group.cos is not None:
            _check_tables(group.sin, group.cos, qkv)


def _check_tables(sin: Tensor, cos: Tensor, qkv: Tensor) -> None:
    width = qkv.shape[-1]
    if sin.dim() != 2 or sin.shape != cos.shape or sin.shape[1] != width:
        raise ValueError(
            f"rope_attention: expected sin and cos [P, {width}], got {tuple(sin.shape)} and "
            f"{tuple(cos.shape)}"
        )
    if sin.dtype != cos.dtype or sin.device != qkv.device or cos.device != qkv.device:
        raise ValueError(
            f"rope_attention: expected sin and cos of one dtype on {qkv.device}, got "
            f"{sin.dtype} on {sin.device} and {cos.dtype} on {cos.device}"
        )
    if sin.requires_grad or cos.requires_grad:
        raise ValueError(
            "rope_attention: expected constant tables, got ones that require grad; detach them"
        )


def _attend(qkv: Tensor, packing: Packing, scale: float | None, backend: str) -> Tensor:
    """Cast for autocast, then choose the path: [T, 3, H, d] -> [T, H, d]."""
    device = qkv.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        # the tables stay as they are: a float32 island
        qkv = qkv.to(torch.get_autocast_dtype(device))
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if backend == "xformers":
        return xformers_attention(qkv, packing, scale)

    triton = runs_kernels("rope_attention", qkv, backend=backend, table=packing.table_dtype)
    if triton and backend == "auto":
        longest = longest_sequence(qkv)
        worth = [group.length <= longest for group in packing.groups]
        if any(worth) and not all(worth):  # long and short crops: each take their own path
            alone = zip(packing.split(qkv), packing.alone(), strict=True)
            return torch.cat([_attend(part, one, scale, backend) for part, one in alone])
        triton = all(worth)

    if not triton and device not in ("cpu", "meta"):
        return sdpa_attention(qkv, packing, scale)
    if not is_plain_eager(qkv):
        return rope_attention_op(qkv, scale=scale, triton=triton, **packing.flat())[0]
    attention = TritonAttention if triton else CpuAttention
    if not (qkv.requires_grad and torch.is_grad_enabled()):
        return attention.without_gradient(qkv, packing, scale)
    # torch has no types for Function.apply
    out: Tensor = attention.apply(qkv, packing, scale)  # type: ignore[no-untyped-call]
    return out
