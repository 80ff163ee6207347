"""Whether the data behind a path are still those of an earlier look."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from dinov3core.data.files import suffix_of
from dinov3core.data.images import LISTS, open_source
from dinov3core.data.scenes import render
from dinov3core.data.trees import Tree, is_image

DRAWN = 4  # scenes that stand for what the formulas draw


def data_identity(spec: str | Path) -> str:
    """SHA-256 of what an evaluation can read at a path, wherever the path itself lies.

    Of files: their names relative to the folder they share, sizes and times of change. Of the
    built-in scenes: the pixels, masks and depths of a few, which change only with the formulas.

    Args:
        spec: see `dinov3core.data.datasets`; a .txt or .csv list stands for the files it names.

    Raises:
        DataError: nothing there.
    """
    if str(spec) == "scenes":
        drawn = render(range(DRAWN))
        return hashlib.sha256(b"".join(part.tobytes() for part in drawn)).hexdigest()
    total = hashlib.sha256()
    files = _files(spec)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    for file in files:
        entry = f"{os.path.relpath(file, root)}\0{_size_and_time(file)}\0"
        total.update(entry.encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _files(spec: str | Path) -> Sequence[str]:
    """The files that readers look at."""
    text = str(Path(spec).expanduser())
    if text.endswith(".npz") and os.path.exists(text):
        return [text]
    if text.endswith(LISTS):
        source = open_source(text)
        return [text, *(source.name(index) for index in range(len(source)))]
    # Of other files classes.json and the lists of DAVIS matter; results may lie beside them.
    return [file for file in Tree(spec).files if is_image(file) or _is_looked_into(file)]


def _is_looked_into(file: str) -> bool:
    return suffix_of(file) == ".tar" or file.endswith((".txt", "classes.json"))


def _size_and_time(file: str) -> str:
    try:
        status = os.stat(file)
    except OSError:  # a list may name files that are gone; they are counted where they are read
        return "none"
    return f"{status.st_size} {status.st_mtime_ns}"
