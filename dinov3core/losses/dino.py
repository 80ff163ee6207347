"""The CLS term: cross-entropy of every student crop against every teacher crop of the same image.

Shapes: S student crops, C teacher crops, B images, K prototypes; crop-major rows (row of crop c,
image b is c * B + b).
"""

import torch
from torch import Tensor

from dinov3core.ops import soft_cross_entropy
from dinov3core.ops.sinkhorn import Assignment


def pair_rows(
    student_crops: int, teacher_crops: int, images: Tensor, batch: int, skip_same: bool = False
) -> Tensor:
    """Which teacher rows each student row is compared with.

    Args:
        student_crops, teacher_crops: S and C.
        images: int64 [b], the images of this part of the batch (all of them, or one micro-batch).
        batch: B, the images of the whole batch, which the teacher rows span.
        skip_same: drop the pairs of a crop with itself (the first min(S, C) student crops are the
            teacher's).

    Returns:
        int64 [S * b, C] for `soft_cross_entropy(target_rows=...)`, -1 where a pair is dropped.
    """
    teacher = torch.arange(teacher_crops, device=images.device) * batch
    rows_SbC = (images[:, None] + teacher).expand(student_crops, -1, -1)
    if skip_same:
        same = torch.eye(student_crops, teacher_crops, dtype=torch.bool, device=images.device)
        rows_SbC = rows_SbC.masked_fill(same[:, None], -1)
    return rows_SbC.flatten(0, 1)


def pair_count(student_crops: int, teacher_crops: int, batch: int, skip_same: bool = False) -> int:
    """Number of compared (student row, teacher row) pairs: the divisor of the term."""
    return batch * (
        student_crops * teacher_crops - (min(student_crops, teacher_crops) if skip_same else 0)
    )


def dino_loss(
    logits: Tensor,
    targets: Assignment | Tensor,
    *,
    student_crops: int,
    teacher_crops: int,
    temperature: float = 0.1,
    skip_same: bool = False,
) -> Tensor:
    """Mean cross-entropy over all compared pairs (DINOv2 paper, section 4, image-level objective).

    Args:
        logits: student logits [S * B, K].
        targets: teacher assignment over C * B rows.
        skip_same: ignore pairs of identical crops (the global term).
    """
    batch = logits.shape[0] // student_crops
    images = torch.arange(batch, device=logits.device)
    rows = pair_rows(student_crops, teacher_crops, images, batch, skip_same)
    loss_R = soft_cross_entropy(
        logits, targets, temperature=temperature, target_rows=rows, reduction="none"
    )
    return loss_R.sum() / pair_count(student_crops, teacher_crops, batch, skip_same)
