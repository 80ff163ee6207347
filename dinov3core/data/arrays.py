"""Image sets in one .npz file, without pickles.

Keys: images as `data` uint8 with `offset` int64 [N + 1] (JPEG or PNG files joined), or `x` [N, C,
H, W] or [N, H, W, 3] of any number type, or `hi` and `lo` uint8 [N, C, H, W], the bytes of 16-bit
values; `label` [N]; `split` [N] with 0 for train; optional `classes` with a name per label and
`name` [N]. Arrays are held in memory.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from PIL import Image

from dinov3core.data.decode import DECODE_ERRORS, Pixels, decode_rgb, to_unit_range
from dinov3core.data.errors import DataError
from dinov3core.data.files import open_regular, reason
from dinov3core.data.labelled import MAX_CLASSES, numbered_classes
from dinov3core.data.npy import load_npy

MOST_EXPANSION = 50  # bytes in memory per byte on disk; photographs reach 1, bands perhaps 10
FREE_BYTES = 2**30  # up to which that does not matter


class ArraySource:
    """Rows of an .npz as an image source.

    Args:
        path: for names and to tell whether the file changed.
        arrays: its content.
        rows: which images.
        scale: the value that becomes 1; None: the largest of an integer type, 1 for floats.
    """

    def __init__(
        self, path: Path, arrays: Mapping[str, np.ndarray], rows: np.ndarray, scale: float | None
    ):
        self._path = path
        self._arrays = arrays
        self._rows = rows
        self.scale = scale

    @property
    def files(self) -> Sequence[str]:
        return [str(self._path)]

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> int:
        return int(self._arrays["label"][self._rows[index]])

    def name(self, index: int) -> str:
        row = self._rows[index]
        return f"{self._path}/{self._arrays['name'][row] if 'name' in self._arrays else row}"

    def load(self, index: int) -> Pixels:
        row = self._rows[index]
        arrays = self._arrays
        if "data" in arrays:
            start, end = arrays["offset"][row : row + 2]
            return decode_rgb(BytesIO(arrays["data"][start:end].tobytes()), self.name(index))
        if "hi" in arrays:
            planes = arrays["hi"][row].astype(np.uint16) << 8 | arrays["lo"][row]
            return to_unit_range(planes, self.name(index), self.scale)
        planes = arrays["x"][row]
        if planes.shape[-1] == 3 != len(planes):
            if planes.dtype == np.uint8:
                return Image.fromarray(planes)
            planes = planes.transpose(2, 0, 1)
        return to_unit_range(planes, self.name(index), self.scale)


def open_arrays(path: Path, scale: float | None) -> tuple[ArraySource, ArraySource, list[str]]:
    """Train and test images of an .npz file, and the class names.

    Raises:
        DataError: not such a file, keys that are missing, of other shapes or lengths, or values
            that cannot be.
    """
    arrays = _read(path)
    images = next((key for key in ("data", "x", "hi") if key in arrays), None)
    lacking = [key for key in ("label", "split") if key not in arrays]
    lacking += [] if images else ["data, x or hi"]
    lacking += [
        key
        for first, key in (("data", "offset"), ("hi", "lo"))
        if first in arrays and key not in arrays
    ]
    if lacking:
        present = ", ".join(arrays) or "others"
        raise DataError(f"{path}: expected the keys {', '.join(lacking)}, found only {present}")
    for key, expected in _SHAPES.items():
        if key in arrays and not _fits(arrays[key], expected):
            got = f"{arrays[key].dtype} {list(arrays[key].shape)}"
            raise DataError(f"{path}: {key}: expected {expected.words}, got {got}")
    count = max(0, len(arrays["offset"]) - 1) if images == "data" else len(arrays[images])
    if len(arrays["label"]) != count or len(arrays["split"]) != count:
        raise DataError(
            f"{path}: expected one label and one split for each of the {count} images, got "
            f"{len(arrays['label'])} and {len(arrays['split'])}"
        )
    _check_values(path, arrays, count)
    train = np.flatnonzero(arrays["split"] == 0)
    test = np.flatnonzero(arrays["split"] != 0)
    if "classes" in arrays:
        names = arrays["classes"].tolist()
    else:
        names = numbered_classes(arrays["label"], str(path))
    return ArraySource(path, arrays, train, scale), ArraySource(path, arrays, test, scale), names


class _Shape(NamedTuple):
    """What an array has to be: numpy's kinds of types, and how many axes."""

    kinds: str
    axes: int
    words: str
    itemsize: int | None = None


