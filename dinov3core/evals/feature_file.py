"""A safetensors file written a few images at a time: it needs no memory and can be continued.

The layout of safetensors is an 8-byte length, a JSON header and the data. Space for the header is
set aside first; rows of tensors of known shape are written in place, tensors whose shape is known
later are appended, and the header comes last. Until then the data sit in `<path>.partial`, with
`<path>.progress` saying how far they go.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3core.writing import publish, write_whole

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
_ENTRY = 256  # bytes of header set aside per appended tensor


class FeatureFile:
    """Open or resume a feature file.

    Args:
        path: the finished file.
        fixed: tensors of known shape: name -> (dtype, shape), widest type first; their first axis
            counts images.
        appended: how many tensors may be appended.
        metadata: strings for the header; they also identify the work, so a file of other work is
            not continued.

    Attributes:
        done: images written so far, by this process or one before it.

    Raises:
        ValueError: when the file is finished already or its parts belong to other work.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fixed: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str],
        appended: int = 0,
    ):
        self.path = Path(path)
        self._partial, self._progress = (Path(f"{path}{end}") for end in (".partial", ".progress"))
        if self.path.exists():
            raise ValueError(
                f"{path}: expected a new file, found one; delete it or give another name"
            )
        self._metadata = dict(metadata)
        self._dtypes = {name: dtype for name, (dtype, _) in fixed.items()}
        self._entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name, (dtype, shape) in fixed.items():
            end = self._enter(name, dtype, shape, end)
        header = json.dumps({"__metadata__": self._metadata} | self._entries)
        self._work = hashlib.sha256(header.encode()).hexdigest()
        # Where the data begin: after the length and a header padded to whole 8 bytes.
        self._start = 8 + -(-(len(header.encode()) + _ENTRY * appended) // 8) * 8
        self.done = 0
        if self._progress.exists():
            self._resume()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._partial.open("wb") as file:
                file.truncate(self._start + end)
        self._file = self._partial.open("r+b")

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Rows [n, ...] of a fixed tensor, from image `first` on."""
        entry = self._entries[name]
        if list(rows.shape[1:]) != entry["shape"][1:]:
            raise ValueError(
                f"{name}: expected rows of shape {entry['shape'][1:]}, got {list(rows.shape[1:])}"
            )
        data = _bytes(rows.to(self._dtypes[name]))
        row_bytes = len(data) // max(len(rows), 1)
        self._file.seek(self._start + entry["data_offsets"][0] + first * row_bytes)
        self._file.write(data)

    def append(self, name: str, tensor: Tensor) -> None:
        """A whole tensor after all others."""
        begin = max((e["data_offsets"][1] for e in self._entries.values()), default=0)
        self._enter(name, tensor.dtype, tensor.shape, begin)
        self._file.seek(self._start + begin)
        self._file.write(_bytes(tensor))

    def commit(self, done: int) -> None:
        """Everything up to image `done` is written: a killed process continues from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done = done
        text = json.dumps({"work": self._work, "entries": self._entries, "done": done})
        write_whole(self._progress, text)

    def finish(self) -> None:
        """Write the header and give the file its name."""
        header = json.dumps({"__metadata__": self._metadata} | self._entries).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._start - 8) + header.ljust(self._start - 8))
        end = max(entry["data_offsets"][1] for entry in self._entries.values())
        self._file.truncate(self._start + end)
        self._file.close()
        publish(self._partial, self.path)
        self._progress.unlink(missing_ok=True)

    def _enter(self, name: str, dtype: torch.dtype, shape: Sequence[int], begin: int) -> int:
        size = dtype.itemsize
        for length in shape:
            size *= length
        self._entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, begin + size],
        }
        return begin + size

    def _resume(self) -> None:
        try:
            progress = json.loads(self._progress.read_text(encoding="utf-8"))
            work = progress["work"]
            self._entries = progress["entries"]
            self.done = int(progress["done"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged: of no work at all
            work = None
        if work != self._work or not self._partial.exists():
            raise ValueError(
                f"{self._partial}: expected an unfinished file of the same images, model and "
                f"settings, got one of other work; delete it and {self._progress.name}, or give "
                "another name"
            )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
