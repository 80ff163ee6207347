"""The rotation of q and k: tiles loaded in pairs, turned in registers; and the kernels that do
nothing else.

Shapes: rows of qkv are [3, H, D] per token, sin and cos [P, D] of which the first D/2 columns are
read.

`split` rotates the packed projection into separate q, k, v [T, H, D] for the attention kernels of
others, `merge` takes their gradients back into d(qkv) [T, 3, H, D] turning q and k the other way:
12 bytes per element of q each (bfloat16), which is what the copies to and from a packed layout cost
anyway.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch
from dinov3core.kernels.tiles import interpreted, on_device, unit_stride


@triton.jit
def load_pair(
    base, rows, limit, stride_t, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr
):
    """The two channels of every pair, [rows, HALF] each; rows from `limit` on are 0."""
    if INTERLEAVED:
        at = base + rows[:, None] * stride_t + tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(at, mask=(rows < limit)[:, None], other=0.0) if MASKED else tl.load(at)
        first, second = tl.split(tl.reshape(both, [rows.shape[0], HALF, 2]))
    else:
        at = base + rows[:, None] * stride_t + tl.arange(0, HALF)[None, :]
        if MASKED:
            first = tl.load(at, mask=(rows < limit)[:, None], other=0.0)
            second = tl.load(at + HALF, mask=(rows < limit)[:, None], other=0.0)
        else:
            first = tl.load(at)
            second = tl.load(at + HALF)
    return first, second


@triton.jit
def store_pair(
    base, first, second, rows, limit, stride_t, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    dtype: tl.constexpr = base.dtype.element_ty
    valid = (rows < limit)[:, None]
    if INTERLEAVED:
        both = tl.reshape(tl.join(first, second), [rows.shape[0], 2 * HALF])
        tl.store(
            base + rows[:, None] * stride_t + tl.arange(0, 2 * HALF)[None, :],
            both.to(dtype),
            mask=valid,
        )
    else:
        at = base + rows[:, None] * stride_t + tl.arange(0, HALF)[None, :]
        tl.store(at, first.to(dtype), mask=valid)
        tl.store(at + HALF, second.to(dtype), mask=valid)


@triton.jit
def table_rows(sin, cos, rows, limit, prefix, stride_s, HALF: tl.constexpr, MASKED: tl.constexpr):
    """float32 (sin, cos) of token rows; the identity before `prefix`."""
    at = (rows - prefix)[:, None] * stride_s + tl.arange(0, HALF)[None, :]
    if MASKED:
        valid = ((rows >= prefix) & (rows < limit))[:, None]
        s = tl.load(sin + at, mask=valid, other=0.0)
        c = tl.load(cos + at, mask=valid, other=1.0)
    else:
        s = tl.load(sin + at)
        c = tl.load(cos + at)
    return s.to(tl.float32), c.to(tl.float32)


@triton.jit
def load_turned(
    base, sin, cos, rows, limit, prefix, stride_t, stride_s,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rotated pairs of q or k rows, rounded through the dtype of the table to that of the data."""
    first, second = load_pair(base, rows, limit, stride_t, HALF, INTERLEAVED, MASKED)
    if ROTATE:
        dtype: tl.constexpr = first.dtype
        table: tl.constexpr = sin.dtype.element_ty
        s, c = table_rows(sin, cos, rows, limit, prefix, stride_s, HALF, MASKED)
        a = first.to(table).to(tl.float32)
        b = second.to(table).to(tl.float32)
        first = (a * c - b * s).to(table).to(dtype)
        second = (b * c + a * s).to(table).to(dtype)
    return first, second


