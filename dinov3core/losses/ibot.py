"""The masked-patch term (iBOT, Zhou et al. 2022).

The student, who does not see the masked patches, predicts what the teacher assigns to them.

Shapes: M masked patches, N image-crops (masked or not), K prototypes.
"""

from torch import Tensor

from dinov3core.ops import soft_cross_entropy
from dinov3core.ops.sinkhorn import Assignment


def ibot_loss(
    logits: Tensor,
    targets: Assignment | Tensor,
    weights: Tensor,
    crops: int,
    *,
    temperature: float = 0.1,
    target_rows: Tensor | None = None,
) -> Tensor:
    """Weighted cross-entropy over masked patches, divided by the number of all image-crops.

    Image-crops without a mask count in the divisor, too, as published.

    Args:
        logits: of the student at the masked positions, [M, K].
        targets: of the teacher, [M', K].
        weights: [M]; 1 / masked patches of the image-crop, so that all masked crops weigh the same.
        crops: N, the divisor.
        temperature: of the student's softmax.
        target_rows: int64 [M], the target row of each logits row; None pairs them in order.
    """
    loss_M = soft_cross_entropy(
        logits, targets, temperature=temperature, target_rows=target_rows, reduction="none"
    )
    return (loss_M * weights).sum() / crops
