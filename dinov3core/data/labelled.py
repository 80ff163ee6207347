"""What the evaluations read: images with a class, with a target per pixel, and videos with masks, each in two splits.

Shapes: C channels, H x W pixels, T frames.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from dinov3core.data.images import ImageSource

IGNORE = 255  # a mask's value for pixels of no class


class Pair(NamedTuple):
    """An image and its target per pixel."""

    image: Image.Image | Tensor  # RGB, or float [C, H, W] in [0, 1]
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
        """Raises UnreadableImage when either file cannot be read, DataError when their sizes differ."""
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