@triton.jit
def store_turned_back(
    base, first, second, sin, cos, rows, limit, prefix, stride_t, stride_s,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store a gradient of rotated rows as the gradient of the rows themselves (the transpose of the
    rotation).
    """
    if ROTATE:
        s, c = table_rows(sin, cos, rows, limit, prefix, stride_s, HALF, True)
        store_pair(
            base,
            first * c + second * s,
            second * c - first * s,
            rows,
            limit,
            stride_t,
            HALF,
            INTERLEAVED,
        )
    else:
        store_pair(base, first, second, rows, limit, stride_t, HALF, INTERLEAVED)


@triton.jit
def load_rows(base, rows, limit, stride_t, D: tl.constexpr, MASKED: tl.constexpr):
    at = base + rows[:, None] * stride_t + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(rows < limit)[:, None], other=0.0) if MASKED else tl.load(at)


@triton.jit
def _turn_rows(
    source, target, sin, cos, rows, limit, prefix, source_t, target_t, stride_s,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Copy rows of one head, rotated on the way; BACK: by the opposite angle, in float32."""
    if BACK:
        first, second = load_pair(source, rows, limit, source_t, HALF, INTERLEAVED, True)
        store_turned_back(
            target, first.to(tl.float32), second.to(tl.float32), sin, cos, rows, limit, prefix, target_t, stride_s,
            HALF, ROTATE, INTERLEAVED,
        )  # fmt: skip
    else:
        first, second = load_turned(
            source,
            sin,
            cos,
            rows,
            limit,
            prefix,
            source_t,
            stride_s,
            HALF,
            ROTATE,
            INTERLEAVED,
            True,
        )
        store_pair(target, first, second, rows, limit, target_t, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0"])
def _split(
    qkv, q, k, v, sin, cos, N, prefix, H, token0, stride_t, stride_p, stride_h, part_t, part_h, stride_s,
    D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A block of rows of one image, every head in turn: the table rows stay in the L1 cache."""
    HALF: tl.constexpr = D // 2
    blocks = tl.cdiv(N, BLOCK)
    start = token0 + (tl.program_id(0) // blocks).to(tl.int64) * N
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    for head in tl.range(0, H):
        packed = qkv + start * stride_t + head * stride_h
        part = start * part_t + head * part_h
        _turn_rows(packed, q + part, sin, cos, rows, N, prefix, stride_t, part_t, stride_s,
                   HALF, ROTATE, INTERLEAVED, False)  # fmt: skip
        _turn_rows(packed + stride_p, k + part, sin, cos, rows, N, prefix, stride_t, part_t, stride_s,
                   HALF, ROTATE, INTERLEAVED, False)  # fmt: skip
        _turn_rows(packed + 2 * stride_p, v + part, sin, cos, rows, N, prefix, stride_t, part_t, stride_s,
                   HALF, False, INTERLEAVED, False)  # fmt: skip


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0"])
def _merge(
    dqkv, dq, dk, dv, sin, cos, N, prefix, H, token0, stride_t, stride_p, stride_h, part_t, part_h, stride_s,
    D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The transpose of `_split`."""
    HALF: tl.constexpr = D // 2
    blocks = tl.cdiv(N, BLOCK)
    start = token0 + (tl.program_id(0) // blocks).to(tl.int64) * N
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    for head in tl.range(0, H):
        packed = dqkv + start * stride_t + head * stride_h
        part = start * part_t + head * part_h
        _turn_rows(dq + part, packed, sin, cos, rows, N, prefix, part_t, stride_t, stride_s,
                   HALF, ROTATE, INTERLEAVED, True)  # fmt: skip
        _turn_rows(dk + part, packed + stride_p, sin, cos, rows, N, prefix, part_t, stride_t, stride_s,
                   HALF, ROTATE, INTERLEAVED, True)  # fmt: skip
        _turn_rows(dv + part, packed + 2 * stride_p, sin, cos, rows, N, prefix, part_t, stride_t, stride_s,
                   HALF, False, INTERLEAVED, True)  # fmt: skip


def problem(dtype: torch.dtype, width: int, table: torch.dtype | None) -> str | None:
    """Why the rotation and attention kernels do not take these inputs, or None."""
    if width not in launch.HEAD_WIDTHS:
        return f"head width {width}: the kernels exist for {launch.HEAD_WIDTHS}"
    if dtype not in (torch.bfloat16, torch.float16) and not (
        interpreted() and dtype == torch.float32
    ):
        return f"{dtype}: the kernels run on bfloat16 and float16 tensor cores"
    if table is not None and table not in (torch.float32, torch.bfloat16, torch.float16):
        return f"tables in {table}: the kernels rotate in float32 or narrower"
    return None


def split(
    qkv: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, rotated k, and v, each [T, H, D], of qkv [T, 3, H, D]."""
    qkv = unit_stride(qkv)
    q, k, v = (qkv.new_empty(qkv.shape[0], *qkv.shape[2:]) for _ in range(3))
    _launch(_split, qkv, (q, k, v), sins, coss, counts, lengths, prefix, interleaved)
    return q, k, v


def merge(
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
    """d(qkv) [T, 3, H, D] of the gradients of what `split` returned."""
    parts = tuple(x.contiguous() for x in (dq, dk, dv))
    dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
    _launch(_merge, dqkv, parts, sins, coss, counts, lengths, prefix, interleaved)
    return dqkv


def _launch(
    kernel, packed: Tensor, parts, sins, coss, counts, lengths, prefix: int, interleaved: bool
) -> None:
    _, _, heads, width = packed.shape
    rows, warps = launch.ROTATION
    with on_device(packed):
        token0 = 0
        for sin, cos, count, length in zip(sins, coss, counts, lengths, strict=True):
            if count:
                kernel[(triton.cdiv(length, rows) * count,)](
                    packed, *parts, unit_stride(sin), unit_stride(cos), length, prefix, heads, token0,
                    *packed.stride()[:3], *parts[0].stride()[:2], sin.stride(0),
                    D=width, BLOCK=rows, ROTATE=True, INTERLEAVED=interleaved, num_warps=warps,
                )  # fmt: skip
            token0 += count * length


def configurations() -> Iterator[launch.KernelBuild]:
    """The rotation kernels on every architecture; a table in bfloat16 at the width of ViT-L."""
    rows, warps = launch.ROTATION
    shapes = [(width, torch.float32) for width in launch.HEAD_WIDTHS] + [(64, torch.bfloat16)]
    for (width, table), kernel in itertools.product(shapes, (_split, _merge)):
        constants = {"D": width, "BLOCK": rows, "ROTATE": True, "INTERLEAVED": False}
        options = {"num_warps": warps}
        yield launch.describe(kernel, width, constants, options, table=table, tensor_cores=False)