_SHAPES = {
    "data": _Shape("u", 1, "bytes [B]", 1),
    "offset": _Shape("iu", 1, "integers [N + 1]"),
    "x": _Shape("buif", 4, "numbers [N, C, H, W] or [N, H, W, 3]"),
    "hi": _Shape("u", 4, "bytes [N, C, H, W]", 1),
    "lo": _Shape("u", 4, "bytes [N, C, H, W]", 1),
    "label": _Shape("iu", 1, "integers [N]"),
    "split": _Shape("biu", 1, "integers [N]"),
    "classes": _Shape("U", 1, "names [K]"),
    "name": _Shape("Uiu", 1, "names [N]"),
}


def _fits(array: np.ndarray, expected: _Shape) -> bool:
    kind = array.dtype.kind in expected.kinds and expected.itemsize in (None, array.itemsize)
    return kind and array.ndim == expected.axes


def _check_values(path: Path, arrays: Mapping[str, np.ndarray], count: int) -> None:
    """What the lengths do not say."""
    if "data" in arrays:
        offset = arrays["offset"]
        size = len(arrays["data"])
        inside = offset.min(initial=0) >= 0 and offset.max(initial=0) <= size
        if not inside or (offset[1:] < offset[:-1]).any():
            expected = f"ascending places in {size} bytes of data"
            raise DataError(f"{path}: offset: expected {expected}, got others")
    elif "hi" in arrays and arrays["hi"].shape != arrays["lo"].shape:
        shapes = list(arrays["hi"].shape), list(arrays["lo"].shape)
        raise DataError(f"{path}: expected hi and lo of one shape, got {shapes[0]} and {shapes[1]}")
    elif not next(arrays[key] for key in ("x", "hi") if key in arrays).size:
        raise DataError(f"{path}: expected images of at least one pixel, got none")
    if len(arrays.get("name", range(count))) != count:
        names = len(arrays["name"])
        raise DataError(f"{path}: expected a name for each of the {count} images, got {names}")
    lowest = arrays["label"].min(initial=0)
    highest = arrays["label"].max(initial=0)
    if lowest < 0 or highest >= MAX_CLASSES:
        got = f"{lowest} to {highest}"
        raise DataError(f"{path}: expected class numbers from 0 to {MAX_CLASSES - 1}, got {got}")


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file that images are made of; others are left alone."""
    try:
        with open_regular(path) as file, ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {key: info for key, info in members.items() if key in _SHAPES}
            _refuse_bombs(path, wanted.values(), os.fstat(file.fileno()).st_size)
            arrays = {key: _array(archive, info) for key, info in wanted.items()}
    except DataError:
        raise
    except (*DECODE_ERRORS, BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted
        expected = "a readable .npz file without pickles"
        raise DataError(f"{path}: expected {expected}, got {reason(error)}") from error
    return arrays


def _array(archive: ZipFile, info: ZipInfo) -> np.ndarray:
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{info.filename} compressed by another method than deflate")
    with archive.open(info) as member:
        return load_npy(member, limit=info.file_size, kinds="buifU")


def _refuse_bombs(path: Path, members: Iterable[ZipInfo], size: int) -> None:
    expanded = sum(info.file_size for info in members)
    if expanded > max(FREE_BYTES, MOST_EXPANSION * size):
        most = f"expected at most {MOST_EXPANSION} times as many; use tar shards"
        raise DataError(f"{path}: {size:,} bytes that expand to {expanded:,}: {most}")
