"""Sinkhorn's row and column sums of 2^(scale * logits + scalings), straight from the logits.

No atomics.

Shapes: R rows, K prototypes; logits [R, K] of any row stride, everything else float32. An iteration
of n rows x K costs one read of the logits for its columns and one for its rows; three iterations
without the last row division, which the cross-entropy does, are 5 reads = 10 bytes per bfloat16
logit (the plain formula moves 162).

Exponents: x = fma(scale, logits, offset_k), near 0 for the terms that matter (ops/sinkhorn.py). The
first column pass
finds the offsets, and every row pass its maxima, while summing: a running maximum per register
instead of per row or column needs no exchange between threads inside the loop, and of the two
factors 2^(old - new), 2^(x - new) one is always 1, so it costs one exponential per logit, which
stays below the memory time (16 exp2 and 18.6 bytes per clock and multiprocessor on an H200). Sums
over parts of a column or row are stored apart and merged in a fixed order.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels.launch import DISTINCT, KernelBuild
from dinov3core.kernels.tiles import on_device, unit_stride

FLOOR = tl.constexpr(-1.0e30)  # below every logit, and finite: -inf - -inf would be NaN
BLOCK_R, BLOCK_K, WARPS = 8, 512, 4
MERGE = 256  # sums merged per program
PROGRAMS = 1024  # enough to fill any current GPU a few times


@triton.jit
def grow(peak, total, x, scale):
    """Add 2^(scale * x) to `total`, the sum relative to 2^(scale * peak), raising `peak` when x is
    larger.
    """
    gap = (x - peak) * scale
    shrunk = tl.math.exp2(-tl.abs(gap))
    return tl.maximum(peak, x), tl.where(gap > 0, total * shrunk + 1.0, total + shrunk)


@triton.jit
def gather_sums(peak, total, scale, axis: tl.constexpr):
    """One running sum along an axis from many."""
    top = tl.max(peak, axis)
    return top, tl.sum(total * tl.math.exp2((peak - tl.expand_dims(top, axis)) * scale), axis)


@triton.jit
def load_logits(logits, rows, columns, in_rows, in_columns, stride, other):
    at = logits + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=other).to(tl.float32)


@triton.jit
def _start(
    logits, peak, total, scale, R, K, stride, rows_per_part, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Column maxima and sums of one part of the rows: peak, total [parts, K]."""
    factor = tl.load(scale)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_per_part, R)
    p = tl.full([BLOCK_R, BLOCK_K], FLOOR, tl.float32)
    t = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for row0 in range(part * rows_per_part, last, BLOCK_R):
        rows = row0 + tl.arange(0, BLOCK_R)
        z = load_logits(logits, rows, columns, rows < last, columns < K, stride, float("-inf"))
        p, t = grow(p, t, z, factor)
    top, sums = gather_sums(p, t, factor, 0)
    at = part.to(tl.int64) * K + columns
    tl.store(peak + at, top, mask=columns < K)
    tl.store(total + at, sums, mask=columns < K)


