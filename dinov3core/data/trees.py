"""Files by their relative names, in a folder or in tar shards, so that a layout is recognised once
for both.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from dinov3core.data.decode import ARRAY_SUFFIXES, RGB_SUFFIXES
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import exists, files_below, open_regular, reason
from dinov3core.data.images import expand
from dinov3core.data.tars import TarIndex, index_tars

TRAIN = ("train", "training")
TEST = (
    "test",
    "testing",
    "val",
    "valid",
    "validation",
)  # the first that holds what is asked for is reported on
SUFFIXES = RGB_SUFFIXES | ARRAY_SUFFIXES
MAX_TEXT = 2**24  # bytes of classes.json or a val.txt
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join((*TRAIN, *TEST))})(?=[-_.])")


class Tree:
    """Images, arrays and JSON files below a root, by names with forward slashes, sorted.

    Shards whose file name carries a split, as in clothing-train-000.tar, are read as if inside a
    folder of that split.

    Args:
        spec: a folder, an uncompressed .tar file, or a pattern of several; a folder of nothing but
            .tar files counts as those.

    Attributes:
        names: relative names.
        files: the paths behind them on disk, whose sizes and times tell whether anything changed.

    Raises:
        DataError: nothing there.
    """

    def __init__(self, spec: str | Path):
        self.root = str(spec)
        path = os.path.expanduser(self.root)
        self._tars: TarIndex | None = None
        self._places: dict[str, int | str] = {}
        there = exists(path, "a folder, .tar shards or an .npz file")
        if os.path.isdir(path):
            files = files_below(path)
            self._places = _places(files, path)
            shards = sorted(file for file in files if file.endswith(".tar"))
            if shards and not any(
                name.lower().endswith(tuple(RGB_SUFFIXES)) for name in self._places
            ):
                self._index(shards)
        elif path.endswith(".tar") or re.search(r"[*?\[{]", path):
            self._index([path] if there else expand(path))
        else:
            raise DataError(
                f"{spec}: expected scenes, a folder, .tar shards or an .npz file, found nothing of "
                "the kind"
            )
        self.names = sorted(self._places)
        if not self.names:
            raise DataError(
                f"{spec}: expected images ending in {', '.join(sorted(SUFFIXES))}, found none"
            )

    @property
    def files(self) -> Sequence[str]:
        return self._tars.paths if self._tars else [str(self._places[name]) for name in self.names]

    def open(self, name: str) -> BinaryIO | str:
        """What decoders read: a path, or the bytes of a shard's member; raises UnreadableImage."""
        place = self._places[name]
        return place if isinstance(place, str) else self._tars.read(place, self.full(name))

    def full(self, name: str) -> str:
        """The name to show to people."""
        place = self._places[name]
        return place if isinstance(place, str) else self._tars.names[place]

    def label(self, name: str) -> int | None:
        """The number in the .cls member beside a shard's image, if there is one."""
        place = self._places[name]
        return None if isinstance(place, str) else self._tars.label(place)

    def text(self, file: str) -> str | None:
        """A text file at the root, such as classes.json, whatever its bytes; None without one.

        Raises:
            DataError: it cannot be read, or is too large for a text.
        """
        if file not in self._places:
            return None
        try:
            opened = self.open(file)
            with open_regular(opened) if isinstance(opened, str) else opened as content:
                text = content.read(MAX_TEXT + 1)
        except (OSError, UnreadableImage) as error:
            raise DataError(f"{self.root}: cannot read {file}: {reason(error)}") from error
        if len(text) > MAX_TEXT:
            raise DataError(f"{self.root}: {file}: expected at most {MAX_TEXT:,} bytes of text")
        return text.decode("utf-8", "replace")

    def _index(self, shards: list[str]) -> None:
        self._tars = index_tars(shards, SUFFIXES | {".json", ".txt"})
        remaining = iter(shards)
        shard = next(remaining)
        for index, full in enumerate(self._tars.names):  # in the order of the shards
            while not full.startswith(f"{shard}/"):
                shard = next(remaining)
            name = _split_of(shard) + full[len(shard) + 1 :].removeprefix("./")
            if (
                name in self._places
            ):  # shards may use the same names; a folder of its own keeps both
                folder, file = os.path.split(name)
                name = os.path.join(folder, stem(os.path.basename(shard)), file)
            self._places[name] = index


def stem(name: str) -> str:
    """A name without its suffix."""
    return os.path.splitext(name)[0]


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def by_split(
    names: Sequence[str], source: str, needs: str, usable: Callable[[str], bool] = lambda _: True
) -> tuple[list[str], list[str]]:
    """Names below the train folder and below the test folder; both empty when there are no such
    folders.

    Args:
        needs: what is expected, for the message.
        usable: a test folder needs a name this holds for: the test images of many sets have no
            labels.

    Raises:
        DataError: only one of the two.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        folder = (
            name.split("/", 1)[0].lower().rstrip("0123456789")
        )  # COCO has train2017 and val2017
        found.setdefault(folder, []).append(name)
    train = next((found[word] for word in TRAIN if word in found), [])
    test = next((found[word] for word in TEST if any(map(usable, found.get(word, ())))), [])
    if bool(train) != bool(test):
        have, lack = ("train", "test or val") if train else ("test or val", "train")
        raise DataError(f"{source}: found a {have} split without {lack}; expected {needs}")
    return train, test


def _places(files: Sequence[str], root: str) -> dict[str, str]:
    """Paths of images and of texts near the root, by their names below it."""
    places = {}
    for path in files:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        if is_image(name) or (name.endswith((".json", ".txt")) and name.count("/") <= 2):
            places[name] = path
    return places


def _split_of(shard: str) -> str:
    found = _SPLIT_IN_NAME.search(os.path.basename(shard).lower())
    return f"{found[1]}/" if found else ""
