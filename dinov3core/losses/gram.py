"""The Gram anchoring term (DINOv3 paper, section 4.2).

It keeps the similarities of the student's patches close to those of an earlier teacher.

Shapes: B image-crops, P patches, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops import gram_loss


def resize_patches(patches_BPD: Tensor, grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of a patch map to the student's grid, before any normalisation.

    As published: without align_corners and without antialiasing.

    Args:
        patches_BPD: teacher patches on `grid`, row-major.
        grid, to_grid: (height, width) in patches.
    """
    if grid == to_grid:
        return patches_BPD
    map_BDhw = torch.unflatten(patches_BPD.mT, 2, grid)
    resized_BDhw = F.interpolate(
        map_BDhw, size=to_grid, mode="bicubic", align_corners=False, antialias=False
    )
    return resized_BDhw.flatten(2).mT


def gram_anchor_loss(
    student_BPD: Tensor,
    teacher_BPD: Tensor,
    *,
    masks_BP: Tensor | None = None,
    tokens: str = "all",
    normalize: bool = True,
    per_image: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """Mean squared difference of the two Gram matrices.

    Args:
        student_BPD, teacher_BPD: patches after the final norm; widths may differ.
        masks_BP: bool, the patches hidden from the student.
        tokens: which patches are compared: "all", or the "masked" or "unmasked" ones, in one Gram
            matrix for all images.
        normalize, per_image, negatives: see `gram_loss`.

    Raises:
        ValueError: other `tokens`, or some of the patches without masks or in a Gram per image.
    """
    if tokens == "all":
        return gram_loss(
            student_BPD, teacher_BPD, normalize=normalize, per_image=per_image, negatives=negatives
        )
    if tokens not in ("masked", "unmasked"):
        raise ValueError(f"tokens: expected 'all', 'masked' or 'unmasked', got {tokens!r}")
    if per_image or masks_BP is None:
        raise ValueError(
            f"tokens={tokens!r} needs the masks and per_image=False: image-crops keep different "
            "patch counts"
        )
    compared_BP = masks_BP if tokens == "masked" else ~masks_BP
    return gram_loss(
        student_BPD[compared_BP],
        teacher_BPD[compared_BP],
        normalize=normalize,
        per_image=False,
        negatives=negatives,
    )
