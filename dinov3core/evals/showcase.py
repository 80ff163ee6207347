"""Which images of a data set a gallery shows: some held-out ones spread over the classes, and a bank to search.

    from dinov3core.evals.gallery import write_gallery
    from dinov3core.evals.showcase import open_showcase

    shown, unreadable = open_showcase("scenes", side=256, bank_side=64)
    write_gallery({"A": model_a, "B": model_b}, out_dir="gallery", **shown._asdict())

Shapes: n images, M images of a bank, C channels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core.data.datasets import DataOptions, open_labelled
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource, open_source
from dinov3core.data.labelled import labels_of
from dinov3core.evals.features import to_pixels

PLAIN = DataOptions()


class Showcase(NamedTuple):
    """The arguments of `write_gallery` that come from data; labels are None where there are no classes."""

    images: Tensor  # [n, C, side, side]
    labels: Tensor | None
    bank: Tensor | None  # [M, C, bank_side, bank_side]; None where all images are shown
    bank_labels: Tensor | None


def open_showcase(
    spec: str | Path,
    options: DataOptions = PLAIN,
    *,
    count: int = 8,
    bank: int = 600,
    side: int = 448,
    bank_side: int = 224,
) -> tuple[Showcase, list[str]]:
    """Images to show and a bank, with the names of files that could not be read and were passed over.

    Data with classes give the first test image of every class, then the second ones, and a bank from the training part,
    in turns of classes too. Any other folder, list or shards give their first images, and those that follow as a bank.

    Args:
        spec, options: see `open_labelled`; what it refuses is opened without classes.
        count, bank: how many images; fewer where there are fewer.
        side, bank_side: the central square of images scaled to these; built-in scenes are drawn at this size.

    Raises:
        DataError: nothing there, or no image that can be read.
    """
    if count < 1 or bank < 1:
        raise ValueError(f"count, bank: expected at least one image each, got {count} and {bank}")
    try:
        small = open_labelled(spec, replace(options, scene_size=bank_side))
    except DataError:
        return _without_classes(spec, options, (count, side), (bank, bank_side))
    large = open_labelled(spec, replace(options, scene_size=side)) if str(spec) == "scenes" else small
    images = _read(large.test, _in_turns(large.test), count, side)
    others = _read(small.train, _in_turns(small.train), bank, bank_side)
    return _showcase(spec, images, others), images.unreadable + others.unreadable


def _without_classes(
    spec: str | Path, options: DataOptions, shown: tuple[int, int], banked: tuple[int, int]
) -> tuple[Showcase, list[str]]:
    """`shown` and `banked` are numbers and sides of images."""
    source = open_source(spec, channels=options.channels, scale=options.scale)
    rows = iter(range(len(source)))
    images, others = (_read(source, rows, count, side) for count, side in (shown, banked))
    found = _showcase(spec, images, others)._replace(labels=None, bank_labels=None)
    return found, images.unreadable + others.unreadable


class _Images(NamedTuple):
    pixels: list[Tensor]
    labels: list[int | None]
    unreadable: list[str]


def _showcase(spec: str | Path, images: _Images, others: _Images) -> Showcase:
    if not images.pixels:
        raise DataError(f"{spec}: expected images to show, got none of {len(images.unreadable)} that can be read")
    labels = None if None in images.labels else torch.tensor(images.labels)
    if not others.pixels:
        return Showcase(torch.stack(images.pixels), labels, None, None)
    bank_labels = None if None in others.labels else torch.tensor(others.labels)
    return Showcase(torch.stack(images.pixels), labels, torch.stack(others.pixels), bank_labels)


def _in_turns(source: ImageSource) -> list[int]:
    """All rows: the first of every class, then the second ones, and so on."""
    seen: dict[int, int] = {}
    turns = []
    for row, label in enumerate(labels_of(source).tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], row))
    return [row for _, row in sorted(turns)]


def _read(source: ImageSource, rows: Iterable[int], count: int, side: int) -> _Images:
    """Up to `count` readable images of `rows`, as many of these as that takes."""
    unreadable: list[str] = []

    def readable() -> Iterator[tuple[Tensor, int | None]]:
        for row in rows:
            try:
                yield to_pixels(source.load(row), resize=side, crop=side), source.label(row)
            except UnreadableImage as error:
                unreadable.append(str(error))

    found = list(islice(readable(), count))
    return _Images([pixels for pixels, _ in found], [label for _, label in found], unreadable)
