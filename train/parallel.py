"""The other processes: start-up under torchrun or alone, the wrapped student, and the few collectives of the loop."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class WorldError(RuntimeError):
    """The processes cannot start as asked; the message says why and what to do."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all processes, None when alone."""
        return dist.group.WORLD if self.size > 1 else None

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def all_true(self, flag: Tensor) -> Tensor:
        """A 0-d bool tensor: whether `flag` holds on every process."""
        if self.size == 1:
            return flag
        votes = flag.to(torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return votes.bool()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather_texts(self, texts: list[str]) -> list[str]:
        """The texts of all processes, in rank order."""
        if self.size == 1:
            return texts
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, texts)
        return [text for part in found for text in part]


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def start(device: str = "auto", threads: int = 0) -> Iterator[World]:
    """Join the processes torchrun started, or run alone; NCCL on GPUs, gloo on CPUs.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads of this process; 0 leaves torch's choice.

    Raises:
        WorldError: when this process has no GPU of its own.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            reason = "finds none" if built else "is built without CUDA"
            raise WorldError(
                f"device cuda: expected a GPU, but torch {torch.__version__} {reason}; use cpu, or "
                "auto for a GPU where there is one"
            )
        if local_rank >= torch.cuda.device_count():
            raise WorldError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; start at most "
                "that many with torchrun --nproc-per-node, or use --run.device cpu"
            )
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def wrap(student: nn.Module, world: World) -> nn.Module:
    """The student as the loop calls it: gradients averaged over processes after each backward pass."""
    if world.size == 1:
        return student
    return DistributedDataParallel(
        student,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def defer_sync(wrapped: nn.Module, wait: bool) -> contextlib.AbstractContextManager:
    """Keep gradients local while `wait` (all micro-batches but the last)."""
    if wait and isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()
