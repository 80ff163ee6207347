"""`train/pretrain.py` in processes of its own, forked from one that has imported everything: 0.1 s instead of 3 s."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dinov3core.train.pretrain", "forked_runs"])


class ForkedRun:
    """A run that has been started; what it prints goes to a file.

    Args:
        argv: of `train/pretrain.py`.
        log: where stdout and stderr go, appended.
    """

    def __init__(self, argv: list[str], log: Path):
        self.log = log
        self._process: ForkServerProcess = _context.Process(target=_run, args=(argv, log))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for something; fails with the run's words when the run ends before."""
        patience = time.monotonic() + seconds
        while not happened():
            assert self.running() and time.monotonic() < patience, self.said()
            time.sleep(0.002)

    def wait(self, seconds: float = 60) -> int:
        """The exit status; a signal's number is negative."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return self._process.exitcode

    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


def _run(argv: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from dinov3core.train.pretrain import exit_status

    sys.exit(exit_status(argv))
