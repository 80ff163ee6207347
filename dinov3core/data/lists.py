"""Lists of images: one path per line, relative to the list, maybe a label in a second column."""

import csv
import os
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov3core.data.decode import ARRAY_SUFFIXES, RGB_SUFFIXES
from dinov3core.data.errors import DataError
from dinov3core.data.files import open_regular, reason

HEADERS = ("path", "file", "filename", "image")
LABEL_DIGITS = 9


class ImageList(NamedTuple):
    """What a list says."""

    paths: list[str]
    labels: np.ndarray | None  # int64 [N]
    class_names: list[str]  # of labels that are words, else empty


class _Row(NamedTuple):
    line: int
    path: str
    label: str  # empty: none


def read_list(path: Path) -> ImageList:
    """A .csv list, with commas before labels, or a .txt list, with tabs before them.

    Empty lines are left out, and so are lines that begin with # unless a file is called so. Labels
    are class numbers, or else words, whose numbers follow their alphabetical order.

    Raises:
        DataError: cannot be read, no text, no paths, none of the first 100 paths exists, or labels
            for some images only.
    """
    rows = [row for row in _rows(path) if not _is_comment(row, path.parent)]
    if rows and _is_header(rows, path.parent):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path} lists no images; expected one path per line")
    paths = [_place(row, path.parent) for row in rows]
    if not any(os.path.exists(listed) for listed in paths[:100]):
        tried = len(paths[:100])
        raise DataError(f"{path}: none of the first {tried} paths exists, such as {paths[0]}")
    return ImageList(paths, *_labels(rows, path))


def _rows(path: Path) -> list[_Row]:
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    utf8 = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    rows = []
    reader = None
    try:
        with TextIOWrapper(open_regular(path), **utf8) as file:
            reader = csv.reader(file, **({} if path.suffix == ".csv" else tabs))
            for fields in reader:
                fields = [field.strip() for field in fields]
                if any(fields):
                    rows.append(_Row(reader.line_num, *(*fields, "")[:2]))
    except OSError as error:
        raise DataError(f"cannot read the list {path}: {reason(error)}") from error
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: expected one path per line, got {error}; look for a "
            "quotation mark that is not closed"
        ) from error
    for row in rows:
        _check(row, path)
    return rows


def _check(row: _Row, path: Path) -> None:
    if "\0" in row.path:
        text = "expected UTF-8 text, got NUL bytes; save it as UTF-8"
        raise DataError(f"{path}: line {row.line}: {text}")
    if not row.path:
        raise DataError(f"{path}: line {row.line}: expected a path before the label, got none")


def _is_comment(row: _Row, folder: Path) -> bool:
    return row.path.startswith("#") and not os.path.exists(_place(row, folder))


def _is_header(rows: list[_Row], folder: Path) -> bool:
    """By its words, or when it is no image and of another kind than the rows below."""
    first, *others = rows
    if first.path.lower() in HEADERS:
        return True
    if not others or _is_image(first) or os.path.exists(_place(first, folder)):
        return False
    if _is_image(others[0]):
        return True
    word = bool(first.label) and not _is_number(first.label)
    return word and all(_is_number(row.label) for row in others)


def _is_image(row: _Row) -> bool:
    return os.path.splitext(row.path)[1].lower() in RGB_SUFFIXES | ARRAY_SUFFIXES


def _place(row: _Row, folder: Path) -> str:
    return os.path.join(folder, os.path.expanduser(row.path))


def _labels(rows: list[_Row], path: Path) -> tuple[np.ndarray | None, list[str]]:
    column = [row.label for row in rows]
    if not any(column):
        return None, []
    if not all(column):
        row = rows[column.index("")]
        place = f"{path}: line {row.line}"
        expected = "a label for every image or for none"
        raise DataError(f"{place}: expected {expected}, got none for {row.path}")
    if all(map(_is_number, column)):
        return np.asarray([int(label) for label in column], np.int64), []
    if all(map(_is_float, column)):
        wrong = next(label for label in column if not _is_number(label))
        raise DataError(f"{path}: expected class numbers from 0 on, or words, got {wrong}")
    names, labels = np.unique(column, return_inverse=True)
    return labels.astype(np.int64), names.tolist()


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) <= LABEL_DIGITS


def _is_float(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
