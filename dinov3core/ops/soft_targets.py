"""Student rows against teacher rows: the arguments, row losses and row gradients of both soft
cross-entropies.

Shapes: R student rows, R' target rows, J targets per student row, K prototypes. With peak_r the
largest entry of s_r, x_r = (s_r - peak_r) / temperature, total_r = sum_k exp(x_rk) and Q_r the sum
of the J target rows of r,

    loss_r = ln(total_r) * sum_k Q_rk - sum_k Q_rk x_rk
    dloss_r / ds_r = [ (sum_k Q_rk) exp(x_r) / total_r - Q_r ] / temperature.

(peak and total are kept apart: their log-sum-exp in one float32 has ten times the error in the
gradient.) Targets of an Assignment are recomputed from the teacher's logits and scalings wherever
they are needed. A single target may still
lack its division by its row sum: it is divided here by the mass sum_k Q_rk, which is known once the
row was read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.ops.dispatch import runs_kernels
from dinov3core.ops.registration import accumulation_dtype
from dinov3core.ops.sinkhorn import Assignment, row_chunks

REDUCTIONS = ("mean", "sum", "none")


class Targets(NamedTuple):
    """Target rows as operator arguments: the five fields of an Assignment, or dense rows and no
    scalings.
    """

    rows: Tensor  # [R', K]: teacher logits, or dense targets
    offset_log2: Tensor | None = None
    row_log2: Tensor | None = None
    column_log2: Tensor | None = None
    scale: Tensor | None = None


class Statistics(NamedTuple):
    """What the gradient needs of the losses, [R] each."""

    peak: Tensor
    total: Tensor
    mass: Tensor

    def of(self, rows: slice) -> "Statistics":
        return Statistics(*(part[rows] for part in self))


def check_arguments(
    name: str,
    rows: Tensor,
    prototypes: torch.Size,
    targets: Assignment | Tensor,
    temperature: float,
    target_rows: Tensor | None,
    reduction: str,
) -> tuple[Targets, Tensor | None]:
    """Targets and target_rows [R, J] as operator arguments; `rows` are the student's [R, .].

    Raises:
        ValueError: as `soft_cross_entropy` says.
    """
    given = targets.logits if isinstance(targets, Assignment) else targets
    if rows.ndim != 2 or given.ndim != 2 or given.shape[1:] != prototypes:
        raise ValueError(
            f"{name} expects student rows [R, .] and targets [R', K] with the student's K, got "
            f"{list(rows.shape)}, K = {list(prototypes)} and targets {list(given.shape)}"
        )
    if not (rows.is_floating_point() and given.is_floating_point()):
        raise ValueError(
            f"{name} expects floating student rows and targets, got {rows.dtype} and {given.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"{name} expects temperature > 0, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    pairs = _check_pairs(name, len(rows), len(given), target_rows)
    if not isinstance(targets, Assignment):
        return Targets(targets.detach()), pairs
    if pairs is not None and pairs.shape[1] > 1:
        targets = targets.normalized()
    fields = (
        targets.logits,
        targets.offset_log2,
        targets.row_log2,
        targets.column_log2,
        targets.scale,
    )
    return Targets(*fields), pairs  # by name: torch 2.11 cannot trace vars()


def _check_pairs(
    name: str, students: int, targets: int, target_rows: Tensor | None
) -> Tensor | None:
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
    """On the CPU, where looking costs no synchronisation; elsewhere a row out of range has a loss
    of NaN.
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
    return loss_R.sum() / (
        max(1, len(loss_R)) if pairs is None else (pairs >= 0).sum().clamp(min=1)
    )


def lacks_division(targets: Targets, pairs: Tensor | None) -> bool:
    """Whether the terms of a target row are still to be divided by their sum."""
    return targets.offset_log2 is not None and (pairs is None or pairs.shape[1] == 1)


def empty_results(rows: Tensor) -> tuple[Tensor, Statistics]:
    """Room for the losses and statistics of student rows [R, .]."""
    loss = rows.new_empty(rows.shape[:1], dtype=accumulation_dtype(rows.dtype))
    return loss, Statistics(*(torch.empty_like(loss) for _ in range(3)))


