"""soft_cross_entropy: student rows against teacher rows, without either side's probabilities ever being stored.

Shapes: R student rows, R' target rows, J targets per student row, K prototypes. With x_r = s_r / temperature - peak_r,
peak_r the largest entry of s_r / temperature, total_r = sum_k exp(x_rk) and q_j a target row,

    loss_r = sum_j [ ln(total_r) * sum_k q_jk - sum_k q_jk x_rk ]
    dloss_r / ds_r = [ (sum_jk q_jk) exp(x_r) / total_r - sum_j q_j ] / temperature.

(peak and total are kept apart: their log-sum-exp in one float32 has ten times the error in the gradient.) Targets of an
Assignment are recomputed from the teacher's logits and scalings where they are needed; the forward keeps peak and total
[R] and the sum over k of every target row's terms [R, J], which is its missing normalisation (Assignment) or its mass
(dense targets). The backward is one more pass over both sides. Rows are worked on a few at a time, in place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.ops.registration import accumulation_dtype, first_order_only, outside_autocast
from dinov3core.ops.sinkhorn import Assignment, row_chunks

REDUCTIONS = ("mean", "sum", "none")


class Targets(NamedTuple):
    """Target rows as operator arguments: the five fields of an Assignment, or dense rows and no scalings."""

    rows: Tensor  # [R', K]: teacher logits, or dense targets
    offset_log2: Tensor | None = None
    row_log2: Tensor | None = None
    column_log2: Tensor | None = None
    scale: float = 1.0


def soft_cross_entropy(
    logits: Tensor,
    targets: Assignment | Tensor,
    *,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare student rows with one or several teacher rows each: the image and patch terms of DINO and iBOT.

    loss_r = weights_r * sum over j of -sum_k q[target_rows[r, j], k] * log_softmax(logits_r / temperature)_k

    Args:
        logits: [R, K] floating, of the student.
        targets: an `Assignment`, or dense [R', K] rows (any floating dtype; they need not sum to 1). Constants.
        temperature: of the student, > 0.
        target_rows: int64 [R] or [R, J], the target rows a student row is compared with, -1 for none; None compares
            row r with target row r.
        weights: [R] factors, constants; None: 1.
        reduction: "none": loss_r, [R]. "sum": their sum. "mean": the sum divided by the number of compared pairs
            (entries of target_rows that are not -1; R without target_rows; weights do not count), 0 without pairs.

    The DINO term over S x T crops is the mean with target_rows [S * B, T], -1 on skipped pairs; the iBOT term over N
    image-crops is the sum with weights / N.

    Returns:
        float32 (float64 for float64 logits), a scalar or [R].

    Raises:
        ValueError: on shapes, dtypes, temperature or reduction other than these; on the CPU also on a row out of range.
    """
    check_reduction("soft_cross_entropy", reduction)
    target = check_targets("soft_cross_entropy", logits, logits.shape[1:], targets, temperature, target_rows)
    rows = target_rows[:, None] if target_rows is not None and target_rows.ndim == 1 else target_rows
    loss_R = _soft_cross_entropy(logits, *target, rows, temperature)[0]
    return reduce_rows("soft_cross_entropy", loss_R, target_rows, weights, reduction)


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_targets(
    name: str,
    rows: Tensor,
    prototypes: torch.Size,
    targets: Assignment | Tensor,
    temperature: float,
    target_rows: Tensor | None,
) -> Targets:
    """The boundary check shared with the op that owns the last linear layer; `rows` are its [R, .] student rows."""
    target = Targets(*vars(targets).values()) if isinstance(targets, Assignment) else Targets(targets.detach())
    if rows.ndim != 2 or target.rows.ndim != 2 or target.rows.shape[1:] != prototypes:
        raise ValueError(
            f"{name} expects student rows [R, .] and targets [R', K] with the student's K, got {list(rows.shape)}, "
            f"K = {list(prototypes)} and targets {list(target.rows.shape)}"
        )
    if not (rows.is_floating_point() and target.rows.is_floating_point()):
        raise ValueError(f"{name} expects floating student rows and targets, got {rows.dtype} and {target.rows.dtype}")
    count = len(rows)
    if target_rows is None and count != len(target.rows):
        raise ValueError(
            f"{name} without target_rows expects one target per student row, got {len(target.rows)} for {count}"
        )
    if target_rows is not None:
        if target_rows.dtype != torch.int64 or target_rows.ndim not in (1, 2) or len(target_rows) != count:
            raise ValueError(
                f"{name} expects target_rows int64 [{count}] or [{count}, J], "
                f"got {target_rows.dtype} {list(target_rows.shape)}"
            )
        if count and not len(target.rows):
            raise ValueError(f"{name} expects at least one target row for {count} student rows, got none")
    if not temperature > 0:
        raise ValueError(f"{name} expects temperature > 0, got {temperature}")
    return target


