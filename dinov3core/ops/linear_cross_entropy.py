"""linear_soft_cross_entropy: the prototype layer and its cross-entropy in one, so that the logits
never exist in full.

Shapes: R rows, E features, K prototypes. Rows are taken as many at a time as a row is wide, which
makes a slab of
logits as large as the weight: smaller slabs would spend their time on reading and writing the [K,
E] weight gradient.
The backward multiplies the logits again instead of keeping them: 4 matrix products where stored
logits need 3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.registration import (
    accumulation_dtype,
    first_order_only,
    full_precision,
    wide_product,
)
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
        weight: [K, E], the prototypes, in the dtype of the features; autocast casts both as it does
            for a linear layer.
        targets, temperature, target_rows, weights, reduction: see `soft_cross_entropy`.

    Returns:
        float32 (float64 for float64 features), a scalar or [R]. Gradients reach features and
        weight; sums are taken in a fixed order, so two runs agree bit by bit.

    Raises:
        ValueError: as `soft_cross_entropy`, and on features and weight of different width or dtype.
    """
    device = features.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    if (
        features.ndim != 2
        or weight.ndim != 2
        or features.shape[1] != weight.shape[1]
        or features.dtype != weight.dtype
    ):
        raise ValueError(
            "linear_soft_cross_entropy expects features [R, E] and weight [K, E] of one dtype, "
            f"got {features.dtype} {list(features.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    name = "linear_soft_cross_entropy"
    target, pairs = check_arguments(
        name, features, weight.shape[:1], targets, temperature, target_rows, reduction
    )
    loss_R = _linear_soft_cross_entropy(features, weight, *target, pairs, temperature)[0]
    return reduced(name, loss_R, pairs, weights, reduction)


@torch.library.custom_op("dinov3core::linear_soft_cross_entropy", mutates_args=())
@full_precision
def _linear_soft_cross_entropy(
    features: Tensor,
    weight: Tensor,
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
    loss, statistics = empty_results(features)
    target = Targets(targets, offset_log2, row_log2, column_log2, scale)
    for rows, logits in _slabs(features, weight):
        chosen = None if pairs is None else pairs[rows]
        fill_losses(
            logits, target, chosen, temperature, loss[rows], statistics.of(rows), first=rows.start
        )
    return loss, *statistics


def _slabs(features: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits in the accumulation dtype: a linear layer in bfloat16 would round them."""
    count, width = features.shape
    for start in range(0, count, max(1, width)):
        rows = slice(start, min(start + width, count))
        yield rows, wide_product(features[rows], weight.mT)


@_linear_soft_cross_entropy.register_fake
def _(features, *rest):
    loss, statistics = empty_results(features)
    return loss, *statistics


@torch.library.custom_op("dinov3core::linear_soft_cross_entropy_backward", mutates_args=())
@full_precision
def _linear_soft_cross_entropy_backward(
    features: Tensor,
    weight: Tensor,
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
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of features, and of weight in the accumulation dtype (empty unless `with_weight`)."""
    target = Targets(targets, offset_log2, row_log2, column_log2, scale)
    statistics, dtype = Statistics(peak, total, mass), accumulation_dtype(weight.dtype)
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    grad_weight = (
        torch.zeros_like(weight, dtype=dtype) if with_weight else weight.new_empty(0, dtype=dtype)
    )
    for rows, logits in _slabs(features, weight):
        chosen = None if pairs is None else pairs[rows]
        gradient = (
            logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)
        )
        fill_gradient(
            logits,
            target,
            chosen,
            temperature,
            grad[rows],
            statistics.of(rows),
            gradient,
            first=rows.start,
        )
        torch.mm(gradient, weight, out=grad_features[rows])
        if with_weight and gradient.dtype == dtype:
            grad_weight.addmm_(gradient.mT, features[rows])
        elif with_weight:
            grad_weight += wide_product(gradient.mT, features[rows])
    return grad_features, grad_weight


@_linear_soft_cross_entropy_backward.register_fake
def _(features, weight, *rest):
    with_weight = rest[-1]
    grad_weight = weight.new_empty(
        weight.shape if with_weight else (0,), dtype=accumulation_dtype(weight.dtype)
    )
    return torch.empty_like(features, memory_format=torch.contiguous_format), grad_weight


def _save(ctx, inputs, output):
    features, weight, targets, offset_log2, row_log2, column_log2, scale, pairs, temperature = (
        inputs
    )
    ctx.save_for_backward(
        features, weight, *output[1:], targets, offset_log2, row_log2, column_log2, scale, pairs
    )
    ctx.temperature = temperature
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    features, weight, *rest = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[1]
    grad_features, grad_weight = _linear_soft_cross_entropy_backward(
        features, weight, grad, *rest, ctx.temperature, with_weight
    )
    return grad_features, grad_weight.to(weight.dtype) if with_weight else None, *(None,) * 7


_linear_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_linear_soft_cross_entropy_backward, "linear_soft_cross_entropy")


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy)
def _flops(features, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * features[0] * features[1] * weight[0]


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy_backward)
def _backward_flops(features, weight, *args, out_shape=None, **kwargs) -> int:
    with_weight = args[-1]
    return (3 if with_weight else 2) * 2 * features[0] * features[1] * weight[0]
