"""Where training images come from: folders, lists, tar shards, any torch Dataset, or the built-in
scenes.

Every source gives random access by index, so that the order of samples is a pure function of a seed
and a position.
"""

import glob
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3core.data.decode import (
    ARRAY_SUFFIXES,
    RGB_SUFFIXES,
    decode_channels,
    decode_rgb,
    to_rgb,
)
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import exists, files_below
from dinov3core.data.lists import read_list
from dinov3core.data.names import printable
from dinov3core.data.packed import PackedStrings
from dinov3core.data.pixels import as_float
from dinov3core.data.scenes import Scenes
from dinov3core.data.tars import TarIndex, index_tars

RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
TRIED = 64  # images of a source, spread evenly, one of which has to be readable

__all__ = [
    "DataError",
    "DatasetSource",
    "FileSource",
    "ImageSource",
    "TarSource",
    "UnreadableImage",
    "open_source",
]


@runtime_checkable
class ImageSource(Protocol):
    """Indexed images.

    One whose images can all be read may also have `loads(indices)`, a faster way to load many.
    """

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image | Tensor:
        """RGB image, or float tensor [C, H, W] in [0, 1] for other channel counts; raises
        UnreadableImage.
        """
        ...

    def label(self, index: int) -> int | None: ...

    def name(self, index: int) -> str: ...


class FileSource:
    """Image files, one per path.

    Args:
        paths: files; a missing one is reported when it is loaded.
        labels: class numbers, or None.
        channels: 3 reads RGB through Pillow, any other number .npy, .tif and .png arrays.
        scale: array value that becomes 1.0; None: the largest of an integer type.
        class_names: the name of every class number.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        labels: Sequence[int] | None = None,
        *,
        channels: int = 3,
        scale: float | None = None,
        class_names: Sequence[str] = (),
    ):
        self._paths = PackedStrings(str(path) for path in paths)
        self._labels = None if labels is None else np.asarray(labels, np.int64)
        self.channels, self.scale, self.class_names = channels, scale, tuple(class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> Image.Image | Tensor:
        path = self._paths[index]
        if self.channels == 3:
            return decode_rgb(path, path)
        return decode_channels(path, path, self.channels, self.scale)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return self._paths[index]


class TarSource:
    """Image members of uncompressed tar files (WebDataset layout), read in place through an index
    of their offsets.

    A member `key.cls` with a number labels the image `key.*` beside it.

    Args:
        paths: the shards; of one that ends early the whole members are used, and a warning counts
            what was lost.
        channels, scale: as for `FileSource`.
    """

    def __init__(
        self, paths: Sequence[str | Path], *, channels: int = 3, scale: float | None = None
    ):
        self.channels, self.scale = channels, scale
        self._index: TarIndex = index_tars([str(path) for path in paths], _suffixes(channels))

    def __len__(self) -> int:
        return len(self._index.names)

    def load(self, index: int) -> Image.Image | Tensor:
        name = self.name(index)
        content = self._index.read(index, name)
        if self.channels == 3:
            return decode_rgb(content, name)
        return decode_channels(content, name, self.channels, self.scale)

    def label(self, index: int) -> int | None:
        return self._index.label(index)

    def name(self, index: int) -> str:
        return self._index.names[index]


class DatasetSource:
    """Any map-style torch Dataset as a source.

    Args:
        dataset: items are an image or a tuple (image, label, ...); an image is a Pillow image, a
            uint8 array [H, W, 3] or [H, W], or a tensor [C, H, W], uint8 or float in [0, 1].
    """

    def __init__(self, dataset: torch.utils.data.Dataset):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"expected a dataset with a length and items by index, got {type(dataset).__name__}"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Image.Image | Tensor:
        try:
            item = self.dataset[index]
        except (
            OSError
        ) as error:  # a broken file below the dataset; other errors are the dataset's own
            raise UnreadableImage(self.name(index), str(error)) from error
        return _as_image(item[0] if isinstance(item, (tuple, list)) else item, self.name(index))

    def label(self, index: int) -> int | None:
        item = self.dataset[index]
        return int(item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else None

    def name(self, index: int) -> str:
        return f"item {index}"


def _as_image(value: Any, name: str) -> Image.Image | Tensor:
    shape = value.size if isinstance(value, Image.Image) else getattr(value, "shape", ())
    if 0 in shape:
        raise UnreadableImage(name, f"shape {list(shape)}, expected at least one pixel")
    if isinstance(value, Image.Image):
        return to_rgb(value, name)
    if (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and (value.ndim == 2 or value.shape[2:] == (3,))
    ):
        return Image.fromarray(value).convert("RGB")
    if isinstance(value, Tensor) and value.ndim == 3:
        planes = as_float(value)
        if len(planes) != 3:
            return planes
        return Image.fromarray(
            planes.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        )
    of_shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
    raise DataError(
        f"{name}: expected a Pillow image, a uint8 array [H, W, 3] or a tensor [C, H, W], "
        f"got {type(value).__name__}{of_shape}"
    )


def open_source(
    spec: str | Path,
    *,
    channels: int = 3,
    scale: float | None = None,
    scenes: int = 8192,
    scene_size: int = 64,
    seed: int = 0,
) -> ImageSource:
    """The images a word or path stands for.

    Args:
        spec: "scenes", a folder of images (searched through, class folders become labels), a .txt
            or .csv list of paths with optional labels, .tar shards: one, a folder of them, or a
            pattern a-{000..010}.tar, a-*.tar.
        channels, scale: as for `FileSource`.
        scenes, scene_size, seed: number, side and seed of the built-in images.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    if channels < 1 or (scale is not None and scale <= 0):
        raise ValueError(
            f"expected at least 1 channel and a positive scale, got {channels} and {scale}"
        )
    text = str(spec)
    if text == "scenes":
        return Scenes(scenes, seed=seed, size=scene_size)
    path = os.path.expanduser(text)
    expected = "scenes, a folder, a .txt or .csv list, or .tar shards"
    there = exists(path, expected)
    if os.path.isdir(path):
        return _open_folder(path, channels, scale)
    if re.search(r"[*?\[{]", text) and not there:
        return _checked(TarSource(expand(path), channels=channels, scale=scale), text)
    if not there:
        place = "" if os.path.isabs(path) else f" (that is {os.path.abspath(path)})"
        raise DataError(f"{text}{place} does not exist; expected {expected}")
    suffix = os.path.splitext(path)[1]
    if suffix in (".txt", ".csv"):
        paths, labels, names = read_list(Path(path))
        return FileSource(paths, labels, channels=channels, scale=scale, class_names=names)
    if suffix == ".tar":
        return _checked(TarSource([path], channels=channels, scale=scale), text)
    raise DataError(f"{text}: expected {expected}, got a file ending in {suffix!r}")