@triton.jit
def _rows(
    logits, offset, column, peak, total, scale, R, K, stride, columns_per_part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row maxima of x + column and sums relative to them, over one part of the columns: peak, total
    [parts, R].
    """
    factor = tl.load(scale)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * columns_per_part, K)
    p = tl.full([BLOCK_R, BLOCK_K], FLOOR, tl.float32)
    t = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for column0 in range(part * columns_per_part, last, BLOCK_K):
        columns = column0 + tl.arange(0, BLOCK_K)
        z = load_logits(logits, rows, columns, rows < R, columns < K, stride, 0.0)
        at_zero = tl.load(offset + columns, mask=columns < K, other=0.0)
        shift = tl.load(column + columns, mask=columns < K, other=float("-inf"))
        p, t = grow(p, t, tl.math.fma(z, factor, at_zero[None, :]) + shift[None, :], 1.0)
    top, sums = gather_sums(p, t, 1.0, 1)
    at = part.to(tl.int64) * R + rows
    tl.store(peak + at, top, mask=rows < R)
    tl.store(total + at, sums, mask=rows < R)


@triton.jit
def _columns(
    logits, offset, column, row, total, scale, R, K, stride, rows_per_part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Column sums of 2^(x + column + row), rows that sum to 1, over one part of the rows: total
    [parts, K].
    """
    factor = tl.load(scale)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_per_part, R)
    at_zero = tl.load(offset + columns, mask=columns < K, other=0.0)
    shift = tl.load(column + columns, mask=columns < K, other=float("-inf"))
    t = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for row0 in range(part * rows_per_part, last, BLOCK_R):
        rows = row0 + tl.arange(0, BLOCK_R)
        z = load_logits(logits, rows, columns, rows < last, columns < K, stride, 0.0)
        row_shift = tl.load(row + rows, mask=rows < last, other=float("-inf"))
        t += tl.math.exp2(
            tl.math.fma(z, factor, at_zero[None, :]) + (shift[None, :] + row_shift[:, None])
        )
    tl.store(total + part.to(tl.int64) * K + columns, tl.sum(t, 0), mask=columns < K)


