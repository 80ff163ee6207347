"""Batches of views for training, in an order that depends on a seed and a position alone.

1. A global position p = step * global_batch + rank * batch_size + i names every sample of a run;
   the image at p is permutation(seed, p // N)[p % N]. So the order does not depend on the number of
   processes.
2. The image is loaded; an unreadable one is replaced by the next readable one and reported.
3. The size of views is drawn from (seed, step), where there are several; the views themselves from
   (seed, p), the batch's masks from (seed, step, rank).
4. Views are stacked crop-major: crop c of image b at c * B + b.

A run therefore resumes by one integer, the step.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3core.data.batch import Batch
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

    def draw_masks(self, crops: CropSettings, rng: np.random.Generator) -> BatchMasks:
        """The masks of a process's batch of such crops."""
        height, width = pair(crops.global_size)
        grid = (height // self.patch_size, width // self.patch_size)
        return batch_masks(crops.global_count * self.batch_size, grid, self.masks, rng)


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


class BatchMaker(Dataset):
    """Makes the batch of a step: the map-style dataset of a worker process, its index the step.

    Args: as for `BatchLoader`.
    """

    def __init__(self, source: ImageSource, settings: BatchSettings, rank: int, world_size: int):
        self.source = source
        self.shares = settings.crops.shares
        self.batch_size = settings.batch_size
        self.seed = settings.seed
        self.rank = rank
        self.global_batch = settings.batch_size * world_size
        self.draw_masks = settings.draw_masks
        self.multi_crops = [
            MultiCrop(crops, gram) for crops, gram in sized_crops(settings.crops, settings.gram)
        ]
        self.order = SampleOrder(len(source), settings.seed)
        self.loads = self.failures = 0

    def __getitem__(self, step: int) -> "Batch | DataError":
        """The batch, or the error that ends the run.

        The error is a value because raising it would bury it in the traceback of a worker.
        """
        try:
            return self.make(step)
        except DataError as error:
            return error

    def make(self, step: int) -> Batch:
        """The batch of a step on this process."""
        first = step * self.global_batch + self.rank * self.batch_size
        positions = range(first, first + self.batch_size)
        images, skipped = self._load([self.order[position] for position in positions])

        multi_crop = self.multi_crops[size_at(self.seed, step, self.shares)]
        views = [
            multi_crop(image, np.random.default_rng((self.seed, VIEWS, position)))
            for image, position in zip(images, positions)
        ]

        crops = multi_crop.settings
        gram = multi_crop.gram
        rng = np.random.default_rng((self.seed, MASKS, step, self.rank))
        channels = len(crops.mean)
        return Batch(
            _crop_major([view.global_ for view in views], (channels, *pair(crops.global_size))),
            _crop_major([view.local for view in views], (channels, *pair(crops.local_size))),
            None
            if gram is None
            else _crop_major([view.gram for view in views], (channels, *pair(gram.size))),
            *self.draw_masks(crops, rng),
            positions=positions,
            skipped=skipped,
            upsampled=sum(view.upsampled for view in views),
        )

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


def _pinned(batch: Batch | DataError) -> Batch | DataError:
    return batch if isinstance(batch, DataError) else batch.pin_memory()


def _crop_major(views: list[list[Tensor]], shape: tuple[int, ...]) -> Tensor:
    """Stack the crops of every image, crop c of image b at c * B + b; `shape` is that of one."""
    crops = [crop for same in zip(*views) for crop in same]
    return torch.stack(crops) if crops else torch.empty(0, *shape)


class BatchLoader:
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
        settings.crops.validate(settings.patch_size)
        validate_gram_crops(settings.crops, settings.gram, settings.patch_size)
        if not len(source):
            raise DataError("the image source is empty; expected at least one image")
        batch_size = settings.batch_size
        seed = settings.seed
        if batch_size < 1 or not 0 <= rank < world_size or min(seed, start_step, workers) < 0:
            raise ValueError(
                "expected batch_size >= 1, 0 <= rank < world_size, and seed, start_step and "
                f"workers of at least 0, got {batch_size}, rank {rank} of {world_size}, seed "
                f"{seed}, step {start_step}, {workers} workers"
            )
        self._maker = BatchMaker(source, settings, rank, world_size)
        self._start_step = start_step
        self._workers = workers
        self._pin_memory = pin_memory
        self._batches: Iterator[Batch | DataError] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._processes() if self._workers else self._thread()
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        return batch

    def _thread(self) -> "_Ahead":
        make = self._maker.__getitem__
        if self._pin_memory and torch.cuda.is_available():
            return _Ahead(lambda step: _pinned(make(step)), self._start_step)
        return _Ahead(make, self._start_step)

    def _processes(self) -> Iterator[Batch | DataError]:
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

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ahead:
    """Makes the next batches in a background thread, in order; an error surfaces in its place."""

    def __init__(self, make: Callable[[int], Batch | DataError], start_step: int):
        self._pool = ThreadPoolExecutor(1, "batches")
        self._make = make
        self._steps = itertools.count(start_step)
        self._pending = deque(
            self._pool.submit(self._make, next(self._steps)) for _ in range(AHEAD)
        )

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> Batch | DataError:
        batch = self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._make, next(self._steps)))
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
