"""What frozen patches are worth on images with masks: two scores, within seconds.

A training run asks this at every evaluation, so no head is trained.

*Linear segmentation*: patches are told apart by linear discriminant analysis (Fisher 1936), which
is the best rule for classes that are normally distributed with one covariance. It needs counts,
means and one D x D matrix, draws no random numbers, and ranks networks as the trained head of
`segmentation` does, in a fraction of its time.

*Patch agreement*: do two patches of one class look more alike than two of different classes? See
`agreement`. It is of all images, as nothing is learned for it, and costs next to nothing beside the
forward pass.

Either is the curve of the paper's figure in which patches degrade while image-level scores rise
(Simeoni et al. 2025, "DINOv3", section 4). In the quick start it is patch agreement that falls: a
linear rule finds what it needs in the patches all the time.

Shapes: N images, B of them at once, C classes, D width, R patches, S pixels of a side, h x w
patches.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import IGNORE, PairSource, Segmented
from dinov3core.evals.agreement import agreements, mean_agreement, patch_labels
from dinov3core.evals.differences import Measured
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import Pairs
from dinov3core.evals.segmentation import checked_classes, patch_counts
from dinov3core.evals.views import float_planes, square, square_target

TINY = 1e-12  # of the largest variance: below it a channel is constant


class PatchScores(NamedTuple):
    """Both scores with their standard errors over images, all in percent."""

    miou: Measured
    agreement: Measured | None  # None where no image shows patches of two classes


class Ridge(NamedTuple):
    """What is added to a covariance, so that few images, or channels that are alike, do no harm."""

    share: float
    """Of a variance."""
    of: Literal["channel", "mean"] = "channel"
    """To each channel of its own variance, so that their scales do not matter; or to all alike of
    their mean variance within classes."""


RIDGE = Ridge(0.01)


class Discriminant(NamedTuple):
    """A linear rule for patches [R, D]: the class with the largest of `patches @ weight + bias`."""

    weight: Tensor  # [D, C']
    bias: Tensor  # [C']
    classes: Tensor  # int64 [C']: those that it knows


class MaskedImages(NamedTuple):
    """Images of one size with a class per pixel."""

    pixels: Tensor  # uint8 [N, 3, S, S]
    masks: Tensor  # uint8 [N, S, S], IGNORE for no class


class PatchClasses:
    """Images with masks, decoded once, on which any number of networks can be scored.

    Args:
        data: what to learn the classes from, and what to report on.
        side: of the central square of every image that a network sees, in pixels.
        images: of either split at most, evenly spread.

    Raises:
        DataError: an empty or unreadable split, masks that do not fit, training masks of fewer than
            two classes, or test masks without a class.
    """

    def __init__(self, data: Segmented, side: int, images: int):
        self.class_names = list(data.class_names)
        self.side = side
        self.train = self._decoded(data.train, images, "training images with masks")
        self.test = self._decoded(data.test, images, "test images with masks")
        counts = torch.bincount(self.train.masks.flatten().long(), minlength=IGNORE)[:IGNORE]
        present = int((counts > 0).sum())
        if present < 2:
            raise DataError(
                f"expected training masks of at least two classes, got {present}; mean IoU would "
                "say nothing"
            )
        if bool((self.test.masks == IGNORE).all()):
            raise DataError("expected test masks with a class, got none; check them")

    def _decoded(self, source: PairSource, limit: int, what: str) -> MaskedImages:
        pixels = []
        masks = []
        for index, pair in Pairs(source, limit, what):
            target = checked_classes(pair.target, len(self.class_names), source.name(index))
            pixels.append(
                (255 * square(float_planes(pair.image), self.side)).round().to(torch.uint8)
            )
            masks.append(square_target(target, self.side).to(torch.uint8))
        return MaskedImages(torch.stack(pixels), torch.stack(masks))

    def score(self, encoder: FrozenEncoder, *, batch_size: int = 64) -> PatchScores:
        """Mean IoU of the test images by what the others show; patch agreement of all of them.

        Raises:
            ValueError: features that are not finite.
        """
        rule, of_training = self._learned(encoder, batch_size)
        areas = []
        agreeing = [of_training]
        for patches, masks in _looked_at(self.test, encoder, batch_size):
            agreeing.append(self._agreements(patches, masks))
            logits = torch.einsum("bdhw,dc->bchw", patches.double(), rule.weight)
            logits = (logits + rule.bias[:, None, None]).float().cpu()
            classes = rule.classes.cpu()
            areas += [
                _areas(mask, classes[_enlarged(one, self.side).argmax(0)], len(self.class_names))
                for one, mask in zip(logits, masks)
            ]
        return PatchScores(_miou(torch.stack(areas)), mean_agreement(torch.cat(agreeing)))

    def _learned(self, encoder: FrozenEncoder, batch_size: int) -> tuple[Discriminant, Tensor]:
        """The rule from what is summed up over training images, and their agreements."""
        sums: list[Tensor] = []
        agreeing = []
        for patches, masks in _looked_at(self.train, encoder, batch_size):
            agreeing.append(self._agreements(patches, masks))
            patches = patches.double()
            height, width = patches.shape[2:]
            weights_RC = self._shares(masks, (height, width)).to(patches)
            patches_RD = patches.movedim(1, 3).flatten(0, 2)
            weighted_RD = patches_RD * weights_RC.sum(1, keepdim=True)
            of_batch = (weights_RC.sum(0), weights_RC.T @ patches_RD, weighted_RD.T @ patches_RD)
            sums = [a + b for a, b in zip(sums, of_batch)] if sums else list(of_batch)
        shares_C, sums_CD, products_DD = sums
        return discriminant(shares_C, sums_CD, products_DD), torch.cat(agreeing)

    def _agreements(self, patches: Tensor, masks: Tensor) -> Tensor:
        height, width = patches.shape[2:]
        return agreements(patches, patch_labels(masks, (height, width), len(self.class_names)))

    def _shares(self, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """[R, C], what share of each patch is of each class; pixels of no class count nowhere."""
        counts = [patch_counts(mask.long(), grid, len(self.class_names)) for mask in masks]
        pixels = self.side**2 / math.prod(grid)
        return torch.stack(counts).movedim(1, 3).flatten(0, 2) / pixels


def _looked_at(
    images: MaskedImages, encoder: FrozenEncoder, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches [B, D, h, w] of images, and their masks."""
    for pixels, masks in zip(images.pixels.split(batch_size), images.masks.split(batch_size)):
        yield encoder.finite(pixels).patches, masks


