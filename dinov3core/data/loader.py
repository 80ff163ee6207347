"""Batches of views for training, in an order that depends on a seed and a position alone.

1. A global position p = step * global_batch + rank * batch_size + i names every sample of a run;
   the image at p is permutation(seed, p // N)[p % N]. So the order does not depend on the number of
   processes.
2. The image is loaded; an unreadable one is replaced by the next readable one and reported.
3. The size of views is drawn from (seed, step), where there are several; the views themselves from
   (seed, p), the batch's masks from (seed, step, rank).
4. Views are stacked crop-major: crop c of image b at c * B + b.

A run therefore resumes by one integer, the step.

Where outputs of a frozen network are to be used again, an image has to be seen again in the same
views. With V fixed views, they are drawn from (seed, image, pass % V) instead: V sets of views of
every image, which repeat every V passes. The size stays a matter of the step, as all images of a
step have the same one. A view in another size is the same region in other pixels, hence another
view to whoever compares pixels: with m sizes an image has up to V * m sets, and it takes more than
V passes until all of them were seen.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3core.data.batch import Batch, Crops
from dinov3core.data.crops import (
    CropSettings,
    GramCrops,
    MultiCrop,
    sized_crops,
    validate_gram_crops,
)
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.masks import BatchMasks, MaskSettings, batch_masks
from dinov3core.data.sizes import pair, size_at

AHEAD = 2  # batches made before they are asked for, in a process of its own or in the thread
TRIES = 64  # unreadable images in a row after which the source counts as broken
ORDER, VIEWS, MASKS = range(3)  # streams of random numbers under one seed
BROKEN_SHARE = 0.9  # of loads; what is left would be seen again and again

Loaded = TypeVar("Loaded", bound=Crops)  # what a loader gives at every step


@dataclass(frozen=True)
class BatchSettings:
    """What the batches of a run hold, alike on all processes."""

    crops: CropSettings
    masks: MaskSettings
    batch_size: int
    """Images per process and step."""
    patch_size: int
    """Of the backbone; with the size of global crops it gives the grid of the masks."""
    seed: int = 0
    """Of order, views, masks and, where there are several, sizes."""
    gram: GramCrops | None = None
    """Crops for a Gram teacher; None: there are none."""
    views: int = 0
    """Sets of views of an image, of which every pass over the images uses the next one; 0: every
    pass draws new ones."""

    def masks_at(self, step: int, rank: int) -> BatchMasks:
        """The masks of a process's batch of that step."""
        size = size_at(self.seed, step, self.crops.shares)
        height, width = pair(self.crops.of_each_size[size].global_size)
        grid = (height // self.patch_size, width // self.patch_size)
        rng = np.random.default_rng((self.seed, MASKS, step, rank))
        return batch_masks(self.crops.global_count * self.batch_size, grid, self.masks, rng)


def shares(count: int, parts: int) -> list[range]:
    """The numbers 0 to `count` as contiguous parts, the larger ones first.

    Lengths differ by one at most; with fewer numbers than parts the last ones are empty.
    """
    length, larger = divmod(count, parts)
    ends = [part * length + min(part, larger) for part in range(parts + 1)]
    return [range(first, end) for first, end in itertools.pairwise(ends)]


class SampleOrder:
    """Which image stands at a position: every pass over the N images is another permutation.

    Args:
        length: N.
        seed: of the permutations.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.length)
        if number not in self._passes:
            # a batch may straddle two passes; older ones are over
            near = {key: value for key, value in self._passes.items() if key >= number - 1}
            rng = np.random.default_rng((self.seed, ORDER, number))
            self._passes = {**near, number: rng.permutation(self.length)}
        return int(self._passes[number][place])


class CropMaker(Dataset):
    """Makes the crops of some images of every step: the map-style dataset of a worker process.

    Its index is the step.

    Args:
        source: images.
        settings: how they are cut.
        global_batch: images of a step, over all processes.
        share: which of them are loaded here, as numbers from 0.
    """

    def __init__(
        self, source: ImageSource, settings: BatchSettings, global_batch: int, share: range
    ):
        self.source = source
        self.settings = settings
        self.global_batch = global_batch
        self.share = share
        self.multi_crops = [
            MultiCrop(crops, gram) for crops, gram in sized_crops(settings.crops, settings.gram)
        ]
        self.order = SampleOrder(len(source), settings.seed)
        self.loads = self.failures = 0

    def __getitem__(self, step: int) -> "Crops | DataError":
        """What `make` makes, or the error that ends the run.

        The error is a value because raising it would bury it in the traceback of a worker.
        """
        try:
            return self.make(step)
        except DataError as error:
            return error

    def make(self, step: int) -> Crops:
        """The crops of a step on this process."""
        first = step * self.global_batch
        positions = range(first + self.share.start, first + self.share.stop)
        images, skipped = self._load([self.order[position] for position in positions])

        settings = self.settings
        multi_crop = self.multi_crops[size_at(settings.seed, step, settings.crops.shares)]
        views = [
            multi_crop(image, self._view_draws(position))
            for image, position in zip(images, positions)
        ]

        crops = multi_crop.settings
        gram = multi_crop.gram
        channels = len(crops.mean)
        return Crops(
            _crop_major([view.global_ for view in views], (channels, *pair(crops.global_size))),
            _crop_major([view.local for view in views], (channels, *pair(crops.local_size))),
            None
            if gram is None
            else _crop_major([view.gram for view in views], (channels, *pair(gram.size))),
            positions=positions,
            skipped=skipped,
            upsampled=sum(view.upsampled for view in views),
        )

    def _view_draws(self, position: int) -> np.random.Generator:
        """The random numbers behind the views at a position.

        Where views are fixed, those of the image that belongs there. An unreadable one's stand-in
        is then seen in its views, so that it shows others than at its own place.
        """
        settings = self.settings
        if not settings.views:
            return np.random.default_rng((settings.seed, VIEWS, position))
        number = position // len(self.source) % settings.views
        return np.random.default_rng((settings.seed, VIEWS, self.order[position], number))

    def _load(self, indices: list[int]) -> tuple[list[Image.Image | Tensor], list[str]]:
        many = getattr(self.source, "loads", None)
        if many is not None:
            return many(indices), []
        skipped: list[str] = []
        return [self._readable(index, skipped) for index in indices], skipped

    def _readable(self, index: int, skipped: list[str]) -> Image.Image | Tensor:
        """The image, or the next one that can be read; notes what could not."""
        for offset in range(min(TRIES, len(self.source))):
            self.loads += 1
            try:
                return self.source.load((index + offset) % len(self.source))
            except UnreadableImage as error:
                skipped.append(str(error))
                self.failures += 1
            if self.loads >= TRIES and self.failures > BROKEN_SHARE * self.loads:
                break
        raise DataError(
            f"{self.failures} of the first {self.loads} images read cannot be used, such as "
            f"{'; '.join(skipped[-3:])}; is this the right source?"
        )


class BatchMaker(CropMaker):
    """Makes the batch of a step on one process: crops, and masks of its own.

    Args: as for `BatchLoader`.
    """

    def __init__(self, source: ImageSource, settings: BatchSettings, rank: int, world_size: int):
        first = rank * settings.batch_size
        share = range(first, first + settings.batch_size)
        super().__init__(source, settings, settings.batch_size * world_size, share)
        self.rank = rank

    def make(self, step: int) -> Batch:
        """The batch of a step on this process."""
        return super().make(step).with_masks(self.settings.masks_at(step, self.rank))


def _pinned(crops: Loaded | DataError) -> Loaded | DataError:
    return crops if isinstance(crops, DataError) else crops.pin_memory()


def _crop_major(views: list[list[Tensor]], shape: tuple[int, ...]) -> Tensor:
    """Stack the crops of every image, crop c of image b at c * B + b; `shape` is that of one."""
    crops = [crop for same in zip(*views) for crop in same]
    return torch.stack(crops) if crops else torch.empty(0, *shape)


class _Loader(Generic[Loaded]):
    """An endless iterator over what a maker makes; a context manager that ends its workers."""

    def __init__(self, maker: CropMaker, start_step: int, workers: int, pin_memory: bool):
        self._maker = maker
        self._start_step = start_step
        self._workers = workers
        self._pin_memory = pin_memory
        self._batches: Iterator[Loaded | DataError] | None = None

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        if self._batches is None:
            self._batches = self._processes() if self._workers else self._thread()
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        return batch

    def _thread(self) -> "_Ahead[Loaded]":
        make = self._maker.__getitem__
        if self._pin_memory and torch.cuda.is_available():
            return _Ahead(lambda step: _pinned(make(step)), self._start_step)
        return _Ahead(make, self._start_step)

    def _processes(self) -> Iterator[Loaded | DataError]:
        return iter(
            DataLoader(
                self._maker,
                batch_size=None,
                sampler=itertools.count(self._start_step),
                num_workers=self._workers,
                pin_memory=self._pin_memory,
                prefetch_factor=AHEAD,
            )
        )

    def close(self) -> None:
        """End worker processes or the thread; iterating again begins at the first step."""
        if isinstance(self._batches, _Ahead):
            self._batches.close()
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BatchLoader(_Loader[Batch]):
    """An endless iterator over this process's batches; a context manager that ends its workers.

    Args:
        source: images; fewer than a global batch are seen several times in it.
        settings: what a batch holds, validated here.
        rank, world_size: this process among the others.
        start_step: the step of the first batch.
        workers: processes that make batches; 0: a thread of this one, ahead of the training step.
        pin_memory: of the batches, for fast copies to a CUDA device; without one nothing happens.

    Raises:
        DataError: the source is empty; while iterating: (nearly) nothing in it can be read.
        ValueError: crop or mask settings that cannot work.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: BatchSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        _check(source, settings, start_step, workers)
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        maker = BatchMaker(source, settings, rank, world_size)
        super().__init__(maker, start_step, workers, pin_memory)


class ShareLoader(_Loader[Crops]):
    """An endless iterator over the crops of some images of every batch, without masks.

    For processes that load images for others, each its part of `shares`. The crops are those that
    `BatchLoader` has at the same places of the run's order, whatever the number of processes.

    Args:
        source: as for `BatchLoader`.
        settings: of whole batches: `batch_size` counts the images of a step over all processes.
        share: which of these are loaded here, as numbers from 0; maybe none.
        start_step, workers, pin_memory: as for `BatchLoader`.

    Raises:
        DataError: the source is empty; while iterating: (nearly) nothing in it can be read.
        ValueError: crop settings that cannot work, or a share outside of the batch.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: BatchSettings,
        share: range,
        *,
        start_step: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        _check(source, settings, start_step, workers)
        size = settings.batch_size
        if share.step != 1 or not 0 <= share.start <= share.stop <= size:
            raise ValueError(f"expected a share of the numbers 0 to {size}, got {share}")
        maker = CropMaker(source, settings, size, share)
        super().__init__(maker, start_step, workers, pin_memory)


def _check(source: ImageSource, settings: BatchSettings, start_step: int, workers: int) -> None:
    settings.crops.validate(settings.patch_size)
    validate_gram_crops(settings.crops, settings.gram, settings.patch_size)
    if not len(source):
        raise DataError("the image source is empty; expected at least one image")
    least = min(settings.seed, settings.views, start_step, workers)
    if settings.batch_size < 1 or least < 0:
        raise ValueError(
            "expected batch_size >= 1, and seed, views, start_step and workers of at least 0, got "
            f"{settings.batch_size}, seed {settings.seed}, {settings.views} views, step "
            f"{start_step}, {workers} workers"
        )


class _Ahead(Generic[Loaded]):
    """Makes the next batches in a background thread, in order; an error surfaces in its place."""

    def __init__(self, make: Callable[[int], Loaded | DataError], start_step: int):
        self._pool = ThreadPoolExecutor(1, "batches")
        self._make = make
        self._steps = itertools.count(start_step)
        self._pending = deque(
            self._pool.submit(self._make, next(self._steps)) for _ in range(AHEAD)
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Loaded | DataError:
        batch = self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._make, next(self._steps)))
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
