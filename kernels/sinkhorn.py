"""Sinkhorn's row and column sums of 2^(scale * logits + scalings), straight from the logits.

No atomics.

Shapes: R rows, K prototypes; logits [R, K] of any row stride, everything else float32. An iteration
of n rows x K costs one read of the logits for its columns and one for its rows; three iterations
without the last row division, which the cross-entropy does, are 5 reads = 10 bytes per bfloat16
logit (the plain formula moves 162).

Exponents: x = fma(scale, logits, offset_k), near 0 for the terms that matter (ops/sinkhorn.py). The
first column pass finds the offsets, and every row pass its maxima, while summing: a running maximum
per register instead of per row or column needs no exchange between threads inside the loop, and of
the two factors 2^(old - new), 2^(x - new) one is always 1, so it costs one exponential per logit,
which stays below the memory time (16 exp2 and 18.6 bytes per clock and multiprocessor on an H200).

Parts: where there are fewer tiles of rows (or columns) than programs a GPU can hold, several
programs share one sum. Each stores what it has, [parts, R] or [parts, K], and a second kernel
merges the parts in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels import launch
from dinov3core.kernels.tiles import on_device, unit_stride

FLOOR = tl.constexpr(-1.0e30)  # below every logit, and finite: -inf - -inf would be NaN


@triton.jit
def grow(peak, total, x, scale):
    """Add 2^(scale * x) to `total`, a sum relative to 2^(scale * peak), and raise `peak` to x."""
    gap = (x - peak) * scale
    # x above the peak: the old sum shrinks by 2^-gap and the new term is 1. Below: the new term is
    # 2^gap and the sum stays. Either way the one exponential is 2^-|gap|.
    shrunk = tl.math.exp2(-tl.abs(gap))
    return tl.maximum(peak, x), tl.where(gap > 0, total * shrunk + 1.0, total + shrunk)


@triton.jit
def gather_sums(peak, total, scale, axis: tl.constexpr):
    """One running sum along an axis from many: bring all to the largest peak, then add."""
    top = tl.max(peak, axis)
    return top, tl.sum(total * tl.math.exp2((peak - tl.expand_dims(top, axis)) * scale), axis)


@triton.jit
def load_logits(logits, rows, columns, in_rows, in_columns, stride, other):
    """A tile in float32. Row numbers are widened first: R * stride passes 2^31."""
    at = logits + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=other).to(tl.float32)


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
def _sinkhorn_start_kernel(
    logits, peak, total, scale, R, K, stride, rows_per_part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
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
        # -inf adds 2^-inf = 0 to whatever sum its lane holds
        z = load_logits(logits, rows, columns, rows < last, columns < K, stride, float("-inf"))
        p, t = grow(p, t, z, factor)
    # only now do the BLOCK_R lanes of a column meet
    top, sums = gather_sums(p, t, factor, 0)
    at = part.to(tl.int64) * K + columns
    tl.store(peak + at, top, mask=columns < K)
    tl.store(total + at, sums, mask=columns < K)


@triton.jit
def _sinkhorn_rows_kernel(
    logits, offset_log2, column_log2, peak, total, scale, R, K, stride, columns_per_part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row maxima of x + column_log2, and sums relative to them, over one part of the columns.

    Stored in peak, total [parts, R].
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
        offset = tl.load(offset_log2 + columns, mask=columns < K, other=0.0)
        # columns beyond K: a logit of 0 and a scaling of -inf make a term of 0
        scaling = tl.load(column_log2 + columns, mask=columns < K, other=float("-inf"))
        # fma first: it rounds once, near 0, where float32 resolves the terms that matter
        p, t = grow(p, t, tl.math.fma(z, factor, offset[None, :]) + scaling[None, :], 1.0)
    top, sums = gather_sums(p, t, 1.0, 1)
    at = part.to(tl.int64) * R + rows
    tl.store(peak + at, top, mask=rows < R)
    tl.store(total + at, sums, mask=rows < R)


@triton.jit
def _sinkhorn_columns_kernel(
    logits, offset_log2, column_log2, row_log2, total, scale, R, K, stride, rows_per_part,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Column sums of 2^(x + column_log2 + row_log2) over one part of the rows: total [parts, K]."""
    factor = tl.load(scale)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_per_part, R)
    offset = tl.load(offset_log2 + columns, mask=columns < K, other=0.0)
    scaling = tl.load(column_log2 + columns, mask=columns < K, other=float("-inf"))
    t = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for row0 in range(part * rows_per_part, last, BLOCK_R):
        rows = row0 + tl.arange(0, BLOCK_R)
        z = load_logits(logits, rows, columns, rows < last, columns < K, stride, 0.0)
        row_scaling = tl.load(row_log2 + rows, mask=rows < last, other=float("-inf"))
        # no running maximum: rows sum to 1, so every term lies in [0, 1]
        t += tl.math.exp2(
            tl.math.fma(z, factor, offset[None, :]) + (scaling[None, :] + row_scaling[:, None])
        )
    tl.store(total + part.to(tl.int64) * K + columns, tl.sum(t, 0), mask=columns < K)


