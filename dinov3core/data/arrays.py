"""Image sets in one .npz file, without pickles.

Keys: images as `data` uint8 with `offset` int64 [N + 1] (JPEG or PNG files joined), or `x` [N, C, H, W] or [N, H, W, 3]
of any number type, or `hi` and `lo` uint8 [N, C, H, W], the bytes of 16-bit values; `label` [N]; `split` [N] with 0 for
train; optional `classes` with a name per label and `name` [N]. Arrays are held in memory.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3core.data.decode import DECODE_ERRORS, decode_rgb
from dinov3core.data.errors import DataError, UnreadableImage


class ArraySource:
    """Rows of an .npz as an image source.

    Args:
        path: for names and to tell whether the file changed.
        arrays: its content.
        rows: which images.
        scale: the value that becomes 1; None: the largest of an integer type, 1 for floats.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], rows: np.ndarray, scale: float | None):
        self._path, self._arrays, self._rows, self.scale = path, arrays, rows, scale

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

    def load(self, index: int) -> Image.Image | Tensor:
        row, found = self._rows[index], self._arrays
        if "data" in found:
            start, end = found["offset"][row : row + 2]
            return decode_rgb(BytesIO(found["data"][start:end].tobytes()), self.name(index))
        if "hi" in found:
            planes = found["hi"][row].astype(np.uint16) << 8 | found["lo"][row]
        else:
            planes = found["x"][row]
            if planes.shape[-1] == 3 != len(planes):
                if planes.dtype == np.uint8:
                    return Image.fromarray(planes)
                planes = planes.transpose(2, 0, 1)
        top = self.scale or (np.iinfo(planes.dtype).max if np.issubdtype(planes.dtype, np.integer) else 1.0)
        scaled = torch.from_numpy(planes.astype(np.float32) / np.float32(top))
        if not torch.isfinite(scaled).all():
            raise UnreadableImage(self.name(index), "the array holds NaN or Inf")
        return scaled.clamp_(0, 1)


def open_arrays(path: Path, scale: float | None) -> tuple[ArraySource, ArraySource, list[str]]:
    """Train and test images of an .npz file, and the class names.

    Raises:
        DataError: not such a file, or keys that are missing or of other lengths.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (*DECODE_ERRORS, BadZipFile) as error:
        raise DataError(f"{path}: expected a readable .npz file without pickles, got {error}") from error
    images = next((key for key in ("data", "x", "hi") if key in arrays), None)
    lacking = [key for key in ("label", "split") if key not in arrays]
    lacking += [] if images else ["data, x or hi"]
    lacking += [key for first, key in (("data", "offset"), ("hi", "lo")) if first in arrays and key not in arrays]
    if lacking:
        raise DataError(f"{path}: expected the keys {', '.join(lacking)}, found only {', '.join(arrays)}")
    count = len(arrays["offset"]) - 1 if images == "data" else len(arrays[images])
    if len(arrays["label"]) != count or len(arrays["split"]) != count:
        raise DataError(
            f"{path}: expected one label and one split for each of the {count} images, got "
            f"{len(arrays['label'])} and {len(arrays['split'])}"
        )
    train = np.flatnonzero(arrays["split"] == 0)
    test = np.flatnonzero(arrays["split"] != 0)
    names = arrays["classes"].tolist() if "classes" in arrays else _numbered(arrays["label"])
    return ArraySource(path, arrays, train, scale), ArraySource(path, arrays, test, scale), names


def _numbered(labels: np.ndarray) -> list[str]:
    return [f"class {label}" for label in range(int(labels.max(initial=-1)) + 1)]
