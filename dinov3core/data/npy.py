"""Arrays of .npy files, whose headers are believed only as far as the file goes."""

import ast
import math
from typing import Any, BinaryIO

import numpy as np

MAX_HEADER = 10_000  # bytes
MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by version of the format


def load_npy(file: BinaryIO, limit: int, kinds: str = "buif") -> np.ndarray:
    """One array of numbers, or of other `kinds` of numpy's types except objects.

    Args:
        limit: bytes it may take.

    Raises:
        ValueError: broken, of another kind, too large; OSError: cannot be read.
    """
    dtype, shape, order = _header(file)
    if dtype.kind not in kinds or not dtype.itemsize:
        got = "a pickle of objects" if dtype.hasobject else dtype
        raise ValueError(f"expected one array of real numbers, got {got}")
    size = math.prod(shape) * dtype.itemsize
    if size > limit:
        most = f"more than the limit of {limit / 1e9:.1f} GB"
        raise ValueError(f"an array of {size / 1e9:.1f} GB and shape {list(shape)}, {most}")
    content = np.empty(size, np.uint8)
    filled = _fill(file, content)
    if filled < size:
        raise ValueError(f"the file ends after {filled} of the {size} bytes of its array")
    return content.view(dtype).reshape(shape, order=order)


def _header(file: BinaryIO) -> tuple[np.dtype, tuple[int, ...], str]:
    """Type, shape and order of the array that follows."""
    start = file.read(8)
    if start[:2] == b"PK":
        raise ValueError("expected one array of real numbers, got an archive")
    length_bytes = _LENGTH_BYTES.get(start[6]) if len(start) == 8 and start[:6] == MAGIC else None
    if length_bytes is None:
        raise ValueError("not a .npy file")
    length = int.from_bytes(file.read(length_bytes), "little")
    if length > MAX_HEADER:
        most = f"more than the limit of {MAX_HEADER:,}"
        raise ValueError(f"a .npy header of {length:,} bytes, {most}")
    try:
        fields = ast.literal_eval(file.read(length).decode("latin1").strip())
        dtype = np.dtype(fields["descr"]) if _is_header(fields) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("a broken .npy header") from error
    if dtype is None:
        raise ValueError("a broken .npy header")
    return dtype, fields["shape"], "F" if fields["fortran_order"] else "C"


def _is_header(fields: Any) -> bool:
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        return False
    shape = fields["shape"]
    return (
        isinstance(fields["descr"], str)
        and isinstance(fields["fortran_order"], bool)
        and isinstance(shape, tuple)
        and all(type(length) is int and 0 <= length < 2**48 for length in shape)
    )


def _fill(file: BinaryIO, content: np.ndarray) -> int:
    """Read bytes into an array until it is full or the file ends; how many there were."""
    view = memoryview(content)
    position = 0
    while position < len(view):
        count = file.readinto(view[position : position + 2**20])
        if not count:
            break
        position += count
    return position