@triton.jit
def sum_parts(peak, total, inside, scale, stride, parts, BLOCK: tl.constexpr):
    """Merge running sums that lie `stride` apart, part after part."""
    p = tl.full([BLOCK], FLOOR, tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        part_peak = tl.load(peak, mask=inside, other=FLOOR)
        top = tl.maximum(p, part_peak)
        part_total = tl.load(total, mask=inside, other=0.0) * tl.math.exp2(
            (part_peak - top) * scale
        )
        t = t * tl.math.exp2((p - top) * scale) + part_total
        p = top
        peak += stride
        total += stride
    return p, t


@triton.jit
def _merge(
    peak, total, merged, merged_total, scale, N, parts, START: tl.constexpr, BLOCK: tl.constexpr
):
    """[parts, N] sums to [N]: the offsets and sums relative to them (START), or -log2 of the sums."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    factor = tl.load(scale) if START else 1.0
    p, t = sum_parts(peak + n, total + n, inside, factor, N, parts, BLOCK)
    if START:
        at_zero = tl.where(t == 0, float("inf"), -factor * p)
        # the sums were taken relative to factor * peak, of which the offset is a rounding
        tl.store(
            merged_total + n,
            tl.where(t == 0, 0.0, t * tl.math.exp2(tl.math.fma(p, factor, at_zero))),
            mask=inside,
        )
        tl.store(merged + n, at_zero, mask=inside)
    else:
        tl.store(merged + n, -(p + tl.math.log2(t)), mask=inside)


def start(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [K] (inf without rows) and column sums [K] relative to them."""
    logits = unit_stride(logits)
    (R, K), block_k = logits.shape, block_of(logits.shape[1])
    blocks, (parts, length) = triton.cdiv(K, block_k), parts_of(triton.cdiv(K, block_k), R, BLOCK_R)
    peak, total = logits.new_empty(2, parts, K, dtype=torch.float32).unbind(0)
    offset = logits.new_empty(K, dtype=torch.float32)
    sums = torch.empty_like(offset)
    with on_device(logits):
        _start[(blocks, parts)](
            logits, peak, total, scale, R, K, logits.stride(0), length,
            BLOCK_R=BLOCK_R, BLOCK_K=block_k, num_warps=WARPS,
        )  # fmt: skip
        _merge[(triton.cdiv(K, MERGE),)](
            peak, total, offset, sums, scale, K, parts, START=True, BLOCK=MERGE, num_warps=WARPS
        )
    return offset, sums


def rows(logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the row sums under these column scalings, [R]."""
    logits = unit_stride(logits)
    (R, K), block_k = logits.shape, block_of(logits.shape[1])
    row_log2 = logits.new_empty(R, dtype=torch.float32)
    if R == 0:
        return row_log2
    blocks = triton.cdiv(R, BLOCK_R)
    parts, length = parts_of(blocks, K, block_k)
    peak, total = logits.new_empty(2, parts, R, dtype=torch.float32).unbind(0)
    with on_device(logits):
        _rows[(blocks, parts)](
            logits, offset_log2, column_log2, peak, total, scale, R, K, logits.stride(0), length,
            BLOCK_R=BLOCK_R, BLOCK_K=block_k, num_warps=WARPS,
        )  # fmt: skip
        _merge[(triton.cdiv(R, MERGE),)](
            peak,
            total,
            row_log2,
            row_log2,
            scale,
            R,
            parts,
            START=False,
            BLOCK=MERGE,
            num_warps=WARPS,
        )
    return row_log2


def columns(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, row_log2: Tensor, scale: Tensor
) -> Tensor:
    """Column sums [K] of the rows as scaled."""
    logits = unit_stride(logits)
    (R, K), block_k = logits.shape, block_of(logits.shape[1])
    blocks = triton.cdiv(K, block_k)
    parts, length = parts_of(blocks, R, BLOCK_R)
    total = logits.new_empty(parts, K, dtype=torch.float32)
    with on_device(logits):
        _columns[(blocks, parts)](
            logits, offset_log2, column_log2, row_log2, total, scale, R, K, logits.stride(0), length,
            BLOCK_R=BLOCK_R, BLOCK_K=block_k, num_warps=WARPS,
        )  # fmt: skip
    return total.sum(0)


def block_of(prototypes: int) -> int:
    """Columns of a tile."""
    return min(BLOCK_K, triton.next_power_of_2(prototypes))


def parts_of(blocks: int, length: int, block: int) -> tuple[int, int]:
    """How many programs share a sum of `length` terms, and how many terms each of them takes (whole
    blocks).
    """
    wanted = max(1, min(PROGRAMS // blocks, triton.cdiv(length, block)))
    each = triton.cdiv(triton.cdiv(max(1, length), wanted), block) * block
    return triton.cdiv(max(1, length), each), each


def CONFIGURATIONS() -> Iterator[KernelBuild]:
    """What is launched for bfloat16 logits of at least 512 prototypes."""
    numbers = {"scale": "*fp32", "R": "i32", "K": "i32", "stride": "i32", "length": "i32"}
    scalings, sums = (
        dict.fromkeys(("offset", "column"), "*fp32"),
        dict.fromkeys(("peak", "total"), "*fp32"),
    )
    arguments = {
        _start: sums,
        _rows: {**scalings, **sums},
        _columns: {**scalings, "row": "*fp32", "total": "*fp32"},
    }
    tile = {"BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K}
    for kernel, tensors in arguments.items():
        types = ["*bf16", *tensors.values(), *numbers.values(), "constexpr", "constexpr"]
        yield build(f"sinkhorn{kernel.__name__}", kernel, types, tile)
    for start in (True, False):
        types = [*["*fp32"] * 5, "i32", "i32", "constexpr", "constexpr"]
        yield build(
            f"sinkhorn_merge_{'start' if start else 'rows'}",
            _merge,
            types,
            {"START": start, "BLOCK": MERGE},
        )


def build(
    name: str,
    kernel: Callable,
    types: list[str],
    constants: dict,
    warps: int = WARPS,
    targets: tuple[str, ...] = DISTINCT,
) -> KernelBuild:
    """A row kernel as it is launched: pointers, prototype counts and strides are multiples of 16."""
    signature = dict(zip(kernel.arg_names, types, strict=True))
    sizes = ("K", "stride", "target_stride", "gradient_stride", "columns_per_part")
    aligned = tuple(name for name, kind in signature.items() if kind[0] == "*" or name in sizes)
    options = {"num_warps": warps}
    described = signature, constants, aligned, options, targets
    return KernelBuild(name, kernel, *described, tensor_cores=False)
