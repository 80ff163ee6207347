"""The masked-patch term (Zhou et al. 2022, iBOT): the student predicts the teacher's assignment of
hidden patches.

Shapes: M masked patches, N image-crops (masked or not), P patches, K prototypes.
"""

import torch
from torch import Tensor

from dinov3core.ops import soft_cross_entropy
from dinov3core.ops.sinkhorn import Assignment


def mask_weights(masks_NP: Tensor) -> Tensor:
    """1 / (masked patches of the image-crop) per masked patch, in flat order: every masked crop
    weighs the same.
    """
    per_patch = masks_NP.float() / masks_NP.sum(-1, keepdim=True).clamp(min=1)
    return per_patch[masks_NP]


def ibot_loss(
    logits: Tensor,
    targets: Assignment | Tensor,
    weights: Tensor,
    crops: int,
    *,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
) -> Tensor:
    """Weighted cross-entropy over masked patches, divided by the number of all image-crops,
    unmasked ones included.

    Args:
        logits: student logits [M, K] at the masked positions.
        targets: teacher assignment or probabilities [M', K].
        weights: [M], usually `mask_weights`.
        crops: N, the divisor.
        target_rows: int64 [M], the target row of each logits row; None pairs them in order.
    """
    loss_M = soft_cross_entropy(
        logits, targets, temperature=temperature, target_rows=target_rows, reduction="none"
    )
    return (loss_M * weights).sum() / crops


def ibot_dense_loss(
    logits_NPK: Tensor, targets_NPK: Tensor, masks_NP: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """The same on full [N, P, K] tensors: mean over the masked patches of a crop, then over all
    crops.
    """
    rows = torch.nonzero(masks_NP.flatten()).squeeze(1)
    logits, targets = logits_NPK.flatten(0, 1)[rows], targets_NPK.flatten(0, 1)[rows]
    return ibot_loss(
        logits, targets, mask_weights(masks_NP), len(masks_NP), temperature=temperature
    )
