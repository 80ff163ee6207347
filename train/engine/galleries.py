"""Pictures of backbones on images of a data set: which images, at which size, and where they go."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinov3core.data.datasets import DataOptions, open_any
from dinov3core.data.errors import DataError
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled, PairSource, Ranged, Segmented
from dinov3core.evals.reading import measured_statistics, read_views
from dinov3core.evals.results import short_names
from dinov3core.pictures.gallery import Bank, Drawing, write_gallery
from dinov3core.train.engine.named_models import Opened

SHOWN = 8
BANK = 600  # images among which neighbours are sought
GRID = Drawing().patches  # along a side of what is shown
LARGEST = 512  # pixels


class Stack(NamedTuple):
    """Square images of one size."""

    images: Tensor  # [n, C, side, side]
    labels: Tensor | None  # [n]; None when one of them has no class


def draw(
    models: Mapping[str, Opened],
    data: str | Path,
    options: DataOptions,
    out: Path,
    size: int,
    device: str = "cpu",
    attention_scale: Literal["map", "row"] = "map",
) -> Path:
    """Draw models on test images of `data`, or on some of images without splits; returns the page.

    Args:
        models: by name, of a path its end is shown.
        options: how the data are read.
        size: side of the images whose CLS tokens are compared for neighbours.
        attention_scale: see `Drawing`.

    Raises:
        DataError: no data, or none that can be read; ValueError: names or statistics that do not
            do.
    """
    backbones = {
        name: opened.backbone.to(device)
        for name, opened in zip(short_names(list(models)), models.values(), strict=True)
    }
    side = min(LARGEST, GRID * max(backbone.patch_size for backbone in backbones.values()))
    opened = small = open_any(data, replace(options, scene_size=side))
    if str(data) == "scenes":  # they are drawn at the size they are looked at
        small = open_any(data, replace(options, scene_size=size))
    split = isinstance(opened, Labelled | Segmented | Ranged)
    test = opened.test if split else opened
    train = small.train if split else opened
    rows = _spread(range(len(test)), SHOWN)
    others = range(len(train)) if split else sorted(set(range(len(train))) - set(rows))
    skipped: list[str] = []
    shown = _stack(test, rows, side, skipped)
    searched = _stack(train, _spread(others, BANK), size, skipped)
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
        backbone.statistics = backbone.statistics or measured_statistics(train)
    bank = None
    if searched is not None:
        bank = Bank(searched.images, searched.labels, query_labels=shown.labels)
    drawing = Drawing(attention_scale=attention_scale)
    return write_gallery(backbones, shown.images, out, bank=bank, drawing=drawing, device=device)


def _stack(
    source: ImageSource | PairSource, rows: Sequence[int], side: int, skipped: list[str]
) -> Stack | None:
    """The readable ones of `rows`, None when there are none; the others are added to `skipped`."""
    views = read_views(source, rows, resize=side, crop=side)
    skipped += views.unreadable
    if not views.pixels:
        return None
    labelled = isinstance(source, ImageSource)
    labels = [source.label(row) if labelled else None for row in views.indices]
    return Stack(torch.stack(views.pixels), None if None in labels else torch.tensor(labels))


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """Up to `count` of `rows`, evenly."""
    places = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()
    return [rows[place] for place in places]
