"""Pictures of backbones on images of a data set: which images, at which size, and where they go."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinov3core.data.datasets import DataOptions, open_any
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled, Pair, PairSource, Ranged, Segmented
from dinov3core.evals.cache import statistics_of
from dinov3core.evals.features import to_pixels
from dinov3core.evals.results import short_names
from dinov3core.pictures.gallery import write_gallery
from dinov3core.train.engine.named_models import Opened

SHOWN = 8
BANK = 600  # images among which neighbours are sought
GRID = 32  # patches along a side of what is shown: `write_gallery` lets every model see so many
LARGEST = 512  # pixels


class Stack(NamedTuple):
    """Square images of one size."""

    images: Tensor  # [n, C, side, side]
    labels: Tensor | None  # [n]; None when one of them has no class


def draw(
    models: Mapping[str, Opened],
    data: str | Path,
    read: DataOptions,
    out: Path,
    size: int,
    device: str = "cpu",
    attention_scale: Literal["map", "row"] = "map",
) -> Path:
    """Draw models on test images of `data`, or on some of images without splits, and return the
    page.

    Args:
        models: by name, of a path its end is shown.
        size: side of the images whose CLS tokens are compared for neighbours.
        attention_scale: see `write_gallery`.

    Raises:
        DataError: no data, or none that can be read; ValueError: names or statistics that do not
            do.
    """
    backbones = {
        name: opened.backbone.to(device)
        for name, opened in zip(short_names(list(models)), models.values(), strict=True)
    }
    side = min(LARGEST, GRID * max(backbone.patch_size for backbone in backbones.values()))
    opened = small = open_any(data, replace(read, scene_size=side))
    if str(data) == "scenes":  # they are drawn at the size they are looked at
        small = open_any(data, replace(read, scene_size=size))
    split = isinstance(opened, Labelled | Segmented | Ranged)
    test, train = (opened.test, small.train) if split else (opened, opened)
    rows = _spread(range(len(test)), SHOWN)
    others = range(len(train)) if split else sorted(set(range(len(train))) - set(rows))
    skipped: list[str] = []
    shown, bank = (
        _stack(test, rows, side, skipped),
        _stack(train, _spread(others, BANK), size, skipped),
    )
    if shown is None:
        raise DataError(
            f"pictures: none of {len(skipped)} images can be read, such as {skipped[0]}; check the "
            "path"
        )
    if skipped:
        print(
            f"pictures: unreadable and left out: {len(skipped)}, such as {skipped[0]}",
            file=sys.stderr,
        )
    for backbone in backbones.values():
        backbone.statistics = backbone.statistics or statistics_of(train)
    neighbours = (
        {}
        if bank is None
        else {"bank": bank.images, "bank_labels": bank.labels, "labels": shown.labels}
    )
    settings = {"device": device, "attention_scale": attention_scale, **neighbours}
    return write_gallery(backbones, shown.images, out, **settings)


def _stack(
    source: ImageSource | PairSource, rows: Sequence[int], side: int, skipped: list[str]
) -> Stack | None:
    """The readable ones of `rows`, None when there are none; the others are added to `skipped`."""
    images, labels = [], []
    for row in rows:
        try:
            found = source.load(row)
        except UnreadableImage as error:
            skipped.append(str(error))
            continue
        images.append(
            to_pixels(found.image if isinstance(found, Pair) else found, resize=side, crop=side)
        )
        labels.append(source.label(row) if isinstance(source, ImageSource) else None)
    if not images:
        return None
    return Stack(torch.stack(images), None if None in labels else torch.tensor(labels))


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """Up to `count` of `rows`, evenly."""
    return [
        rows[place]
        for place in torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()
    ]
