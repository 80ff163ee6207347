"""The CLS term: cross-entropy of every student crop against every teacher crop of the same image.

Shapes: S student crops, C teacher crops, B images of the batch, b of them in this part of it, K
prototypes. Rows are crop-major: crop c of image i is row c * B + i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3core.ops import soft_cross_entropy
from dinov3core.ops.sinkhorn import Assignment


@dataclass(frozen=True)
class CropPairs:
    """Which student crops are compared with which teacher crops, in every image alike.

    Args:
        student_crops, teacher_crops: S and C.
        skip_same: leave out the pairs of a crop with itself; the first min(S, C) student crops are
            the teacher's.
    """

    student_crops: int
    teacher_crops: int
    skip_same: bool = False

    @property
    def per_image(self) -> int:
        """Number of pairs compared in an image."""
        same = min(self.student_crops, self.teacher_crops) if self.skip_same else 0
        return self.student_crops * self.teacher_crops - same

    def target_rows(self, images: Tensor, batch: int) -> Tensor:
        """The teacher rows that each student row is compared with.

        Args:
            images: int64 [b], places of the student's images in the batch.
            batch: B; the teacher's rows are those of the whole batch.

        Returns:
            int64 [S * b, C], -1 where a pair is left out.
        """
        first_C = torch.arange(self.teacher_crops, device=images.device) * batch
        rows_SbC = (images[:, None] + first_C).expand(self.student_crops, -1, -1)
        if self.skip_same:
            same_SC = torch.eye(
                self.student_crops, self.teacher_crops, dtype=torch.bool, device=images.device
            )
            rows_SbC = rows_SbC.masked_fill(same_SC[:, None], -1)
        return rows_SbC.flatten(0, 1)


def dino_losses(
    logits: Tensor,
    targets: Assignment | Tensor,
    groups: Sequence[CropPairs],
    images: Tensor,
    batch: int,
    *,
    temperature: float = 0.1,
) -> list[Tensor]:
    """Cross-entropy of each group of student crops, in one comparison with the teacher's targets.

    A group's loss is the mean over its compared pairs (DINOv2 paper, section 4, image-level
    objective), divided by their number in the whole batch: losses of the parts of a batch add up to
    the batch's. A group without a pair has loss 0.

    Args:
        logits: of the student, [sum of S * b, K], one group after the other.
        targets: of the teacher, over C * B rows.
        groups: for instance the global crops and the local ones.
        images: int64 [b], places of the student's images in the batch.
        batch: B.
        temperature: of the student's softmax.

    Returns:
        A scalar for each group.
    """
    rows_of = [pairs.target_rows(images, batch) for pairs in groups]
    loss_R = soft_cross_entropy(
        logits,
        targets,
        temperature=temperature,
        target_rows=torch.cat(rows_of),
        reduction="none",
    )
    losses_of = torch.split(loss_R, [len(rows) for rows in rows_of])
    return [
        group_R.sum() / max(batch * pairs.per_image, 1)
        for group_R, pairs in zip(losses_of, groups, strict=True)
    ]
