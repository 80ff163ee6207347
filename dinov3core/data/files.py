"""Files and folders of other people: only regular files are opened, loops of links are left out."""

import errno
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from dinov3core.data.errors import DataError
from dinov3core.printable import printable

MOST_ALIASES = 8  # times one folder is searched; links to links would double it at every level


def open_regular(path: str | os.PathLike, buffering: int = -1) -> BinaryIO:
    """A file opened for reading, if it is one: a pipe would wait for ever, a device need never end.

    Raises:
        OSError: missing, not permitted, a folder, or no regular file.
    """
    return open(path, "rb", buffering, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe opens at once, even without a writer
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "not a regular file", path)


def exists(path: str, expected: str) -> bool:
    """Whether a file or folder is there.

    Args:
        expected: for the message.

    Raises:
        DataError: it cannot be told, for instance without permission for a folder above it.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot look at {path}: {reason(error)}; expected {expected}") from error
    return True


def suffix_of(path: str) -> str:
    """The end of a name that tells its kind, in small letters, with its dot."""
    return os.path.splitext(path)[1].lower()


def files_below(root: str) -> list[str]:
    """Paths of everything but folders anywhere below a folder.

    They are sorted within each folder, and its own files come before its folders. Links are
    followed, except to a folder that holds them. Warns once, with a count, about folders that
    cannot be read.

    Raises:
        DataError: `root` itself cannot be read.
    """
    unreadable: list[OSError] = []
    paths = list(_walked(root, unreadable))
    if unreadable and unreadable[0].filename == root:
        why = reason(unreadable[0])
        raise DataError(f"cannot read the folder {root}: {why}; expected one that may be listed")
    if unreadable:
        first = unreadable[0]
        warnings.warn(
            printable(
                f"{len(unreadable)} folders below {root} cannot be read, such as {first.filename}: "
                f"{reason(first)}; what they hold is left out"
            ),
            stacklevel=3,
        )
    return paths


def _walked(root: str, unreadable: list[OSError]) -> Iterator[str]:
    searched: Counter[tuple[int, int]] = Counter()
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while pending:
        folder, above = pending.pop()
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            if searched[identity] == MOST_ALIASES:
                raise OSError(errno.ELOOP, f"linked more than {MOST_ALIASES} times", folder)
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(error)
            continue
        searched[identity] += 1
        folders = [entry.path for entry in inside if _is_folder(entry)]
        yield from (entry.path for entry in inside if not _is_folder(entry))
        pending += [(path, above | {identity}) for path in reversed(folders)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def reason(error: BaseException) -> str:
    """Why a file cannot be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{error}" or type(error).__name__
