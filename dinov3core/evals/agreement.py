"""Do patches that show the same thing look alike to a network? Nothing is learned to find out.

Any two patches of an image have a cosine. The *agreement* of the image is the probability, in
percent, that two patches of one class are more alike than two of different classes, background
being a class like any other: 50 says nothing, 100 tells them apart without a mistake. It is the
area under the ROC curve of all pairs of the image (Mann and Whitney 1947); a tie counts half.
No number is drawn, so that there is no seed. The cost is that of sorting P (P - 1) / 2 cosines.

It falls when patches degrade as in section 4 of the DINOv3 paper (Simeoni et al. 2025), and so does
what compares patches with one another, such as tracking. A linear rule need not fall: see
`patch_classes`. It is a curve to follow one network by, not a scale to rank networks of different
kinds on: on the built-in scenes the mean colours of patches alone score 89.

Shapes: N images, C classes, D width, S pixels of a side, h x w patches, P = h w, Q of them known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.data.labelled import IGNORE
from dinov3core.evals.differences import Measured
from dinov3core.evals.segmentation import patch_counts


def patch_labels(masks_NSS: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The class of most pixels of each patch, int64 [N, h, w]; IGNORE where no pixel has one.

    Args:
        masks_NSS: class numbers or IGNORE.
        grid: h and w.
        classes: how many there are.
    """
    counts_NChw = torch.stack([patch_counts(mask.long(), grid, classes) for mask in masks_NSS])
    labels_Nhw = counts_NChw.argmax(1)
    return labels_Nhw.where(counts_NChw.sum(1) > 0, IGNORE)


def agreement(patches_NDhw: Tensor, labels_Nhw: Tensor) -> Measured | None:
    """The mean over images in percent, with its standard error; None where no image has one.

    Args:
        patches_NDhw: features of patches.
        labels_Nhw: their classes, of `patch_labels`.
    """
    return mean_agreement(agreements(patches_NDhw, labels_Nhw))


def agreements(patches_NDhw: Tensor, labels_Nhw: Tensor) -> Tensor:
    """Of every image in percent, float64 [N] on the CPU; NaN without pairs of both kinds.

    Args: as for `agreement`.
    """
    images = zip(patches_NDhw.flatten(2), labels_Nhw.flatten(1).to(patches_NDhw.device))
    scores = [_of_image(patches, labels) for patches, labels in images]
    return torch.tensor(scores, dtype=torch.double)


def mean_agreement(agreements_N: Tensor) -> Measured | None:
    """Mean of images and its standard error, from the spread over them; None for a single one."""
    counted = agreements_N[agreements_N.isfinite()]
    count = len(counted)
    if not count:
        return None
    error = counted.std().item() / count**0.5 if count > 1 else None
    return Measured(counted.mean().item(), error)


def _of_image(patches_DP: Tensor, labels_P: Tensor) -> float:
    known = labels_P != IGNORE
    unit_DQ = F.normalize(patches_DP[:, known].double(), dim=0)
    labels_Q = labels_P[known]

    # Every pair of two patches once.
    rows, columns = torch.triu_indices(len(labels_Q), len(labels_Q), 1, device=labels_Q.device)
    cosines = (unit_DQ.T @ unit_DQ)[rows, columns]
    same = labels_Q[rows] == labels_Q[columns]
    alike = cosines[same]
    others = cosines[~same].sort().values

    # How many of the others lie below each pair of one class, and how many beside it.
    below = torch.searchsorted(others, alike)
    up_to = torch.searchsorted(others, alike, right=True)
    wins = (below + up_to).double().sum() / 2
    return (100 * wins / (len(alike) * len(others))).item()