@triton.jit
def _sinkhorn_merge_start_kernel(
    peak, total, offset_log2, sums, scale, N, parts, BLOCK: tl.constexpr
):
    """Column maxima and sums [parts, N] to offsets [N] and sums [N] relative to them."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    factor = tl.load(scale)
    p, t = sum_parts(peak + n, total + n, inside, factor, N, parts, BLOCK)
    offset = tl.where(t == 0, float("inf"), -factor * p)
    # the sums were taken relative to factor * peak, of which the offset is a rounding
    rounding = tl.math.exp2(tl.math.fma(p, factor, offset))
    tl.store(sums + n, tl.where(t == 0, 0.0, t * rounding), mask=inside)
    tl.store(offset_log2 + n, offset, mask=inside)


@triton.jit
def _sinkhorn_merge_rows_kernel(peak, total, row_log2, N, parts, BLOCK: tl.constexpr):
    """Row maxima and sums [parts, N] to row scalings [N]: -log2 of the sums."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    p, t = sum_parts(peak + n, total + n, inside, 1.0, N, parts, BLOCK)
    tl.store(row_log2 + n, -(p + tl.math.log2(t)), mask=inside)


def start(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [K] (inf without rows) and column sums [K] relative to them."""
    logits = unit_stride(logits)
    R, K = logits.shape
    choice = launch.SINKHORN.narrowed(K)
    blocks = triton.cdiv(K, choice.block_k)
    parts, rows_per_part = launch.parts_of(blocks, R, choice.block_r)

    peak, total = logits.new_empty(2, parts, K, dtype=torch.float32).unbind(0)
    offset_log2 = logits.new_empty(K, dtype=torch.float32)
    sums = torch.empty_like(offset_log2)
    merged, merge_warps = launch.MERGE
    with on_device(logits):
        _sinkhorn_start_kernel[(blocks, parts)](
            logits, peak, total, scale, R, K, logits.stride(0), rows_per_part,
            BLOCK_R=choice.block_r, BLOCK_K=choice.block_k, num_warps=choice.warps,
        )  # fmt: skip
        _sinkhorn_merge_start_kernel[(triton.cdiv(K, merged),)](
            peak, total, offset_log2, sums, scale, K, parts, BLOCK=merged, num_warps=merge_warps
        )
    return offset_log2, sums


def row_scalings(logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor) -> Tensor:
    """row_log2 [R]: -log2 of the row sums under these column scalings."""
    logits = unit_stride(logits)
    R, K = logits.shape
    row_log2 = logits.new_empty(R, dtype=torch.float32)
    if R == 0:
        return row_log2
    choice = launch.SINKHORN.narrowed(K)
    blocks = triton.cdiv(R, choice.block_r)
    parts, columns_per_part = launch.parts_of(blocks, K, choice.block_k)

    peak, total = logits.new_empty(2, parts, R, dtype=torch.float32).unbind(0)
    merged, merge_warps = launch.MERGE
    with on_device(logits):
        _sinkhorn_rows_kernel[(blocks, parts)](
            logits, offset_log2, column_log2, peak, total, scale,
            R, K, logits.stride(0), columns_per_part,
            BLOCK_R=choice.block_r, BLOCK_K=choice.block_k, num_warps=choice.warps,
        )  # fmt: skip
        _sinkhorn_merge_rows_kernel[(triton.cdiv(R, merged),)](
            peak, total, row_log2, R, parts, BLOCK=merged, num_warps=merge_warps
        )
    return row_log2


def column_sums(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, row_log2: Tensor, scale: Tensor
) -> Tensor:
    """Column sums [K] of the rows as scaled."""
    logits = unit_stride(logits)
    R, K = logits.shape
    choice = launch.SINKHORN.narrowed(K)
    blocks = triton.cdiv(K, choice.block_k)
    parts, rows_per_part = launch.parts_of(blocks, R, choice.block_r)

    total = logits.new_empty(parts, K, dtype=torch.float32)
    with on_device(logits):
        _sinkhorn_columns_kernel[(blocks, parts)](
            logits, offset_log2, column_log2, row_log2, total, scale,
            R, K, logits.stride(0), rows_per_part,
            BLOCK_R=choice.block_r, BLOCK_K=choice.block_k, num_warps=choice.warps,
        )  # fmt: skip
    return total.sum(0)


def configurations() -> Iterator[launch.KernelBuild]:
    """What is launched for bfloat16 logits of at least 512 prototypes."""
    choice = launch.SINKHORN
    tile = {"BLOCK_R": choice.block_r, "BLOCK_K": choice.block_k}
    merged, merge_warps = launch.MERGE
    scalings = ("offset_log2", "column_log2")
    for kernel, vectors in (
        (_sinkhorn_start_kernel, ("peak", "total", "scale")),
        (_sinkhorn_rows_kernel, (*scalings, "peak", "total", "scale")),
        (_sinkhorn_columns_kernel, (*scalings, "row_log2", "total", "scale")),
    ):
        pointers = {"logits": "*bf16"} | dict.fromkeys(vectors, "*fp32")
        aligned = {"K", "stride", "columns_per_part"}.intersection(kernel.arg_names)
        options = {"num_warps": choice.warps}
        yield launch.describe_loss(kernel, pointers, tile, options, aligned=sorted(aligned))
    for kernel, vectors in (
        (_sinkhorn_merge_start_kernel, ("peak", "total", "offset_log2", "sums", "scale")),
        (_sinkhorn_merge_rows_kernel, ("peak", "total", "row_log2")),
    ):
        pointers = dict.fromkeys(vectors, "*fp32")
        yield launch.describe_loss(kernel, pointers, {"BLOCK": merged}, {"num_warps": merge_warps})