def discriminant(
    shares_C: Tensor, sums_CD: Tensor, products_DD: Tensor, ridge: Ridge = RIDGE
) -> Discriminant:
    """Linear discriminant analysis of weighted samples, from their moments in float64.

    Args:
        shares_C: weight of all samples of each class.
        sums_CD: weighted sum of the samples of each class.
        products_DD: weighted sum of the outer products of all samples.
        ridge: what is added to the covariance within classes.
    """
    known = shares_C > 0
    priors = shares_C[known] / shares_C.sum()
    mean_D = sums_CD.sum(0) / shares_C.sum()
    offsets_CD = sums_CD[known] / shares_C[known, None] - mean_D

    # Covariance within classes: all of it less that of the class means.
    total_DD = products_DD / shares_C.sum() - torch.outer(mean_D, mean_D)
    between_DD = (offsets_CD.T * priors) @ offsets_CD
    variance_D = total_DD.diagonal()
    constant = variance_D <= TINY * variance_D.max()
    deviation_D = variance_D.where(~constant, torch.ones_like(variance_D)).sqrt()
    within_DD = total_DD - between_DD
    added_D = torch.full_like(deviation_D, ridge.share)
    if ridge.of == "mean":
        added_D = ridge.share * within_DD.diagonal().mean() / deviation_D.square()
    within_DD = within_DD / torch.outer(deviation_D, deviation_D) + torch.diag(added_D)

    # log p(class) + log p(patch | class), less what all classes have in common.
    standard_CD = (offsets_CD / deviation_D).where(~constant, 0.0)
    weight_DC = torch.linalg.solve(within_DD, standard_CD.T)
    bias_C = priors.log() - 0.5 * (standard_CD.T * weight_DC).sum(0)
    weight_DC = weight_DC / deviation_D[:, None]
    weight_DC = weight_DC.where(~constant[:, None], 0.0)
    return Discriminant(weight_DC, bias_C - mean_D @ weight_DC, known.nonzero().flatten())


def _enlarged(logits_Chw: Tensor, side: int) -> Tensor:
    return F.interpolate(logits_Chw[None], size=(side, side), mode="bilinear")[0]


def _areas(mask_SS: Tensor, predicted_SS: Tensor, classes: int) -> Tensor:
    """[3, C]: pixels of each class that are right, in the mask, and predicted."""
    known = mask_SS != IGNORE
    truth = mask_SS[known].long()
    predicted = predicted_SS[known]
    parts = (truth[truth == predicted], truth, predicted)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def _miou(areas_N3C: Tensor) -> Measured:
    """Mean IoU over all pixels, and the jackknife's standard error: every image left out once."""
    total_3C = areas_N3C.sum(0)
    count = len(areas_N3C)
    if count == 1:
        return Measured(_mean_iou(total_3C).item())
    without = _mean_iou(total_3C - areas_N3C)
    without = without[without.isfinite()]  # NaN where no other image has a class
    variance = (count - 1) / count * (without - without.mean()).square().sum()
    return Measured(_mean_iou(total_3C).item(), variance.sqrt().item())


def _mean_iou(areas: Tensor) -> Tensor:
    """In percent, of [..., 3, C], over the classes that occur or are predicted."""
    right, truth, predicted = areas.double().unbind(-2)
    return 100 * (right / (truth + predicted - right)).nanmean(-1)
