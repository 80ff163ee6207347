"""What a path stands for: files of a folder, of a list or of tar shards, each with a number."""

import glob
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dinov3core.data.errors import DataError
from dinov3core.data.files import exists, files_below, suffix_of
from dinov3core.data.packed import PackedStrings

PATTERN = re.compile(r"[*?\[{]")  # a path with one of these may stand for several
RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")


class Files(Protocol):
    """Files by number, wherever they lie.

    Attributes:
        paths: of the files on the disk, whose sizes and times tell whether anything changed.
    """

    @property
    def paths(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name to show to people."""
        ...

    def open(self, index: int) -> BinaryIO | str:
        """What decoders read: a path, or the bytes of a shard's member; raises UnreadableImage."""
        ...

    def label(self, index: int) -> int | None:
        """The number of its class, where that is known."""
        ...


class PathFiles:
    """Files by their paths; a missing one is reported when it is read.

    Args:
        paths: of the files.
        labels: their class numbers, or None.
    """

    def __init__(self, paths: Iterable[str | Path], labels: Sequence[int] | None = None):
        self.paths = PackedStrings(str(path) for path in paths)
        self._labels = None if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> str:
        return self.paths[index]

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


class StoredPaths(NamedTuple):
    """Paths of the files that a path stands for."""

    files: list[str]  # below a folder, in the order of the walk
    shards: list[str]  # .tar files, to be looked into


def look_into(spec: str | Path, images: Collection[str], expected: str) -> StoredPaths | None:
    """Look at a folder, a .tar file, or a pattern of several; None for anything else.

    Shards in a folder count when it holds no image beside them.

    Args:
        images: suffixes that tell an image.
        expected: what may be there, for the message.

    Raises:
        DataError: the place cannot be looked at, or shards of a pattern are missing.
    """
    path = os.path.expanduser(spec)
    there = exists(path, expected)
    if os.path.isdir(path):
        below = files_below(path)
        files = [file for file in below if suffix_of(file) != ".tar"]
        shards = sorted(file for file in below if suffix_of(file) == ".tar")
        if any(suffix_of(file) in images for file in files):
            shards = []
        return StoredPaths(files, shards)
    if not there and PATTERN.search(path):
        return StoredPaths([], expand(path))
    if there and suffix_of(path) == ".tar":
        return StoredPaths([], [path])
    return None


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
