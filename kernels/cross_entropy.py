"""Soft-target cross-entropy and its gradient, straight from logits and Sinkhorn scalings.

Shapes: R student rows, R' target rows, J targets per student row, K prototypes; math and names of
ops/soft_targets.py. A target row is dense, or 2^(fma(scale, teacher logit, offset_k) + column_k +
row); Q sums those of a student row. Bytes per pair of bfloat16 logits:

    losses      one read of S and of J target rows per student row, six numbers out     4
    gradient    the same read again, dS out                                             6

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

from dinov3core.kernels import launch
from dinov3core.kernels.sinkhorn import FLOOR, gather_sums, grow, load_logits, sum_parts
from dinov3core.kernels.tiles import LN2, LOG2E, on_device, unit_stride

# The target side as ops.soft_targets.Targets lays it out: matrix [R', K] (teacher logits or dense
# targets), offset_log2, row_log2, column_log2, scale (all None: dense), pairs [R, J] (None: student
# row r meets target row r).
Targets = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _target_sum(
    targets, offset_log2, row_log2, column_log2, scale, pairs,
    rows, columns, in_rows, in_columns, targets_R, stride,
    J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Q of a tile: the sum of J target rows per student row; NaN for one that does not exist."""
    q = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    factor = 1.0 if DENSE else tl.load(scale)
    for j in tl.static_range(J):
        if PAIRED:
            index = tl.load(pairs + rows.to(tl.int64) * J + j, mask=in_rows, other=-1)
        else:
            index = tl.where(in_rows, rows.to(tl.int64), -1)
        # -1 is "no target" and adds 0; an index past the end must not read, and must not hide
        exists = (index >= 0) & (index < targets_R)
        t = load_logits(targets, index, columns, exists, in_columns, stride, 0.0)
        if not DENSE:
            offset = tl.load(offset_log2 + columns, mask=in_columns, other=0.0)
            scaling = tl.load(column_log2 + columns, mask=in_columns, other=float("-inf"))
            row_scaling = tl.load(row_log2 + index, mask=exists, other=float("-inf"))
            t = tl.math.exp2(
                tl.math.fma(t, factor, offset[None, :]) + (scaling[None, :] + row_scaling[:, None])
            )
        q += tl.where((index >= targets_R)[:, None], float("nan"), t)
    return q


