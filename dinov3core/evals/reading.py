"""Images on their way from a source to a backbone: which ones, read ahead, without broken ones.

Shapes: N images, C channels, H x W pixels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled, Pair, PairSource, Ranged, Segmented
from dinov3core.data.pixels import as_float
from dinov3core.data.progress import progress
from dinov3core.evals.views import central_view, float_planes
from dinov3core.image_statistics import ImageStatistics

AnyData = Labelled | Segmented | Ranged | ImageSource | PairSource
Item = TypeVar("Item")

GOLDEN = (5**0.5 - 1) / 2  # its multiples fill 0 .. 1 most evenly, whatever their number
STATISTICS_SAMPLE = 1000  # images that mean and deviation are measured on


def read_ahead(
    load: Callable[[int], Item], indices: Sequence[int], *, batch_size: int, workers: int
) -> Iterator[dict[int, Item | UnreadableImage]]:
    """What `load` gives by index, in batches and in order; one batch is read while one is used.

    An image that cannot be read stands in its place as the error. Any other error of `load` is
    raised when the batch it belongs to is due.

    Args:
        load: called in threads; anything slow that holds Python's lock is better left out of it.
        workers: threads; at least one is used.
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # One batch ahead, not all: images wait in memory until they are used.
        following = pool.map(lambda index: _attempt(load, index), batches[0] if batches else ())
        for batch, after in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            current = following
            following = pool.map(lambda index: _attempt(load, index), after)
            yield dict(zip(batch, current, strict=True))


def readable(
    source: ImageSource | PairSource, indices: Iterable[int], what: str, unreadable: list[str]
) -> Iterator[tuple[int, Any]]:
    """(index, what `source.load` gives) of all that can be read.

    Args:
        what: for messages.
        unreadable: the names of the others are added to it.

    Raises:
        DataError: nothing can be read.
    """
    count = 0
    for index in indices:
        item = _attempt(source.load, index)
        if isinstance(item, UnreadableImage):
            unreadable.append(item.name)
            continue
        count += 1
        yield index, item
    if not count:
        raise DataError(
            f"{what}: expected at least one readable image, got {len(unreadable)} unreadable ones"
        )


class ReadableViews(NamedTuple):
    """Central views of some images of a source; of the others why they cannot be read."""

    pixels: list[Tensor]  # [C, crop, crop] each
    indices: list[int]
    unreadable: list[str]


def read_views(
    source: ImageSource | PairSource, indices: Iterable[int], *, resize: int, crop: int
) -> ReadableViews:
    """The readable ones of some images as `central_view` shows them."""
    views = ReadableViews([], [], [])
    for index in indices:
        item = _attempt(source.load, index)
        if isinstance(item, UnreadableImage):
            views.unreadable.append(str(item))
            continue
        views.pixels.append(central_view(image_of(item), resize=resize, crop=crop))
        views.indices.append(index)
    return views


def measured_statistics(source: ImageSource | PairSource) -> ImageStatistics:
    """Mean and standard deviation per channel of up to 1000 images, spread evenly.

    Every image has the same weight; Pillow images are measured at 64 x 64 pixels.

    Raises:
        DataError: none of them can be read.
    """
    sample = min(STATISTICS_SAMPLE, len(source))
    indices = torch.linspace(0, len(source) - 1, sample).long().tolist()
    means: list[Tensor] = []
    squares: list[Tensor] = []
    for index in progress(indices, desc="image statistics", unit="image"):
        item = _attempt(source.load, index)
        if isinstance(item, UnreadableImage):  # counted where it is used
            continue
        image = image_of(item)
        view = image if isinstance(image, Tensor) else central_view(image, resize=64, crop=64)
        pixels = as_float(view).double()
        means.append(pixels.mean((1, 2)))
        squares.append(pixels.square().mean((1, 2)))
    if not means:
        raise DataError("image statistics: none of the images can be read; check the path")
    mean = torch.stack(means).mean(0)
    variance = torch.stack(squares).mean(0) - mean.square()
    deviation = variance.clamp_min(1e-12).sqrt()
    return ImageStatistics(tuple(mean.tolist()), tuple(deviation.tolist()))


def _attempt(load: Callable[[int], Item], index: int) -> Item | UnreadableImage:
    try:
        return load(index)
    except UnreadableImage as error:
        return error


def image_of(item: Any) -> Any:
    """The image of what a source gives: of a pair its first half."""
    return item.image if isinstance(item, Pair) else item


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


class _Readable(Generic[Item]):
    """What can be read of a source, in order, as (index, item); of `Pairs` and of `Images`.

    Args:
        limit: at most so many, evenly spread; None: all.
        what: for messages.

    Attributes:
        unreadable: names of those that could not be read.

    Raises:
        DataError: an empty source; in iteration nothing readable.
    """

    def __init__(self, source: ImageSource | PairSource, limit: int | None, what: str):
        self.source = source
        self.indices = evenly(len(source), limit)
        self.what = what
        self.unreadable: list[str] = []
        if not self.indices:
            raise DataError(f"{what}: expected at least one image, got an empty split")

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        yield from self._items(progress(self.indices, desc=self.what, unit="image"))

    def first(self) -> Item:
        """The first readable one."""
        return next(self._items(self.indices))[1]

    def _items(self, indices: Iterable[int]) -> Iterator[tuple[int, Item]]:
        self.unreadable.clear()
        for index, loaded in readable(self.source, indices, self.what, self.unreadable):
            yield index, self._item(loaded, index)

    def _item(self, loaded: Any, index: int) -> Item:
        """What is handed out for what the source gives."""
        raise NotImplementedError


class Pairs(_Readable[Pair]):
    """Readable pairs of a source, checked.

    Raises:
        DataError: beside what `_Readable` raises, a target of another size than its image.
    """

    def _item(self, loaded: Pair, index: int) -> Pair:
        return checked_pair(loaded, self.source.name(index))


class Images(_Readable[Tensor]):
    """Readable images [C, H, W] of any data, without targets.

    Args:
        data: of two splits the test split.
    """

    def __init__(self, data: AnyData, limit: int | None, what: str):
        source = data.test if isinstance(data, Labelled | Segmented | Ranged) else data
        super().__init__(source, limit, what)

    def _item(self, loaded: Any, index: int) -> Tensor:
        return float_planes(image_of(loaded))


def checked_pair(pair: Pair, name: str) -> Pair:
    """The pair with pixels as a tensor.

    Raises:
        DataError: the target is of another size.
    """
    pixels = float_planes(pair.image)
    if pair.target.shape != pixels.shape[1:]:
        raise DataError(
            f"{name}: expected a target of the image's size {list(pixels.shape[1:])}, got "
            f"{list(pair.target.shape)}; image and target must belong together pixel by pixel"
        )
    return Pair(pixels, pair.target)
