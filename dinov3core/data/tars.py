"""Random access into tar files: offsets are read once from the headers, members then in place.

The headers are read here and not by `tarfile`, which trusts them: negative sizes send it round in
circles, and it reads as much of a long name or of a pax header as a file claims to hold. Understood
are ustar, GNU long names and sizes, and pax paths and sizes; sparse members are left out.
"""

import os
import re
import threading
import warnings
from array import array
from collections.abc import Collection, Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import open_regular, reason, suffix_of
from dinov3core.data.packed import PackedStrings
from dinov3core.printable import printable

OPEN_SHARDS = 64  # file descriptors kept per process
BLOCK = 512
MAX_EXTENSION = 2**20  # bytes of a long name or a pax header; real ones take a few hundred
MAX_MEMBER = 2**30  # bytes of an image file
LABEL_BYTES = 64  # of a .cls member
LABEL_DIGITS = 9
REGULAR = (b"0", b"\0", b"7")  # types of members: files,
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes,
EXTENSIONS = (b"x", b"g", b"L", b"K")  # pax headers of one or all members, long names and targets


class Member(NamedTuple):
    """A file in a shard; offset and size in bytes."""

    name: str
    start: int
    size: int


class Header(NamedTuple):
    """One block of 512 bytes."""

    kind: bytes
    name: str
    size: int


class Extension(NamedTuple):
    """What pax headers and long names say about the member after them."""

    name: str = ""
    size: int | None = None
    refusal: str = ""


class Shard(NamedTuple):
    """What the headers of a shard say."""

    members: list[Member]  # regular files, whole
    refused: list[str]  # "name: why" of the others
    complete: bool  # whether the headers are sound to the end


