"""Soft-target cross-entropy and its gradient, straight from student logits, teacher logits and
Sinkhorn scalings.

Shapes: R student rows, R' target rows, J targets per student row, K prototypes; math and names of
ops/soft_targets.py. A target row is dense, or 2^(fma(scale, teacher logit, offset_k) + column_k +
row); Q sums those of a student row.

    losses    one read of S and of J target rows per student row, six numbers out       4 bytes per
    bfloat16 pair gradient  the same read again, dS out
    6 bytes

against 75 for the plain formula, and neither log-softmax nor probabilities nor their float32 copies
ever exist. Running sums live per register (see sinkhorn.py: one exponential per logit, no exchange
between threads inside the loop). The dot product is taken relative to a logit of the row, `base`,
the largest of its first tile: relative to 0 it would cancel against the log-sum-exp. Rows are split
over several programs when there are few; parts merge in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov3core.kernels.launch import DISTINCT, LOSSES_WARPS, KernelBuild, architecture
from dinov3core.kernels.sinkhorn import (
    BLOCK_K,
    FLOOR,
    MERGE,
    WARPS,
    block_of,
    build,
    gather_sums,
    grow,
    load_logits,
    parts_of,
    sum_parts,
)
from dinov3core.kernels.tiles import LN2, LOG2E, on_device, unit_stride

BLOCK_R = 4


@triton.jit
def _target_sum(
    targets, offset, column, row, pairs, rows, columns, in_rows, in_columns, targets_R, stride, scale, first,
    J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Q of a tile: the sum of the J target rows of each student row; NaN for a target row that does
    not exist.
    """
    q = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    factor = 1.0 if DENSE else tl.load(scale)
    for j in tl.static_range(J):
        if PAIRED:
            index = tl.load(pairs + rows.to(tl.int64) * J + j, mask=in_rows, other=-1)
        else:
            index = tl.where(in_rows, rows.to(tl.int64) + first, -1)
        exists = (index >= 0) & (index < targets_R)
        t = load_logits(targets, index, columns, exists, in_columns, stride, 0.0)
        if not DENSE:
            at_zero = tl.load(offset + columns, mask=in_columns, other=0.0)
            shift = tl.load(column + columns, mask=in_columns, other=float("-inf"))
            row_shift = tl.load(row + index, mask=exists, other=float("-inf"))
            t = tl.math.exp2(
                tl.math.fma(t, factor, at_zero[None, :]) + (shift[None, :] + row_shift[:, None])
            )
        q += tl.where((index >= targets_R)[:, None], float("nan"), t)
    return q