def open_readable(spec: str | Path, **settings: Any) -> tuple[ImageSource, str]:
    """A source with a sentence for people: how many images it has and how long finding them took.

    Args:
        spec, settings: as for `open_source`.

    Raises:
        DataError: as there, and when none of up to `TRIED` images can be read.
    """
    began = time.perf_counter()
    source = open_source(spec, **settings)
    seconds = time.perf_counter() - began
    _refuse_unreadable(source, str(spec))
    return source, printable(f"images: {len(source):,} in {spec}, found in {seconds:.1f} s")


def _refuse_unreadable(source: ImageSource, text: str) -> None:
    reasons: list[str] = []
    for index in np.linspace(0, len(source) - 1, min(TRIED, len(source)), dtype=np.int64).tolist():
        try:
            source.load(index)
            return
        except UnreadableImage as error:
            reasons.append(str(error))
    tried = "" if len(reasons) == len(source) else f"{len(reasons)} tried of "
    raise DataError(
        f"none of {tried}the {len(source):,} images of {text} can be read, such as "
        f"{'; '.join(reasons[:3])}; is this the right source?"
    )


def expand(pattern: str) -> list[str]:
    """Paths of a pattern with {first..last} ranges and shell wildcards, sorted within a wildcard.

    Raises:
        DataError: a range from high to low, a path of a range that does not exist, or no match.
    """
    pieces = RANGE.split(pattern)
    ranges = list(zip(pieces[1::3], pieces[2::3]))
    for first, last in ranges:
        if int(first) > int(last):
            got = f"{{{first}..{last}}}"
            raise DataError(f"{pattern}: expected a range from low to high, got {got}")
    paths: list[str] = []
    for numbers in _numbers(ranges):
        path = "".join(text for both in zip(pieces[::3], (*numbers, "")) for text in both)
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if ranges and not matches:
            matches = [path]  # a number of the range without a shard
        missing = next((match for match in matches if not os.path.exists(match)), None)
        if missing:
            raise DataError(
                f"{pattern}: {missing} does not exist; give the range of the shards that do"
            )
        paths += matches
    if not paths:
        raise DataError(f"{pattern}: no file matches")
    return paths


def _numbers(ranges: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """All numbers of all ranges, the last fastest, one at a time: there may be any number."""
    lengths = [int(last) - int(first) + 1 for first, last in ranges]
    for place in range(math.prod(lengths)):
        numbers = []
        for (first, _), length in zip(reversed(ranges), reversed(lengths)):
            place, digit = divmod(place, length)
            numbers.append(str(int(first) + digit).zfill(len(first)))
        yield numbers[::-1]


def _suffixes(channels: int) -> frozenset[str]:
    return RGB_SUFFIXES if channels == 3 else ARRAY_SUFFIXES


def _checked(source: TarSource, text: str) -> TarSource:
    if not len(source):
        raise DataError(
            f"{text}: no images in the shards; expected members ending in "
            f"{_listed(source.channels)}"
        )
    return source


def _listed(channels: int) -> str:
    return ", ".join(sorted(_suffixes(channels)))


def _open_folder(folder: str, channels: int, scale: float | None) -> ImageSource:
    """Images anywhere below a folder in the order of their paths; or, when there are only tar
    files, those shards.
    """
    images: list[str] = []
    tars: list[str] = []
    others: list[str] = []
    for path in files_below(folder):
        suffix = os.path.splitext(path)[1].lower()
        kind = images if suffix in _suffixes(channels) else tars if suffix == ".tar" else others
        kind.append(path)
    if images:
        labels, names = _labels_from_folders(images, folder)
        return FileSource(images, labels, channels=channels, scale=scale, class_names=names)
    if tars:
        return _checked(TarSource(sorted(tars), channels=channels, scale=scale), folder)
    seen = (
        f"{len(others)} other files, such as {os.path.basename(others[0])}"
        if others
        else "no files at all"
    )
    raise DataError(
        f"no images in {folder}: expected files ending in {_listed(channels)}; found {seen}"
    )


def _labels_from_folders(images: list[str], root: str) -> tuple[np.ndarray | None, list[str]]:
    """The folder right below the root is the class; without one for every image there are no
    labels.
    """
    parts = [os.path.relpath(image, root).split(os.sep) for image in images]
    if any(len(part) < 2 for part in parts):
        return None, []
    names, labels = np.unique([part[0] for part in parts], return_inverse=True)
    return labels, names.tolist()
