"""Batches of views for training, in an order that depends on a seed and a position alone.

1. A global position p = step * global_batch + rank * batch_size + i names every sample of a run;
   the image at p is permutation(seed, p // N)[p % N]. So the order does not depend on the number of
   processes.
2. The image is loaded; an unreadable one is replaced by the next readable one and reported.
3. Its views are drawn from (seed, p), the batch's masks from (seed, step, rank).
4. Views are stacked crop-major: crop c of image b at c * B + b.

A run therefore resumes by one integer, the step.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings, MultiCrop, pair
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.masks import batch_masks

AHEAD = 2  # batches made before they are asked for, in a process of its own or in the thread
TRIES = 64  # unreadable images in a row after which the source counts as broken
ORDER, VIEWS, MASKS = range(3)  # streams of random numbers under one seed
BROKEN_SHARE = 0.9  # of loads; what is left would be seen again and again


class SampleOrder:
    """Which image stands at a position: every pass over the N images is another permutation.

    Args:
        length: N.
        seed: of the permutations.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.length)
        if number not in self._passes:
            kept = {key: value for key, value in self._passes.items() if key >= number - 1}
            rng = np.random.default_rng((self.seed, ORDER, number))
            self._passes = {**kept, number: rng.permutation(self.length)}
        return int(self._passes[number][place])


class BatchMaker(Dataset):
    """Makes the batch of a step; the map-style dataset a worker process runs, with the step as its
    index.

    Args: as for `BatchLoader`.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: CropSettings,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        draw_masks: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ):
        self.source, self.settings, self.seed, self.rank, self.batch_size = (
            source,
            settings,
            seed,
            rank,
            batch_size,
        )
        self.global_batch = batch_size * world_size
        self.draw_masks, self.multi_crop = draw_masks, MultiCrop(settings)
        self.order = SampleOrder(len(source), seed)
        self.loads = self.failures = 0

    def __getitem__(self, step: int) -> "Batch | DataError":
        """The batch, or as a value the error that ends the run, as raising it would bury it in a
        worker's traceback.
        """
        try:
            return self.make(step)
        except DataError as error:
            return error

    def make(self, step: int) -> Batch:
        first = step * self.global_batch + self.rank * self.batch_size
        positions = range(first, first + self.batch_size)
        images, skipped = self._load([self.order[position] for position in positions])
        views = [
            self.multi_crop(image, np.random.default_rng((self.seed, VIEWS, position)))
            for image, position in zip(images, positions)
        ]
        masks = self.draw_masks(rng=np.random.default_rng((self.seed, MASKS, step, self.rank)))
        channels, gram = len(self.settings.mean), self.settings.gram_size
        return Batch(
            _crop_major(
                [view.global_ for view in views], (channels, *pair(self.settings.global_size))
            ),
            _crop_major(
                [view.local for view in views], (channels, *pair(self.settings.local_size))
            ),
            None
            if gram is None
            else _crop_major([view.gram for view in views], (channels, *pair(gram))),
            *masks,
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
    """An endless iterator over this process's batches, from any step on; a context manager that
    ends its workers.

    Args:
        source: images; fewer than a global batch are seen several times in it.
        settings: views to cut, validated against `patch_size` here.
        batch_size: images per process and step.
        rank, world_size: this process among the others.
        seed: of order, views and masks.
        start_step: the step of the first batch.
        patch_size: of the backbone; with the global crop size it gives the mask grid.
        mask_probability, mask_ratio_min, mask_ratio_max, mask_circular_shift: as for `batch_masks`.
        workers: processes that make batches; 0: a thread of this one, ahead of the training step.
        pin_memory: of the batches, for fast copies to a CUDA device; without one nothing happens.

    Raises:
        DataError: the source is empty; while iterating: (nearly) nothing in it can be read.
        ValueError: crop or mask settings that cannot work.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: CropSettings,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        patch_size: int = 16,
        mask_probability: float = 0.5,
        mask_ratio_min: float = 0.1,
        mask_ratio_max: float = 0.5,
        mask_circular_shift: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        settings.validate(patch_size)
        if not len(source):
            raise DataError("the image source is empty; expected at least one image")
        if batch_size < 1 or not 0 <= rank < world_size or min(seed, start_step, workers) < 0:
            raise ValueError(
                "expected batch_size >= 1, 0 <= rank < world_size, and seed, start_step and "
                f"workers of at least 0, got {batch_size}, rank {rank} of {world_size}, seed "
                f"{seed}, step {start_step}, {workers} workers"
            )
        height, width = pair(settings.global_size)
        draw_masks = partial(
            batch_masks,
            settings.global_count * batch_size,
            (height // patch_size, width // patch_size),
            probability=mask_probability,
            ratio_min=mask_ratio_min,
            ratio_max=mask_ratio_max,
            circular_shift=mask_circular_shift,
        )
        self._maker = BatchMaker(source, settings, batch_size, rank, world_size, seed, draw_masks)
        self._start_step, self._workers, self._pin_memory = start_step, workers, pin_memory
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
        """End worker processes or the thread; iterating again starts from the first step once more."""
        if isinstance(self._batches, _Ahead):
            self._batches.close()
        self._batches = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ahead:
    """Makes the next batches in a background thread and hands them over in order; an error surfaces
    in its place.
    """

    def __init__(self, make: Callable[[int], Batch | DataError], start_step: int):
        self._pool = ThreadPoolExecutor(1, "batches")
        self._make, self._steps = make, itertools.count(start_step)
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
