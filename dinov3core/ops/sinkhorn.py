"""sinkhorn: teacher targets balanced over the prototypes, held as scaling vectors, not as a matrix.

Shapes: R rows of this process, K prototypes. With M = 2^(scale * logits), scale = log2(e) /
temperature, one iteration divides every column of M by its sum over the rows of all processes, then
every row by its own sum. The result is u_r M_rk v_k, so two vectors describe it, and the last row
division leaves

    p_r = softmax over k of (logits_rk / temperature + ln v_k).

A factor per prototype cancels in the first column division, so every column is taken relative to
its largest logit by an offset (a factor per row does not cancel: subtracting row maxima would
change the assignment). scale * logits + offset is one fused multiply-add that is near 0 for the
terms that matter, where float32 resolves it, and log2 v is added after: 10 to 20 times less error
than scale * logits + log2 v. All is held in log2, so logits far apart neither overflow nor vanish.
After the first iteration column sums lie in [1 / (R K), R] and need no further shift.

The row pass of one iteration and the column pass of the next share one read of the logits; the last
row division is left to whoever reads a row (the cross-entropy has to read it anyway).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.dispatch import runs_kernels
from dinov3core.ops.registration import (
    accumulation_dtype,
    full_precision,
    without_products,
)

ALONE = "alone"
LOG2E = math.log2(math.e)
CHUNK_ELEMENTS = 1 << 19  # 2 MB in float32


@dataclass(frozen=True, eq=False)
class Assignment:
    """Teacher probabilities [R, K], not yet computed.

    They are 2^(scale * logits_rk + offset_log2_k + column_log2_k + row_log2_r) divided by the sums
    of their rows.

    Attributes:
        logits: [R, K], as given to `sinkhorn`.
        offset_log2: [K], -scale times the largest logit of each prototype over all processes.
        row_log2: [R], brings the sum of every row near 1; the exact division is left to whoever
            computes a row.
        column_log2: [K], log2 of the prototype scalings.
        scale: log2(e) / temperature, a 0-d tensor, so that compiled code follows a changing
            temperature.
    """

    logits: Tensor
    offset_log2: Tensor
    row_log2: Tensor
    column_log2: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return self.logits.shape[0]

    def dense(self) -> Tensor:
        """The probabilities [R, K] in float32 (float64 for float64 logits).

        For people and tests: the losses take the Assignment itself and never need this matrix.
        """
        return _sinkhorn_dense(self.logits, self.offset_log2, self.column_log2, self.scale)

    def normalized(self) -> "Assignment":
        """The same, but the terms of every row sum to exactly 1; reads the logits once more."""
        return self.of_rows(self.logits)

    def of_rows(self, logits: Tensor) -> "Assignment":
        """The assignment of other rows by these prototype scalings; their terms sum to exactly 1.

        A row that was among those balanced gets the probabilities it has there, whichever process
        it is on: what describes a balance beside the logits is one number per prototype.

        Args:
            logits: [R', K] floating. Treated as constants.

        Raises:
            ValueError: on logits of another shape or type.
        """
        prototypes = len(self.column_log2)
        if logits.ndim != 2 or logits.shape[1] != prototypes or not logits.is_floating_point():
            raise ValueError(
                f"expected floating logits [R, {prototypes}] for these {prototypes} prototypes, "
                f"got {logits.dtype} {list(logits.shape)}"
            )
        logits = logits.detach()
        row_log2 = _sinkhorn_rows(logits, self.offset_log2, self.column_log2, self.scale)
        return Assignment(logits, self.offset_log2, row_log2, self.column_log2, self.scale)

    def rows(self, index: Tensor | slice) -> "Assignment":
        """The assignment of some rows: a view for a slice, a copy for indices or a mask."""
        return Assignment(
            self.logits[index], self.offset_log2, self.row_log2[index], self.column_log2, self.scale
        )


def sinkhorn(
    logits: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    group: ProcessGroup | str | None = None,
) -> Assignment:
    """Balance teacher scores over the prototypes (Caron et al. 2020, SwAV; DINOv2, DINOv3).

    Args:
        logits: [R, K] floating, the rows of this process; row counts may differ between processes,
            0 included. Treated as constants.
        temperature: of the teacher, > 0.
        iterations: column-then-row normalisations, >= 1; DINOv3 uses 3.
        group: whose rows are balanced together. None: all processes when torch.distributed is
            initialised, else this one; "alone": this process only; or a process group. Costs one
            K-vector maximum and `iterations` K-vector sums, and no host synchronisation.

    Returns:
        An `Assignment`; `.dense()` are probabilities whose rows sum to 1.

    Raises:
        ValueError: on logits that are not a floating [R, K] with K >= 1, a temperature <= 0 or
            iterations < 1.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"sinkhorn expects floating logits [R, K] with K >= 1, got {logits.dtype} "
            f"{list(logits.shape)}"
        )
    if not temperature > 0 or iterations < 1:
        raise ValueError(
            f"sinkhorn expects temperature > 0 and iterations >= 1, got {temperature} and "
            f"{iterations}"
        )
    logits = logits.detach()
    one = torch.ones((), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    scale = one * (LOG2E / temperature)

    offset_log2, sums = _sinkhorn_start(logits, scale)
    offset_log2, column_log2 = _first_columns(offset_log2, sums, group)
    if iterations == 1:
        row_log2 = _sinkhorn_rows(logits, offset_log2, column_log2, scale)
    for _ in range(iterations - 1):
        row_log2, sums = _sinkhorn_step(logits, offset_log2, column_log2, scale)
        column_log2 = column_log2 + _negative_log2(_all_reduce(sums, group))
    return Assignment(logits, offset_log2, row_log2, column_log2, scale)


def _first_columns(
    own: Tensor, sums: Tensor, group: ProcessGroup | str | None
) -> tuple[Tensor, Tensor]:
    """Offsets and column scalings of all processes, from this one's offsets and sums."""
    offset_log2 = _all_reduce(own.clone(), group, dist.ReduceOp.MIN)
    # inf: no row anywhere, or a prototype nobody may choose
    offset_log2 = torch.where(offset_log2 == math.inf, 0.0, offset_log2)
    sums = _all_reduce(sums * torch.exp2(offset_log2 - own), group)
    return offset_log2, _negative_log2(sums)


def _all_reduce(
    tensor: Tensor,
    group: ProcessGroup | str | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """In place; the tensor itself when there is nobody else."""
    if group != ALONE and dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _negative_log2(sums: Tensor) -> Tensor:
    """-log2 of column sums; 0 without mass, so that probabilities stay 0 and are not NaN."""
    return torch.where(sums == 0, 0.0, -torch.log2(sums))


@torch.library.custom_op("dinov3core::sinkhorn_start", mutates_args=())
@full_precision
def _sinkhorn_start(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [K] of these rows, inf without rows; column sums of 2^(scale * logits + offset)."""
    if runs_kernels("sinkhorn", logits):
        from dinov3core.kernels import sinkhorn as kernels

        return kernels.start(logits, scale)
    dtype = accumulation_dtype(logits.dtype)
    peak = logits.new_full(logits.shape[1:], -math.inf, dtype=dtype)
    for rows, _ in row_chunks(logits):
        torch.maximum(peak, logits[rows].amax(0).to(dtype), out=peak)
    offset_log2 = peak.mul_(-scale)
    finite = torch.where(offset_log2 == math.inf, 0.0, offset_log2)
    sums = torch.zeros_like(offset_log2)
    for rows, terms in row_chunks(logits):
        sums += torch.add(finite, logits[rows], alpha=scale.item(), out=terms).exp2_().sum(0)
    return offset_log2, sums


@_sinkhorn_start.register_fake
def _(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    offset_log2 = logits.new_empty(logits.shape[1:], dtype=accumulation_dtype(logits.dtype))
    return offset_log2, torch.empty_like(offset_log2)


@torch.library.custom_op("dinov3core::sinkhorn_step", mutates_args=())
@full_precision
def _sinkhorn_step(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Row scalings [R] under these column scalings; column sums [K] of the normalised rows."""
    if runs_kernels("sinkhorn", logits):
        from dinov3core.kernels import sinkhorn as kernels

        row_log2 = kernels.row_scalings(logits, offset_log2, column_log2, scale)
        return row_log2, kernels.column_sums(logits, offset_log2, column_log2, row_log2, scale)
    row_log2 = offset_log2.new_empty(len(logits))
    column_sums = torch.zeros_like(column_log2)
    for part in _scaled_rows(logits, offset_log2, column_log2, scale):
        row_log2[part.rows] = part.row_log2
        # on the CPU both passes share one read: the terms are still in the cache
        column_sums.addmv_(part.terms.mT, 1 / part.sums)
    return row_log2, column_sums


@_sinkhorn_step.register_fake
def _(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return column_log2.new_empty(logits.shape[:1]), torch.empty_like(column_log2)


@torch.library.custom_op("dinov3core::sinkhorn_rows", mutates_args=())
@full_precision
def _sinkhorn_rows(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor
) -> Tensor:
    """Row scalings [R] under these column scalings."""
    if runs_kernels("sinkhorn", logits):
        from dinov3core.kernels import sinkhorn as kernels

        return kernels.row_scalings(logits, offset_log2, column_log2, scale)
    row_log2 = offset_log2.new_empty(len(logits))
    for part in _scaled_rows(logits, offset_log2, column_log2, scale):
        row_log2[part.rows] = part.row_log2
    return row_log2


@_sinkhorn_rows.register_fake
def _(logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor) -> Tensor:
    return column_log2.new_empty(logits.shape[:1])


@torch.library.custom_op("dinov3core::sinkhorn_dense", mutates_args=())
@full_precision
def _sinkhorn_dense(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor
) -> Tensor:
    """The probabilities [R, K]."""
    dense = torch.empty_like(logits, dtype=offset_log2.dtype, memory_format=torch.contiguous_format)
    for part in _scaled_rows(logits, offset_log2, column_log2, scale):
        torch.div(part.terms, part.sums[:, None], out=dense[part.rows])
    return dense


@_sinkhorn_dense.register_fake
def _(logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=offset_log2.dtype, memory_format=torch.contiguous_format)


class _ScaledRows(NamedTuple):
    """A few rows under the column scalings.

    Terms [r, K] relative to each row's largest, the sums [r] of the terms, the row scalings [r].
    """

    rows: slice
    terms: Tensor
    sums: Tensor
    row_log2: Tensor


def _scaled_rows(
    logits: Tensor, offset_log2: Tensor, column_log2: Tensor, scale: Tensor
) -> Iterator[_ScaledRows]:
    for rows, terms in row_chunks(logits):
        torch.add(offset_log2, logits[rows], alpha=scale.item(), out=terms).add_(column_log2)
        peak = terms.amax(1)
        sums = terms.sub_(peak[:, None]).exp2_().sum(1)
        yield _ScaledRows(rows, terms, sums, torch.add(peak, sums.log2()).neg_())


without_products(torch.ops.dinov3core.sinkhorn_start, torch.ops.dinov3core.sinkhorn_rows)


@register_flop_formula(torch.ops.dinov3core.sinkhorn_step)
def _step_flops(logits: torch.Size, *others: Any, **options: Any) -> int:
    """The column sums of the normalised rows are one matrix-vector product."""
    return 2 * logits[0] * logits[1]


def row_chunks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a few rows of [R, K], and room [r, K] for their terms in the accumulation dtype.

    All slices share the room, so that terms stay in the cache: a fresh 2 MB tensor costs more than
    the arithmetic on it (21 ms against 7 for one subtraction over 512 x 65536 on two cores).
    """
    count, columns = matrix.shape
    step = max(1, min(count, CHUNK_ELEMENTS // columns))
    workspace = matrix.new_empty(step, columns, dtype=accumulation_dtype(matrix.dtype))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), workspace[: stop - start]
