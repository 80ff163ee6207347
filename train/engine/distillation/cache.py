"""Outputs of a frozen teacher for views, computed once, stored, and read when a view comes again.

**Exact.** The key of a view is a hash (BLAKE2b, 16 bytes) of the very pixels that the teacher is
given, and of their shape. So it holds the image, the crop box, the flip and every other draw by
construction, and code that draws views may change without making an entry wrong: other pixels are
another key. The folder says the rest: the teacher's weights, the precision of its arithmetic, the
shapes and types of what is stored. A view that is not there is computed, never approximated; a
mirrored one is another view. (Mirrored features of the plain view had a cosine of 0.867 to the true
ones elsewhere.) What is returned is bit for bit what the teacher said when it first saw the view;
asked again in a batch of another size, it would differ by rounding.

**Cost.** Measured on one core of a server for a view of 3 x 224 x 224: 0.64 ms to hash it, 0.11 ms
to read what a ViT-S/16 said of it (0.3 MB), 203 ms to compute that. Several threads hash and read
at once. Where the teacher takes a millisecond, as a small one does on a large GPU, a cache does not
pay. On the disk a view takes (E + P * E') numbers and 24 bytes, in the memory of every process that
asks 175 bytes. (benchmarks/teacher_cache.py measures all of it.)

**Files.** Every process that writes has a pair of its own in the teacher's folder, and only ever
appends: `<token>.data` has records of one length, `<token>.index` the key of each, written after
it. So a kill at any byte leaves whole entries and a tail that nobody reads, several processes and
several runs share a folder, and each finds what the others wrote. Both are raw bytes; keys and
records carry checksums. What is damaged is computed again. Nothing that a file holds is run.

Files are read at their offsets instead of being mapped: the pages in memory are the same ones, but
a file that somebody cuts, or a disk that fails, is a miss and not the end of the process (SIGBUS).

Shapes: n crops, P patches of a crop, E and E' widths of a teacher's rows.
"""

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov3core.printable import printable
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.frozen_teacher import (
    FrozenTeacher,
    HeadTeacher,
    TeacherRows,
)
from dinov3core.writing import write_whole

VERSION = 1  # counts changes of the files, and of what the same teacher says of the same pixels
MARK = "cache.json"  # in a folder that is a cache
TEACHER = "teacher.json"  # in the folder of each teacher
CONTENTS = {"contents": "outputs of frozen teachers", "version": VERSION}
KEY_BYTES = 16
ENTRY = struct.Struct(f"<{KEY_BYTES}sI")  # a key and its CRC-32
CHECKSUM = struct.Struct("<I")  # after each record: CRC-32 of its key and itself
THREADS = 8  # that hash and read; both leave Python to the others meanwhile


