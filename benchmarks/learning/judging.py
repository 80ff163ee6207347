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
from dinov3core.evals.agreement import agreement, patch_labels
from dinov3core.evals.correspondence import correspondence
from dinov3core.evals.differences import Measured
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import knn_accuracy
from dinov3core.evals.patch_classes import Ridge, discriminant
from dinov3core.evals.segmentation import confusion_matrix, scores_of
from dinov3core.evals.tracking import tracking
from dinov3core.models import VisionTransformer

NEIGHBOURS = 20
AT_ONCE = 256  # images through the backbone
CLASSES = len(CLASS_NAMES) + 1  # background first
# Of the figures in benchmarks/results/degradation.json. Training runs have another one, and judge
# pixels in place of whole patches.
RIDGE = Ridge(1e-3, "mean")

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
        patch agreement, see `dinov3core.evals.agreement`. `matches`: patches found within one patch
        of their place in a warped, recoloured copy. `j_and_f`: masks carried along through the
        built-in videos.
        """
        encoder = FrozenEncoder(backbone)
        bank_cls, bank_patches = _embedded(encoder, self.bank.images)
        cls, patches = _embedded(encoder, self.queries.images)
        height, width = patches.shape[2:]
        grid = (height, width)
        targets = _labels(self.queries.masks, grid)
        fitted_to = _labels(self.bank.masks[: self.fitted], grid)
        fitted = bank_patches[: self.fitted]
        warped = correspondence(backbone, self.scenes, side=self.side, images=self.pairs)
        return {
            "knn": self._knn(bank_cls, cls),
            "miou": patch_miou(fitted, fitted_to, patches, targets),
            "object_iou": patch_miou(fitted, fitted_to.clamp(max=1), patches, targets.clamp(max=1)),
            "cosine_auc": _percent(agreement(patches, targets)),
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


def _labels(masks_NSS: np.ndarray, grid: tuple[int, int]) -> Tensor:
    return patch_labels(torch.from_numpy(masks_NSS), grid, CLASSES)


def _percent(score: Measured | None) -> float:
    """Scenes show an object on a background, so that there always is a score."""
    assert score is not None
    return score.value


def patch_miou(fitted: Tensor, fitted_to: Tensor, patches: Tensor, targets: Tensor) -> float:
    """mIoU of the linear discriminant (Fisher 1936) of patch features, on held-out patches.

    Args:
        fitted, patches: maps [N, D, h, w]; fitted_to, targets: classes [N, h, w].
    """
    rows_RD = _rows(fitted)
    one_hot_RC = F.one_hot(fitted_to.flatten(), CLASSES).double()
    rule = discriminant(one_hot_RC.sum(0), one_hot_RC.T @ rows_RD, rows_RD.T @ rows_RD, RIDGE)

    predicted = rule.classes[(_rows(patches) @ rule.weight + rule.bias).argmax(1)]
    confusion = confusion_matrix(targets.flatten(), predicted, CLASSES, "scenes")
    return scores_of(confusion).miou


def _rows(maps_NDhw: Tensor) -> Tensor:
    """float64 [N h w, D]."""
    return maps_NDhw.permute(0, 2, 3, 1).flatten(0, 2).double()
