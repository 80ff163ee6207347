"""Vectors of labelled images, computed once: a second evaluation of the same kind reads a file.

Shapes: N images, D width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import labels_of
from dinov3core.data.progress import progress
from dinov3core.evals.backbones import fingerprint
from dinov3core.evals.frozen import FrozenEncoder, check_rows
from dinov3core.evals.reading import read_ahead
from dinov3core.evals.views import central_view
from dinov3core.writing import written_whole

VERSION = 1  # counts changes of what a cache file holds for the same key
NAMED = 100  # unreadable images that a result lists
SAMPLED = 32  # images that stand for the content of a source without files


class Embedded(NamedTuple):
    """Vectors of the images of a source that could be read, float32 on the CPU."""

    cls: Tensor  # [N, D]
    patch_mean: Tensor  # [N, D']
    labels: Tensor  # int64 [N]
    rows: Tensor  # int64 [N], their places in the source
    unreadable: list[str]  # the others, with reasons

    def record(self, other: "Embedded") -> dict:
        """What a result says about the images of the train (self) and test split."""
        unreadable = [*self.unreadable, *other.unreadable]
        counts = {
            "train_images": len(self.labels),
            "test_images": len(other.labels),
            "unreadable": len(unreadable),
        }
        return counts | ({"unreadable_names": unreadable[:NAMED]} if unreadable else {})

    @property
    def both(self) -> Tensor:
        """CLS and the mean patch side by side, [N, D + D'], what linear probes read."""
        return torch.cat([self.cls, self.patch_mean], 1)


@dataclass(frozen=True)
class Embedder:
    """How the images of a source become vectors.

    Args:
        size, resize: the shorter side goes to `resize` (bicubic), the central square of `size` is
            seen.
        device, batch_size, autocast_dtype: where and how the backbone runs; see `FrozenEncoder`.
        workers: threads that read images.
        cache: folder of the files; None: nothing is stored.
        digest: `fingerprint` of the backbone where it is known: 7 billion weights take a minute.
        shown: say how far it is; of several processes one is enough.
    """

    size: int = 224
    resize: int = 256
    device: str = "cpu"
    batch_size: int = 64
    autocast_dtype: torch.dtype | None = None
    workers: int = 4
    cache: Path | None = None
    digest: str = ""
    shown: bool = True

    def __call__(self, backbone: nn.Module, source: ImageSource) -> Embedded:
        """Vectors of every readable image, from the cache where it has them.

        Args:
            backbone: already on `device`.

        Raises:
            DataError: no image can be read, an image without a label.
            ValueError: features with NaN or infinity, a size off the patch grid, no image
                statistics.
        """
        path = self.place(backbone, source)
        embedded = read_embedded(path)
        if embedded is None:
            embedded = joined([self.compute(backbone, source, range(len(source)))])
            write_embedded(embedded, path)
        return embedded

    def compute(self, backbone: nn.Module, source: ImageSource, rows: Sequence[int]) -> Embedded:
        """Vectors of some rows of a source, whatever the cache holds.

        Several processes may share the rows; `joined` puts their parts together.

        Raises:
            ValueError: a size off the patch grid, no image statistics; DataError: an image without
                a label.
        """
        patch = backbone.patch_size
        if self.size % patch or self.size > self.resize:
            raise ValueError(
                f"size: expected a multiple of the patch size {patch}, at most "
                f"resize={self.resize}, got {self.size}"
            )
        encoder = FrozenEncoder(backbone, device=self.device, autocast_dtype=self.autocast_dtype)
        labels = torch.from_numpy(labels_of(source))
        parts: list[tuple[Tensor, ...]] = []
        unreadable: list[str] = []
        bar_settings = {"desc": "features", "unit": "image", "leave": True, "shown": self.shown}

        def view(row: int) -> Tensor:
            return central_view(source.load(row), resize=self.resize, crop=self.size)

        batches = read_ahead(view, rows, batch_size=self.batch_size, workers=self.workers)
        with progress(total=len(rows), **bar_settings) as bar:
            for batch in batches:
                views = {row: item for row, item in batch.items() if isinstance(item, Tensor)}
                unreadable += [
                    str(item) for item in batch.values() if isinstance(item, UnreadableImage)
                ]
                if views:
                    vectors = encoder.vectors(torch.stack(list(views.values())))
                    parts.append((*vectors, torch.tensor(list(views))))
                bar.update(len(batch))

        if not parts:
            nothing = torch.empty(0, 0)
            return Embedded(nothing, nothing, labels[:0], labels[:0], unreadable)
        cls, patch_mean, readable = (torch.cat(column) for column in zip(*parts))
        return Embedded(cls, patch_mean, labels[readable], readable, unreadable)

    def place(self, backbone: nn.Module, source: ImageSource) -> Path | None:
        """The cache file of these vectors; None without a cache.

        Another backbone, view or data is another file. Device, batch size and threads are not in
        the key: they change no feature beyond rounding.
        """
        if self.cache is None:
            return None
        # As files of version 1 are named: False without autocast, True for bfloat16.
        names = {None: False, torch.bfloat16: True}
        autocast = names.get(self.autocast_dtype, str(self.autocast_dtype))
        view = {"size": self.size, "resize": self.resize, "autocast": autocast}
        key = [VERSION, self.digest or fingerprint(backbone), view, identity(source)]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return Path(self.cache) / f"{name}.safetensors"


CENTRE = Embedder()  # k-NN and linear probes: 256, then the central 224
WHOLE = Embedder(resize=224)  # logistic regression: the shorter side is seen as a whole


def joined(parts: Sequence[Embedded]) -> Embedded:
    """Parts of one source in the order of its rows.

    Raises:
        DataError: no image could be read; ValueError: features with NaN or infinity.
    """
    unreadable = sorted(name for part in parts for name in part.unreadable)
    filled = [part for part in parts if len(part.rows)]
    if not filled:
        raise DataError(
            f"none of {len(unreadable)} images can be read, such as {unreadable[:1]}; check the "
            "path"
        )
    columns = [torch.cat(column) for column in zip(*(part[:-1] for part in filled))]
    for vectors in columns[:2]:
        check_rows(vectors, "features")
    order = columns[3].argsort()
    return Embedded(*(column[order] for column in columns), unreadable)


def read_embedded(path: Path | None) -> Embedded | None:
    """What a cache file holds; None when there is none, or one that cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return Embedded(**tensors, unreadable=json.loads(file.metadata()["unreadable"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        # cut short by a kill or a full disk: compute again
        return None


def write_embedded(embedded: Embedded, path: Path | None) -> None:
    """Store vectors; without a path nothing happens."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.contiguous()
        for name, value in embedded._asdict().items()
        if isinstance(value, Tensor)
    }
    with written_whole(path, SafetensorError) as partial:
        save_file(tensors, partial, {"unreadable": json.dumps(embedded.unreadable)})


def identity(source: ImageSource) -> str:
    """SHA-256 of what images a source has: names, labels, scale, sizes and times of its files.

    Sources without files are known by the content of up to 32 images, spread evenly.
    """
    scale = getattr(source, "scale", None)  # what array values are divided by
    total = hashlib.sha256(f"{type(source).__qualname__} {len(source)} {scale}".encode())
    paths = getattr(source, "files", None)
    for index in range(len(source)):
        total.update(
            f"\n{source.name(index)} {source.label(index)}".encode("utf-8", "surrogateescape")
        )
    if paths is None:
        sample = min(SAMPLED, len(source))
        for index in torch.linspace(0, len(source) - 1, sample).long().tolist():
            total.update(_content(source, index))
    for path in paths or ():
        status = os.stat(path) if os.path.exists(path) else None
        change = status and (status.st_size, status.st_mtime_ns)
        total.update(f"\n{path} {change}".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _content(source: ImageSource, index: int) -> bytes:
    try:
        image = source.load(index)
    except UnreadableImage as error:
        return str(error).encode()
    if isinstance(image, Image.Image):
        return image.tobytes()
    return image.contiguous().numpy().tobytes()
