"""linear_soft_cross_entropy: the prototype layer and its cross-entropy in one, so that the logits never exist in full.

Shapes: R rows, E features, K prototypes. Rows are taken as many at a time as a row is wide, which makes a chunk of
logits as large as the weight: smaller chunks would spend their time on reading and writing the [K, E] weight gradient.
The backward multiplies the logits again instead of keeping them: 4 matrix products where stored logits need 3.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.cross_entropy import (
    TargetRows,
    Targets,
    check_range,
    check_reduction,
    check_targets,
    empty_statistics,
    fill_gradient,
    fill_statistics,
    reduce_rows,
)
from dinov3core.ops.registration import accumulation_dtype, first_order_only, outside_autocast
from dinov3core.ops.sinkhorn import Assignment


def linear_soft_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Assignment | Tensor,
    *,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """soft_cross_entropy(features @ weight.T, targets, ...) in the memory of a slab of logits.

    Args:
        features: [R, E] floating, of the student.
        weight: [K, E], the prototypes, in the dtype of the features; autocast casts both as it does for a linear layer.
        targets, temperature, target_rows, weights, reduction: see `soft_cross_entropy`.

    Returns:
        float32 (float64 for float64 features), a scalar or [R]. Gradients reach features and weight; sums are taken in
        a fixed order, so two runs agree bit by bit.

    Raises:
        ValueError: as `soft_cross_entropy`, and on features and weight of different width or dtype.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1] or features.dtype != weight.dtype:
        raise ValueError(
            f"linear_soft_cross_entropy expects features [R, E] and weight [K, E] of one dtype, got "
            f"{features.dtype} {list(features.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    check_reduction("linear_soft_cross_entropy", reduction)
    target = check_targets("linear_soft_cross_entropy", features, weight.shape[:1], targets, temperature, target_rows)
    rows = target_rows[:, None] if target_rows is not None and target_rows.ndim == 1 else target_rows
    loss_R = _linear_soft_cross_entropy(features, weight, *target, rows, temperature)[0]
    return reduce_rows("linear_soft_cross_entropy", loss_R, target_rows, weights, reduction)


@torch.library.custom_op("dinov3core::linear_soft_cross_entropy", mutates_args=())
@outside_autocast
def _linear_soft_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    center: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: float,
    target_rows: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [R], lse [R] and target sums [R, J]."""
    check_range(target_rows, len(targets))
    statistics = empty_statistics(features, target_rows)
    target = TargetRows(Targets(targets, center, row_log2, column_log2, scale))
    for rows in _slabs(features):
        logits, chosen = features[rows] @ weight.mT, None if target_rows is None else target_rows[rows]
        fill_statistics(logits, target, chosen, temperature, *(part[rows] for part in statistics), first=rows.start)
    return statistics


def _slabs(features: Tensor) -> list[slice]:
    count, width = features.shape
    return [slice(start, min(start + width, count)) for start in range(0, count, max(1, width))]


@_linear_soft_cross_entropy.register_fake
def _(features, weight, targets, center, row_log2, column_log2, scale, target_rows, temperature):
    return empty_statistics(features, target_rows)


@torch.library.custom_op("dinov3core::linear_soft_cross_entropy_backward", mutates_args=())
@outside_autocast
def _linear_soft_cross_entropy_backward(
    features: Tensor,
    weight: Tensor,
    grad: Tensor,
    lse: Tensor,
    sums: Tensor,
    targets: Tensor,
    center: Tensor | None,
    row_log2: Tensor | None,
    column_log2: Tensor | None,
    scale: float,
    target_rows: Tensor | None,
    temperature: float,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of features, and of weight in the accumulation dtype (empty unless `with_weight`)."""
    target = TargetRows(Targets(targets, center, row_log2, column_log2, scale))
    dtype = accumulation_dtype(weight.dtype)
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=dtype) if with_weight else weight.new_empty(0, dtype=dtype)
    for rows in _slabs(features):
        logits, chosen = features[rows] @ weight.mT, None if target_rows is None else target_rows[rows]
        fill_gradient(
            logits, target, chosen, temperature, grad[rows], lse[rows], sums[rows], gradient=logits, first=rows.start
        )
        grad_features[rows] = logits @ weight
        if with_weight:
            grad_weight.addmm_(logits.mT.to(dtype), features[rows].to(dtype))
    return grad_features, grad_weight


@_linear_soft_cross_entropy_backward.register_fake
def _(features, weight, *rest):
    with_weight = rest[-1]
    grad_weight = weight.new_empty(weight.shape if with_weight else (0,), dtype=accumulation_dtype(weight.dtype))
    return torch.empty_like(features, memory_format=torch.contiguous_format), grad_weight


def _save(ctx, inputs, output):
    features, weight, targets, center, row_log2, column_log2, scale, target_rows, temperature = inputs
    _, lse, sums = output
    ctx.save_for_backward(features, weight, lse, sums, targets, center, row_log2, column_log2, target_rows)
    ctx.scale, ctx.temperature = scale, temperature
    ctx.mark_non_differentiable(lse, sums)


def _backward(ctx, grad, *_):
    features, weight, lse, sums, targets, center, row_log2, column_log2, target_rows = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[1]
    target = (targets, center, row_log2, column_log2, ctx.scale, target_rows, ctx.temperature)
    grads = _linear_soft_cross_entropy_backward(features, weight, grad, lse, sums, *target, with_weight)
    return grads[0], grads[1].to(weight.dtype) if with_weight else None, *(None,) * len(target)


_linear_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_linear_soft_cross_entropy_backward, "linear_soft_cross_entropy")


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy)
def _flops(features, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * features[0] * features[1] * weight[0]


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy_backward)
def _backward_flops(features, weight, *args, out_shape=None, **kwargs) -> int:
    with_weight = args[-1]
    return (3 if with_weight else 2) * 2 * features[0] * features[1] * weight[0]
