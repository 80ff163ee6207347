"""The Gram anchoring term (DINOv3 paper, section 4.2): keep patch similarities close to those of an
earlier teacher.
"""

import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops import gram_loss


def resize_patches(patches_BPD: Tensor, grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of a patch map to the student's grid, before any normalisation (align_corners
    and antialias off).

    Args:
        patches_BPD: teacher patches on `grid`, row-major.
        grid, to_grid: (height, width) in patches.
    """
    if grid == to_grid:
        return patches_BPD
    patch_map = patches_BPD.mT.unflatten(2, grid)
    return (
        F.interpolate(patch_map, size=to_grid, mode="bicubic", align_corners=False, antialias=False)
        .flatten(2)
        .mT
    )


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
        masks_BP, tokens: "all", or only the "masked" / "unmasked" patches of the student's masks
            (one Gram for all).
        normalize, per_image, negatives: see `gram_loss`.
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
    chosen = masks_BP if tokens == "masked" else ~masks_BP
    return gram_loss(
        student_BPD[chosen],
        teacher_BPD[chosen],
        normalize=normalize,
        per_image=False,
        negatives=negatives,
    )
