"""Rotary positions of a patch grid: settings, periods as a buffer, tables on demand."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from dinov3core.bounds import Bounds
from dinov3core.ops import rope_table
from dinov3core.ops.rope import rope_periods
from dinov3core.ops.table_cache import while_unchanged

TABLE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions; shift, jitter and rescale act in training only."""

    base: Annotated[float, Bounds(1e-2, 1e9, off=0)] = 100.0
    """Periods run from 1 to this; coordinates are in [-1, 1]. 0: from min_period to max_period."""
    min_period: Annotated[float, Bounds(1e-6, 1e12, off=0)] = 0.0
    """Shortest period, with a base of 0."""
    max_period: Annotated[float, Bounds(1e-6, 1e12, off=0)] = 0.0
    """Longest period, with a base of 0."""
    normalize: Literal["separate", "max", "min"] = "separate"
    """Coordinates are divided by each side of the grid, by the longer or by the shorter one."""
    shift: Annotated[float, Bounds(0, 1e3)] = 0.0
    """Add up to so much, either way, to the coordinates of each axis; 0: off."""
    jitter: Annotated[float, Bounds(1, 1e3, off=0)] = 0.0
    """Multiply the coordinates of each axis by a factor between 1 over this and this; 0: off."""
    rescale: Annotated[float, Bounds(1, 1e3, off=0)] = 0.0
    """Multiply the coordinates of both axes by one such factor; 0: off."""
    draw: Literal["block", "forward"] = "block"
    """Draw shift, jitter and rescale anew for every block, as published, or once for all blocks of
    a pass; in both cases for each crop set by itself.
    """
    # The published option for float32 tables was never passed on to the module.
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Number type of the tables; bf16 rounds them as in the published training runs."""

    @property
    def augments(self) -> bool:
        """Whether tables of a training step are drawn."""
        return bool(self.shift or self.jitter or self.rescale)


class RopeEmbedding(nn.Module):
    """sin and cos tables for a patch grid (DINOv3 paper, section 3.2).

    `periods` is a persistent buffer because released weights carry periods rounded to bfloat16 and
    a loader must honour what is stored. In training mode with shift, jitter or rescale set, every
    call draws a new table.

    Args:
        head_dim: channels of an attention head, a multiple of 4.

    Raises:
        ValueError: another head width, an unknown number type, or periods given both ways or none.
    """

    periods: Tensor

    def __init__(self, head_dim: int, settings: RopeSettings):
        super().__init__()
        if settings.dtype not in TABLE_DTYPES:
            raise ValueError(
                f"RoPE dtype: expected one of {', '.join(TABLE_DTYPES)}, got {settings.dtype!r}"
            )
        self.head_dim = head_dim
        self.settings = settings
        self.dtype = TABLE_DTYPES[settings.dtype]
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=self.dtype))
        self.reset_periods()

    @torch.no_grad()
    def reset_periods(self) -> None:
        """Fill the buffer: base ** (4k / d), or log-spaced from min_period to max_period."""
        settings = self.settings
        self.periods.copy_(
            rope_periods(
                self.head_dim,
                base=settings.base or None,
                min_period=settings.min_period or None,
                max_period=settings.max_period or None,
                dtype=self.dtype,
                device=self.periods.device,
            )
        )

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(sin, cos), each [height * width, head_dim]; cached unless an augmentation draws."""
        settings = self.settings
        if self.training and settings.augments:
            return rope_table(
                height,
                width,
                self.head_dim,
                periods=self.periods,
                normalize=settings.normalize,
                shift=settings.shift or None,
                jitter=settings.jitter or None,
                rescale=settings.rescale or None,
                dtype=self.dtype,
            )
        normalize = settings.normalize
        return while_unchanged(_tables, (self.periods,), height, width, normalize, self.dtype)


def _tables(
    periods: Tensor, height: int, width: int, normalize: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sin, cos) of a grid without augmentation."""
    head_dim = 4 * len(periods)
    return rope_table(height, width, head_dim, periods=periods, normalize=normalize, dtype=dtype)
