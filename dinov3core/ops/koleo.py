"""koleo_loss: spread features out by pushing every row away from its nearest neighbours.

Shapes: B rows of this process, C candidates (those rows, or those of several processes), k
neighbours, D channels. Everything is float32 (float64 for float64 features): the loss is a
logarithm of distances that reach 0.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.registration import (
    accumulation_dtype,
    first_order_only,
    full_precision,
    without_products,
)
from dinov3core.ops.unit_rows import unit_rows, unit_rows_backward

# As in the published loss: under a norm, on every coordinate of a difference, in the logarithm.
EPS = 1e-8


def koleo_loss(
    features: Tensor,
    *,
    topk: int = 1,
    group: ProcessGroup | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Spread features out (Kozachenko-Leonenko entropy estimate; Sablayrolles et al. 2019).

    With z = features / max(norm, eps) and n the topk most similar other candidates of row i,
    loss = -mean over (i, n) of ln(|z_i - z_n + eps| + eps), eps = 1e-8. The gradient reaches both
    ends of each pair.

    Args:
        features: [B, D] floating.
        topk: neighbours per row.
        group: None looks for neighbours among the rows of this process. A process group gathers the
            rows of its members (equal B everywhere); the gradient of a gathered row returns to its
            process, so summed over processes every one holds the gradient of the sum of the losses.
        group_size: with `group`, split the gathered rows into consecutive blocks of this many and
            look only inside the one this process belongs to; a multiple of B that divides B *
            processes. None: all of them.

    Returns:
        A float32 scalar (float64 for float64 features); 0, with a zero gradient, when there is no
        other row.

    Raises:
        ValueError: on features that are not a floating [B, D], topk < 1 or not below the number of
            candidates, or a group_size that does not fit.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"koleo_loss expects floating features [B, D], got {features.dtype} "
            f"{list(features.shape)}"
        )
    if group is None and group_size is not None:
        raise ValueError(
            f"koleo_loss: group_size={group_size} needs a process group, got group=None"
        )
    candidates = features
    first = 0
    if group is not None:
        candidates, first = _gather_block(features, group, group_size)
    if topk < 1 or (topk >= len(candidates) > 1):
        raise ValueError(
            f"koleo_loss: topk must be at least 1 and below the {len(candidates)} candidate rows, "
            f"got {topk}"
        )
    if len(candidates) < 2:
        return (features * 0).sum(dtype=accumulation_dtype(features.dtype))
    return _koleo(features, candidates, first, topk)[0]


def _gather_block(
    features: Tensor, group: ProcessGroup, group_size: int | None
) -> tuple[Tensor, int]:
    """The candidate rows of this process' block, and where its own rows start among them."""
    processes = dist.get_world_size(group)
    B = len(features)
    size = group_size or processes * B
    if B and (size % B or processes * B % size):
        raise ValueError(
            f"koleo_loss: group_size must be a multiple of the {B} local rows and divide the "
            f"{processes * B} gathered ones, got {group_size}"
        )
    own = dist.get_rank(group) * B
    block = own // size * size if B else 0
    gathered = _GatherRows.apply(features, group)  # type: ignore[no-untyped-call]  # torch's own
    return gathered[block : block + size], own - block


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in rank order; the backward sums what all of them ask of this one's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None]:
        dgathered = dgathered.contiguous().clone()
        dist.all_reduce(dgathered, group=ctx.group)
        drows = dgathered.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        return drows, None


@torch.library.custom_op("dinov3core::koleo", mutates_args=())
@full_precision
def _koleo(features: Tensor, candidates: Tensor, first: int, topk: int) -> tuple[Tensor, Tensor]:
    """The loss and the neighbours [B, k]; row i of `features` is candidate first + i."""
    z = unit_rows(features, EPS)
    z_all = unit_rows(candidates, EPS)
    similarity = z @ z_all.mT
    similarity.diagonal(first)[: len(z)].fill_(-torch.inf)  # a row is no neighbour of itself
    neighbours = similarity.topk(topk, dim=1).indices
    # of the difference, not sqrt(2 - 2 cos), which cancels for near neighbours
    distance = torch.linalg.vector_norm(z[:, None] - z_all[neighbours] + EPS, dim=-1)
    return -(distance + EPS).log().mean(), neighbours


@_koleo.register_fake
def _(features: Tensor, candidates: Tensor, first: int, topk: int) -> tuple[Tensor, Tensor]:
    loss = features.new_empty((), dtype=accumulation_dtype(features.dtype))
    return loss, features.new_empty((features.shape[0], topk), dtype=torch.int64)


@torch.library.custom_op("dinov3core::koleo_backward", mutates_args=())
@full_precision
def _koleo_backward(
    dloss: Tensor, features: Tensor, candidates: Tensor, neighbours: Tensor
) -> tuple[Tensor, Tensor]:
    """dfeatures and dcandidates: both ends of every pair are pushed apart."""
    z = unit_rows(features, EPS)
    z_all = unit_rows(candidates, EPS)
    difference = z[:, None] - z_all[neighbours] + EPS
    distance = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    # d(-ln(distance + EPS)) / d(difference), over the pairs of the mean
    dpair = difference * (-dloss / (neighbours.numel() * (distance + EPS) * distance))
    dz_all = _sum_by_row(neighbours.flatten(), -dpair.flatten(0, 1), torch.zeros_like(z_all))
    dfeatures = unit_rows_backward(features, z, dpair.sum(1), EPS)
    dcandidates = unit_rows_backward(candidates, z_all, dz_all, EPS)
    return dfeatures.to(features.dtype), dcandidates.to(candidates.dtype)


@_koleo_backward.register_fake
def _(
    dloss: Tensor, features: Tensor, candidates: Tensor, neighbours: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(candidates)


def _sum_by_row(index: Tensor, values: Tensor, into: Tensor) -> Tensor:
    """into[index[i]] += values[i], in a fixed order: several rows may have the same neighbour.

    On a GPU index_add_ adds in the order in which its atomics arrive and index_put_ sorts first; on
    a CPU it is index_put_ that adds from several threads at once.
    """
    if into.is_cuda:
        return into.index_put_((index,), values, accumulate=True)
    return into.index_add_(0, index, values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, candidates, _, _ = inputs
    _, neighbours = output
    ctx.save_for_backward(features, candidates, neighbours)
    ctx.mark_non_differentiable(neighbours)


def _backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_koleo_backward(dloss, *ctx.saved_tensors), None, None


_koleo.register_autograd(_backward, setup_context=_save)
first_order_only(_koleo_backward, "koleo_loss")


@register_flop_formula(torch.ops.dinov3core.koleo)
def _flops(features: torch.Size, candidates: torch.Size, *others: Any, **options: Any) -> int:
    return 2 * features[0] * candidates[0] * features[1]


without_products(torch.ops.dinov3core.koleo_backward)
