"""Measure launch choices on the GPU at hand and write down the fastest.

    python -m dinov3core.tune [--width 64] [--out FILE]

Without --out the file goes where every later process looks for this kind of GPU
(~/.cache/dinov3core). Training never tunes by itself: all ranks of a run read one file, so they
launch alike, and the first step costs what the others do.

Every field of the launch table belongs to one kernel, so the fields are searched one after the
other, each over a short list of tiles. Last comes `longest`: up to where the fused kernels beat the
rotation followed by torch's attention.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without("torch", "triton")

import torch

from dinov3core.ops import rope_attention, rope_table

# (backend, tokens, head width) -> milliseconds of forward and backward
Measure = Callable[[str, int, int], float]
logger = logging.getLogger(__name__)


class Candidates(NamedTuple):
    """What may stand in one field of the launch table, and the lengths (tokens) that it is for."""

    values: tuple
    lengths: tuple[int, ...]


# 54: local crops of 112 px; 201, 261: global crops of 224 and 256 px; 401, 577: crops of 320 and
# 384 px
FIELDS = {
    "one_tile_warps": Candidates((4, 8), (54,)),
    "resident_warps": Candidates((4, 8), (54, 201, 261)),
    "resident_keys": Candidates((64, 272), (201, 261)),
    "stream": Candidates(
        ((64, 64, 4, 1), (64, 64, 4, 2), (128, 64, 8, 1), (128, 64, 8, 2), (128, 128, 8, 1)),
        (401, 577),
    ),
    "two_pass": Candidates(
        (
            (64, 64, 64, 64, 4, 1),
            (64, 64, 32, 64, 8, 2),
            (64, 64, 64, 64, 8, 1),
            (128, 32, 32, 64, 8, 2),
            (128, 64, 64, 128, 8, 2),
        ),
        (201, 261, 401),
    ),
}
LIMITS = (54, 201, 261, 325, 401, 513, 641, 785, 1029)  # tokens at which `longest` may end


def tune(width: int, device: torch.device, measure: Measure):
    """The best launch entry of one head width; the process keeps its former launches."""
    from dinov3core.kernels import launch

    target = launch.architecture(device)
    entry = launch.ROPE_ATTENTION.get((target, width))
    if entry is None:
        raise ValueError(
            f"tune: expected an architecture with a launch table, got {target}; the fused kernels "
            "spill there"
        )
    try:
        for name, field in FIELDS.items():
            variants = [dataclasses.replace(entry, **{name: value}) for value in field.values]
            times = []
            for variant in variants:
                launch.replace(target, width, variant)
                times.append(sum(measure("triton", length, width) for length in field.lengths))
            entry = variants[times.index(min(times))]
            logger.info("head width %d: %s = %s", width, name, getattr(entry, name))
        launch.replace(target, width, entry)
        wins = [
            measure("triton", length, width) < measure("torch", length, width) for length in LIMITS
        ]
    finally:
        launch.replace(target, width, None)
    return dataclasses.replace(entry, longest=last_win(LIMITS, wins))


def last_win(lengths: Sequence[int], wins: Sequence[bool]) -> int:
    """The largest length before the first loss; 0 when the first is lost."""
    best = 0
    for length, won in zip(lengths, wins, strict=True):
        if not won:
            break
        best = length
    return best


def milliseconds(backend: str, length: int, width: int) -> float:
    """Forward and backward of about 32,000 tokens of width 1024 in bfloat16, from a cold L2 cache.

    Infinite where the GPU has too little shared memory or registers for the tiles.
    """
    import triton

    images = 32_000 // length
    heads = 1024 // width
    prefix = 5
    qkv = torch.randn(
        images, length, 3, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    sin, cos = rope_table(1, length - prefix, width, device="cuda")
    dout = torch.randn(images, length, heads, width, device="cuda", dtype=torch.bfloat16)

    def both() -> None:
        rope_attention(qkv, sin, cos, prefix_tokens=prefix, backend=backend).backward(dout)
        qkv.grad = None

    try:
        return triton.testing.do_bench(both)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3core.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--width", type=int, action="append", choices=(32, 64, 128), help="head width; default: all"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write; default: the one later processes read"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: expected a GPU to measure on, found none", file=sys.stderr)
        return 1
    from dinov3core.kernels import launch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    target = launch.architecture(device)
    path = options.out or launch.tuned_file(device)
    known = launch.read_file(path) if path.is_file() else {}
    tuned = {
        (target, width): tune(width, device, milliseconds)
        for width in options.width or launch.HEAD_WIDTHS
    }
    launch.write_file(path, known | tuned)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
