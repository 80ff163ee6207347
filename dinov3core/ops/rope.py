"""sin and cos tables of the axial rotary position embedding (DINOv3 paper, section 3.2).

Patch centres of a grid, scaled to [-1, 1], become angles 2 pi c / T for head_dim / 4 periods T per
axis. Every step is rounded to `dtype`, in this order: with bfloat16 the tables are bit for bit
those of the published training code, which runs this module in bfloat16; float32 is what the
released models use.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZE = ("separate", "max", "min")


class RopeDraws(NamedTuple):
    """One draw of the coordinate augmentation; None where an augmentation is off."""

    shift: Tensor | None = None  # [2], added to (y, x)
    jitter: Tensor | None = None  # [2], factors of (y, x)
    rescale: Tensor | None = None  # [1], factor of both


def rope_table(
    height: int,
    width: int,
    head_dim: int,
    *,
    base: float | None = 100.0,
    min_period: float | None = None,
    max_period: float | None = None,
    periods: Tensor | None = None,
    normalize: str = "separate",
    shift: float | None = None,
    jitter: float | None = None,
    rescale: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotation tables for the patches of a height x width grid, row by row.

    Args:
        base: periods base ** (4 k / head_dim), k = 0 .. head_dim / 4 - 1. Pass None to use
            min_period and max_period.
        min_period, max_period: log-spaced periods between these two instead.
        periods: [head_dim / 4] periods to use as they are, for instance those stored with a model.
        normalize: what the patch centres are divided by before scaling to [-1, 1]: "separate" (each
            axis by its own length), "max" or "min" (both axes by the longer or the shorter side).
        shift, jitter, rescale: strengths of the training augmentation of the coordinates, drawn
            anew by every call in this order: add U(-shift, shift) per axis, multiply by exp(U(-ln
            jitter, ln jitter)) per axis, multiply both by one exp(U(-ln rescale, ln rescale)).
        generator: source of the draws.

    Returns:
        (sin, cos), each [height * width, head_dim]. Columns: head_dim / 4 angles of the row (y),
        head_dim / 4 of the column (x), then the same half again.

    Raises:
        ValueError: head_dim not a multiple of 4, an empty grid, contradictory periods, an unknown
            `normalize`.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"rope_table: expected a grid of at least 1 x 1 patches, got {height} x {width}"
        )
    if periods is None:
        periods = rope_periods(
            head_dim,
            base=base,
            min_period=min_period,
            max_period=max_period,
            dtype=dtype,
            device=device,
        )
    elif periods.shape != (head_dim // 4,):
        raise ValueError(
            f"rope_table: expected {head_dim // 4} periods for head_dim={head_dim}, got shape "
            f"{tuple(periods.shape)}"
        )
    else:
        device = periods.device if device is None else device
        periods = periods.to(device, dtype)
    coordinates = rope_coordinates(height, width, normalize=normalize, dtype=dtype, device=device)
    draws = rope_draws(
        shift=shift, jitter=jitter, rescale=rescale, generator=generator, dtype=dtype, device=device
    )
    return rope_table_from(augment_coordinates(coordinates, draws), periods)


def rope_periods(
    head_dim: int,
    *,
    base: float | None = 100.0,
    min_period: float | None = None,
    max_period: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The head_dim / 4 periods of one axis, in units of half the normalised image side."""
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"rope: expected head_dim to be a positive multiple of 4, got {head_dim}")
    count = head_dim // 4
    if base is None and min_period is not None and max_period is not None:
        ratio = max_period / min_period
        exponents = torch.linspace(0, 1, count, dtype=dtype, device=device)
        return ratio**exponents / ratio * max_period
    if base is None or (min_period is not None and max_period is not None):
        raise ValueError(
            "rope: expected either base, or min_period and max_period with base=None, got "
            f"base={base}, min_period={min_period}, max_period={max_period}"
        )
    exponents = 2 * torch.arange(count, dtype=dtype, device=device) / (head_dim // 2)
    return base**exponents


def rope_coordinates(
    height: int,
    width: int,
    *,
    normalize: str = "separate",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Patch centres in [-1, 1], row-major [height * width, 2], y before x."""
    if normalize not in NORMALIZE:
        raise ValueError(f"rope: expected normalize to be one of {NORMALIZE}, got {normalize!r}")
    sides = {
        "separate": (height, width),
        "max": (max(height, width),) * 2,
        "min": (min(height, width),) * 2,
    }
    y, x = (
        torch.arange(0.5, length, dtype=dtype, device=device) / side
        for length, side in zip((height, width), sides[normalize], strict=True)
    )
    return 2 * torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1) - 1


def rope_draws(
    *,
    shift: float | None = None,
    jitter: float | None = None,
    rescale: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RopeDraws:
    """Draw shift, jitter and rescale, in this order, which fixes the random stream."""

    def uniform(count: int, bound: float) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device).uniform_(
            -bound, bound, generator=generator
        )

    return RopeDraws(
        shift=None if shift is None else uniform(2, shift),
        jitter=None if jitter is None else uniform(2, math.log(jitter)).exp(),
        rescale=None if rescale is None else uniform(1, math.log(rescale)).exp(),
    )


def augment_coordinates(coordinates: Tensor, draws: RopeDraws) -> Tensor:
    """Apply a draw to [P, 2] coordinates: shift, then jitter, then rescale."""
    if draws.shift is not None:
        coordinates = coordinates + draws.shift
    if draws.jitter is not None:
        coordinates = coordinates * draws.jitter
    if draws.rescale is not None:
        coordinates = coordinates * draws.rescale
    return coordinates


def rope_table_from(coordinates: Tensor, periods: Tensor) -> tuple[Tensor, Tensor]:
    """(sin, cos) [P, 4 * len(periods)] of [P, 2] coordinates."""
    angles = 2 * math.pi * coordinates[:, :, None] / periods
    angles = angles.flatten(1).tile(2)
    return angles.sin(), angles.cos()
