"""Semantic segmentation with a linear head: what frozen patches know about the class of a place.

The protocol is that of DINOv3 on ADE20K (Simeoni et al. 2025, section 6.1): last layer with its
final norm, dropout, batch norm and a 1x1 convolution, AdamW, sliding windows, dataset-level IoU.
Published: side 512, stride 341, 40,000 iterations of 16 augmented crops. The defaults are for a
laptop: features of fixed windows are computed once and kept in memory, and each training step
touches the head alone.

Shapes: C classes, B windows, D width, H x W pixels, h x w patches.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import IGNORE, Pair, Segmented
from dinov3core.data.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_tensor_contrast,
)
from dinov3core.evals.dense_head import DenseHead, DenseSettings, DenseTask, WindowCache, fit_head
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import checked_pair
from dinov3core.evals.views import float_planes, resized, resized_target, shorter_side_to

PROTOCOL = (
    "Frozen patches of the last layer after the final norm; dropout 0.1, batch norm, 1x1 "
    "convolution, trained with AdamW (warm-up, cosine) on {}. Test: sliding windows, logits "
    "averaged, enlarged bilinearly to the target; IoU over all test pixels, mean over the classes "
    "that occur or are predicted."
)
FIXED = (
    "features of fixed windows, computed once, without augmentation; a pixel's loss is that of its "
    "patch's logits"
)
AUGMENTED = (
    "crops with random scale, place, flip and colours, new in every iteration; logits enlarged "
    "bilinearly"
)

SEGMENTATION = DenseSettings(learning_rate=1e-3, weight_decay=1e-3)
DROPOUT = 0.1
WARMUP = 1500 / 40_000  # share of the iterations; published: 1500 of 40,000
# An augmented crop is drawn anew, up to ten times, while one class fills a larger share of it.
LARGEST_SHARE = 0.75
TRIES = 10


class ConfusionScores(NamedTuple):
    """Scores of a confusion matrix in percent."""

    miou: float
    iou: list[float]  # by class; NaN where it neither occurs nor is predicted
    pixel_accuracy: float


def segmentation(
    backbone: nn.Module,
    data: Segmented,
    settings: DenseSettings = SEGMENTATION,
    *,
    augment: bool = False,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train a linear head on frozen patch features and report mIoU on the test split.

    Args:
        settings: e.g. `dataclasses.replace(SEGMENTATION, iterations=40_000)`.
        augment: False: features of every training window are computed once, and the loss compares
            each patch with all its pixels (equal to the pixel loss of logits enlarged by nearest
            neighbour). True: every iteration runs the backbone on new crops (scale 0.5 to 2, flip,
            colours, no crop filled by one class) and enlarges bilinearly.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        `miou`, `iou` (by class, None where a class neither occurs nor is predicted) and
        `pixel_accuracy` in percent, `train_loss`, `unreadable` images, and the `protocol`.

    Raises:
        DataError: targets of another size than their image, outside the classes, without a labelled
            pixel, or of one class only.
        ValueError: settings out of range, or features that are not finite.
    """
    classes = len(data.class_names)
    if classes < 2:
        raise DataError(
            f"segmentation: expected at least two classes, got {list(data.class_names)}"
        )
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast_dtype)
    task = DenseTask(encoder, data, settings, "segmentation")
    with task.seeded():
        batches = _Crops(task, classes) if augment else _Cached(task, classes)
        head = DenseHead(batches.width, classes, DROPOUT).to(encoder.device)
        loss = fit_head(
            head, lambda step: batches.loss(head, settings.batch_size), settings, warmup=WARMUP
        )

    confusion = _confusion_on_test(task, head, classes)
    if not confusion.sum():
        raise DataError(
            "segmentation: expected pixels of a known target in the test split, got none; check "
            "them"
        )
    scores = scores_of(confusion)
    return {
        "miou": scores.miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "iou": [None if math.isnan(iou) else iou for iou in scores.iou],
        "class_names": list(data.class_names),
        "train_loss": loss,
        "unreadable": len(task.train.unreadable) + len(task.test.unreadable),
        "protocol": {
            "text": PROTOCOL.format(AUGMENTED if augment else FIXED),
            "augment": augment,
            **task.protocol(),
        },
    }


