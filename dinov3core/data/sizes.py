"""Sides of views: a size, and several of them in one run, each for its share of the steps.

Which of several sizes a step uses is a function of (seed, step) alone. So all processes, and all
worker processes of each, agree without a word, and a resumed run goes on where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np

from dinov3core.bounds import Bounds

Size = int | tuple[int, int]
Side = Bounds(1, 16384)  # pixels
PUBLISHED_SEED = 65537  # of the draws of sizes, whatever the seed of training
WRITTEN = "SHARE:GLOBAL/LOCAL or SHARE:GLOBAL/LOCAL/GRAM, such as 0.3:768/112/1152"


@dataclass(frozen=True)
class CropSizes:
    """Sides of views in a share of a run's steps."""

    share: Annotated[float, Bounds(0, 1, open_low=True, open_high=True)]
    """Share of the steps, drawn."""
    global_size: Annotated[int | tuple[int, int], Side]
    """Side of the large views."""
    local_size: Annotated[int | tuple[int, int], Side]
    """Side of the small views."""
    gram_size: Annotated[int | tuple[int, int] | None, Side] = None
    """Side of the crops of a Gram teacher of its own; None: it reads the global views."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From SHARE:GLOBAL/LOCAL or SHARE:GLOBAL/LOCAL/GRAM; a size is SIDE or HEIGHTxWIDTH.

        Raises:
            ValueError: another text.
        """
        share, colon, sides = text.partition(":")
        try:
            sizes = [_size_from(side) for side in sides.split("/")]
            if not colon or len(sizes) not in (2, 3):
                raise ValueError
            return cls(float(share), *sizes)
        except ValueError:
            raise ValueError(f"expected sizes as {WRITTEN}, got {text!r}") from None

    def __str__(self) -> str:
        sizes = (self.global_size, self.local_size, self.gram_size)
        written = "/".join(in_text(size) for size in sizes if size is not None)
        return f"{self.share}:{written}"


def _size_from(text: str) -> Size:
    if "x" not in text:
        return int(text)
    height, width = text.split("x")
    return int(height), int(width)


def in_text(size: Size) -> str:
    """SIDE or HEIGHTxWIDTH."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as a side or as both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_complaints(name: str, size: Size, patch: int) -> Iterator[str]:
    """One sentence for every side that patches of `patch` pixels do not divide."""
    for side in pair(size):
        lower = side // patch * patch
        if side < patch:
            advice = f"use {patch} or a multiple of it"
            yield f"{name} crop {side} is smaller than the patch {patch}; {advice}"
        elif side % patch:
            advice = f"use {lower} or {lower + patch}"
            yield f"{name} crop {side} is not a multiple of the patch {patch}; {advice}"


def size_at(seed: int, step: int, shares: Sequence[float]) -> int:
    """Which of several sizes a step of a run uses.

    Every step has one uniform double of NumPy's PCG64, which is reached in O(log step). Seed 0
    draws the sequence of the published high-resolution stage.

    Args:
        seed: of the run.
        step: from 0.
        shares: of each size; only their proportions count.
    """
    bits = np.random.PCG64(PUBLISHED_SEED + seed)
    bits.advance(step)
    draw = np.random.Generator(bits).random()
    ends = np.cumsum(shares)
    return int(np.searchsorted(ends / ends[-1], draw, side="right"))
