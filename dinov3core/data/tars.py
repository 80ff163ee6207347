"""Random access into tar files: offsets are read once from the headers, members then in place."""

import os
import tarfile
import warnings
from collections.abc import Collection
from io import BytesIO

import numpy as np

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.packed import PackedStrings

OPEN_SHARDS = 64  # file descriptors kept per process


class TarIndex:
    """Where the members of many shards lie; cheap to send to worker processes."""

    def __init__(
        self,
        paths: list[str],
        shard: np.ndarray,
        start: np.ndarray,
        size: np.ndarray,
        labels: np.ndarray,
        names: PackedStrings,
    ):
        self.paths, self.names = paths, names
        self._shard, self._start, self._size, self._labels = shard, start, size, labels
        self._open: dict[int, int] = {}

    def read(self, index: int, name: str) -> BytesIO:
        """The bytes of a member.

        Raises:
            UnreadableImage: the shard can no longer be read there.
        """
        size = int(self._size[index])
        try:
            content = os.pread(self._descriptor(int(self._shard[index])), size, int(self._start[index]))
        except OSError as error:
            raise UnreadableImage(name, str(error.strerror).lower()) from error
        if len(content) < size:
            raise UnreadableImage(name, f"the shard ends after {len(content)} of its {size} bytes")
        return BytesIO(content)

    def label(self, index: int) -> int | None:
        label = int(self._labels[index])
        return None if label < 0 else label

    def _descriptor(self, shard: int) -> int:
        """Positioned reads need no seek, so threads and forked workers may share one descriptor."""
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def index_tars(paths: list[str], suffixes: Collection[str]) -> TarIndex:
    """Read the headers of shards and note where the members with an image suffix lie.

    Warns once, with counts, about shards that end early; their whole members are kept.

    Raises:
        DataError: a shard is missing, compressed, or not a tar file.
    """
    shards, starts, sizes, labels, names, cut, used = [], [], [], [], [], [], 0
    for shard, path in enumerate(paths):
        members, complete = _members(path)
        classes = {_key(name): _number(path, start, size) for name, start, size in members if name.endswith(".cls")}
        for name, start, size in members:
            if os.path.splitext(name)[1].lower() in suffixes:
                shards.append(shard)
                starts.append(start)
                sizes.append(size)
                labels.append(classes.get(_key(name), -1))
                names.append(f"{path}/{name}")
        if not complete:
            cut.append(path)
            used += shards.count(shard)
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(paths)} shards end early, such as {cut[0]}; their {used} whole images are used",
            stacklevel=3,
        )
    as_array = [np.asarray(column, np.int64) for column in (shards, starts, sizes, labels)]
    return TarIndex(paths, *as_array, PackedStrings(names))


def _members(path: str) -> tuple[list[tuple[str, int, int]], bool]:
    """(name, offset, size) of every whole file in a shard, and whether the shard is complete."""
    found, length = [], 0
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and member.offset_data + member.size <= length:
                    found.append((member.name, member.offset_data, member.size))
                elif member.isfile():
                    return found, False
            return found, _ends_properly(path, tar.offset)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {str(error.strerror).lower()}") from error
    except tarfile.ReadError as error:
        if not found:
            raise DataError(
                f"{path} is not an uncompressed tar file ({error}); unpack compressed shards first, as they cannot be "
                "read at random"
            ) from error
        return found, False


def _ends_properly(path: str, offset: int) -> bool:
    """Whether nothing but padding follows the last member; Python's reader is silent about half a header there."""
    with open(path, "rb") as file:
        file.seek(offset)
        return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def _key(name: str) -> str:
    """What the files of one sample share: the path up to the first dot of the file's name."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".", 1)[0])


def _number(path: str, start: int, size: int) -> int:
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(size).strip()
    return int(text) if text.isdigit() else -1
