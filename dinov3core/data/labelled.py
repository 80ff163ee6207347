"""What the evaluations read: images with a class or a target per pixel, and videos with masks.

Shapes: C channels, H x W pixels, T frames.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from dinov3core.data.decode import Pixels
from dinov3core.data.errors import DataError
from dinov3core.data.images import ImageSource

MAX_CLASSES = 1_000_000
IGNORE = 255  # a mask's value for pixels of no class


class Pair(NamedTuple):
    """An image and its target per pixel."""

    image: Pixels  # RGB, or float [C, H, W] in [0, 1]
    target: Tensor  # [H, W]: int64 class with IGNORE, or fp32 depth in metres (0 or NaN: unknown)


class Video(NamedTuple):
    """Frames of one size and a mask for each."""

    name: str
    frames: Sequence[Image.Image]
    masks: Sequence[Tensor]  # int64 [H, W]: 0 background, 1.. objects


@runtime_checkable
class PairSource(Protocol):
    """Indexed images with a target per pixel."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Pair:
        """An image with its target.

        Raises:
            UnreadableImage: either file cannot be read; DataError: their sizes differ.
        """
        ...

    def name(self, index: int) -> str: ...


@runtime_checkable
class VideoSource(Protocol):
    """Indexed videos, read when asked for."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Video: ...

    def name(self, index: int) -> str: ...


class Labelled(NamedTuple):
    """Classification: every image has a label that indexes `class_names`."""

    train: ImageSource
    test: ImageSource
    class_names: Sequence[str]


class Segmented(NamedTuple):
    """Semantic segmentation: targets are classes."""

    train: PairSource
    test: PairSource
    class_names: Sequence[str]


class Ranged(NamedTuple):
    """Depth estimation: targets are metres."""

    train: PairSource
    test: PairSource


def split_by_class(
    labels: Sequence[int] | np.ndarray, share: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of images to learn from and of others to report on, both ascending.

    Of every class the same share is held out to report on, at least one image; a class of a single
    image is learned from. The result depends on the arguments alone.

    Args:
        labels: one integer per image.
        share: of each class to hold out, between 0 and 1.
        seed: of the choice.

    Raises:
        DataError: no class of two images, so that nothing can be held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held_out.append(rng.permutation(members)[:count])
    if not any(map(len, held_out)):
        raise DataError(
            f"expected a class of at least two images, one of them to hold out, got {len(labels)} "
            f"images of {len(held_out)} classes; add images"
        )
    test = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), test), test


def numbered_classes(labels: np.ndarray, source: str) -> list[str]:
    """Names of the classes from 0 to the highest label.

    Raises:
        DataError: more than `MAX_CLASSES`.
    """
    count = int(labels.max(initial=-1)) + 1
    if count > MAX_CLASSES:
        expected = f"class numbers below {MAX_CLASSES:,}"
        raise DataError(f"{source}: expected {expected}, got {count - 1:,}")
    return [f"class {number}" for number in range(count)]


def labels_of(source: ImageSource) -> np.ndarray:
    """int64 [N], the class of every image.

    Raises:
        DataError: an image without a label.
    """
    labels = [source.label(index) for index in range(len(source))]
    missing = next((index for index, label in enumerate(labels) if label is None), None)
    if missing is not None:
        raise DataError(
            f"{source.name(missing)}: expected a label for every image, got none here; sort it "
            "into a class"
        )
    return np.asarray(labels, np.int64)


def check_labelled(data: Labelled) -> None:
    """Refuse what no accuracy can be computed on.

    Raises:
        DataError: an empty split, a single class, or labels that do not index `class_names`.
    """
    for name, source in (("train", data.train), ("test", data.test)):
        if not len(source):
            raise DataError(
                f"the {name} split is empty: expected labelled images in both, name a folder that "
                "has them"
            )
        labels = labels_of(source)
        if labels.min() < 0 or labels.max() >= len(data.class_names):
            raise DataError(
                f"the labels of the {name} split run from {labels.min()} to {labels.max()}: "
                f"expected 0 to {len(data.class_names) - 1}, one per class name; use the same "
                "classes in both splits"
            )
    if len(np.unique(labels_of(data.train))) < 2:
        raise DataError(
            "the train split holds one class only: expected two or more, as accuracy would say "
            "nothing"
        )