def reduce_rows(
    name: str, loss_R: Tensor, target_rows: Tensor | None, weights: Tensor | None, reduction: str
) -> Tensor:
    """Weights and reduction, as `soft_cross_entropy` documents them."""
    if weights is not None:
        if weights.shape != loss_R.shape:
            raise ValueError(f"{name} expects weights {list(loss_R.shape)}, got {list(weights.shape)}")
        loss_R = loss_R * weights.detach()
    if reduction == "none":
        return loss_R
    if reduction == "sum":
        return loss_R.sum()
    pairs = max(1, len(loss_R)) if target_rows is None else (target_rows >= 0).sum().clamp(min=1)
    return loss_R.sum() / pairs


class Statistics(NamedTuple):
    """What the backward needs of the forward."""

    peak: Tensor  # [R]
    total: Tensor  # [R]
    sums: Tensor  # [R, J]

    def of(self, rows: slice) -> "Statistics":
        return Statistics(*(part[rows] for part in self))


class TargetRows:
    """Target rows on plain torch operations, a few at a time: `terms` computes some of them in one reused buffer."""

    def __init__(self, target: Targets) -> None:
        self.target = target
        self.dense = target.offset_log2 is None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def terms(self, index: Tensor | slice) -> Tensor:
        """[r, K] in the accumulation dtype; those of an Assignment still lack their division by their sum."""
        rows, out = self._rows(index)
        if self.dense:
            return out.copy_(rows)
        torch.add(self.target.offset_log2, rows, alpha=self.target.scale, out=out)
        return out.add_(self.target.column_log2).add_(self.target.row_log2[index][:, None]).exp2_()

    def _rows(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        rows = self.target.rows
        count = len(index) if isinstance(index, Tensor) else index.stop - index.start
        if self._buffers is None or len(self._buffers[0]) < count:
            out = rows.new_empty(count, rows.shape[1], dtype=accumulation_dtype(rows.dtype))
            self._buffers = out, out if out.dtype == rows.dtype else torch.empty_like(out, dtype=rows.dtype)
        out, gathered = (buffer[:count] for buffer in self._buffers)
        if isinstance(index, slice):
            return rows[index], out
        return torch.index_select(rows, 0, index, out=gathered), out


def targets_of(target_rows: Tensor | None, rows: slice, first: int = 0) -> list[tuple[Tensor | slice, Tensor | None]]:
    """For each of the J targets of a chunk of rows: their indices, and which of them exist (None: all of them)."""
    if target_rows is None:
        return [(slice(first + rows.start, first + rows.stop), None)]
    return [(column.clamp(min=0), column >= 0) for column in target_rows[rows].unbind(1)]


@torch.library.custom_op("dinov3core::soft_cross_entropy", mutates_args=())
@outside_autocast
def _soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    offset_log2: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: float,
    target_rows: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [R] and the three statistics."""
    check_range(target_rows, len(targets))
    loss, statistics = empty_results(logits, target_rows)
    target = TargetRows(Targets(targets, offset_log2, row_log2, column_log2, scale))
    fill_losses(logits, target, target_rows, temperature, loss, statistics)
    return loss, *statistics


def check_range(target_rows: Tensor | None, count: int) -> None:
    """On the CPU only, where looking costs no synchronisation."""
    if target_rows is not None and target_rows.is_cpu and target_rows.numel():
        low, high = (int(bound) for bound in target_rows.aminmax())
        if low < -1 or high >= count:
            raise ValueError(f"target_rows must lie in [-1, {count}) for {count} target rows, got {low} to {high}")


def empty_results(rows: Tensor, target_rows: Tensor | None) -> tuple[Tensor, Statistics]:
    """Room for loss [R] and the statistics."""
    loss = rows.new_empty(rows.shape[:1], dtype=accumulation_dtype(rows.dtype))
    sums = loss.new_empty((*loss.shape, 1) if target_rows is None else target_rows.shape)
    return loss, Statistics(torch.empty_like(loss), torch.empty_like(loss), sums)


def fill_losses(
    logits: Tensor,
    target: TargetRows,
    target_rows: Tensor | None,
    temperature: float,
    loss: Tensor,
    statistics: Statistics,
    first: int = 0,
) -> None:
    """Losses and statistics of all rows; without target_rows, row 0 meets target row `first`."""
    loss.zero_()
    for rows, x in row_chunks(logits):
        peak, total, sums = statistics.of(rows)
        torch.amax(x.copy_(logits[rows]).div_(temperature), 1, out=peak)
        log_total = torch.logsumexp(x.sub_(peak[:, None]), 1)
        torch.exp(log_total, out=total)
        for j, (index, exists) in enumerate(targets_of(target_rows, rows, first)):
            terms = target.terms(index)
            mass = torch.sum(terms, 1, out=sums[:, j])
            dot = torch.linalg.vecdot(terms, x)
            value = log_total * mass - dot if target.dense else log_total - dot / mass
            loss[rows] += value if exists is None else torch.where(exists, value, 0.0)


@_soft_cross_entropy.register_fake
def _(logits, targets, offset_log2, row_log2, column_log2, scale, target_rows, temperature):
    loss, statistics = empty_results(logits, target_rows)
    return loss, *statistics


@torch.library.custom_op("dinov3core::soft_cross_entropy_backward", mutates_args=())
@outside_autocast
def _soft_cross_entropy_backward(
    logits: Tensor,
    grad: Tensor,
    peak: Tensor,
    total: Tensor,
    sums: Tensor,
    targets: Tensor,
    offset_log2: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: float,
    target_rows: Tensor | None,
    temperature: float,
) -> Tensor:
    target = TargetRows(Targets(targets, offset_log2, row_log2, column_log2, scale))
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    fill_gradient(logits, target, target_rows, temperature, grad, Statistics(peak, total, sums), gradient)
    return gradient


def fill_gradient(
    logits: Tensor,
    target: TargetRows,
    target_rows: Tensor | None,
    temperature: float,
    grad: Tensor,
    statistics: Statistics,
    gradient: Tensor,
    first: int = 0,
) -> None:
    """d(sum_r grad_r loss_r) / d logits, which may overwrite the logits."""
    factor = grad / temperature
    for rows, x in row_chunks(logits):
        peak, total, sums = statistics.of(rows)
        columns = targets_of(target_rows, rows, first)
        shares = [_share(target.dense, factor[rows], sums[:, j], exists) for j, (_, exists) in enumerate(columns)]
        mass = sum(share * sums[:, j] for j, share in enumerate(shares))
        x.copy_(logits[rows]).div_(temperature).sub_(peak[:, None]).exp_().mul_((mass / total)[:, None])
        for (index, _), share in zip(columns, shares):
            x.addcmul_(target.terms(index), share[:, None], value=-1)
        gradient[rows] = x


def _share(dense: bool, factor: Tensor, total: Tensor, exists: Tensor | None) -> Tensor:
    """The factor on a target's terms: the row's own over the missing normalisation; 0 where there is no target."""
    share = factor if dense else factor / total
    return share if exists is None else torch.where(exists, share, 0.0)


@_soft_cross_entropy_backward.register_fake
def _(logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, targets, offset_log2, row_log2, column_log2, scale, target_rows, temperature = inputs
    ctx.save_for_backward(logits, *output[1:], targets, offset_log2, row_log2, column_log2, target_rows)
    ctx.scale, ctx.temperature = scale, temperature
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    logits, *target, target_rows = ctx.saved_tensors
    gradient = _soft_cross_entropy_backward(logits, grad, *target, ctx.scale, target_rows, ctx.temperature)
    return gradient, *(None,) * 7


_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_soft_cross_entropy_backward, "soft_cross_entropy")