class TargetSums:
    """Q [r, K] of a few student rows at a time, in a buffer of its own."""

    def __init__(self, targets: Targets, pairs: Tensor | None, first: int) -> None:
        self.targets, self.pairs, self.first = targets, pairs, first
        self._buffers: dict[str, Tensor] = {}

    def of(self, rows: slice) -> Tensor:
        """The sum of the target rows of these student rows; without pairs, row r meets target row
        first + r.
        """
        count = rows.stop - rows.start
        if self.pairs is None:
            index = slice(self.first + rows.start, self.first + rows.stop)
            return self._terms(self.targets.rows[index], index, None, self._buffer("sum", count))
        total = None
        for column in self.pairs[rows].unbind(1):
            exists, index = column >= 0, column.clamp(min=0)
            if column.is_cpu and not exists.any():
                continue  # skipped pairs come in blocks: half of the work of the global crops
            chosen = self.targets.rows.index_select(0, index)
            terms = self._terms(
                chosen, index, exists, self._buffer("sum" if total is None else "term", count)
            )
            total = terms if total is None else total.add_(terms)
        return self._buffer("sum", count).zero_() if total is None else total

    def _terms(
        self, rows: Tensor, index: Tensor | slice, exists: Tensor | None, out: Tensor
    ) -> Tensor:
        _, offset, row_log2, column, scale = self.targets
        if offset is None:
            out.copy_(rows)
            return out if exists is None else out.mul_(exists[:, None])
        row = row_log2[index] if exists is None else row_log2[index].masked_fill(~exists, -math.inf)
        torch.add(offset, rows, alpha=scale.item(), out=out)
        return out.add_(column).add_(row[:, None]).exp2_()

    def _buffer(self, name: str, count: int) -> Tensor:
        if name not in self._buffers or len(self._buffers[name]) < count:
            rows = self.targets.rows
            self._buffers[name] = rows.new_empty(
                count, rows.shape[1], dtype=accumulation_dtype(rows.dtype)
            )
        return self._buffers[name][:count]


def fill_losses(
    logits: Tensor,
    targets: Targets,
    pairs: Tensor | None,
    temperature: float,
    loss: Tensor,
    statistics: Statistics,
    first: int = 0,
) -> None:
    """Losses and statistics of all rows of logits [R, K]; without pairs, row r meets target row
    first + r.
    """
    if runs_kernels("soft_cross_entropy", logits):
        from dinov3core.kernels import cross_entropy as kernels

        found = kernels.losses(
            logits, targets, pairs, temperature, lacks_division(targets, pairs), first
        )
        for room, values in zip((loss, *statistics), found):
            room.copy_(values)
        return
    target = TargetSums(targets, pairs, first)
    for rows, x in row_chunks(logits):
        peak, total, mass = statistics.of(rows)
        torch.amax(x.copy_(logits[rows]), 1, out=peak)
        log_total = torch.logsumexp(x.sub_(peak[:, None]).div_(temperature), 1)
        torch.exp(log_total, out=total)
        terms = target.of(rows)
        torch.sum(terms, 1, out=mass)
        dot = torch.linalg.vecdot(terms, x)
        if lacks_division(targets, pairs):
            loss[rows] = torch.where(mass == 0, 0.0, log_total - dot / mass)  # no mass: no target
        else:
            loss[rows] = log_total * mass - dot


def fill_gradient(
    logits: Tensor,
    targets: Targets,
    pairs: Tensor | None,
    temperature: float,
    grad: Tensor,
    statistics: Statistics,
    gradient: Tensor,
    first: int = 0,
) -> None:
    """d(sum_r grad_r loss_r) / d logits into `gradient`, which may be the logits themselves."""
    if runs_kernels("soft_cross_entropy", logits):
        from dinov3core.kernels import cross_entropy as kernels

        divide = lacks_division(targets, pairs)
        kernels.gradient(
            logits, targets, pairs, temperature, divide, grad, statistics, gradient, first
        )
        return
    target, factor = TargetSums(targets, pairs, first), grad / temperature
    for rows, x in row_chunks(logits):
        peak, total, mass = statistics.of(rows)
        share = factor[rows]
        if lacks_division(targets, pairs):
            share = torch.where(mass == 0, 0.0, share / mass)
        x.copy_(logits[rows]).sub_(peak[:, None]).div_(temperature).exp_().mul_(
            (share * mass / total)[:, None]
        )
        gradient[rows] = x.addcmul_(target.of(rows), share[:, None], value=-1)
