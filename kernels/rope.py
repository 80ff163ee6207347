"""The rotation of q and k: tiles loaded in pairs and turned in registers; kernels that only rotate.

Shapes: rows of qkv are [3, H, D] per token, sin and cos [P, D] of which the first D/2 columns are
read.

`split` rotates the packed projection into separate q, k, v [T, H, D] for the attention kernels of
others, `merge` takes their gradients back into d(qkv) [T, 3, H, D] turning q and k the other way:
12 bytes per element of q each (bfloat16), which is what the copies to and from a packed layout cost
anyway.

Device functions take what belongs to a rotation as one tuple, `tables`: the pointers sin and cos,
the number of prefix rows, and the stride from one table row to the next.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

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
        # Whole rows, parted in registers: loads of every second channel cannot be wide.
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
    """Where `load_pair` would find them again; nothing from `limit` on."""
    dtype: tl.constexpr = base.dtype.element_ty
    valid = (rows < limit)[:, None]
    if INTERLEAVED:
        at = base + rows[:, None] * stride_t + tl.arange(0, 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first, second), [rows.shape[0], 2 * HALF])
        tl.store(at, both.to(dtype), mask=valid)
    else:
        at = base + rows[:, None] * stride_t + tl.arange(0, HALF)[None, :]
        tl.store(at, first.to(dtype), mask=valid)
        tl.store(at + HALF, second.to(dtype), mask=valid)


@triton.jit
def table_rows(tables, rows, limit, HALF: tl.constexpr, MASKED: tl.constexpr):
    """float32 (sin, cos) of token rows; the identity (0, 1) before the prefix ends."""
    sin, cos, prefix, stride_s = tables
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
    base, tables, rows, limit, stride_t,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rotated pairs of q or k rows, rounded through the dtype of the table to that of the data."""
    first, second = load_pair(base, rows, limit, stride_t, HALF, INTERLEAVED, MASKED)
    if ROTATE:
        dtype: tl.constexpr = first.dtype
        table: tl.constexpr = tables[0].dtype.element_ty
        s, c = table_rows(tables, rows, limit, HALF, MASKED)
        # Rows rounded to bfloat16 before and after a bfloat16 rotation, as arithmetic in that
        # dtype would; with a float32 table none of these casts rounds but the last.
        a = first.to(table).to(tl.float32)
        b = second.to(table).to(tl.float32)
        first = (a * c - b * s).to(table).to(dtype)
        second = (b * c + a * s).to(table).to(dtype)
    return first, second


@triton.jit
def store_turned_back(
    base, first, second, tables, rows, limit, stride_t,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store a gradient of rotated rows as that of the rows: by the transpose of the rotation."""
    if ROTATE:
        s, c = table_rows(tables, rows, limit, HALF, True)
        a = first * c + second * s
        b = second * c - first * s
        store_pair(base, a, b, rows, limit, stride_t, HALF, INTERLEAVED)
    else:
        store_pair(base, first, second, rows, limit, stride_t, HALF, INTERLEAVED)


@triton.jit
def load_rows(base, rows, limit, stride_t, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of one head [rows, D]; those from `limit` on are 0."""
    at = base + rows[:, None] * stride_t + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(rows < limit)[:, None], other=0.0) if MASKED else tl.load(at)