@triton.jit
def _losses(
    logits, targets, offset, column, row, pairs, parts_out, alpha, scale, R, K, targets_R, first, stride, target_stride,
    columns_per_part, J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """peak, total, mass, dot and base of one part of the columns: parts_out [parts, 5, R]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    begin = part * columns_per_part
    last = tl.minimum(begin + columns_per_part, K)
    columns = begin + tl.arange(0, BLOCK_K)
    s = load_logits(logits, rows, columns, rows < R, columns < K, stride, float("-inf"))
    base = tl.maximum(tl.max(s, 1), FLOOR)
    p = tl.full([BLOCK_R, BLOCK_K], FLOOR, tl.float32)
    t = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    mass = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    dot = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for column0 in range(begin, last, BLOCK_K):
        columns = column0 + tl.arange(0, BLOCK_K)
        s = load_logits(logits, rows, columns, rows < R, columns < K, stride, float("-inf"))
        p, t = grow(p, t, s, alpha)
        q = _target_sum(
            targets, offset, column, row, pairs, rows, columns, rows < R, columns < K, targets_R, target_stride,
            scale, first, J, PAIRED, DENSE,
        )  # fmt: skip
        mass += q
        dot += q * tl.where((columns < K)[None, :], s - base[:, None], 0.0)
    peak, total = gather_sums(p, t, alpha, 1)
    at = parts_out + part.to(tl.int64) * 5 * R + rows
    tl.store(at, peak, mask=rows < R)
    tl.store(at + R, total, mask=rows < R)
    tl.store(at + 2 * R, tl.sum(mass, 1), mask=rows < R)
    tl.store(at + 3 * R, tl.sum(dot, 1), mask=rows < R)
    tl.store(at + 4 * R, base, mask=rows < R)


@triton.jit
def _merge_losses(
    parts_out, loss, peak, total, mass, alpha, R, parts, DIVIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Statistics and losses [R] from the parts; DIVIDE: the target terms still lack their division
    by their sum.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < R
    p, t = sum_parts(parts_out + rows, parts_out + R + rows, inside, alpha, 5 * R, parts, BLOCK)
    m = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    at = parts_out + rows
    for _ in range(0, parts):
        part_mass = tl.load(at + 2 * R, mask=inside, other=0.0)
        m += part_mass
        d += tl.load(at + 3 * R, mask=inside, other=0.0)
        d += (tl.load(at + 4 * R, mask=inside, other=0.0) - p) * part_mass
        at += 5 * R
    log_total = tl.math.log2(t) * LN2
    d *= alpha * LN2
    value = tl.where(m == 0, 0.0, log_total - d / m) if DIVIDE else log_total * m - d
    tl.store(loss + rows, value, mask=inside)
    tl.store(peak + rows, p, mask=inside)
    tl.store(total + rows, t, mask=inside)
    tl.store(mass + rows, m, mask=inside)


@triton.jit
def _gradient(
    logits, targets, offset, column, row, pairs, peak, total, mass, grad, gradient, alpha, scale, R, K, targets_R,
    first, stride, target_stride, gradient_stride, J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
    DIVIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient; it may overwrite the logits it was read from."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows, in_columns = rows < R, columns < K
    s = load_logits(logits, rows, columns, in_rows, in_columns, stride, float("-inf"))
    q = _target_sum(
        targets, offset, column, row, pairs, rows, columns, in_rows, in_columns, targets_R, target_stride,
        scale, first, J, PAIRED, DENSE,
    )  # fmt: skip
    share = tl.load(grad + rows, mask=in_rows, other=0.0) * (alpha * LN2)
    m = tl.load(mass + rows, mask=in_rows, other=0.0)
    if DIVIDE:
        share = tl.where(m == 0, 0.0, share / m)
    own = share * m / tl.load(total + rows, mask=in_rows, other=1.0)
    top = tl.load(peak + rows, mask=in_rows, other=0.0)
    ds = own[:, None] * tl.math.exp2((s - top[:, None]) * alpha) - share[:, None] * q
    at = gradient + rows.to(tl.int64)[:, None] * gradient_stride + columns[None, :]
    tl.store(at, ds.to(gradient.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def losses(
    logits: Tensor,
    targets: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    pairs: Tensor | None,
    temperature: float,
    divide: bool,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, peak, total and mass, [R] each. `targets`: rows, offset, row, column scalings (None:
    dense), scale.
    """
    logits = unit_stride(logits)
    R, K = logits.shape
    loss, peak, total, mass = (logits.new_empty(R, dtype=torch.float32) for _ in range(4))
    if R == 0:
        return loss, peak, total, mass
    block_k, blocks = block_of(K), triton.cdiv(R, BLOCK_R)
    parts, length = parts_of(blocks, K, block_k)
    parts_out = logits.new_empty(parts, 5, R, dtype=torch.float32)
    alpha = LOG2E.value / temperature
    tensors, scale, constants = _target_arguments(logits, targets, pairs)
    with on_device(logits):
        _losses[(blocks, parts)](
            logits, *tensors, parts_out, alpha, scale, R, K, len(tensors[0]), first, logits.stride(0),
            tensors[0].stride(0), length, **constants, BLOCK_R=BLOCK_R, BLOCK_K=block_k,
            num_warps=LOSSES_WARPS.get(architecture(logits.device), WARPS),
        )  # fmt: skip
        _merge_losses[(triton.cdiv(R, MERGE),)](
            parts_out,
            loss,
            peak,
            total,
            mass,
            alpha,
            R,
            parts,
            DIVIDE=divide,
            BLOCK=MERGE,
            num_warps=WARPS,
        )
    return loss, peak, total, mass


def gradient(
    logits: Tensor,
    targets: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    pairs: Tensor | None,
    temperature: float,
    divide: bool,
    grad: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    first: int = 0,
) -> None:
    """d(sum_r grad_r loss_r) / d logits into `out`, of any dtype, perhaps the logits; `statistics`:
    of `losses`.
    """
    logits = unit_stride(logits)
    R, K = logits.shape
    if R == 0:
        return
    block_k = block_of(K)
    tensors, scale, constants = _target_arguments(logits, targets, pairs)
    with on_device(logits):
        _gradient[(triton.cdiv(R, BLOCK_R), triton.cdiv(K, block_k))](
            logits, *tensors, *statistics, grad.contiguous(), out, LOG2E.value / temperature, scale, R, K,
            len(tensors[0]), first, logits.stride(0), tensors[0].stride(0), out.stride(0), **constants, DIVIDE=divide,
            BLOCK_R=BLOCK_R, BLOCK_K=block_k, num_warps=WARPS,
        )  # fmt: skip


def _target_arguments(
    logits: Tensor, targets: tuple, pairs: Tensor | None
) -> tuple[tuple, Tensor, dict]:
    """Pointers (the logits stand for what is not there), the scale among them, and the compile-time
    constants.
    """
    rows, offset, row, column, scale = targets
    dense = offset is None
    pairs_or_none = None if pairs is None else pairs.contiguous()
    pointers = [logits if x is None else x for x in (offset, column, row, pairs_or_none)]
    constants = {
        "J": 1 if pairs is None else pairs.shape[1],
        "PAIRED": pairs is not None,
        "DENSE": dense,
    }
    return (unit_stride(rows), *pointers), logits if scale is None else scale, constants


def CONFIGURATIONS() -> Iterator[KernelBuild]:
    """The terms of DINO (two targets per row) and iBOT (one) on bfloat16 logits of at least 512
    prototypes.
    """
    teacher = ["*bf16", "*fp32", "*fp32", "*fp32", "*i64"]
    sizes = ["fp32", "*fp32", "i32", "i32", "i32", "i32", "i32", "i32"]
    for term, targets in (("dino", 2), ("ibot", 1)):
        constants = {"J": targets, "PAIRED": True, "DENSE": False}
        constants |= {"BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K}
        types = ["*bf16", *teacher, "*fp32", *sizes, "i32", *["constexpr"] * 5]
        for target in DISTINCT:
            name, warps = f"soft_cross_entropy_losses_{term}", LOSSES_WARPS[target]
            yield build(name, _losses, types, constants, warps, (target,))
        types = ["*bf16", *teacher, *["*fp32"] * 4, "*bf16", *sizes, "i32", *["constexpr"] * 6]
        yield build(
            f"soft_cross_entropy_gradient_{term}",
            _gradient,
            types,
            {**constants, "DIVIDE": targets == 1},
        )
        types = [*["*fp32"] * 5, "fp32", "i32", "i32", "constexpr", "constexpr"]
        yield build(
            f"soft_cross_entropy_merge_{term}",
            _merge_losses,
            types,
            {"DIVIDE": targets == 1, "BLOCK": MERGE},
        )
