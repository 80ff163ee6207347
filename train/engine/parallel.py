"""The other processes: start-up under torchrun or alone, the wrapped student, a few collectives.

What processes do together, those of a range can do among themselves: `World.part` is such a range
as a world of its own, with collectives that no process outside it takes part in.

A process that waits for one that hangs is ended by its `Watch` with a sentence; torch's own limit
on collectives comes later and is a safety net. Waiting for what the main process does alone
(`World.wait_for_main`) has a limit of its own.
"""

import contextlib
import inspect
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov3core.train.engine.watch import LOOK, Watch


class WorldError(RuntimeError):
    """The processes cannot start as asked; the message says why and what to do."""


DISCONNECTED = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
GLOO = re.compile(r"gloo/\S+\.(cc|h):\d+")
LATER_SECONDS = 60.0  # by which torch's limit on a collective comes after the watch's
POLL_SECONDS = 0.2
ALONE_HOURS = 12.0  # what the main process may take alone, an evaluation or a report


@dataclass(frozen=True)
class World:
    """This process among the others.

    Args:
        rank, size, device: which of how many it is, and where its tensors are.
        store: what the processes met through; None when alone.
        watch: to be told what this process is doing.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    watch: Watch = field(default_factory=Watch)
    _turns: Iterator[int] = field(default_factory=itertools.count)
    _group: dist.ProcessGroup | None = None  # of a part; None: all processes there are

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of these processes, None when alone."""
        return self._group or dist.group.WORLD if self.size > 1 else None

    def part(self, first: int, past: int) -> "World | None":
        """The processes from `first` to before `past` as a world; None outside of them.

        All processes have to call this, in the same order.
        """
        if (first, past) == (0, self.size):
            return self
        group = dist.new_group(list(range(first, past)), **_limits(self.watch.seconds))
        if not first <= self.rank < past:
            return None
        prefix = f"part {first} {past}"
        return replace(
            self,
            rank=self.rank - first,
            size=past - first,
            store=None if self.store is None else dist.PrefixStore(prefix, self.store),
            _turns=itertools.count(),
            _group=group,
        )

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def wait_for_main(self) -> None:
        """Return once the main process is here, too, which may have worked alone for hours.

        Raises:
            WorldError: it has not come in ALONE_HOURS, or is gone.
        """
        if self.store is not None:
            arrived = f"main process/{next(self._turns)}"
            if self.is_main:
                self.store.set(arrived, "")
            else:
                self._wait_for_key(arrived)
        self.barrier()  # a store in the main process must stay until the others have read it

    def wait_for_all(self) -> None:
        """Return once every process is here, any of which may have worked alone for hours.

        Raises:
            WorldError: one has not come in ALONE_HOURS, or is gone.
        """
        if self.store is not None:
            turn = next(self._turns)
            self.store.set(f"process {self.rank}/{turn}", "")
            for rank in range(self.size):
                self._wait_for_key(f"process {rank}/{turn}", "another process")
        self.barrier()

    def _wait_for_key(self, key: str, whose: str = "the main process") -> None:
        patience = time.monotonic() + ALONE_HOURS * 3600
        with self.watch.paused():
            while not self.store.check([key]):
                if time.monotonic() > patience:
                    alone = f"{whose} has worked alone for {ALONE_HOURS:g} hours"
                    raise WorldError(f"{alone}; {LOOK}")
                time.sleep(POLL_SECONDS)

    def minimum(self, tensor: Tensor) -> Tensor:
        """The smallest value over processes, element by element."""
        if self.size == 1:
            return tensor
        smallest = tensor.clone()
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return smallest

    def all_true(self, flag: Tensor) -> Tensor:
        """A 0-d bool tensor: whether `flag` holds on every process."""
        return self.minimum(flag.to(torch.int32)).bool()

    def from_main(self, text: str) -> str:
        """The main process's text, on every process."""
        if self.size == 1:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, group=self.group, device=self.device, group_src=0)
        return texts[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        return self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather_texts(self, texts: list[str]) -> list[str]:
        """The texts of all processes, in rank order."""
        if self.size == 1:
            return texts
        texts_of: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(texts_of, texts, group=self.group)
        return [text for one in texts_of for text in one]


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def start(
    device: str = "auto",
    threads: int = 0,
    timeout_minutes: float = math.inf,
) -> Iterator[World]:
    """Join the processes torchrun started, or run alone; NCCL on GPUs, gloo on CPUs.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads of this process; 0 leaves torch's choice.
        timeout_minutes: how long a process may be at what it told its watch it is doing; infinite:
            there is no watch, and collectives have torch's own limit.

    Raises:
        WorldError: this process has no GPU of its own, the others do not come, or, inside the
            context, one of them is gone.
    """
    if threads:
        torch.set_num_threads(threads)
    own = _own_device(device)
    if "RANK" not in os.environ:
        yield World(0, 1, own)
        return
    world = _join(own, 60 * timeout_minutes)
    try:
        with world.watch.running(), _lost_peers_explained(world.watch):
            yield world
    finally:
        dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    """The device of this process: on a GPU machine, the GPU of its number there.

    Args:
        device: auto, cpu or cuda.

    Raises:
        WorldError: there is none for it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "finds none" if built else "is built without CUDA"
        raise WorldError(
            f"device cuda: expected a GPU, but torch {torch.__version__} {reason}; use cpu, or "
            "auto for a GPU where there is one"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} "
            "found; start at most that many with torchrun --nproc-per-node, or use "
            "--run.device cpu"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


@contextlib.contextmanager
def _lost_peers_explained(watch: Watch) -> Iterator[None]:
    """Turn the error of a collective, within, into a sentence.

    Raises:
        WorldError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not _speaks_of_a_peer(error):
            raise
        lost = f"{watch.name} lost its connection to another one ({watch.doing})"
        raise WorldError(f"{lost}: {_first_line(error)}; {LOOK}") from error


def _join(device: torch.device, seconds: float) -> World:
    """Meet the other processes."""
    limits = _limits(seconds)
    try:
        store, rank, size = next(dist.rendezvous("env://", **limits))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            **limits,
        )
    except DISCONNECTED as error:
        failure = f"the {processes()} processes did not all meet: {_first_line(error)}"
        raise WorldError(f"{failure}; {LOOK}") from error
    watch = Watch(seconds, f"process {rank} of {size}")
    return World(rank, size, device, dist.PrefixStore("world", store), watch)


def _limits(seconds: float) -> dict[str, timedelta]:
    """Torch's own limit on a collective, as its options have it: after that of the watch."""
    return {"timeout": timedelta(seconds=seconds + LATER_SECONDS)} if seconds < math.inf else {}


def _speaks_of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, DISCONNECTED) or GLOO.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    """What a library error says first, without the source file that gloo puts before it."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return re.sub(r"^\[\S+\] ", "", line)


def wrap(student: nn.Module, world: World) -> nn.Module:
    """The student as a step calls it: a backward pass averages gradients over processes."""
    if world.size == 1:
        return student
    # Buffers are constants and the same everywhere. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in known
    return DistributedDataParallel(
        student,
        process_group=world.group,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )


def defer_sync(wrapped: nn.Module, wait: bool) -> contextlib.AbstractContextManager:
    """Within, gradients stay this process's while `wait`: for all micro-batches but the last."""
    if wait and isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()
