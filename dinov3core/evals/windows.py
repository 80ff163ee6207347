"""Pictures of any size before a frozen backbone: sides on the patch grid, sliding windows, features
of their patches.

Shapes: B images, C channels, H x W pixels, D width, h x w patches. A backbone is any module with
`patch_size`, with `statistics` and with `.features(images)`, which returns `cls` [B, D] and
`patches` [B, D, h, w].
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled, Pair, PairSource, Ranged, Segmented
from dinov3core.data.progress import progress
from dinov3core.evals.backbones import known_statistics
from dinov3core.evals.features import frozen

AnyData = Labelled | Segmented | Ranged | ImageSource | PairSource

GOLDEN = (5**0.5 - 1) / 2  # its multiples fill 0 .. 1 most evenly, whatever their number
LARGEST_SIDE = (
    512  # what a side of None grows to at most; the published segmentation protocol works at 512
)


class PatchFeatures(NamedTuple):
    """Features of a stack of images, fp32 on the backbone's device."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, D, h, w]


class Frozen:
    """A backbone in eval mode and without gradients: pixels in, features out.

    Args:
        backbone: already on `device`.
        autocast: dtype of `torch.autocast`; None runs the backbone in its own dtype.

    Raises:
        ValueError: a backbone without image statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        self.backbone, self.device, self.autocast = backbone, torch.device(device), autocast
        self.patch_size: int = backbone.patch_size
        self.statistics = known_statistics(backbone)

    def __call__(self, pixels_BCHW: Tensor, **how: Any) -> PatchFeatures:
        """Features of pixels in [0, 1]; `how` goes to `backbone.features`.

        Raises:
            ValueError: another number of channels than the backbone's, or features that are not
                finite.
        """
        images = self.statistics.normalise(pixels_BCHW.to(self.device))
        with (
            frozen(self.backbone),
            torch.autocast(
                self.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ),
        ):
            found = self.backbone.features(images, **how)
        kept = PatchFeatures(found.cls.float(), found.patches.float())
        if not (kept.patches.isfinite().all() and kept.cls.isfinite().all()):
            raise ValueError(
                "features: expected finite values, got NaN or infinity; the backbone has diverged"
            )
        return kept


def as_pixels(image: Image.Image | Tensor) -> Tensor:
    """An image as float [C, H, W] in [0, 1]."""
    if isinstance(image, Tensor):
        return image.float()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def resize(pixels_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, clipped to [0, 1]."""
    if tuple(pixels_CHW.shape[1:]) == size:
        return pixels_CHW
    return F.interpolate(pixels_CHW[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def resize_target(target_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour by pixel centres: classes and depths are never mixed."""
    return F.interpolate(target_HW[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(
        target_HW.dtype
    )


def shorter_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) with the shorter one `side` and the shape kept."""
    shorter = min(height, width)
    return max(side, round(height * side / shorter)), max(side, round(width * side / shorter))


def resolve_side(side: int | None, image: Image.Image | Tensor, patch_size: int) -> int:
    """The side images are resized to; None: that of `image`, on the patch grid and at most
    `LARGEST_SIDE`.

    Raises:
        ValueError: a side off the patch grid.
    """
    if side is None:
        shorter = min(as_pixels(image).shape[1:])
        return max(1, round(min(shorter, LARGEST_SIDE) / patch_size)) * patch_size
    if side < patch_size or side % patch_size:
        near = max(1, round(side / patch_size)) * patch_size
        raise ValueError(
            f"side: expected a multiple of the patch size {patch_size}, got {side}; take {near}"
        )
    return side


def resolve_window(
    window: int | None, stride: int | None, side: int, patch_size: int
) -> tuple[int, int]:
    """Window and stride; None: the whole shorter side, and two thirds of the window (published: 512
    and 341).
    """
    window = side if window is None else window
    if window < patch_size or window % patch_size or window > side:
        raise ValueError(
            f"window: expected a multiple of the patch size {patch_size} up to side={side}, got "
            f"{window}; leave it out for windows as large as the shorter side"
        )
    stride = max(1, math.ceil(window * 2 / 3)) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride: expected 1 to window={window}, got {stride}; pixels would be left out"
        )
    return window, stride


def window_origins(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of the square windows that cover an image of sides >= window; the last ones end
    at the border.
    """
    return [
        (top, left)
        for top in _starts(height, window, stride)
        for left in _starts(width, window, stride)
    ]


def _starts(length: int, window: int, stride: int) -> list[int]:
    count = math.ceil((length - window) / stride) + 1
    return [min(index * stride, length - window) for index in range(count)]


def cut(planes_CHW: Tensor, origins: Sequence[tuple[int, int]], window: int) -> Tensor:
    """Windows [n, C, window, window] of planes [C, H, W]."""
    return torch.stack(
        [planes_CHW[:, top : top + window, left : left + window] for top, left in origins]
    )


def join(
    maps: Tensor, origins: Sequence[tuple[int, int]], size: tuple[int, int], window: int
) -> Tensor:
    """The mean of overlapping window maps [n, K, h, w], enlarged to their windows bilinearly: [K,
    H, W].
    """
    total = maps.new_zeros(maps.shape[1], *size)
    coverage = maps.new_zeros(size)
    for one, (top, left) in zip(maps, origins, strict=True):
        rows, columns = slice(top, top + window), slice(left, left + window)
        total[:, rows, columns] += F.interpolate(one[None], size=(window, window), mode="bilinear")[
            0
        ]
        coverage[rows, columns] += 1
    return total / coverage


def evenly(length: int, limit: int | None) -> list[int]:
    """At most `limit` of `length` indices, evenly spread; None: all.

    One from each of `limit` parts of one size, at a place that moves on by the golden ratio: equal
    steps would see one class only where the classes of a source take turns, as those of the
    built-in scenes do.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"number of images: expected at least 1, got {limit}; None takes all")
    if limit is None or limit >= length:
        return list(range(length))
    starts = [part * length // limit for part in range(limit + 1)]
    return [
        start + int(part * GOLDEN % 1 * (end - start))
        for part, (start, end) in enumerate(pairwise(starts))
    ]


def readable(
    source: ImageSource | PairSource, indices: Iterable[int], what: str, unreadable: list[str]
) -> Iterator[tuple[int, Any]]:
    """(index, what `source.load` gives) of all that can be read; the names of the others are added
    to `unreadable`.

    Raises:
        DataError: nothing can be read.
    """
    found = 0
    for index in indices:
        try:
            loaded = source.load(index)
        except UnreadableImage as error:
            unreadable.append(error.name)
            continue
        found += 1
        yield index, loaded
    if not found:
        raise DataError(
            f"{what}: expected at least one readable image, got {len(unreadable)} unreadable ones"
        )


class Pairs:
    """Readable pairs of a source in order, (index, pair), checked; what cannot be read is named in
    `unreadable`.

    Args:
        limit: at most so many, evenly spread; None: all.

    Raises:
        DataError: an empty source; in iteration nothing readable, or a target of another size than
            its image.
    """

    def __init__(self, source: PairSource, limit: int | None, what: str):
        self.source, self.indices, self.what = source, evenly(len(source), limit), what
        self.unreadable: list[str] = []
        _check_not_empty(self.indices, what)

    def __iter__(self) -> Iterator[tuple[int, Pair]]:
        yield from self._read(progress(self.indices, desc=self.what, unit="image"))

    def first(self) -> Pair:
        """The first readable pair."""
        return next(self._read(self.indices))[1]

    def _read(self, indices: Iterable[int]) -> Iterator[tuple[int, Pair]]:
        self.unreadable.clear()
        for index, pair in readable(self.source, indices, self.what, self.unreadable):
            yield index, checked_pair(pair, self.source.name(index))


class Images:
    """Readable images of any data in order, (index, pixels [C, H, W]), without targets; of two
    splits the test split.

    Args:
        limit: at most so many, evenly spread; None: all.

    Raises:
        DataError: an empty source; in iteration nothing readable.
    """

    def __init__(self, data: AnyData, limit: int | None, what: str):
        self.source = data.test if isinstance(data, Labelled | Segmented | Ranged) else data
        self.indices, self.what = evenly(len(self.source), limit), what
        self.unreadable: list[str] = []
        _check_not_empty(self.indices, what)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        yield from self._read(progress(self.indices, desc=self.what, unit="image"))

    def first(self) -> Tensor:
        """The first readable image."""
        return next(self._read(self.indices))[1]

    def _read(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        self.unreadable.clear()
        for index, loaded in readable(self.source, indices, self.what, self.unreadable):
            yield index, as_pixels(loaded.image if isinstance(loaded, Pair) else loaded)


def _check_not_empty(indices: Sequence[int], what: str) -> None:
    if not indices:
        raise DataError(f"{what}: expected at least one image, got an empty split")


def square(pixels_CHW: Tensor, side: int) -> Tensor:
    """The central square of an image, [C, side, side]."""
    height, width = shorter_side_to(side, *pixels_CHW.shape[1:])
    top, left = (height - side) // 2, (width - side) // 2
    return resize(pixels_CHW, (height, width))[:, top : top + side, left : left + side]


def checked_pair(pair: Pair, name: str) -> Pair:
    """The pair with pixels as a tensor.

    Raises:
        DataError: the target is of another size.
    """
    pixels = as_pixels(pair.image)
    if pair.target.shape != pixels.shape[1:]:
        raise DataError(
            f"{name}: expected a target of the image's size {list(pixels.shape[1:])}, got "
            f"{list(pair.target.shape)}; image and target must belong together pixel by pixel"
        )
    return Pair(pixels, pair.target)
