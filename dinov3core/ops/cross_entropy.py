"""soft_cross_entropy: student rows against teacher rows, without either side's probabilities ever
being stored.

The forward reads both sides once and keeps three numbers per row; the backward reads both once more
and writes the gradient. What is computed per row is in soft_targets.py.
"""

import torch
from torch import Tensor

from dinov3core.ops.registration import first_order_only, full_precision, without_products
from dinov3core.ops.sinkhorn import Assignment
from dinov3core.ops.soft_targets import (
    Statistics,
    Targets,
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
    """Compare student rows with one or several teacher rows each: the image and patch terms of DINO
    and iBOT.

    loss_r = weights_r * sum over j of -sum_k q[target_rows[r, j], k] * log_softmax(logits_r /
    temperature)_k

    Args:
        logits: [R, K] floating, of the student.
        targets: an `Assignment`, or dense [R', K] rows (any floating dtype; they need not sum to
            1). Constants.
        temperature: of the student, > 0.
        target_rows: int64 [R] or [R, J], the target rows a student row is compared with, -1 for
            none; None compares row r with target row r.
        weights: [R] factors, constants; None: 1.
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
    target, pairs = check_arguments(
        name, logits, logits.shape[1:], targets, temperature, target_rows, reduction
    )
    loss_R = _soft_cross_entropy(logits, *target, pairs, temperature)[0]
    return reduced(name, loss_R, pairs, weights, reduction)


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
    loss, statistics = empty_results(logits)
    fill_losses(
        logits,
        Targets(targets, offset_log2, row_log2, column_log2, scale),
        pairs,
        temperature,
        loss,
        statistics,
    )
    return loss, *statistics


@_soft_cross_entropy.register_fake
def _(logits, *rest):
    loss, statistics = empty_results(logits)
    return loss, *statistics


@torch.library.custom_op("dinov3core::soft_cross_entropy_backward", mutates_args=())
@full_precision
def _soft_cross_entropy_backward(
    logits: Tensor,
    grad: Tensor,
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
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    target = Targets(targets, offset_log2, row_log2, column_log2, scale)
    fill_gradient(logits, target, pairs, temperature, grad, Statistics(peak, total, mass), gradient)
    return gradient


@_soft_cross_entropy_backward.register_fake
def _(logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, targets, offset_log2, row_log2, column_log2, scale, pairs, temperature = inputs
    ctx.save_for_backward(
        logits, *output[1:], targets, offset_log2, row_log2, column_log2, scale, pairs
    )
    ctx.temperature = temperature
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    logits, *rest = ctx.saved_tensors
    gradient = _soft_cross_entropy_backward(logits, grad, *rest, ctx.temperature)
    return gradient, *(None,) * 7


_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_soft_cross_entropy_backward, "soft_cross_entropy")
without_products(
    torch.ops.dinov3core.soft_cross_entropy, torch.ops.dinov3core.soft_cross_entropy_backward
)
