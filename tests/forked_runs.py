"""`train/pretrain.py` in processes forked from one that has imported it: 0.1 s instead of 3 s."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from dinov3core.train.engine import parallel
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.pretrain import exit_status

HERE = Path(__file__).resolve().parent
_context = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Imports this file once, to be forked from; Python 3.11 hands it no path of its own."""
    _context.set_forkserver_preload(["forked_runs"])
    with patch.dict(os.environ, {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}):
        forkserver.ensure_running()


class Forked:
    """A function in a process of its own; what it returns is the exit status.

    Args:
        log: where stdout and stderr go, appended.
        function, arguments: what to call, importable by name.
        environment: set in addition.
    """

    def __init__(
        self,
        log: Path,
        function: Callable[..., int],
        *arguments: object,
        environment: dict[str, str] | None = None,
    ):
        self.log = log
        _start_server()
        call = (log, environment or {}, function, arguments)
        self._process = _context.Process(target=_call, args=call)
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

    def end(self) -> None:
        """Kill it, stopped or not, if it is still there."""
        if self.running():
            self.signal(signal.SIGKILL)
        self._process.join()


class ForkedRun(Forked):
    """A run of `train/pretrain.py` with this command line."""

    def __init__(self, argv: list[str], log: Path):
        super().__init__(log, exit_status, argv)


def _call(
    log: Path,
    environment: dict[str, str],
    function: Callable[..., int],
    arguments: tuple,
) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.exit(function(*arguments))


@contextmanager
def two_ranks(
    log: Path,
    function: Callable[..., int],
    *arguments: object,
) -> Iterator[list[Forked]]:
    """Two processes that meet as those of torchrun do, rank 0 first; killed at the end."""
    with several_ranks(2, log, function, *arguments) as ranks:
        yield ranks


@contextmanager
def several_ranks(
    processes: int,
    log: Path,
    function: Callable[..., int],
    *arguments: object,
) -> Iterator[list[Forked]]:
    """So many processes that meet as those of torchrun do; killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        file = log.with_name(f"{log.name}{rank}")
        environment = common | {"RANK": str(rank)}
        ranks.append(Forked(file, function, *arguments, environment=environment))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


def run_forked_ranks(folder: Path, processes: int, function: Callable[[Path], int]) -> None:
    """Call `function(folder)` in so many processes, which meet by `two_processes.joined`.

    Fails with what they said when one of them does.
    """
    common = {"WORLD_SIZE": str(processes), "RENDEZVOUS": str(folder / "rendezvous")}
    ranks = [
        Forked(folder / f"log{rank}", function, folder, environment=common | {"RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        statuses = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()
    assert not any(statuses), "\n".join(rank.said() for rank in ranks)


def exit_status_without_pictures(argv: list[str]) -> int:
    """A run that draws nothing, which takes a second of each."""
    with (
        patch.object(Monitor, "report", lambda *_: None),
        patch.object(Monitor, "snapshot_before", lambda *_: None),
    ):
        return exit_status(argv)


def slow_main(seconds: float) -> int:
    """A rank of two: the main one works alone, for longer than processes wait for each other."""
    with parallel.start("cpu", timeout_minutes=1 / 60) as world:
        world.watch.note("beginning")
        if world.is_main:
            with world.watch.paused():
                time.sleep(seconds)
        world.wait_for_main()
        assert world.from_main(f"from {world.rank}") == "from 0"
        assert world.minimum(parallel.torch.tensor([world.rank, -world.rank])).tolist() == [0, -1]
    return 0