@triton.jit
def _turn_rows(
    source, target, tables, rows, limit, source_t, target_t,
    HALF: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Copy rows of one head, rotated on the way; BACK: by the opposite angle, in float32."""
    if BACK:
        a, b = load_pair(source, rows, limit, source_t, HALF, INTERLEAVED, True)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        store_turned_back(target, a, b, tables, rows, limit, target_t, HALF, ROTATE, INTERLEAVED)
    else:
        a, b = load_turned(source, tables, rows, limit, source_t, HALF, ROTATE, INTERLEAVED, True)
        store_pair(target, a, b, rows, limit, target_t, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0"])
def _rope_split_kernel(
    qkv, q, k, v, sin, cos, N, prefix, H, token0,
    stride_t, stride_p, stride_h, part_t, part_h, stride_s,
    D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A block of rows of one image, every head in turn: the table rows stay in the L1 cache."""
    HALF: tl.constexpr = D // 2
    blocks = tl.cdiv(N, BLOCK)
    # in int64 from here on: T * 3 * H * D passes 2^31 at 700,000 tokens of width 1024
    start = token0 + (tl.program_id(0) // blocks).to(tl.int64) * N
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tables = (sin, cos, prefix, stride_s)
    for head in tl.range(0, H):
        packed = qkv + start * stride_t + head * stride_h
        part = start * part_t + head * part_h
        _turn_rows(packed, q + part, tables, rows, N, stride_t, part_t,
                   HALF, ROTATE, INTERLEAVED, False)  # fmt: skip
        _turn_rows(packed + stride_p, k + part, tables, rows, N, stride_t, part_t,
                   HALF, ROTATE, INTERLEAVED, False)  # fmt: skip
        _turn_rows(packed + 2 * stride_p, v + part, tables, rows, N, stride_t, part_t,
                   HALF, False, INTERLEAVED, False)  # fmt: skip


@triton.jit(do_not_specialize=["N", "prefix", "H", "token0"])
def _rope_merge_kernel(
    dqkv, dq, dk, dv, sin, cos, N, prefix, H, token0,
    stride_t, stride_p, stride_h, part_t, part_h, stride_s,
    D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The transpose of `_rope_split_kernel`, by the same blocks."""
    HALF: tl.constexpr = D // 2
    blocks = tl.cdiv(N, BLOCK)
    start = token0 + (tl.program_id(0) // blocks).to(tl.int64) * N
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tables = (sin, cos, prefix, stride_s)
    for head in tl.range(0, H):
        packed = dqkv + start * stride_t + head * stride_h
        part = start * part_t + head * part_h
        _turn_rows(dq + part, packed, tables, rows, N, part_t, stride_t,
                   HALF, ROTATE, INTERLEAVED, True)  # fmt: skip
        _turn_rows(dk + part, packed + stride_p, tables, rows, N, part_t, stride_t,
                   HALF, ROTATE, INTERLEAVED, True)  # fmt: skip
        _turn_rows(dv + part, packed + 2 * stride_p, tables, rows, N, part_t, stride_t,
                   HALF, False, INTERLEAVED, True)  # fmt: skip


class Packing(Protocol):
    """What the launchers ask of a dinov3core.ops.packing.Packing, which they may not import.

    A group is (images, tokens of each, sin, cos), the tables None where nothing is rotated.
    """

    @property
    def groups(self) -> Sequence[tuple[int, int, Tensor | None, Tensor | None]]: ...

    @property
    def prefix(self) -> int: ...

    @property
    def interleaved(self) -> bool: ...


class Sequences(NamedTuple):
    """The sequences of one launch: `images` of `length` tokens each, from token `token0` on."""

    token0: int
    images: int
    length: int
    sin: Tensor
    cos: Tensor
    rotated: bool


def runs(packing: Packing, unread: Tensor) -> Iterator[Sequences]:
    """One launch per group that holds an image; `unread` stands where there is no table.

    The first token is a number of its own instead of an offset of every pointer: that of a row of
    lse [H, T] would not be aligned, and each alignment would be compiled once more.
    """
    token0 = 0
    for images, length, sin, cos in packing.groups:
        rotated = sin is not None and cos is not None
        sin, cos = (_one_stride(sin, cos)) if rotated else (unread, unread)
        if images:
            yield Sequences(token0, images, length, sin, cos, rotated)
        token0 += images * length


def _one_stride(sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Tables whose rows are dense and lie equally far apart: the kernels know one stride."""
    if sin.stride() == cos.stride() and sin.stride(1) == 1:
        return sin, cos
    return sin.contiguous(), cos.contiguous()


def problem(dtype: torch.dtype, width: int, table: torch.dtype | None) -> str | None:
    """Why the rotation and attention kernels do not take these inputs, or None."""
    if width not in launch.HEAD_WIDTHS:
        return f"head width {width}: the kernels exist for {launch.HEAD_WIDTHS}"
    narrow = dtype in (torch.bfloat16, torch.float16)
    if not narrow and not (interpreted() and dtype == torch.float32):
        return f"{dtype}: the kernels run on bfloat16 and float16 tensor cores"
    if table is not None and table not in (torch.float32, torch.bfloat16, torch.float16):
        return f"tables in {table}: the kernels rotate in float32 or narrower"
    return None


def split(qkv: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, rotated k, and v, each [T, H, D], of qkv [T, 3, H, D]."""
    qkv = unit_stride(qkv)
    q, k, v = (qkv.new_empty(qkv.shape[0], *qkv.shape[2:]) for _ in "qkv")
    _launch(_rope_split_kernel, qkv, (q, k, v), packing)
    return q, k, v


def merge(dq: Tensor, dk: Tensor, dv: Tensor, packing: Packing) -> Tensor:
    """d(qkv) [T, 3, H, D] of the gradients of what `split` returned."""
    dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
    parts = dq.contiguous(), dk.contiguous(), dv.contiguous()
    _launch(_rope_merge_kernel, dqkv, parts, packing)
    return dqkv


def _launch(
    kernel: Any, packed: Tensor, parts: tuple[Tensor, Tensor, Tensor], packing: Packing
) -> None:
    _, _, heads, width = packed.shape
    rows, warps = launch.ROTATION
    with on_device(packed):
        for run in runs(packing, packed):
            kernel[(triton.cdiv(run.length, rows) * run.images,)](
                packed, *parts, run.sin, run.cos,
                run.length, packing.prefix, heads, run.token0,
                *packed.stride()[:3], *parts[0].stride()[:2], run.sin.stride(0),
                D=width, BLOCK=rows, ROTATE=run.rotated, INTERLEAVED=packing.interleaved,
                num_warps=warps,
            )  # fmt: skip


def configurations() -> Iterator[launch.KernelBuild]:
    """The rotation kernels on every architecture; tables in bfloat16 at the widths of ViT-L, 7B."""
    rows, warps = launch.ROTATION
    shapes = [(width, torch.float32) for width in launch.HEAD_WIDTHS]
    shapes += [(width, torch.bfloat16) for width in (64, 128)]
    kernels = (_rope_split_kernel, _rope_merge_kernel)
    for (width, table), kernel in itertools.product(shapes, kernels):
        constants = {"D": width, "BLOCK": rows, "ROTATE": True, "INTERLEAVED": False}
        options = {"num_warps": warps}
        yield launch.describe(kernel, width, constants, options, table=table, tensor_cores=False)