class CachedTeacher:
    """A `FrozenTeacher` that computes only what the cache does not have.

    Attributes:
        hits, misses: views that were read, and computed, so far.
        bytes_read, bytes_written: of the cache, so far.

    Args:
        teacher: who is asked for what is missing.
        folder: of the cache; made where there is none. Teachers, processes and runs may share it.
        say: told, once each, when the folder knows other teachers only, when something in it is
            damaged, and when it cannot be written; training goes on.

    Raises:
        ConfigError: the folder holds something else, or cannot be made.
    """

    def __init__(self, teacher: FrozenTeacher, folder: Path, say: Callable[[str], None]):
        self.teacher = teacher
        self.name = teacher.name
        self.patch_size = teacher.patch_size
        self.fingerprint = teacher.fingerprint
        self.hits = self.misses = self.bytes_read = self.bytes_written = 0
        self._say = say
        self._said: set[str] = set()
        self._stores: dict[tuple[object, ...], Store] = {}
        self._threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "cache")
        _open_cache(folder)
        self._folder = folder / _folder_name(teacher)
        others = [] if self._folder.exists() else _teachers(folder)
        if others:
            say(
                f"the cache {folder} has outputs of other teachers only ({', '.join(others)}): "
                f"those of {printable(self.name)} are computed and added"
            )

    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        """As `FrozenTeacher`; one pass of the teacher over the crops that are not there, if any."""
        if not len(crops):
            return self.teacher(crops, rows)
        store = self._store(crops)
        keys = list(self._threads.map(_key, crops.cpu()))
        records, absent = self._stored(store, keys)
        missing: dict[bytes, list[int]] = {}  # a view may be there twice
        for row in absent:
            missing.setdefault(keys[row], []).append(row)
        if missing:
            computed = self._compute(store, crops, missing)
            for record, rows_of in zip(computed, missing.values(), strict=True):
                records[rows_of] = record
        self.hits += len(crops) - len(missing)
        self.misses += len(missing)

        cls, patches = store.layout.decoded(records)
        chosen = patches if rows is None else patches[rows.to(patches.device)]
        return TeacherRows(cls.to(crops.device), chosen.to(crops.device))

    def in_words(self) -> str:
        """How much of the teacher's work the cache has saved so far."""
        views = self.hits + self.misses
        share = 100 * self.hits / max(views, 1)
        return (
            f"{self.hits:,} of {views:,} views of {printable(self.name)} came from the cache "
            f"({share:.1f} %): {self.bytes_read / 1e9:.2f} GB read, "
            f"{self.bytes_written / 1e9:.2f} GB written"
        )

    def _store(self, crops: Tensor) -> "Store":
        """What is stored of crops of this shape, in the precision of here and now.

        The first time, the teacher is asked for one crop to see what it gives.
        """
        size = "x".join(map(str, crops.shape[1:]))
        kind = f"{size}-{_precision(crops.device)}"
        if kind not in self._stores:
            layout = Layout.of(self.teacher(crops[:1]), 1)
            self._stores[kind] = Store(self._folder / f"{kind}-{layout}", layout)
        return self._stores[kind]

    def _stored(self, store: "Store", keys: Sequence[bytes]) -> tuple[Tensor, list[int]]:
        """The records of keys, uint8 [n, length], and which rows of it are not there."""
        if any(key not in store.places for key in keys):
            store.look_again()
        records = torch.empty(len(keys), store.layout.length, dtype=torch.uint8)
        there = list(self._threads.map(store.fetch, keys, records))
        self.bytes_read += sum(there) * store.stride
        if store.damaged:
            self._once("damaged", f"some of the cache {store.folder} is damaged: computed again")
        return records, [row for row, is_there in enumerate(there) if not is_there]

    def _compute(
        self, store: "Store", crops: Tensor, missing: Mapping[bytes, Sequence[int]]
    ) -> Tensor:
        """The records of missing views, uint8 [n, length], which are stored as well.

        Args:
            missing: rows of `crops` that show each view, by its key.
        """
        first = torch.tensor([rows[0] for rows in missing.values()], device=crops.device)
        computed = self.teacher(crops if len(first) == len(crops) else crops[first])
        records = store.layout.encoded(computed, len(first))
        if "unwritable" in self._said:
            return records
        try:
            self._introduce()
            self.bytes_written += store.append(list(missing), records)
        except OSError as error:
            self._once(
                "unwritable",
                f"the cache {store.folder} cannot be written ({error.strerror or error}): it is "
                "read, and training goes on",
            )
        return records

    def _introduce(self) -> None:
        """Say in the teacher's folder whose it is."""
        description = self._folder / TEACHER
        if not description.exists():
            self._folder.mkdir(exist_ok=True)
            known = {"name": self.name, "fingerprint": self.fingerprint}
            write_whole(description, json.dumps(known))

    def _once(self, word: str, sentence: str) -> None:
        if word not in self._said:
            self._said.add(word)
            self._say(sentence)


class CachedHeads(CachedTeacher):
    """A `CachedTeacher` of heads: bottlenecks are stored, and last layers computed from them.

    Args: as for `CachedTeacher`.
    """

    teacher: HeadTeacher

    def __init__(self, teacher: HeadTeacher, folder: Path, say: Callable[[str], None]):
        super().__init__(teacher, folder, say)

    def cls_logits(self, bottlenecks: Tensor) -> Tensor:
        """As of the teacher."""
        return self.teacher.cls_logits(bottlenecks)

    def patch_logits(self, bottlenecks: Tensor) -> Tensor:
        """As of the teacher."""
        return self.teacher.patch_logits(bottlenecks)


