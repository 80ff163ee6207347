"""Files by their relative names, in a folder or in tar shards: a layout is known once for both."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from dinov3core.data.decode import ARRAY_SUFFIXES, RGB_SUFFIXES
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import open_regular, reason, suffix_of
from dinov3core.data.stored import Files, PathFiles, look_into
from dinov3core.data.tars import TarIndex, index_tars

TRAIN = ("train", "training")
# The first of these that holds what is asked for is reported on.
TEST = ("test", "testing", "val", "valid", "validation")
SUFFIXES = RGB_SUFFIXES | ARRAY_SUFFIXES
TEXTS = (".json", ".txt")
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
        contents = look_into(path, RGB_SUFFIXES, "a folder, .tar shards or an .npz file")
        if contents is None:
            raise DataError(
                f"{spec}: expected scenes, a folder, .tar shards or an .npz file, found nothing of "
                "the kind"
            )
        self._places: dict[str, tuple[Files, int]] = {}
        self._enter_files(contents.files, path)
        members = index_tars(contents.shards, SUFFIXES | {*TEXTS})
        self._enter_members(members)
        self.names = sorted(self._places)
        if not self.names:
            raise DataError(
                f"{spec}: expected images ending in {', '.join(sorted(SUFFIXES))}, found none"
            )
        self.files = contents.shards or [self.full(name) for name in self.names]

    def open(self, name: str) -> BinaryIO | str:
        """What decoders read: a path, or the bytes of a shard's member; raises UnreadableImage."""
        files, index = self._places[name]
        return files.open(index)

    def full(self, name: str) -> str:
        """The name to show to people."""
        files, index = self._places[name]
        return files.name(index)

    def label(self, name: str) -> int | None:
        """The number in the .cls member beside a shard's image, if there is one."""
        files, index = self._places[name]
        return files.label(index)

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

    def _enter_files(self, paths: Sequence[str], root: str) -> None:
        """Images anywhere, and texts near the root."""
        files = PathFiles(paths)
        for index, path in enumerate(paths):
            name = os.path.relpath(path, root).replace(os.sep, "/")
            if is_image(name) or (name.endswith(TEXTS) and name.count("/") <= 2):
                self._places[name] = files, index

    def _enter_members(self, members: TarIndex) -> None:
        for index in range(len(members)):
            shard, inside = members.name_inside(index)
            name = _split_of(shard) + inside.removeprefix("./")
            if name in self._places:
                # Shards may use the same names; a folder of its own keeps both.
                folder, file = os.path.split(name)
                name = os.path.join(folder, stem(os.path.basename(shard)), file)
            self._places[name] = members, index


class TreeFiles:
    """Some of a tree as files by number.

    Args:
        tree: where they are.
        names: which, in their order.
        labels: their class numbers, or None.
    """

    def __init__(self, tree: Tree, names: Sequence[str], labels: Sequence[int] | None = None):
        self._tree = tree
        self._names = list(names)
        self._labels = labels

    @property
    def paths(self) -> Sequence[str]:
        return self._tree.files

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._tree.full(self._names[index])

    def open(self, index: int) -> BinaryIO | str:
        return self._tree.open(self._names[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


def stem(name: str) -> str:
    """A name without its suffix."""
    return os.path.splitext(name)[0]


def is_image(name: str) -> bool:
    return suffix_of(name) in SUFFIXES


def by_split(
    names: Sequence[str], source: str, needs: str, usable: Callable[[str], bool] = lambda _: True
) -> tuple[list[str], list[str]]:
    """Names below the train folder and below the test folder; both empty when there are none.

    Args:
        needs: what is expected, for the message.
        usable: a test folder needs a name this holds for: the test images of many sets have no
            labels.

    Raises:
        DataError: only one of the two.
    """
    below: dict[str, list[str]] = {}
    for name in names:
        folder = name.split("/", 1)[0].lower()
        below.setdefault(folder.rstrip("0123456789"), []).append(name)  # COCO: train2017, val2017
    train = next((below[word] for word in TRAIN if word in below), [])
    test = next((below[word] for word in TEST if any(map(usable, below.get(word, ())))), [])
    if bool(train) != bool(test):
        have, lack = ("train", "test or val") if train else ("test or val", "train")
        raise DataError(f"{source}: found a {have} split without {lack}; expected {needs}")
    return train, test


def _split_of(shard: str) -> str:
    """The folder that the name of a shard stands for, with a slash; empty: none."""
    split = _SPLIT_IN_NAME.search(os.path.basename(shard).lower())
    return f"{split[1]}/" if split else ""