@triton.jit
def _soft_cross_entropy_losses_kernel(
    logits, targets, offset_log2, row_log2, column_log2, scale, pairs, part_sums,
    alpha, R, K, targets_R, stride, target_stride, columns_per_part,
    J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """peak, total, mass, dot and base of one part of the columns: part_sums [parts, 5, R]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    begin = part * columns_per_part
    last = tl.minimum(begin + columns_per_part, K)

    # `base` comes first, from a tile that the loop reads again (it is in the cache then)
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
            targets, offset_log2, row_log2, column_log2, scale, pairs,
            rows, columns, rows < R, columns < K, targets_R, target_stride, J, PAIRED, DENSE,
        )  # fmt: skip
        mass += q
        # beyond K the logit is -inf and q is 0: their product would be NaN
        dot += q * tl.where((columns < K)[None, :], s - base[:, None], 0.0)

    peak, total = gather_sums(p, t, alpha, 1)
    at = part_sums + part.to(tl.int64) * 5 * R + rows
    tl.store(at, peak, mask=rows < R)
    tl.store(at + R, total, mask=rows < R)
    tl.store(at + 2 * R, tl.sum(mass, 1), mask=rows < R)
    tl.store(at + 3 * R, tl.sum(dot, 1), mask=rows < R)
    tl.store(at + 4 * R, base, mask=rows < R)


@triton.jit
def _soft_cross_entropy_merge_kernel(
    part_sums, loss, peak, total, mass, alpha, R, parts, DIVIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Statistics and losses [R] from the parts.

    DIVIDE: the target terms still lack their division by their sum.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < R
    # the peak of the whole row is known only after a walk over all parts
    p, t = sum_parts(part_sums + rows, part_sums + R + rows, inside, alpha, 5 * R, parts, BLOCK)
    m = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    at = part_sums + rows
    for _ in range(0, parts):
        part_mass = tl.load(at + 2 * R, mask=inside, other=0.0)
        m += part_mass
        # sum q (s - base) of the part becomes sum q (s - p)
        d += tl.load(at + 3 * R, mask=inside, other=0.0)
        d += (tl.load(at + 4 * R, mask=inside, other=0.0) - p) * part_mass
        at += 5 * R
    # alpha = log2(e) / temperature, so alpha * ln 2 = 1 / temperature
    log_total = tl.math.log2(t) * LN2
    d *= alpha * LN2
    value = tl.where(m == 0, 0.0, log_total - d / m) if DIVIDE else log_total * m - d
    tl.store(loss + rows, value, mask=inside)
    tl.store(peak + rows, p, mask=inside)
    tl.store(total + rows, t, mask=inside)
    tl.store(mass + rows, m, mask=inside)


@triton.jit
def _soft_cross_entropy_gradient_kernel(
    logits, targets, offset_log2, row_log2, column_log2, scale, pairs,
    peak, total, mass, dloss, dlogits,
    alpha, R, K, targets_R, stride, target_stride, dlogits_stride,
    J: tl.constexpr, PAIRED: tl.constexpr, DENSE: tl.constexpr,
    DIVIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dS = dloss / temperature * (mass * softmax - Q), over mass once more with DIVIDE.

    It may overwrite the logits it was read from: a program stores only what it alone has loaded.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows = rows < R
    in_columns = columns < K
    s = load_logits(logits, rows, columns, in_rows, in_columns, stride, float("-inf"))
    q = _target_sum(
        targets, offset_log2, row_log2, column_log2, scale, pairs,
        rows, columns, in_rows, in_columns, targets_R, target_stride, J, PAIRED, DENSE,
    )  # fmt: skip
    share = tl.load(dloss + rows, mask=in_rows, other=0.0) * (alpha * LN2)
    m = tl.load(mass + rows, mask=in_rows, other=0.0)
    if DIVIDE:
        share = tl.where(m == 0, 0.0, share / m)  # no mass: no target, no gradient
    own = share * m / tl.load(total + rows, mask=in_rows, other=1.0)
    top = tl.load(peak + rows, mask=in_rows, other=0.0)
    ds = own[:, None] * tl.math.exp2((s - top[:, None]) * alpha) - share[:, None] * q
    at = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + columns[None, :]
    tl.store(at, ds.to(dlogits.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def losses(
    logits: Tensor,
    targets: Targets,
    temperature: float,
    divide: bool,
    loss: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill loss and statistics (peak, total, mass), dense [R] in float32."""
    logits = unit_stride(logits)
    R, K = logits.shape
    if R == 0:
        return
    target = launch.architecture(logits.device)
    choice = launch.CROSS_ENTROPY_LOSSES.get(target, launch.CROSS_ENTROPY).narrowed(K)
    blocks = triton.cdiv(R, choice.block_r)
    parts, columns_per_part = launch.parts_of(blocks, K, choice.block_k)

    part_sums = logits.new_empty(parts, 5, R, dtype=torch.float32)
    alpha = LOG2E.value / temperature
    matrix, *tensors = _pointers(logits, targets)
    merged, merge_warps = launch.MERGE
    with on_device(logits):
        _soft_cross_entropy_losses_kernel[(blocks, parts)](
            logits, matrix, *tensors, part_sums,
            alpha, R, K, len(matrix), logits.stride(0), matrix.stride(0), columns_per_part,
            **_constants(targets),
            BLOCK_R=choice.block_r, BLOCK_K=choice.block_k, num_warps=choice.warps,
        )  # fmt: skip
        _soft_cross_entropy_merge_kernel[(triton.cdiv(R, merged),)](
            part_sums, loss, *statistics, alpha, R, parts,
            DIVIDE=divide, BLOCK=merged, num_warps=merge_warps,
        )  # fmt: skip


def gradient(
    logits: Tensor,
    targets: Targets,
    temperature: float,
    divide: bool,
    statistics: tuple[Tensor, Tensor, Tensor],
    dloss: Tensor,
    dlogits: Tensor,
) -> None:
    """Fill dlogits, of any dtype, perhaps the logits themselves, from dloss [R] and statistics."""
    logits = unit_stride(logits)
    R, K = logits.shape
    if R == 0:
        return
    choice = launch.CROSS_ENTROPY.narrowed(K)
    alpha = LOG2E.value / temperature
    matrix, *tensors = _pointers(logits, targets)
    with on_device(logits):
        _soft_cross_entropy_gradient_kernel[
            (triton.cdiv(R, choice.block_r), triton.cdiv(K, choice.block_k))
        ](
            logits, matrix, *tensors, *statistics, dloss.contiguous(), dlogits,
            alpha, R, K, len(matrix), logits.stride(0), matrix.stride(0), dlogits.stride(0),
            **_constants(targets), DIVIDE=divide,
            BLOCK_R=choice.block_r, BLOCK_K=choice.block_k, num_warps=choice.warps,
        )  # fmt: skip


def _pointers(logits: Tensor, targets: Targets) -> list[Tensor]:
    """The targets as kernel arguments; the logits stand for what is not there."""
    matrix, *scalings, pairs = targets
    others = [*scalings, None if pairs is None else pairs.contiguous()]
    return [unit_stride(matrix), *(logits if x is None else x for x in others)]


def _constants(targets: Targets) -> dict[str, int | bool]:
    """Compile-time arguments that follow from the form of the targets."""
    _, offset_log2, *_, pairs = targets
    targets_per_row = 1 if pairs is None else pairs.shape[1]
    return {"J": targets_per_row, "PAIRED": pairs is not None, "DENSE": offset_log2 is None}


def configurations() -> Iterator[launch.KernelBuild]:
    """The terms of DINO (two targets per row) and iBOT (one), bfloat16, 512 prototypes or more."""
    teacher = {"targets": "*bf16", "pairs": "*i64"}
    teacher |= dict.fromkeys(("offset_log2", "row_log2", "column_log2", "scale"), "*fp32")
    statistics = dict.fromkeys(("peak", "total", "mass"), "*fp32")
    merged, merge_warps = launch.MERGE
    for term, targets in (("_dino", 2), ("_ibot", 1)):
        form = {"J": targets, "PAIRED": True, "DENSE": False}
        pointers = {"logits": "*bf16", **teacher, "part_sums": "*fp32"}
        aligned = ["K", "stride", "target_stride", "columns_per_part"]
        for target in launch.DISTINCT:
            choice = launch.CROSS_ENTROPY_LOSSES[target]
            constants = form | {"BLOCK_R": choice.block_r, "BLOCK_K": choice.block_k}
            yield launch.describe_loss(
                _soft_cross_entropy_losses_kernel, pointers, constants,
                {"num_warps": choice.warps}, aligned=aligned, suffix=term, targets=(target,),
            )  # fmt: skip

        divide = {"DIVIDE": targets == 1}
        pointers = {"logits": "*bf16", **teacher, **statistics, "dloss": "*fp32"}
        pointers["dlogits"] = "*bf16"
        choice = launch.CROSS_ENTROPY
        constants = form | divide | {"BLOCK_R": choice.block_r, "BLOCK_K": choice.block_k}
        yield launch.describe_loss(
            _soft_cross_entropy_gradient_kernel, pointers, constants,
            {"num_warps": choice.warps}, suffix=term,
            aligned=["K", "stride", "target_stride", "dlogits_stride"],
        )  # fmt: skip

        yield launch.describe_loss(
            _soft_cross_entropy_merge_kernel,
            {"part_sums": "*fp32", "loss": "*fp32", **statistics},
            divide | {"BLOCK": merged},
            {"num_warps": merge_warps},
            suffix=term,
        )
