"""Features of labelled images, computed once: the second evaluation of the same weights on the same
data reads a file.

Shapes: N images, D width.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Pair, PairSource, labels_of
from dinov3core.data.progress import progress
from dinov3core.evals.backbones import fingerprint, known_statistics
from dinov3core.evals.features import frozen, normalise, to_pixels
from dinov3core.models import ImageStatistics
from dinov3core.writing import written_whole

VERSION = 1  # counts changes of what a cache file holds for the same key
NAMED = 100  # unreadable images that a result lists
SAMPLED = 32  # images that stand for the content of a source without files
STATISTICS_SAMPLE = (
    1000  # images that mean and deviation are taken of, for backbones without their own
)


class Embedded(NamedTuple):
    """Features of the images of a source that could be read, fp32 on the CPU."""

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
        device, batch_size, autocast: where and how the backbone runs; autocast in bfloat16.
        workers: threads that read images.
        cache: folder of the files; None: nothing is kept.
        digest: `fingerprint` of the backbone where it is known: 7 billion weights take a minute.
        shown: say how far it is; of several processes one is enough.
    """

    size: int = 224
    resize: int = 256
    device: str = "cpu"
    batch_size: int = 64
    autocast: bool = False
    workers: int = 4
    cache: Path | None = None
    digest: str = ""
    shown: bool = True

    def __call__(self, backbone: nn.Module, source: ImageSource) -> Embedded:
        """Features of every readable image, from the cache where it has them.

        Args:
            backbone: already on `device`.

        Raises:
            DataError: no image can be read, an image without a label.
            ValueError: features with NaN or infinity, a size off the patch grid, no image
                statistics.
        """
        place = self.place(backbone, source)
        kept = read_embedded(place)
        if kept is None:
            kept = joined([self.compute(backbone, source, range(len(source)))])
            write_embedded(kept, place)
        return kept

    def compute(self, backbone: nn.Module, source: ImageSource, rows: Sequence[int]) -> Embedded:
        """Features of some rows, past the cache; several processes may share the rows and `joined`
        their parts.

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
        statistics = known_statistics(backbone)
        labels = torch.from_numpy(labels_of(source))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        unreadable: list[str] = []
        autocast = torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.autocast
        )
        said = {"desc": "features", "unit": "image", "leave": True, "shown": self.shown}
        with frozen(backbone), autocast, progress(total=len(rows), **said) as bar:
            for batch in self._batches(source, rows):
                readable = {row: image for row, image in batch.items() if isinstance(image, Tensor)}
                unreadable += [
                    str(image) for image in batch.values() if isinstance(image, UnreadableImage)
                ]
                if readable:
                    pixels = torch.stack(list(readable.values())).to(self.device)
                    found = backbone.features(normalise(pixels, *statistics))
                    vectors = found.cls.float().cpu(), found.patches.float().mean((2, 3)).cpu()
                    parts.append((*vectors, torch.tensor(list(readable))))
                bar.update(len(batch))
        if not parts:
            return Embedded(
                torch.empty(0, 0), torch.empty(0, 0), labels[:0], labels[:0], unreadable
            )
        cls, patch_mean, kept = (torch.cat(column) for column in zip(*parts))
        return Embedded(cls, patch_mean, labels[kept], kept, unreadable)

    def place(self, backbone: nn.Module, source: ImageSource) -> Path | None:
        """The cache file of these features; None without a cache.

        Another backbone, view or data is another file.
        """
        if self.cache is None:
            return None
        # What changes no feature beyond rounding; and the weights, which stand in the key anyway.
        beside = ("device", "batch_size", "workers", "cache", "digest", "shown")
        view = {name: value for name, value in asdict(self).items() if name not in beside}
        key = [VERSION, self.digest or fingerprint(backbone), view, identity(source)]
        return (
            Path(self.cache)
            / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
        )

    def _batches(
        self, source: ImageSource, rows: Sequence[int]
    ) -> Iterator[dict[int, Tensor | UnreadableImage]]:
        """Images by row; the next batch is read while one is used."""

        def load(row: int) -> Tensor | UnreadableImage:
            try:
                return to_pixels(source.load(row), resize=self.resize, crop=self.size)
            except UnreadableImage as error:
                return error

        parts = [
            rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)
        ]
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead = pool.map(load, parts[0]) if parts else iter(())
            for part, following in zip(parts, [*parts[1:], ()]):
                current, ahead = ahead, pool.map(load, following)
                yield dict(zip(part, current))


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
    _refuse_broken(*columns[:2])
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


def write_embedded(found: Embedded, path: Path | None) -> None:
    """Keep features; without a path nothing happens."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.contiguous()
        for name, value in found._asdict().items()
        if isinstance(value, Tensor)
    }
    with written_whole(path, SafetensorError) as partial:
        save_file(tensors, partial, {"unreadable": json.dumps(found.unreadable)})


def identity(source: ImageSource) -> str:
    """SHA-256 that changes with the images: names, labels, scale, and sizes and times of the files
    behind them.

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
        for index in torch.linspace(0, len(source) - 1, min(SAMPLED, len(source))).long().tolist():
            total.update(_content(source, index))
    for path in paths or ():
        found = os.stat(path) if os.path.exists(path) else None
        total.update(
            f"\n{path} {found and (found.st_size, found.st_mtime_ns)}".encode(
                "utf-8", "surrogateescape"
            )
        )
    return total.hexdigest()


def statistics_of(source: ImageSource | PairSource) -> ImageStatistics:
    """Mean and standard deviation per channel over up to 1000 images, spread evenly; every image
    has the same weight.

    Raises:
        DataError: none of them can be read.
    """
    means, squares = [], []
    rows = torch.linspace(0, len(source) - 1, min(STATISTICS_SAMPLE, len(source))).long().tolist()
    for index in progress(rows, desc="image statistics", unit="image"):
        try:
            found = source.load(index)
        except UnreadableImage:  # counted where it is used
            continue
        image = found.image if isinstance(found, Pair) else found
        pixels = (
            image
            if isinstance(image, Tensor)
            else to_pixels(image, resize=64, crop=64).float() / 255
        )
        means.append(pixels.double().mean((1, 2)))
        squares.append(pixels.double().square().mean((1, 2)))
    if not means:
        raise DataError("image statistics: none of the images can be read; check the path")
    mean = torch.stack(means).mean(0)
    deviation = (torch.stack(squares).mean(0) - mean.square()).clamp_min(1e-12).sqrt()
    return ImageStatistics(tuple(mean.tolist()), tuple(deviation.tolist()))


def _content(source: ImageSource, index: int) -> bytes:
    try:
        image = source.load(index)
    except UnreadableImage as error:
        return str(error).encode()
    return (
        image.tobytes() if isinstance(image, Image.Image) else image.contiguous().numpy().tobytes()
    )


def _refuse_broken(*features: Tensor) -> None:
    for vectors in features:
        broken = int((~vectors.isfinite().all(1)).sum())
        if broken:
            raise ValueError(
                f"features: {broken} of {len(vectors)} rows hold NaN or infinity; the model that "
                "made them has diverged"
            )