def _confusion_on_test(task: DenseTask, head: DenseHead, classes: int) -> Tensor:
    """Pixel counts [truth, prediction] over all test images, at the size of their targets."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for index, pair in task.test:
        logits = task.predict(head, pair.image)
        size = tuple(pair.target.shape)
        enlarged = F.interpolate(logits[None], size=size, mode="bilinear")[0]
        predicted = enlarged.argmax(0).cpu()
        name = task.test.source.name(index)
        confusion += confusion_matrix(pair.target, predicted, classes, name)
    return confusion


def confusion_matrix(target: Tensor, predicted: Tensor, classes: int, name: str) -> Tensor:
    """Pixel counts [truth, prediction], int64; pixels of IGNORE are left out.

    Raises:
        DataError: a target that is neither a class nor IGNORE.
    """
    truth = checked_classes(target, classes, name).flatten()
    known = truth != IGNORE
    pairs = truth[known] * classes + predicted.flatten()[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor) -> ConfusionScores:
    """IoU and accuracy over all pixels of a data set; the mean is over classes with an IoU."""
    counts = confusion.double()
    hits = counts.diagonal()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)
    accuracy = 100 * hits.sum() / counts.sum()
    return ConfusionScores(iou.nanmean().item(), iou.tolist(), accuracy.item())


def patch_counts(target_HW: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """How many pixels of every class lie in each patch, [C, h, w]; pixels of IGNORE count nowhere.

    int16, as they are as many as the logits, but int32 where a patch has 32,768 pixels or more.
    """
    height, width = target_HW.shape
    rows = torch.arange(height) * grid[0] // height
    columns = torch.arange(width) * grid[1] // width
    patch = rows[:, None] * grid[1] + columns  # number of the patch that holds a pixel
    patches = grid[0] * grid[1]
    known = target_HW != IGNORE
    counts = torch.bincount(target_HW[known] * patches + patch[known], minlength=classes * patches)
    most = math.ceil(height / grid[0]) * math.ceil(width / grid[1])
    return counts.view(classes, *grid).to(torch.int16 if most < 2**15 else torch.int32)


class _Cached:
    """Features of all training windows, with the class counts of their patches."""

    def __init__(self, task: DenseTask, classes: int):
        source = task.train.source

        def counts_of(target: Tensor, grid: tuple[int, int], index: int) -> Tensor | None:
            labels = checked_classes(target, classes, source.name(index))
            return patch_counts(labels, grid, classes) if (labels != IGNORE).any() else None

        self.cache = WindowCache(task, counts_of)
        by_window = [counts.sum((1, 2), dtype=torch.int64) for counts in self.cache.targets]
        _check_labels(torch.stack(by_window).sum(0))
        self.width = self.cache.width

    def loss(self, head: DenseHead, batch_size: int) -> Tensor:
        """Cross entropy over the labelled pixels of a batch, each with the logits of its patch."""
        features, counts = self.cache.batch(batch_size)
        return -(counts * head(features).log_softmax(1)).sum() / counts.sum()


class _Crops:
    """Augmented crops of the training images, new in every iteration."""

    def __init__(self, task: DenseTask, classes: int):
        self.encoder = task.encoder
        self.source = task.train.source
        self.classes = classes
        self.side = task.windows.side
        self.window = task.windows.window
        # Everything is read once: which images can be used is known before training.
        total = torch.zeros(classes, dtype=torch.int64)
        self.usable: list[int] = []
        for index, pair in task.train:
            labels = checked_classes(pair.target, classes, self.source.name(index))
            counts = torch.bincount(labels[labels != IGNORE], minlength=classes)
            total += counts
            if counts.sum():
                self.usable.append(index)
        _check_labels(total)
        channels = len(float_planes(self.source.load(self.usable[0]).image))
        nothing = torch.zeros(1, channels, self.window, self.window)
        self.width = self.encoder.finite(nothing).patches.shape[1]

    def loss(self, head: DenseHead, batch_size: int) -> Tensor:
        """Cross entropy over the labelled pixels of new crops, with bilinearly enlarged logits."""
        pixels, labels = zip(*(self._crop() for _ in range(batch_size)))
        target = torch.stack(labels).to(self.encoder.device)
        logits = head(self.encoder.finite(torch.stack(pixels)).patches)
        enlarged = F.interpolate(logits, size=(self.window, self.window), mode="bilinear")
        total = F.cross_entropy(enlarged, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp_min(1)

    def _crop(self) -> tuple[Tensor, Tensor]:
        index = self.usable[_integer(len(self.usable))]
        pair = self.source.load(index)
        image = distorted(pair.image)
        pixels, target = checked_pair(Pair(image, pair.target), self.source.name(index))

        # Another scale; what is then smaller than a window is padded with black of no class.
        side = max(1, round(self.side * _between(0.5, 2.0)))
        size = shorter_side_to(side, *target.shape)
        below, beside = (max(0, self.window - length) for length in size)
        pixels = F.pad(resized(pixels, size), (0, beside, 0, below))
        target = F.pad(resized_target(target, size), (0, beside, 0, below), value=IGNORE)

        top, left = self._place(target)
        rows = slice(top, top + self.window)
        columns = slice(left, left + self.window)
        pixels = pixels[:, rows, columns]
        target = target[rows, columns]
        return (pixels.flip(2), target.flip(1)) if _integer(2) else (pixels, target)

    def _place(self, target: Tensor) -> tuple[int, int]:
        """Where to cut: where one class fills at most `LARGEST_SHARE`, if such a place is drawn."""
        for _ in range(TRIES):
            top, left = (_integer(length - self.window + 1) for length in target.shape)
            labels = target[top : top + self.window, left : left + self.window]
            counts = torch.bincount(labels[labels != IGNORE], minlength=self.classes)
            if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return top, left


def distorted(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Brightness, contrast, saturation and hue changed, each with probability 1/2.

    Tensors, of other channel counts, know the first two. The ranges are those of the usual
    photometric distortion: 1/8, 1/2, 1/2 and 18 degrees (Liu et al. 2016, SSD).
    """
    if isinstance(image, Tensor):
        image = (image * _between(0.875, 1.125)).clamp(0, 1) if _integer(2) else image
        return adjust_tensor_contrast(image, _between(0.5, 1.5)) if _integer(2) else image
    image = image.convert("RGB")
    for change, low, high in (
        (adjust_brightness, 0.875, 1.125),
        (adjust_contrast, 0.5, 1.5),
        (adjust_saturation, 0.5, 1.5),
        (adjust_hue, -0.05, 0.05),
    ):
        image = change(image, _between(low, high)) if _integer(2) else image
    return image


def _integer(below: int) -> int:
    return int(torch.randint(below, ()))


def _between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def checked_classes(target: Tensor, classes: int, name: str) -> Tensor:
    """A target as int64.

    Raises:
        DataError: a value that is neither a class nor IGNORE.
    """
    target = target.long()
    wrong = (target < 0) | ((target >= classes) & (target != IGNORE))
    if wrong.any():
        raise DataError(
            f"{name}: expected classes 0 to {classes - 1} or {IGNORE} (no class), got "
            f"{target[wrong][0].item()}; check that class names and masks belong together"
        )
    return target


def _check_labels(counts: Tensor) -> None:
    """Refuse training pixels [C] that are of no class or of one only, with a DataError."""
    present = (counts > 0).nonzero().flatten().tolist()
    if not present:
        raise DataError(
            "segmentation: expected pixels of a known target in the training split, got none; "
            "check them"
        )
    if len(present) < 2:
        raise DataError(
            "segmentation: expected at least two classes in the training targets, got only class "
            f"{present[0]}; IoU would say nothing"
        )
