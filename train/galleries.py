"""Pictures of backbones on images of a data set: which images, at which size, and where they go."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov3core.data.datasets import DataOptions, open_any
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled, PairSource
from dinov3core.evals.cache import statistics_of
from dinov3core.evals.features import to_pixels
from dinov3core.evals.gallery import write_gallery
from dinov3core.train.named_models import Opened

SHOWN = 8
BANK = 600  # images among which neighbours are sought
GRID = 32  # patches along a side of what is shown: `write_gallery` lets every model see so many
LARGEST = 512  # pixels


def draw(
    models: Mapping[str, Opened], data: str | Path, read: DataOptions, out: Path, size: int, device: str = "cpu"
) -> Path:
    """Draw models on test images of `data` and return the page.

    Args:
        models: by the name shown.
        size: side of the images whose CLS tokens are compared for neighbours.

    Raises:
        DataError: no data, or none that can be read; ValueError: names or statistics that do not do.
    """
    backbones = {name: opened.backbone.to(device) for name, opened in models.items()}
    side = min(LARGEST, GRID * max(backbone.patch_size for backbone in backbones.values()))
    opened = open_any(data, _at(read, side))
    images, labels = _stack(opened.test, SHOWN, side)
    neighbours: dict = {}
    if isinstance(opened, Labelled):
        small = open_any(data, _at(read, size))
        bank, bank_labels = _stack(small.train, BANK, size)
        neighbours = {"bank": bank, "bank_labels": bank_labels, "labels": labels}
        for backbone in backbones.values():
            backbone.statistics = backbone.statistics or statistics_of(small.train)
    return write_gallery(backbones, images, out, device=device, **neighbours)


def _at(read: DataOptions, side: int) -> DataOptions:
    """Built-in scenes are drawn at the size they are looked at."""
    return DataOptions(**{**vars(read), "scene_size": side})


def _stack(source: ImageSource | PairSource, count: int, side: int) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images spread evenly over a source, [n, C, side, side], and their labels if there are any."""
    images, labels = [], []
    for index in _spread(len(source), count):
        try:
            found = source.load(index)
        except UnreadableImage:
            continue
        images.append(to_pixels(getattr(found, "image", found), resize=side, crop=side))
        labels.append(source.label(index) if hasattr(source, "label") else -1)
    if not images:
        raise DataError("pictures: none of the images can be read; check the path")
    return torch.stack(images), torch.tensor(labels) if min(labels) >= 0 else None


def _spread(length: int, count: int) -> Sequence[int]:
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()
