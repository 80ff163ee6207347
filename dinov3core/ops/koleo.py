"""koleo_loss: spread features out by pushing every row away from its nearest neighbours.

Shapes: B rows of this process, C candidates (those rows, or those of several processes), k
neighbours, D channels. Everything is float32 (float64 for float64 features): the loss is a
logarithm of distances that reach 0.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.registration import (
    accumulation_dtype,
    first_order_only,
    full_precision,
    without_products,
)

# under a norm, on every coordinate of a difference, and inside the logarithm, as in the published
# loss
EPS = 1e-8


def koleo_loss(
    features: Tensor,
    *,
    topk: int = 1,
    group: ProcessGroup | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Kozachenko-Leonenko entropy regulariser (Sablayrolles et al. 2019): -mean ln distance to the
    nearest neighbours.

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
    candidates, first = (
        (features, 0) if group is None else _gather_block(features, group, group_size)
    )
    if group is None and group_size is not None:
        raise ValueError(
            f"koleo_loss: group_size={group_size} needs a process group, got group=None"
        )
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
    processes, B = dist.get_world_size(group), len(features)
    size = group_size or processes * B
    if B and (size % B or processes * B % size):
        raise ValueError(
            f"koleo_loss: group_size must be a multiple of the {B} local rows and divide the "
            f"{processes * B} gathered ones, got {group_size}"
        )
    own = dist.get_rank(group) * B
    block = own // size * size if B else 0
    return _GatherRows.apply(features, group)[block : block + size], own - block


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in rank order; the backward sums what every process asks of this one's
    rows.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


@torch.library.custom_op("dinov3core::koleo", mutates_args=())
@full_precision
def _koleo(features: Tensor, candidates: Tensor, first: int, topk: int) -> tuple[Tensor, Tensor]:
    """The loss and the neighbours [B, k]; row i of `features` is candidate first + i."""
    z, z_all = _unit(features), _unit(candidates)
    similarity = z @ z_all.mT
    similarity.diagonal(first)[: len(z)].fill_(-torch.inf)
    neighbours = similarity.topk(topk, dim=1).indices
    distance = torch.linalg.vector_norm(z[:, None] - z_all[neighbours] + EPS, dim=-1)
    return -(distance + EPS).log().mean(), neighbours


@_koleo.register_fake
def _(features, candidates, first, topk):
    loss = features.new_empty((), dtype=accumulation_dtype(features.dtype))
    return loss, features.new_empty((features.shape[0], topk), dtype=torch.int64)


@torch.library.custom_op("dinov3core::koleo_backward", mutates_args=())
@full_precision
def _koleo_backward(
    grad: Tensor, features: Tensor, candidates: Tensor, neighbours: Tensor
) -> tuple[Tensor, Tensor]:
    z, z_all = _unit(features), _unit(candidates)
    difference = z[:, None] - z_all[neighbours] + EPS
    distance = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    pull = difference * (-grad / (neighbours.numel() * (distance + EPS) * distance))
    grad_all = _sum_by_row(neighbours.flatten(), -pull.flatten(0, 1), torch.zeros_like(z_all))
    return _through_unit(features, z, pull.sum(1)), _through_unit(candidates, z_all, grad_all)


@_koleo_backward.register_fake
def _(grad, features, candidates, neighbours):
    return torch.empty_like(features), torch.empty_like(candidates)


def _sum_by_row(index: Tensor, values: Tensor, into: Tensor) -> Tensor:
    """into[index[i]] += values[i], in a fixed order: several rows may have the same neighbour.

    On a GPU index_add_ adds in the order in which its atomics arrive and index_put_ sorts first; on
    a CPU it is index_put_ that adds from several threads at once.
    """
    if into.is_cuda:
        return into.index_put_((index,), values, accumulate=True)
    return into.index_add_(0, index, values)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(accumulation_dtype(rows.dtype)), dim=-1, eps=EPS)


def _through_unit(rows: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to `rows` of a function of unit = rows / max(norm, EPS)."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=unit.dtype)
    radial = torch.linalg.vecdot(unit, grad).unsqueeze(-1) * (norm > EPS)
    return torch.addcmul(grad, unit, radial, value=-1).div_(norm.clamp(min=EPS)).to(rows.dtype)


def _save(ctx, inputs, output):
    features, candidates, _, _ = inputs
    ctx.save_for_backward(features, candidates, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return *_koleo_backward(grad, *ctx.saved_tensors), None, None


_koleo.register_autograd(_backward, setup_context=_save)
first_order_only(_koleo_backward, "koleo_loss")


@register_flop_formula(torch.ops.dinov3core.koleo)
def _flops(features, candidates, first, topk, *args, out_shape=None, **kwargs) -> int:
    return 2 * features[0] * candidates[0] * features[1]


without_products(torch.ops.dinov3core.koleo_backward)