class Layout(NamedTuple):
    """What a record holds: a CLS row and the patches of one view, one after the other."""

    cls: tuple[int, torch.dtype]  # E and its type
    patches: tuple[int, int, torch.dtype]  # P, E' and its type

    @classmethod
    def of(cls, rows: TeacherRows, views: int) -> "Layout":
        """Of the rows of so many views."""
        patches = rows.patches
        own = (rows.cls.shape[1], rows.cls.dtype)
        return cls(own, (len(patches) // views, patches.shape[1], patches.dtype))

    def __str__(self) -> str:
        """As folders are named: cls-384-float32-patches-256x384-float32."""
        width, cls_type = self.cls
        count, patch_width, patch_type = self.patches
        words = f"cls-{width}-{cls_type}-patches-{count}x{patch_width}-{patch_type}"
        return words.replace("torch.", "")

    @property
    def cls_bytes(self) -> int:
        width, dtype = self.cls
        return width * dtype.itemsize

    @property
    def length(self) -> int:
        """Bytes of a record."""
        count, width, dtype = self.patches
        return self.cls_bytes + count * width * dtype.itemsize

    def encoded(self, rows: TeacherRows, views: int) -> Tensor:
        """The records of so many views, uint8 [n, length] in host memory."""
        parts = (rows.cls, rows.patches)
        return torch.cat([_bytes_of(part.cpu().reshape(views, -1)) for part in parts], 1)

    def decoded(self, records: Tensor) -> TeacherRows:
        """What records hold."""
        _, cls_type = self.cls
        _, patch_width, patch_type = self.patches
        cls, patches = records.split([self.cls_bytes, self.length - self.cls_bytes], 1)
        return TeacherRows(
            cls.contiguous().view(cls_type),
            patches.contiguous().view(patch_type).view(-1, patch_width),
        )

    def finite(self, records: Tensor) -> Tensor:
        """Which of records, uint8 [n, length], have neither NaN nor infinity: bool [n]."""
        parts = self.decoded(records)
        return torch.stack([part.isfinite().view(len(records), -1).all(1) for part in parts]).all(0)


class Store:
    """The files of one kind of outputs, read by everybody and appended to by their writer.

    Attributes:
        places: of records by key: which file of `names`, and which record in it.
        damaged: whether something did not match its checksum, or was gone, so far.

    Args:
        folder: of the files; made with the first record.
        layout: of the records.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder
        self.layout = layout
        self.places: dict[bytes, tuple[int, int]] = {}
        self.names: list[str] = []
        self.damaged = False
        self._known: dict[str, int] = {}  # how many entries of each file
        self._own = secrets.token_hex(8)  # the pair that this process alone appends to

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return self.layout.length + CHECKSUM.size

    def look_again(self) -> None:
        """Learn what was stored since the last time: no more than a look at sizes if nothing."""
        counts: list[tuple[float, str, int]] = []
        with suppress(OSError):  # there is no such folder yet
            for item in os.scandir(self.folder):
                name, _, ending = item.name.rpartition(".")
                if ending == "index":
                    status = item.stat()
                    counts.append((status.st_mtime, name, status.st_size // ENTRY.size))
        for _, name, count in sorted(counts):  # later ones stand in for damaged ones
            if count > self._known.get(name, 0):
                with suppress(OSError):
                    self._learn(name, count)

    def _learn(self, name: str, count: int) -> None:
        """Read an index file up to entry `count`."""
        known = self._known.get(name, 0)
        with open(self.folder / f"{name}.index", "rb") as file:
            file.seek(known * ENTRY.size)
            content = file.read((count - known) * ENTRY.size)
        whole = len(content) - len(content) % ENTRY.size
        number = self._number_of(name)
        for record, (key, check) in enumerate(ENTRY.iter_unpack(content[:whole]), known):
            if check == zlib.crc32(key):
                self.places[key] = (number, record)
            else:
                self.damaged = True
        self._known[name] = known + whole // ENTRY.size

    def _number_of(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def fetch(self, key: bytes, record: Tensor) -> bool:
        """Fill `record`, uint8 [length], with that of a key; False: it is not there, or damaged."""
        if key not in self.places:
            return False
        file_number, number = self.places[key]
        path = self.folder / f"{self.names[file_number]}.data"
        buffer = record.numpy()
        check = bytearray(CHECKSUM.size)
        length = 0
        with suppress(OSError), open(path, "rb", 0) as file:
            length = os.preadv(file.fileno(), [buffer, check], number * self.stride)
        if length == self.stride and check == _checksum(key, buffer):
            return True
        self.damaged = True
        return False

    def append(self, keys: Sequence[bytes], records: Tensor) -> int:
        """Store records, uint8 [n, length], but those that are not finite; the bytes written.

        Raises:
            OSError: the disk is full, or the like; nothing can be appended after that.
        """
        finite = self.layout.finite(records).nonzero().flatten().tolist()
        if not finite:
            return 0
        chosen = [(keys[row], records[row].numpy()) for row in finite]
        content = b"".join(
            part for key, record in chosen for part in (record.data, _checksum(key, record))
        )
        entries = b"".join(ENTRY.pack(key, zlib.crc32(key)) for key, _ in chosen)

        self.folder.mkdir(parents=True, exist_ok=True)
        _append(self.folder / f"{self._own}.data", content)
        _append(self.folder / f"{self._own}.index", entries)
        file_number = self._number_of(self._own)
        first = self._known.get(self._own, 0)
        for number, (key, _) in enumerate(chosen, first):
            self.places[key] = (file_number, number)
        self._known[self._own] = first + len(chosen)
        return len(content) + len(entries)


def _append(path: Path, content: bytes) -> None:
    """Write all of it: an unbuffered file takes as much as fits."""
    rest = memoryview(content)
    with open(path, "ab", 0) as file:
        while rest:
            rest = rest[file.write(rest) :]


def _key(crop: Tensor) -> bytes:
    """Of the pixels of one crop [C, H, W] in host memory, and its shape."""
    pixels = crop.to(torch.float32).contiguous().numpy()
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=KEY_BYTES)
    digest.update(pixels)
    return digest.digest()


def _checksum(key: bytes, record: np.ndarray) -> bytes:
    return CHECKSUM.pack(zlib.crc32(record, zlib.crc32(key)))


def _bytes_of(rows: Tensor) -> Tensor:
    """[n, m] of any type as uint8 [n, bytes of m]."""
    return rows.contiguous().view(torch.uint8)


def _precision(device: torch.device) -> str:
    """In which a network computes on a device here and now, for the name of a folder."""
    if torch.is_autocast_enabled(device.type):
        return f"autocast-{torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    return f"{torch.get_float32_matmul_precision()}-precision"


def _folder_name(teacher: FrozenTeacher) -> str:
    """Of what a teacher says: its weights, and what kind of rows it gives of them."""
    known = json.dumps([type(teacher).__name__, teacher.fingerprint])
    return hashlib.blake2b(known.encode(), digest_size=KEY_BYTES).hexdigest()


def _open_cache(folder: Path) -> None:
    """Make a cache of a new or empty folder.

    Raises:
        ConfigError: it holds something else, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.startswith(MARK)]
        mark = folder / MARK
        if mark.exists():
            stated = mark.read_bytes()
        elif others:
            stated = b""
        else:
            stated = json.dumps(CONTENTS).encode()
            write_whole(mark, stated)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cache: expected a folder that can be made or read, got {folder} ({reason}); give "
            "another one"
        ) from error
    if stated != json.dumps(CONTENTS).encode():
        example = printable(sorted(others or [MARK])[0])
        raise ConfigError(
            f"cache: expected a new folder or a cache of version {VERSION}, got {folder}, which "
            f"holds something else, such as {example}; give another folder"
        )


def _teachers(folder: Path) -> list[str]:
    """Names of the teachers of which a cache has outputs."""
    names = []
    for description in folder.glob(f"*/{TEACHER}"):
        with suppress(OSError, ValueError, LookupError, TypeError):
            names.append(printable(str(json.loads(description.read_bytes())["name"])))
    return sorted(names)