class TarIndex:
    """Members of many shards as files by number; cheap to send to worker processes.

    Args:
        paths: of the shards.
        names: shard and name of every member, with a slash between.
        places: int64 [members, 4]: number of the shard, offset and size in bytes, label or -1.
    """

    def __init__(self, paths: list[str], names: PackedStrings, places: np.ndarray):
        self.paths = paths
        self._names = names
        self._places = places
        self._open: dict[int, _Descriptor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def name_inside(self, index: int) -> tuple[str, str]:
        """The path of the shard, and the name that the member has in it."""
        path = self.paths[self._places[index, 0]]
        return path, self._names[index][len(path) + 1 :]

    def label(self, index: int) -> int | None:
        """The number in the .cls member beside it, if there is one."""
        label = int(self._places[index, 3])
        return None if label < 0 else label

    def open(self, index: int) -> BytesIO:
        """The bytes of a member.

        Raises:
            UnreadableImage: the shard can no longer be read there, or the member is too large.
        """
        shard, start, size, _ = self._places[index].tolist()
        name = self.name(index)
        if size > MAX_MEMBER:
            raise UnreadableImage(name, f"{size:,} bytes, more than the limit of {MAX_MEMBER:,}")
        try:
            # Held by a name while it is read from: another thread may have it closed else.
            descriptor = self._descriptor(shard)
            content = os.pread(descriptor.number, size, start)
        except OSError as error:
            raise UnreadableImage(name, reason(error)) from error
        if len(content) < size:
            raise UnreadableImage(name, f"the shard ends after {len(content)} of its {size} bytes")
        return BytesIO(content)

    def _descriptor(self, shard: int) -> "_Descriptor":
        """Positioned reads need no seek, so threads and forked workers may share one descriptor."""
        with self._lock:
            if shard not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[shard] = _Descriptor(self.paths[shard])
            return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class _Descriptor:
    """An open file, closed when nobody uses it any more, so never below a thread that reads."""

    def __init__(self, path: str):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def index_tars(paths: Iterable[str | Path], suffixes: Collection[str]) -> TarIndex:
    """Read the headers of shards and note where the members with one of the suffixes lie.

    Warns once each, with counts, about shards that end early, whose whole members are used, and
    about members that are left out.

    Raises:
        DataError: a shard is missing, compressed, or not a tar file.
    """
    paths = [str(path) for path in paths]
    names: list[str] = []
    places = array("q")  # four numbers a member, see TarIndex
    cut: list[str] = []
    refused: list[str] = []
    whole = 0  # members of the shards that end early
    for number, path in enumerate(paths):
        shard = read_shard(path)
        labels = _labels(path, shard.members)
        members = [one for one in shard.members if suffix_of(one.name) in suffixes]
        names += [f"{path}/{member.name}" for member in members]
        for name, start, size in members:
            places.extend((number, start, size, labels.get(_key(name), -1)))
        refused += [f"{path}/{member}" for member in shard.refused]
        if not shard.complete:
            cut.append(path)
            whole += len(members)
    if cut:
        text = f"{len(cut)} of {len(paths)} shards end early, such as {cut[0]}"
        warnings.warn(printable(f"{text}; their {whole} whole images are used"), stacklevel=3)
    if refused:
        text = f"{len(refused)} members of the shards are left out, such as {refused[0]}"
        warnings.warn(printable(text), stacklevel=3)
    return TarIndex(paths, PackedStrings(names), np.array(places, np.int64).reshape(-1, 4))


def read_shard(path: str) -> Shard:
    """The headers of a tar file.

    Raises:
        DataError: missing, compressed, or not a tar file.
    """
    try:
        with open_regular(path, buffering=0) as file:
            shard = _read_headers(file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {reason(error)}") from error
    if shard is None:
        advice = "unpack compressed shards first, as they cannot be read at random"
        raise DataError(f"{path} is not an uncompressed tar file; {advice}")
    return shard


def _read_headers(file: int, length: int) -> Shard | None:
    """None when not even the first header is one."""
    members: list[Member] = []
    refused: list[str] = []
    extension = Extension()
    offset = 0
    while (block := os.pread(file, BLOCK, offset)).strip(b"\0"):
        header = _parsed(block)
        if header is None:
            return Shard(members, refused, False) if offset else None
        start = _after_sparse_map(file, block, offset)
        size = _data_size(header, extension)
        if start + size > length:
            return Shard(members, refused, False)
        offset = start + -(-size // BLOCK) * BLOCK
        if header.kind in EXTENSIONS:
            content = os.pread(file, min(size, MAX_EXTENSION), start)
            extension = _extended(extension, header, content)
            continue
        name = extension.name or header.name
        refusal = "sparse" if header.kind == b"S" else extension.refusal
        if refusal:
            refused.append(f"{name}: {refusal}")
        elif header.kind in REGULAR and not name.endswith("/"):  # the oldest tars: a folder
            members.append(Member(name, start, size))
        extension = Extension()
    return Shard(members, refused, True)


def _parsed(block: bytes) -> Header | None:
    """None without a matching checksum, or with a size below 0."""
    checksum = _number(block[148:156])
    size = _number(block[124:136])
    if len(block) < BLOCK or size is None or checksum is None:
        return None
    counted = block[:148] + b" " * 8 + block[156:]
    total = sum(counted)
    if checksum != total and checksum != total - 256 * sum(byte > 127 for byte in counted):
        return None  # some old tars count signed bytes
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return Header(block[156:157], f"{prefix}/{name}" if prefix else name, size)


def _number(field: bytes) -> int | None:
    """Octal digits, or 0x80 and a number in base 256; None for anything else, also below 0."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _after_sparse_map(file: int, block: bytes, offset: int) -> int:
    """Where the data begin: old GNU headers of sparse files go on for several blocks."""
    more = block[156:157] == b"S" and block[482:483] != b"\0"
    offset += BLOCK
    while more:
        more = os.pread(file, BLOCK, offset)[504:505] not in (b"", b"\0")
        offset += BLOCK
    return offset


def _data_size(header: Header, extension: Extension) -> int:
    if header.kind in WITHOUT_DATA:
        return 0
    if header.kind in EXTENSIONS or extension.size is None:
        return header.size
    return extension.size


def _extended(known: Extension, header: Header, content: bytes) -> Extension:
    """What is known of the next member after one more header about it."""
    if header.kind not in (b"x", b"L"):
        return known
    if header.size > len(content):
        return known._replace(refusal=f"a header of {header.size:,} bytes")
    if header.kind == b"L":
        return known._replace(name=_text(content))
    records = _pax_records(content)
    size = records.get(b"size", b"")
    if not records or not re.fullmatch(rb"[0-9]{0,18}", size):
        return known._replace(refusal="a broken pax header")
    if any(key.startswith(b"GNU.sparse.") for key in records):
        known = known._replace(refusal="sparse")
    path = records.get(b"GNU.sparse.name", records.get(b"path", b""))
    return known._replace(name=_text(path) or known.name, size=int(size) if size else known.size)


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Lines "LENGTH KEY=VALUE" of a pax header; empty when one of them is none."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        length = content[position : position + 20].split(b" ")[0]
        if not re.fullmatch(rb"[0-9]{1,10}", length):
            return {}
        end = position + int(length)
        key, equals, value = content[position + len(length) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            return {}
        records[key] = value
        position = end
    return records


def _labels(path: str, members: list[Member]) -> dict[str, int]:
    """The numbers in the .cls members of a shard by what the files of a sample share."""
    labels = [member for member in members if member.name.endswith(".cls")]
    if not labels:
        return {}
    try:
        with open_regular(path, buffering=0) as file:
            number = file.fileno()
            texts = [os.pread(number, min(size, LABEL_BYTES), start) for _, start, size in labels]
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {reason(error)}") from error
    return {_key(label.name): _label(text) for label, text in zip(labels, texts)}


def _label(content: bytes) -> int:
    """-1 for none."""
    text = content.strip()
    return int(text) if text.isdigit() and len(text) <= LABEL_DIGITS else -1


def _key(name: str) -> str:
    """What the files of one sample share: the path up to the first dot of the file's name."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".", 1)[0])
