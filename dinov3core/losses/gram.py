"""The Gram anchoring term (DINOv3 paper, section 4.2).

It keeps the similarities of the student's patches close to those of an earlier teacher.

Shapes: B image-crops, P patches, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops import gram_loss


def resize_patches(
    patches_BPD: Tensor,
    grid: tuple[int, int],
    to_grid: tuple[int, int],
    *,
    mode: str,
    antialias: bool,
) -> Tensor:
    """A teacher's patch map on the student's grid, before any normalisation.

    As published without align_corners, and to that very size, not by a factor. Nothing is done
    where the grids are equal.

    Args:
        patches_BPD: on `grid`, row-major.
        grid, to_grid: (height, width) in patches.
        mode: "bicubic" or "bilinear".
        antialias: average over what a patch of a coarser `to_grid` covers.
    """
    if grid == to_grid:
        return patches_BPD
    map_BDhw = torch.unflatten(patches_BPD.mT, 2, grid)
    resized_BDhw = F.interpolate(
        map_BDhw, size=to_grid, mode=mode, align_corners=False, antialias=antialias
    )
    return resized_BDhw.flatten(2).mT


def compared_rows(tokens: str, masks_BP: Tensor, mask_indices: Tensor) -> Tensor | None:
    """Which patches are compared, int64 [n], flat positions in ascending order; None: all.

    No GPU is waited for: the host knows their count from the shapes.

    Args:
        tokens: "all", "masked" or "unmasked".
        masks_BP: bool, the patches hidden from the student.
        mask_indices: int64 [M], their flat positions.

    Raises:
        ValueError: other `tokens`.
    """
    if tokens == "all":
        return None
    if tokens == "masked":
        return mask_indices
    if tokens != "unmasked":
        raise ValueError(f"tokens: expected 'all', 'masked' or 'unmasked', got {tokens!r}")
    in_order = masks_BP.flatten().to(torch.uint8).argsort(stable=True)  # the unmasked ones first
    return in_order[: masks_BP.numel() - len(mask_indices)]


def gram_anchor_loss(
    student_BPD: Tensor,
    teacher_BPD: Tensor,
    rows: Tensor | None,
    *,
    normalize: bool,
    per_image: bool,
    negatives: str,
) -> Tensor:
    """Mean squared difference of the two Gram matrices.

    Args:
        student_BPD, teacher_BPD: patches after the final norm; widths may differ.
        rows: of `compared_rows`.
        normalize, per_image, negatives: see `gram_loss`.

    Raises:
        ValueError: some of the patches in a Gram matrix per image.
    """
    if rows is not None:
        if per_image:
            raise ValueError(
                "some of the patches need per_image=False: crops hide different counts of them"
            )
        student_BPD = student_BPD.flatten(0, 1).index_select(0, rows)
        teacher_BPD = teacher_BPD.flatten(0, 1).index_select(0, rows)
    return gram_loss(
        student_BPD, teacher_BPD, normalize=normalize, per_image=per_image, negatives=negatives
    )
