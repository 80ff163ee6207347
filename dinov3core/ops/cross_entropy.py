"""soft_cross_entropy: student rows against teacher rows; neither side's probabilities are stored.

The forward reads both sides once and keeps three numbers per row; the backward reads both once more
and writes the gradient. What is computed per row is in soft_targets.py.
"""

from typing import Any

import torch
from torch import Tensor

from dinov3core.ops.registration import first_order_only, full_precision, without_products
from dinov3core.ops.sinkhorn import Assignment
from dinov3core.ops.soft_targets import (
    SoftTargets,
    Statistics,
    check_arguments,
    check_range,
    empty_results,
    fill_gradient,
    fill_losses,
    reduced,
)


def soft_cross_entropy(
    logits: Tensor,
    targets: Assignment | Tensor,
    *,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compare student rows with one or several teacher rows each: the terms of DINO and iBOT.

    With log p_r = log_softmax(logits_r / temperature) and q the targets' probabilities,
    loss_r = -weights_r * sum over j and k of q[target_rows[r, j], k] * log p_rk.

    Args:
        logits: [R, K] floating, of the student.
        targets: an `Assignment`, or dense [R', K] rows of any floating dtype, which need not sum to
            1. They get no gradient.
        temperature: of the student, > 0.
        target_rows: int64 [R] or [R, J], the target rows a student row is compared with, -1 for
            none; None compares row r with target row r.
        weights: [R] factors, without a gradient; None: 1.
        reduction: "none": loss_r, [R]. "sum": their sum. "mean": the sum divided by the number of
            compared pairs (entries of target_rows that are not -1; R without target_rows; weights
            do not count), 0 without pairs.

    The DINO term over S x T crops is the mean with target_rows [S * B, T], -1 on skipped pairs; the
    iBOT term over N image-crops is the sum with weights / N.

    Returns:
        float32 (float64 for float64 logits), a scalar or [R].

    Raises:
        ValueError: on shapes, dtypes, temperature or reduction other than these; on the CPU also on
            a target row out of range, whose loss is NaN elsewhere.
    """
    name = "soft_cross_entropy"
    target = check_arguments(
        name, logits, logits.shape[1:], targets, temperature, target_rows, reduction
    )
    loss_R = _soft_cross_entropy(logits, *target.flat(), temperature)[0]
    return reduced(name, loss_R, target.pairs, weights, reduction)


@torch.library.custom_op("dinov3core::soft_cross_entropy", mutates_args=())
@full_precision
def _soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    offset_log2: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: Tensor | None,
    pairs: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [R] and the three statistics."""
    check_range(pairs, len(targets))
    target = SoftTargets.from_flat(targets, offset_log2, row_log2, column_log2, scale, pairs)
    loss, statistics = empty_results(logits)
    fill_losses(logits, target, temperature, loss, statistics)
    return loss, *statistics


@_soft_cross_entropy.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss, statistics = empty_results(logits)
    return loss, *statistics


@torch.library.custom_op("dinov3core::soft_cross_entropy_backward", mutates_args=())
@full_precision
def _soft_cross_entropy_backward(
    logits: Tensor,
    dloss: Tensor,
    peak: Tensor,
    total: Tensor,
    mass: Tensor,
    targets: Tensor,
    offset_log2: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: Tensor | None,
    pairs: Tensor | None,
    temperature: float,
) -> Tensor:
    """dlogits [R, K] from dloss [R]."""
    target = SoftTargets.from_flat(targets, offset_log2, row_log2, column_log2, scale, pairs)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    fill_gradient(logits, target, temperature, Statistics(peak, total, mass), dloss, dlogits)
    return dlogits


@_soft_cross_entropy_backward.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *target, temperature = inputs
    _, *statistics = output
    ctx.save_for_backward(logits, *statistics, *target)
    ctx.temperature = temperature
    ctx.mark_non_differentiable(*statistics)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, *statistics_and_target = ctx.saved_tensors
    dlogits = _soft_cross_entropy_backward(logits, dloss, *statistics_and_target, ctx.temperature)
    return dlogits, *(None,) * 7


_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_soft_cross_entropy_backward, "soft_cross_entropy")
without_products(
    torch.ops.dinov3core.soft_cross_entropy, torch.ops.dinov3core.soft_cross_entropy_backward
)
