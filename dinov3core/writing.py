"""Files are written whole or not at all: a reader meets the earlier file or the new one.

That holds through errors, kills and, as the bytes are on the disk before the name changes, a loss
of power. A kill may leave `<name>.<token>.tmp` beside the file; nothing reads that.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file of these bytes, or of this text as UTF-8."""
    with written_whole(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def written_whole(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """For writers that take a path: one beside `path`, which becomes `path` when the block ends.

    An error inside leaves the earlier file and nothing else. The new file gets the permissions that
    `open` gives, whatever its writer asked for.

    Args:
        failures: what the writer raises instead of OSError when it cannot write.

    Raises:
        OSError: it could not be written, with the reason.
    """
    # A token, and no fixed name: two processes, of two machines even, may write one file at a time.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        publish(partial, path)
    except failures as error:
        raise OSError(f"{path}: could not be written: {error}") from error
    except OSError as error:
        if error.filename and os.fspath(error.filename) == os.fspath(partial):
            error.filename = os.fspath(path)  # the name that people know
        raise
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a complete file its name; an earlier file of that name is gone at once."""
    flush(partial)  # before the name: a file system may else keep the name and lose the bytes
    os.replace(partial, path)


def publish_folder(partial: Path, folder: Path) -> None:
    """Give a complete folder its name; the earlier folder of that name goes once it is there.

    A kill in between leaves the earlier one under another name: `put_back` finds it.
    """
    flush(partial)
    earlier = _aside(folder)
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(folder, earlier)
    os.replace(partial, folder)
    flush(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Give a folder its name again that a kill within `publish_folder` took from it."""
    if not folder.exists() and _aside(folder).is_dir():
        os.replace(_aside(folder), folder)


def _aside(folder: Path) -> Path:
    """What an earlier folder is called while a new one takes its place."""
    return folder.with_name(f"{folder.name}.old.tmp")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
