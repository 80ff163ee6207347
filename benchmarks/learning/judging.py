"""What a backbone is worth on held-out built-in scenes: as a whole image, and patch by patch.

All scores are in percent, without a learning rate or a random draw, and cost one forward pass of
every image, so that a curve of them can be drawn while a network trains.

Shapes: N rows, D width, C classes, h x w patches, P = h w.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.data.datasets import HELD_OUT, DataOptions, open_videos
from dinov3core.data.scenes import CLASS_NAMES, Rendered, Scenes
from dinov3core.evals.correspondence import correspondence
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import knn_accuracy
from dinov3core.evals.segmentation import confusion_matrix, patch_counts, scores_of
from dinov3core.evals.tracking import tracking
from dinov3core.models import VisionTransformer

NEIGHBOURS = 20
AT_ONCE = 256  # images through the backbone
CLASSES = len(CLASS_NAMES) + 1  # background first
RIDGE = 1e-3  # of the mean variance, added to every direction before a covariance is inverted

Scores = dict[str, float]


class SceneJudge:
    """Scores of a backbone on the scenes that `train/evaluate.py` judges by.

    Args:
        side: of the whole scenes, in pixels.
        bank, queries: how many scenes neighbours are sought among, and how many ask.
        fitted: scenes of the bank that the linear classifier of patches is fitted to.
        pairs: scenes whose patches are sought in a warped copy.
    """

    def __init__(
        self,
        side: int,
        bank: int = 2400,
        queries: int = 1200,
        fitted: int = 600,
        pairs: int = 100,
    ):
        self.scenes = Scenes(queries, size=side, offset=HELD_OUT + bank)
        self.queries = _rendered(self.scenes)
        self.bank = _rendered(Scenes(bank, size=side, offset=HELD_OUT))
        self.videos = open_videos("scenes", DataOptions(scene_size=side))
        self.side = side
        self.fitted = fitted
        self.pairs = pairs

    def __call__(self, backbone: VisionTransformer) -> Scores:
        """All scores of a backbone, by name.

        `knn`: 20-NN accuracy of the CLS token. `miou` and `object_iou`: of a linear classifier of
        patches into 12 textures and the background, or into objects and background. `cosine_auc`:
        see `agreement`. `matches`: patches found within one patch of their place in a warped,
        recoloured copy. `j_and_f`: masks carried along through the built-in videos.
        """
        encoder = FrozenEncoder(backbone)
        bank_cls, bank_patches = _embedded(encoder, self.bank.images)
        cls, patches = _embedded(encoder, self.queries.images)
        height, width = patches.shape[2:]
        grid = (height, width)
        targets = patch_classes(self.queries.masks, grid)
        warped = correspondence(backbone, self.scenes, side=self.side, images=self.pairs)
        return {
            "knn": self._knn(bank_cls, cls),
            "miou": patch_miou(
                bank_patches[: self.fitted],
                patch_classes(self.bank.masks[: self.fitted], grid),
                patches,
                targets,
            ),
            "object_iou": patch_miou(
                bank_patches[: self.fitted],
                patch_classes(self.bank.masks[: self.fitted], grid).clamp(max=1),
                patches,
                targets.clamp(max=1),
            ),
            "cosine_auc": agreement(patches, targets),
            "matches": warped["within_one_patch"],
            "j_and_f": tracking(backbone, self.videos)["j_and_f"],
        }

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        labels = torch.from_numpy(self.bank.labels), torch.from_numpy(self.queries.labels)
        accuracy = knn_accuracy(bank, labels[0], queries, labels[1], k=(NEIGHBOURS,))
        return accuracy.top1[NEIGHBOURS]


def _rendered(scenes: Scenes) -> Rendered:
    return scenes.render(range(len(scenes)))


def _embedded(encoder: FrozenEncoder, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """CLS tokens [N, D] and patch maps [N, D, h, w] of images [N, S, S, 3]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    starts = range(0, len(pixels), AT_ONCE)
    parts = [encoder.finite(pixels[start : start + AT_ONCE]) for start in starts]
    return torch.cat([part.cls for part in parts]), torch.cat([part.patches for part in parts])


def patch_classes(masks_NSS: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The most frequent class of the pixels of each patch, int64 [N, h, w]."""
    masks = torch.from_numpy(masks_NSS).long()
    return torch.stack([patch_counts(mask, grid, CLASSES).argmax(0) for mask in masks])


def patch_miou(fitted: Tensor, fitted_to: Tensor, patches: Tensor, targets: Tensor) -> float:
    """mIoU of the linear discriminant (Fisher 1936) of patch features, on held-out patches.

    Args:
        fitted, patches: maps [N, D, h, w]; fitted_to, targets: classes [N, h, w].
    """
    rows = _rows(fitted)
    one_hot = F.one_hot(fitted_to.flatten(), CLASSES).double()
    counts = one_hot.sum(0)
    means = one_hot.T @ rows / counts.clamp_min(1)[:, None]
    within = rows - one_hot @ means
    covariance = within.T @ within / len(rows)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    weights = torch.linalg.solve(covariance, means.T)
    log_priors = (counts / len(rows)).log()  # minus infinity for a class without a patch
    offsets = log_priors - (means.T * weights).sum(0) / 2

    predicted = (_rows(patches) @ weights + offsets).argmax(1)
    confusion = confusion_matrix(targets.flatten(), predicted, CLASSES, "scenes")
    return scores_of(confusion).miou


def agreement(patches: Tensor, classes: Tensor) -> float:
    """How well cosines of patches tell which of them show the same thing: 50 is blind, 100 perfect.

    The area under the ROC curve: the share of cases in which two patches of one class of an image
    are more alike than two of different classes of it; the mean over images with both.

    Args:
        patches: maps [N, D, h, w]; classes: [N, h, w].
    """
    unit = F.normalize(patches.flatten(2), dim=1)
    upper = torch.ones(unit.shape[2], unit.shape[2]).triu(1).bool()
    cosines = (unit.mT @ unit)[:, upper]
    flat = classes.flatten(1)
    same = (flat[:, :, None] == flat[:, None, :])[:, upper]
    alike = same.sum(1)
    others = (~same).sum(1)
    both = (alike > 0) & (others > 0)

    # Mann and Whitney 1947: from the ranks of all pairs of an image.
    ranks = cosines.argsort(1).argsort(1).double() + 1
    wins = (ranks * same).sum(1) - alike * (alike + 1) / 2
    return 100 * (wins / (alike * others))[both].mean().item()


def _rows(maps_NDhw: Tensor) -> Tensor:
    """float64 [N h w, D]."""
    return maps_NDhw.permute(0, 2, 3, 1).flatten(0, 2).double()
