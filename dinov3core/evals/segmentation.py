"""Semantic segmentation with a linear head on frozen patches: what the dense features know about
the class of a place.

The protocol is that of DINOv3 on ADE20K (Simeoni et al. 2025, section 6.1): last layer with its
final norm, dropout, batch norm and a 1x1 convolution, AdamW, sliding windows, dataset-level IoU.
Published: side 512, stride 341, 40,000
iterations of 16 augmented crops. The defaults are for a laptop: features of fixed windows are
computed once and kept in memory, and each training step touches the head alone.

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
from dinov3core.evals.dense_head import DenseHead, WindowCache, fit_head, predict, seeded
from dinov3core.evals.windows import (
    Frozen,
    Pairs,
    as_pixels,
    checked_pair,
    resize,
    resize_target,
    resolve_side,
    resolve_window,
    shorter_side_to,
)

PROTOCOL = (
    "Frozen patches of the last layer after the final norm; dropout 0.1, batch norm, 1x1 "
    "convolution, trained with AdamW (warm-up, cosine) on {}. Test: sliding windows, logits "
    "averaged, enlarged bilinearly to the target; IoU over all test pixels, mean over the classes "
    "that occur or are predicted."
)
FIXED = "features of fixed windows, computed once, without augmentation; a pixel's loss is that of its patch's logits"
AUGMENTED = "crops with random scale, place, flip and colours, new in every iteration; logits enlarged bilinearly"

DROPOUT = 0.1
WARMUP = 1500 / 40_000  # share of the iterations; published: 1500 of 40,000
LARGEST_SHARE, TRIES = (
    0.75,
    10,
)  # an augmented crop is drawn anew, up to ten times, while one class fills more of it


class Scores(NamedTuple):
    """Scores of a confusion matrix in percent; the IoU of a class that neither occurs nor is
    predicted is NaN.
    """

    miou: float
    iou: list[float]
    pixel_accuracy: float


def segmentation(
    backbone: nn.Module,
    data: Segmented,
    *,
    side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    augment: bool = False,
    iterations: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train a linear head on frozen patch features and report mIoU on the test split.

    Args:
        side: the shorter side of resized images; None: that of the first one, on the patch grid, at
            most 512.
        window, stride: of the sliding windows of training features and of the test; None: `side`,
            two thirds of it.
        augment: False: features of every training window are computed once, and the loss compares
            each patch with all its pixels (equal to the pixel loss of logits enlarged by nearest
            neighbour). True: every iteration runs the backbone on new crops (scale 0.5 to 2, flip,
            colours, no crop filled by one class) and enlarges bilinearly.
        iterations, batch_size, learning_rate, weight_decay: of AdamW; a batch is of windows.
        train_images, test_images: at most so many, evenly spread over the split; None: all.

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
    read = Frozen(backbone, device=device, autocast=autocast)
    train = Pairs(data.train, train_images, "segmentation: training images")
    test = Pairs(data.test, test_images, "segmentation: test images")
    side = resolve_side(side, train.first().image, read.patch_size)
    window, stride = resolve_window(window, stride, side, read.patch_size)
    with seeded(seed, read.device):
        batches: _Crops | _Cached = (
            _Crops(read, train, classes, side, window)
            if augment
            else _Cached(read, train, classes, side, window, stride)
        )
        head = DenseHead(batches.width, classes, DROPOUT).to(read.device)
        loss = fit_head(
            head,
            lambda step: batches.loss(head, batch_size),
            iterations=iterations,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=WARMUP,
        )
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for index, pair in test:
        logits = predict(read, head, pair.image, side, window, stride)
        logits = F.interpolate(logits[None], size=tuple(pair.target.shape), mode="bilinear")[0]
        confusion += confusion_matrix(
            pair.target, logits.argmax(0).cpu(), classes, data.test.name(index)
        )
    if not confusion.sum():
        raise DataError(
            "segmentation: expected pixels of a known target in the test split, got none; check "
            "them"
        )
    scores = scores_of(confusion)
    return {
        "miou": scores.miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "iou": [None if value != value else value for value in scores.iou],
        "class_names": list(data.class_names),
        "train_loss": loss,
        "unreadable": batches.unreadable + len(test.unreadable),
        "protocol": {
            "text": PROTOCOL.format(AUGMENTED if augment else FIXED),
            "augment": augment,
            "side": side,
            "window": window,
            "stride": stride,
            "iterations": iterations,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "train_images": len(train.indices),
            "test_images": len(test.indices),
            "seed": seed,
        },
    }


def confusion_matrix(target: Tensor, predicted: Tensor, classes: int, name: str) -> Tensor:
    """Pixel counts [truth, prediction], int64; pixels of IGNORE are left out.

    Raises:
        DataError: a target that is neither a class nor IGNORE.
    """
    truth = _checked_classes(target, classes, name).flatten()
    known = truth != IGNORE
    pairs = truth[known] * classes + predicted.flatten()[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor) -> Scores:
    """IoU by class over all pixels of the data set, its mean over classes that occur or are
    predicted, and accuracy.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)
    return Scores(iou.nanmean().item(), iou.tolist(), (100 * hits.sum() / counts.sum()).item())


