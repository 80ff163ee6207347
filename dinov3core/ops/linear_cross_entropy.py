"""linear_soft_cross_entropy: the prototype layer and its cross-entropy, without the logits in full.

Shapes: R rows, E features, K prototypes. E rows are taken at a time, which makes a slab of logits
[E, K] as large as the weight: smaller slabs would spend their time on reading and writing the
[K, E] weight gradient. The backward multiplies the logits again instead of keeping them: 4 matrix
products where stored logits need 3.
"""

from collections.abc import Iterator
from typing import Any

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
    SoftTargets,
    Statistics,
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
        features = features.to(dtype)
        weight = weight.to(dtype)
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
    target = check_arguments(
        name, features, weight.shape[:1], targets, temperature, target_rows, reduction
    )
    loss_R = _linear_soft_cross_entropy(features, weight, *target.flat(), temperature)[0]
    return reduced(name, loss_R, target.pairs, weights, reduction)


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
    target = SoftTargets.from_flat(targets, offset_log2, row_log2, column_log2, scale, pairs)
    loss, statistics = empty_results(features)
    for rows, logits in _slabs(features, weight):
        part = statistics.of_students(rows)
        fill_losses(logits, target.of_students(rows), temperature, loss[rows], part)
    return loss, *statistics


def _slabs(features: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits in the accumulation dtype, which a layer in bfloat16 would round."""
    count, width = features.shape
    for start in range(0, count, max(1, width)):
        rows = slice(start, min(start + width, count))
        yield rows, wide_product(features[rows], weight.mT)


@_linear_soft_cross_entropy.register_fake
def _(features: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss, statistics = empty_results(features)
    return loss, *statistics


@torch.library.custom_op("dinov3core::linear_soft_cross_entropy_backward", mutates_args=())
@full_precision
def _linear_soft_cross_entropy_backward(
    features: Tensor,
    weight: Tensor,
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
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dfeatures, and dweight in the accumulation dtype (empty unless `with_weight`)."""
    target = SoftTargets.from_flat(targets, offset_log2, row_log2, column_log2, scale, pairs)
    statistics = Statistics(peak, total, mass)
    dfeatures, dweight = _empty_gradients(features, weight, with_weight)
    dweight.zero_()
    for rows, logits in _slabs(features, weight):
        # the products below take operands of the layer's dtype; float32 logits give way in place
        same = logits.dtype == weight.dtype
        dlogits = logits if same else torch.empty_like(logits, dtype=weight.dtype)
        part = statistics.of_students(rows)
        fill_gradient(logits, target.of_students(rows), temperature, part, dloss[rows], dlogits)
        torch.mm(dlogits, weight, out=dfeatures[rows])
        if with_weight and dlogits.dtype == dweight.dtype:
            dweight.addmm_(dlogits.mT, features[rows])
        elif with_weight:
            dweight += wide_product(dlogits.mT, features[rows])
    return dfeatures, dweight


@_linear_soft_cross_entropy_backward.register_fake
def _(features: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    with_weight = others[-1]
    return _empty_gradients(features, weight, with_weight)


def _empty_gradients(features: Tensor, weight: Tensor, with_weight: bool) -> tuple[Tensor, Tensor]:
    shape = weight.shape if with_weight else (0,)
    dweight = weight.new_empty(shape, dtype=accumulation_dtype(weight.dtype))
    return torch.empty_like(features, memory_format=torch.contiguous_format), dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, *target, temperature = inputs
    _, *statistics = output
    ctx.save_for_backward(features, weight, *statistics, *target)
    ctx.temperature = temperature
    ctx.mark_non_differentiable(*statistics)


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    features, weight, *statistics_and_target = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[1]
    dfeatures, dweight = _linear_soft_cross_entropy_backward(
        features, weight, dloss, *statistics_and_target, ctx.temperature, with_weight
    )
    return dfeatures, dweight.to(weight.dtype) if with_weight else None, *(None,) * 7


_linear_soft_cross_entropy.register_autograd(_backward, setup_context=_save)
first_order_only(_linear_soft_cross_entropy_backward, "linear_soft_cross_entropy")


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy)
def _flops(features: torch.Size, weight: torch.Size, *others: Any, **options: Any) -> int:
    return 2 * features[0] * features[1] * weight[0]


@register_flop_formula(torch.ops.dinov3core.linear_soft_cross_entropy_backward)
def _backward_flops(features: torch.Size, weight: torch.Size, *others: Any, **options: Any) -> int:
    with_weight = others[-1]
    return (3 if with_weight else 2) * 2 * features[0] * features[1] * weight[0]
