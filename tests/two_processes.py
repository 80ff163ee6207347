"""Run a script as two gloo processes (or more) on this machine, and join them inside it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from dinov3core.train.engine.parallel import World

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2


def run_ranks(
    script: Path, *arguments: str | Path, processes: int = PROCESSES, timeout: float = 600
) -> list[str]:
    """Start `script` once per rank, wait for all, and return what each printed; fails with their
    errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # where it was, should torch end a process with a signal
            "WORLD_SIZE": str(processes),
            "RENDEZVOUS": f"{folder}/rendezvous",
        }
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [
            subprocess.Popen(command, env=common | {"RANK": str(rank)}, **pipes)
            for rank in range(processes)
        ]
        try:
            said = [rank.communicate(timeout=timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    failed = [
        f"rank {i}:\n{err}"
        for i, (rank, (_, err)) in enumerate(zip(ranks, said))
        if rank.returncode
    ]
    assert not failed, "\n".join(failed)
    return [out for out, _ in said]


@contextmanager
def joined() -> Iterator[World]:
    """Inside such a script: this process among the others."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=size
    )
    try:
        yield World(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def part_of(world: World, ranges: Iterable[tuple[int, int]]) -> World:
    """This process among those of its range; all processes call it together."""
    parts = [world.part(*ranks) for ranks in ranges]
    (own,) = [part for part in parts if part is not None]
    return own
