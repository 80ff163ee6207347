"""Where training images come from: files, any torch Dataset, or the built-in scenes.

Every source gives random access by index, so that the order of samples is a pure function of a seed
and a position.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3core.data.decode import RGB, PixelFormat, Pixels, to_rgb
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import suffix_of
from dinov3core.data.lists import read_list
from dinov3core.data.pixels import as_float
from dinov3core.data.scenes import SCENES, Scenes, SceneSet
from dinov3core.data.stored import Files, PathFiles, look_into
from dinov3core.data.tars import index_tars
from dinov3core.printable import printable

LISTS = (".txt", ".csv")
EXPECTED = "scenes, a folder, a .txt or .csv list, or .tar shards"
TRIED = 64  # images of a source, spread evenly, one of which has to be readable


@runtime_checkable
class ImageSource(Protocol):
    """Indexed images.

    One whose images can all be read may also have `loads(indices)`, a faster way to load many.
    """

    def __len__(self) -> int: ...

    def load(self, index: int) -> Pixels:
        """An RGB image, or a float tensor [C, H, W] in [0, 1] for other channel counts.

        Raises:
            UnreadableImage: it cannot be used.
        """
        ...

    def label(self, index: int) -> int | None: ...

    def name(self, index: int) -> str: ...


class FileSource:
    """Images of files, wherever these lie.

    Args:
        files: one for every image.
        pixels: how they become pixels.
        class_names: the name of every class number.
    """

    def __init__(self, files: Files, pixels: PixelFormat = RGB, class_names: Sequence[str] = ()):
        self._files = files
        self.pixels = pixels
        self.class_names = tuple(class_names)

    @property
    def files(self) -> Sequence[str]:
        """Paths on the disk, whose sizes and times tell whether anything changed."""
        return self._files.paths

    @property
    def scale(self) -> float | None:
        """The array value that becomes 1."""
        return self.pixels.scale

    def __len__(self) -> int:
        return len(self._files)

    def open(self, index: int) -> BinaryIO | str:
        """A path or the bytes, for another decoder than that of `load`."""
        return self._files.open(index)

    def load(self, index: int) -> Pixels:
        return self.pixels.decode(self._files.open(index), self._files.name(index))

    def label(self, index: int) -> int | None:
        return self._files.label(index)

    def name(self, index: int) -> str:
        return self._files.name(index)


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

    def load(self, index: int) -> Pixels:
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


def _as_image(value: Any, name: str) -> Pixels:
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
    spec: str | Path, pixels: PixelFormat = RGB, scenes: SceneSet = SCENES
) -> ImageSource:
    """The images that a word or a path stands for.

    Args:
        spec: "scenes", a folder of images (searched through, class folders become labels), a .txt
            or .csv list of paths with optional labels, .tar shards: one, a folder of them, or a
            pattern a-{000..010}.tar, a-*.tar. A member `key.cls` of a shard with a number labels
            the image `key.*` beside it.
        pixels: how files become pixels.
        scenes: the built-in images that the word stands for.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    text = str(spec)
    if text == "scenes":
        return Scenes(scenes.length, seed=scenes.seed, size=scenes.size)
    path = os.path.expanduser(text)
    if path.endswith(LISTS) and os.path.exists(path) and not os.path.isdir(path):
        paths, labels, names = read_list(Path(path))
        return FileSource(PathFiles(paths, labels), pixels, names)
    contents = look_into(path, pixels.suffixes, EXPECTED)
    if contents is None and os.path.exists(path):
        got = f"got a file ending in {os.path.splitext(path)[1]!r}"
        raise DataError(f"{text}: expected {EXPECTED}, {got}")
    if contents is None:
        place = "" if os.path.isabs(path) else f" (that is {os.path.abspath(path)})"
        raise DataError(f"{text}{place} does not exist; expected {EXPECTED}")
    if contents.shards:
        return _open_shards(contents.shards, text, pixels)
    return _open_folder(contents.files, path, pixels)


def open_readable(
    spec: str | Path, pixels: PixelFormat = RGB, scenes: SceneSet = SCENES
) -> tuple[ImageSource, str]:
    """A source, and a sentence on how many images it has and how long it took to find them.

    Args: as for `open_source`.

    Raises:
        DataError: as there, and when none of up to `TRIED` images can be read.
    """
    began = time.perf_counter()
    source = open_source(spec, pixels, scenes)
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


def _open_shards(shards: Sequence[str], text: str, pixels: PixelFormat) -> FileSource:
    files = index_tars(shards, pixels.suffixes)
    if not len(files):
        endings = ", ".join(sorted(pixels.suffixes))
        raise DataError(f"{text}: no images in the shards; expected members ending in {endings}")
    return FileSource(files, pixels)


def _open_folder(files: Sequence[str], folder: str, pixels: PixelFormat) -> FileSource:
    """The images among the files of a folder, in the order of their paths."""
    images = [file for file in files if suffix_of(file) in pixels.suffixes]
    if not images:
        others = f"{len(files)} other files, such as {os.path.basename(files[0])}" if files else ""
        raise DataError(
            f"no images in {folder}: expected files ending in "
            f"{', '.join(sorted(pixels.suffixes))}; found {others or 'no files at all'}"
        )
    labels, names = _labels_from_folders(images, folder)
    return FileSource(PathFiles(images, labels), pixels, names)


def _labels_from_folders(
    images: Sequence[str], root: str
) -> tuple[Sequence[int] | None, list[str]]:
    """Labels and class names: the folder right below the root is the class of an image.

    Without one for every image there are no labels.
    """
    parts = [os.path.relpath(image, root).split(os.sep) for image in images]
    if any(len(part) < 2 for part in parts):
        return None, []
    names, labels = np.unique([part[0] for part in parts], return_inverse=True)
    return labels, names.tolist()
