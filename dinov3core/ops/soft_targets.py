"""Student rows against teacher rows: what both soft cross-entropies check and compute per row.

Shapes: R student rows, R' target rows, J targets per student row, K prototypes. With peak_r the
largest entry of s_r, x_r = (s_r - peak_r) / temperature, total_r = sum_k exp(x_rk) and Q_r the sum
of the J target rows of r,

    loss_r = ln(total_r) * sum_k Q_rk - sum_k Q_rk x_rk
    dloss_r / ds_r = [ (sum_k Q_rk) exp(x_r) / total_r - Q_r ] / temperature.

(peak and total are kept apart: their log-sum-exp in one float32 has ten times the error in the
gradient.) Targets of an Assignment are recomputed from the teacher's logits and scalings wherever
they are needed. A single target may still lack its division by its row sum: it is divided here by
the mass sum_k Q_rk, which is known once the row was read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.ops.dispatch import runs_kernels
from dinov3core.ops.registration import accumulation_dtype
from dinov3core.ops.sinkhorn import Assignment, row_chunks

REDUCTIONS = ("mean", "sum", "none")


class SoftTargets(NamedTuple):
    """What student rows are compared with.

    Attributes:
        teacher: R' target rows, balanced or dense [R', K].
        pairs: [R, J], the target rows of every student row, -1 for none; None: student row r has
            target row r.
    """

    teacher: Assignment | Tensor
    pairs: Tensor | None

    @classmethod
    def from_flat(cls, matrix: Tensor, *others: Tensor | None) -> "SoftTargets":
        """From operator arguments, which are tensors: what `flat` returned."""
        *scalings, pairs = others
        given = [tensor for tensor in scalings if tensor is not None]
        return cls(Assignment(matrix, *given) if given else matrix, pairs)

    def flat(self) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """As operator arguments: logits or dense rows, four scalings or None, pairs."""
        teacher = self.teacher
        if not isinstance(teacher, Assignment):
            return teacher, None, None, None, None, self.pairs
        scalings = teacher.offset_log2, teacher.row_log2, teacher.column_log2, teacher.scale
        return teacher.logits, *scalings, self.pairs  # by name: torch 2.11 cannot trace vars()

    def of_students(self, rows: slice) -> "SoftTargets":
        """Those of some student rows: views."""
        if self.pairs is not None:
            return SoftTargets(self.teacher, self.pairs[rows])
        if isinstance(self.teacher, Assignment):
            return SoftTargets(self.teacher.rows(rows), None)
        return SoftTargets(self.teacher[rows], None)

    @property
    def lacks_division(self) -> bool:
        """Whether the terms of a target row are still to be divided by their sum."""
        single = self.pairs is None or self.pairs.shape[1] == 1
        return isinstance(self.teacher, Assignment) and single


class Statistics(NamedTuple):
    """What the gradient needs of the losses, [R] each."""

    peak: Tensor
    total: Tensor
    mass: Tensor

    def of_students(self, rows: slice) -> "Statistics":
        """Those of some student rows: views."""
        return Statistics(*(part[rows] for part in self))


def check_arguments(
    name: str,
    rows: Tensor,
    prototypes: torch.Size,
    targets: Assignment | Tensor,
    temperature: float,
    target_rows: Tensor | None,
    reduction: str,
) -> SoftTargets:
    """The target side of a call of the op `name`; `rows` are the student's [R, .].

    Raises:
        ValueError: as `soft_cross_entropy` says.
    """
    matrix = targets.logits if isinstance(targets, Assignment) else targets
    if rows.ndim != 2 or matrix.ndim != 2 or matrix.shape[1:] != prototypes:
        raise ValueError(
            f"{name} expects student rows [R, .] and targets [R', K] with the student's K, got "
            f"{list(rows.shape)}, K = {list(prototypes)} and targets {list(matrix.shape)}"
        )
    if not (rows.is_floating_point() and matrix.is_floating_point()):
        raise ValueError(
            f"{name} expects floating student rows and targets, got {rows.dtype} and {matrix.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"{name} expects temperature > 0, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    pairs = _check_pairs(name, len(rows), len(matrix), target_rows)
    if not isinstance(targets, Assignment):
        return SoftTargets(targets.detach(), pairs)
    if pairs is not None and pairs.shape[1] > 1:
        targets = targets.normalized()  # rows of a sum cannot be divided after it
    return SoftTargets(targets, pairs)


def _check_pairs(
    name: str, students: int, targets: int, target_rows: Tensor | None
) -> Tensor | None:
    """target_rows as [R, J]."""
    if target_rows is None:
        if students != targets:
            raise ValueError(
                f"{name} without target_rows expects one target per row, got {targets} for "
                f"{students} rows"
            )
        return None
    if (
        target_rows.dtype != torch.int64
        or target_rows.ndim not in (1, 2)
        or len(target_rows) != students
    ):
        raise ValueError(
            f"{name} expects target_rows int64 [{students}] or [{students}, J], "
            f"got {target_rows.dtype} {list(target_rows.shape)}"
        )
    if students and not targets:
        raise ValueError(
            f"{name} expects at least one target row for {students} student rows, got none"
        )
    return target_rows if target_rows.ndim == 2 else target_rows[:, None]


def check_range(target_rows: Tensor | None, count: int) -> None:
    """Refuse target rows that do not exist, on the CPU, where a look costs no synchronisation.

    Elsewhere a row out of range has a loss of NaN.
    """
    if target_rows is not None and target_rows.is_cpu and target_rows.numel():
        low, high = (int(bound) for bound in target_rows.aminmax())
        if low < -1 or high >= count:
            raise ValueError(
                f"target_rows must lie in [-1, {count}) for {count} target rows, got {low} to "
                f"{high}"
            )


def reduced(
    name: str, loss_R: Tensor, pairs: Tensor | None, weights: Tensor | None, reduction: str
) -> Tensor:
    """Weights and reduction, as `soft_cross_entropy` documents them."""
    if weights is not None:
        if weights.shape != loss_R.shape:
            raise ValueError(
                f"{name} expects weights {list(loss_R.shape)}, got {list(weights.shape)}"
            )
        loss_R = loss_R * weights.detach()
    if reduction == "none":
        return loss_R
    if reduction == "sum":
        return loss_R.sum()
    count = max(1, len(loss_R)) if pairs is None else (pairs >= 0).sum().clamp(min=1)
    return loss_R.sum() / count


def empty_results(rows: Tensor) -> tuple[Tensor, Statistics]:
    """Room for the losses and statistics of student rows [R, .]."""
    loss = rows.new_empty(rows.shape[:1], dtype=accumulation_dtype(rows.dtype))
    return loss, Statistics(*(torch.empty_like(loss) for _ in range(3)))


class TargetSums:
    """Q [r, K] of a few student rows at a time, in a buffer of its own."""

    def __init__(self, targets: SoftTargets) -> None:
        self.targets = targets
        self._buffers: dict[str, Tensor] = {}

    def of(self, rows: slice) -> Tensor:
        """The sum of the target rows of these student rows."""
        count = rows.stop - rows.start
        if self.targets.pairs is None:
            return self._terms(rows, None, self._buffer("sum", count))
        total = None
        for target_rows in self.targets.pairs[rows].unbind(1):
            exists = target_rows >= 0
            if exists.is_cpu and not exists.any():
                continue  # skipped pairs come in blocks: half of the work of the global crops
            room = self._buffer("sum" if total is None else "term", count)
            terms = self._terms(target_rows.clamp(min=0), exists, room)
            total = terms if total is None else total.add_(terms)
        return self._buffer("sum", count).zero_() if total is None else total

    def _terms(self, index: Tensor | slice, exists: Tensor | None, out: Tensor) -> Tensor:
        """Target rows by index; 0 where a row does not exist."""
        teacher = self.targets.teacher
        if not isinstance(teacher, Assignment):
            out.copy_(_taken(teacher, index))
            return out if exists is None else out.mul_(exists[:, None])
        row_log2 = _taken(teacher.row_log2, index)
        if exists is not None:
            row_log2 = row_log2.masked_fill(~exists, -math.inf)
        logits = _taken(teacher.logits, index)
        torch.add(teacher.offset_log2, logits, alpha=teacher.scale.item(), out=out)
        return out.add_(teacher.column_log2).add_(row_log2[:, None]).exp2_()

    def _buffer(self, name: str, count: int) -> Tensor:
        if name not in self._buffers or len(self._buffers[name]) < count:
            matrix = self.targets.flat()[0]
            dtype = accumulation_dtype(matrix.dtype)
            self._buffers[name] = matrix.new_empty(count, matrix.shape[1], dtype=dtype)
        return self._buffers[name][:count]


def _taken(tensor: Tensor, index: Tensor | slice) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def fill_losses(
    logits: Tensor, targets: SoftTargets, temperature: float, loss: Tensor, statistics: Statistics
) -> None:
    """Losses and statistics of all rows of logits [R, K]."""
    if runs_kernels("soft_cross_entropy", logits):
        from dinov3core.kernels import cross_entropy as kernels

        divide = targets.lacks_division
        kernels.losses(logits, targets.flat(), temperature, divide, loss, statistics)
        return
    sums = TargetSums(targets)
    for rows, x in row_chunks(logits):
        peak, total, mass = statistics.of_students(rows)
        torch.amax(x.copy_(logits[rows]), 1, out=peak)
        log_total = torch.logsumexp(x.sub_(peak[:, None]).div_(temperature), 1)
        torch.exp(log_total, out=total)
        terms = sums.of(rows)
        torch.sum(terms, 1, out=mass)
        dot = torch.linalg.vecdot(terms, x)
        if targets.lacks_division:
            loss[rows] = torch.where(mass == 0, 0.0, log_total - dot / mass)  # no mass: no target
        else:
            loss[rows] = log_total * mass - dot


def fill_gradient(
    logits: Tensor,
    targets: SoftTargets,
    temperature: float,
    statistics: Statistics,
    dloss: Tensor,
    dlogits: Tensor,
) -> None:
    """dlogits from dloss [R]; `dlogits` may be the logits themselves."""
    if runs_kernels("soft_cross_entropy", logits):
        from dinov3core.kernels import cross_entropy as kernels

        divide = targets.lacks_division
        kernels.gradient(logits, targets.flat(), temperature, divide, statistics, dloss, dlogits)
        return
    sums = TargetSums(targets)
    factor = dloss / temperature
    for rows, x in row_chunks(logits):
        peak, total, mass = statistics.of_students(rows)
        share = factor[rows]
        if targets.lacks_division:
            share = torch.where(mass == 0, 0.0, share / mass)
        x.copy_(logits[rows]).sub_(peak[:, None]).div_(temperature).exp_()
        x.mul_((share * mass / total)[:, None])
        dlogits[rows] = x.addcmul_(sums.of(rows), share[:, None], value=-1)