def patch_counts(target_HW: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """How many pixels of every class lie in each patch, [C, h, w]; pixels of IGNORE count nowhere.

    int16, as they are as many as the logits, but int32 where a patch has 32,768 pixels or more.
    """
    height, width = target_HW.shape
    rows = torch.arange(height) * grid[0] // height
    columns = torch.arange(width) * grid[1] // width
    patch, patches = rows[:, None] * grid[1] + columns, grid[0] * grid[1]
    known = target_HW != IGNORE
    found = torch.bincount(target_HW[known] * patches + patch[known], minlength=classes * patches)
    most = math.ceil(height / grid[0]) * math.ceil(width / grid[1])
    return found.view(classes, *grid).to(torch.int16 if most < 2**15 else torch.int32)


class _Cached:
    """Features of all training windows, with the class counts of their patches."""

    def __init__(
        self, read: Frozen, pairs: Pairs, classes: int, side: int, window: int, stride: int
    ):
        def counts(target: Tensor, grid: tuple[int, int], index: int) -> Tensor | None:
            labels = _checked_classes(target, classes, pairs.source.name(index))
            return patch_counts(labels, grid, classes) if (labels != IGNORE).any() else None

        self.cache = WindowCache(
            read, pairs, counts, side=side, window=window, stride=stride, task="segmentation"
        )
        _check_labels(
            torch.stack([c.sum((1, 2), dtype=torch.int64) for c in self.cache.targets]).sum(0)
        )
        self.width, self.unreadable = self.cache.width, self.cache.unreadable

    def loss(self, head: DenseHead, batch_size: int) -> Tensor:
        """Cross entropy over the labelled pixels of a batch, each with the logits of its patch."""
        features, counts = self.cache.batch(batch_size)
        return -(counts * head(features).log_softmax(1)).sum() / counts.sum()


class _Crops:
    """Augmented crops of the training images, new in every iteration."""

    def __init__(self, read: Frozen, pairs: Pairs, classes: int, side: int, window: int):
        self.read, self.source, self.classes, self.window, self.side = (
            read,
            pairs.source,
            classes,
            window,
            side,
        )
        found, self.usable = torch.zeros(classes, dtype=torch.int64), []
        for (
            index,
            pair,
        ) in pairs:  # everything is read once: which images can be used is known before training
            labels = _checked_classes(pair.target, classes, self.source.name(index))
            counts = torch.bincount(labels[labels != IGNORE], minlength=classes)
            found += counts
            if counts.sum():
                self.usable.append(index)
        self.unreadable = len(pairs.unreadable)
        _check_labels(found)
        channels = len(as_pixels(self.source.load(self.usable[0]).image))
        self.width = read(torch.zeros(1, channels, window, window)).patches.shape[1]

    def loss(self, head: DenseHead, batch_size: int) -> Tensor:
        """Cross entropy over the labelled pixels of a batch of new crops, with bilinearly enlarged
        logits.
        """
        pixels, labels = zip(*(self._crop() for _ in range(batch_size)))
        target = torch.stack(labels).to(self.read.device)
        logits = head(self.read(torch.stack(pixels)).patches)
        enlarged = F.interpolate(logits, size=(self.window, self.window), mode="bilinear")
        total = F.cross_entropy(enlarged, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp_min(1)

    def _crop(self) -> tuple[Tensor, Tensor]:
        index = self.usable[_integer(len(self.usable))]
        pair = self.source.load(index)
        image = distorted(pair.image)
        pixels, target = checked_pair(Pair(image, pair.target), self.source.name(index))
        side = max(1, round(self.side * _between(0.5, 2.0)))
        size = shorter_side_to(side, *target.shape)
        pixels, target = resize(pixels, size), resize_target(target, size)
        below, beside = (max(0, self.window - length) for length in size)
        pixels, target = (
            F.pad(pixels, (0, beside, 0, below)),
            F.pad(target, (0, beside, 0, below), value=IGNORE),
        )
        top, left = self._place(target)
        rows, columns = slice(top, top + self.window), slice(left, left + self.window)
        pixels, target = pixels[:, rows, columns], target[rows, columns]
        return (pixels.flip(2), target.flip(1)) if _integer(2) else (pixels, target)

    def _place(self, target: Tensor) -> tuple[int, int]:
        """Where to cut: not where one class fills more than `LARGEST_SHARE` of the labelled pixels,
        if avoidable.
        """
        for _ in range(TRIES):
            top, left = (_integer(length - self.window + 1) for length in target.shape)
            labels = target[top : top + self.window, left : left + self.window]
            counts = torch.bincount(labels[labels != IGNORE], minlength=self.classes)
            if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return top, left


def distorted(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Brightness, contrast, saturation and hue changed with probability 1/2 each; other channel
    counts: the first two.

    The ranges are those of the usual photometric distortion: 1/8, 1/2, 1/2 and 18 degrees (Liu et
        al. 2016, SSD).
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


def _checked_classes(target: Tensor, classes: int, name: str) -> Tensor:
    target = target.long()
    wrong = (target < 0) | ((target >= classes) & (target != IGNORE))
    if wrong.any():
        raise DataError(
            f"{name}: expected classes 0 to {classes - 1} or {IGNORE} (no class), got "
            f"{target[wrong][0].item()}; check that class names and masks belong together"
        )
    return target


def _check_labels(counts: Tensor) -> None:
    """Raises DataError when training pixels are of no class or of one only."""
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
