"""The feature-matching term: what share of a teacher's variance a student does not explain.

A teacher's features x [R, D] are standardised by the mean of each channel and by one scale,

    z = (x - mean) / scale,        scale^2 = E |x - mean|^2 / D,

so that E |z|^2 / D is 1. Of a prediction y the term is the mean of (y - z)^2 over rows and
channels. It is 1 for whoever knows the mean alone and 0 for whoever knows everything, whatever the
teacher: features a hundred times as large are the same features, and none of several teachers
drowns the others.

One scale keeps the angles and the principal directions of a teacher: what varies most in it counts
most. A scale for each channel (Theia: Shang et al. 2024) blows up channels that hardly vary, and a
cosine (AM-RADIO: Ranzinger et al. 2023) forgets lengths. On one small teacher the first was as good
and the second was not better (LOG.md, 2026-11-24). That a single scale is the balance to prefer
among several teachers is PHI-S (Ranzinger et al. 2024, arXiv 2410.01680), whose additional rotation
leaves this term as it is: a squared distance after a linear layer has no preferred axes.

The statistics are of all rows seen so far, as sums, to which parts of a batch, processes and steps
add. They are float64: sums of squares about zero lose the variance of features far from zero
otherwise.

Shapes: R rows (images, or patches of images), D channels of the teacher.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the mean square: below it a variance is rounding, and the features are constant.
ROUNDING = 1e-12
SMALLEST = 1e-30  # a scale to divide by where all features are zero


class FeatureStatistics(NamedTuple):
    """What standardises a teacher's features."""

    mean_D: Tensor  # fp32
    scale: Tensor  # fp32, 0-d


def feature_sums(features_RD: Tensor) -> Tensor:
    """What `statistics_of` needs of some rows; sums of parts of the rows add up to the whole's.

    Returns:
        fp64 [2 + D]: the number of rows, the sum of all squares, the sum of each channel.
    """
    sum_D = features_RD.sum(0, dtype=torch.float64)
    squares = torch.linalg.vector_norm(features_RD, dtype=torch.float64).square()
    count = torch.full_like(squares, len(features_RD))
    return torch.cat([torch.stack([count, squares]), sum_D])


def finite_total(sums: Tensor, more: Tensor) -> Tensor:
    """`sums + more`, or `sums` alone where `more` holds NaN or infinity; the host does not wait."""
    return torch.where(more.isfinite().all(), sums + more, sums)


def statistics_of(sums: Tensor) -> FeatureStatistics:
    """Mean and scale of the rows that these sums are of; NaN where there was none.

    Args:
        sums: [2 + D] of `feature_sums`.
    """
    count, squares = sums[:2]
    mean_D = sums[2:] / count
    mean_square = squares / count
    variance = (mean_square - mean_D.square().sum()).clamp(min=ROUNDING * mean_square)
    scale = (variance / len(mean_D)).sqrt().clamp(min=SMALLEST)
    return FeatureStatistics(mean_D.float(), scale.float())


def standardised(features_RD: Tensor, statistics: FeatureStatistics) -> Tensor:
    """fp32 [R, D]; over all rows that the statistics are of, the mean square is 1."""
    return (features_RD.float() - statistics.mean_D) / statistics.scale


def restored(standardised_RD: Tensor, statistics: FeatureStatistics) -> Tensor:
    """The features that `standardised` gives these for; fp32."""
    return standardised_RD.float() * statistics.scale + statistics.mean_D


def unexplained_share(predicted_RD: Tensor, standardised_RD: Tensor, rows: int) -> Tensor:
    """The share of the teacher's variance that a prediction does not explain.

    Args:
        predicted_RD: by the student, of the standardised features.
        standardised_RD: of the teacher.
        rows: of the whole batch: shares of the parts of a batch add up to the batch's.
    """
    squares = F.mse_loss(predicted_RD.float(), standardised_RD, reduction="sum")
    return squares / (rows * standardised_RD.shape[1])
