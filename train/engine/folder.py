"""The run folder: made, checked, locked, and a finished run in it moved aside."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from dinov3core.printable import printable
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.stopping import TrainingStopped

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what such systems answer

_locked: set[int] = set()  # descriptors of the locks this process holds


def _leave_locks_to_the_parent() -> None:
    """A forked loader process shares the open file and keeps the lock past its parent's death."""
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


class RunFolder:
    """The folder a run writes into, locked until this process ends or `close`; a context manager.

    The lock is a flock on a file in the folder that names its holder: it goes with the process,
    however that ends, and with the folder when that is moved.

    Args:
        path: made when missing.
        resume: leave an unfinished run in place; a finished one is moved aside under a number.

    Raises:
        TrainingStopped: another run holds the folder, or it cannot be written.
    """

    def __init__(self, path: Path, resume: bool = True):
        self.path = path
        self._descriptor = -1
        try:
            self._lock()
            if (path / "summary.json").is_file() or not resume:
                self._set_aside()
            (path / ".writable").write_text("")
            (path / ".writable").unlink()
        except OSError as error:
            self.close()
            problem = f"cannot write the run folder {path}: {error.strerror}"
            raise TrainingStopped(f"{problem}; give a writable one with --run.out") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor in _locked:
            _locked.remove(self._descriptor)
            os.close(self._descriptor)

    def restore(self) -> bool:
        """Make and lock the folder again when its lock is gone; whether that was so.

        Raises:
            TrainingStopped: another run has begun in its place.
            OSError: it cannot be made.
        """
        there = _read(self.path / LOCK)
        if there == self._holder:
            return False
        if there:
            raise TrainingStopped(
                f"the run folder {self.path} was moved or deleted and another run{_who(there)} has "
                "begun in its place; this one stops rather than write into it"
            )
        self.close()
        self._lock()
        return True

    def _lock(self) -> None:
        """Make the folder and lock it; once more when it was moved aside in between."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            _locked.add(self._descriptor)
            self._claim()
            if _read(self.path / LOCK) == self._holder:
                return
            self.close()

    def _claim(self) -> None:
        """Take the lock of the opened file and write this process's name into it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 4096, 0)
            self.close()
            raise TrainingStopped(
                f"another run{_who(holder)} is writing into {self.path}; wait for its end, or give "
                "another folder with --run.out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            said = f"the file system of {self.path} has no locks: nothing keeps a second run out"
            print(said, file=sys.stderr)
        name = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._holder = json.dumps(name).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, self._holder, 0)

    def _set_aside(self) -> None:
        """Move what is here to the first free number, its lock with it, and begin anew."""
        if all(item.name == LOCK for item in self.path.iterdir()):
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        shutil.move(self.path, aside)
        self.close()
        self._lock()
        print(printable(f"the earlier run in {self.path} is kept as {aside}"), file=sys.stderr)


@contextlib.contextmanager
def open_folder(path: Path, resume: bool, world: World) -> Iterator[RunFolder | None]:
    """The run folder, held by the main process while the context lasts; None on the others.

    Raises:
        TrainingStopped: on all processes, when the main one cannot have it.
    """
    folder = None
    problem = ""
    if world.is_main:
        try:
            folder = RunFolder(path, resume)
        except TrainingStopped as error:
            problem = str(error)
    with folder or contextlib.nullcontext():
        stop_all(world, problem)
        yield folder


def stop_all(world: World, problem: str) -> None:
    """End the run on all processes when the main one has a problem that it cannot solve."""
    problem = world.from_main(problem)
    if problem:
        raise TrainingStopped(problem)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _who(holder: bytes) -> str:
    """Whom a lock names, in brackets; empty when it names nobody."""
    try:
        named = json.loads(holder)
        return f" (process {named['pid']} on {named['host']})"
    except (ValueError, KeyError, TypeError):
        return ""
