"""Rotary position embedding of a patch grid: periods as a buffer, tables on demand, augmentation in
training.
"""

import torch
from torch import Tensor, nn

from dinov3core.ops import rope_table
from dinov3core.ops.table_cache import while_unchanged


class RopeEmbedding(nn.Module):
    """sin and cos tables for a patch grid (DINOv3 paper, section 3.2: box coordinates in [-1, 1],
    with jittering).

    `periods` is a persistent buffer because released weights carry periods rounded to bfloat16 and
    a loader must honour what is stored. In training mode with shift, jitter or rescale set, every
    call draws a new table.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize: str = "separate",
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"RoPE needs a head width that is a multiple of 4, got {head_dim}")
        self.head_dim, self.normalize, self.dtype = head_dim, normalize, dtype
        self.base, self.min_period, self.max_period = base, min_period, max_period
        self.augmentation = {"shift": shift, "jitter": jitter, "rescale": rescale}
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=dtype))
        self.reset_periods()

    @property
    def augments(self) -> bool:
        return any(strength is not None for strength in self.augmentation.values())

    def reset_periods(self) -> None:
        """Fill the buffer: base ** (4k / d), or log-spaced from min_period to max_period when both
        are given.
        """
        count = self.head_dim // 4
        device = self.periods.device
        by_range = self.min_period is not None and self.max_period is not None
        if by_range == (self.base is not None):
            raise ValueError(
                "RoPE periods: give either base or both min_period and max_period, got "
                f"base={self.base}, min_period={self.min_period}, max_period={self.max_period}"
            )
        if by_range:
            ratio = self.max_period / self.min_period
            exponents = torch.linspace(0, 1, count, device=device, dtype=self.dtype)
            periods = ratio**exponents / ratio * self.max_period
        else:
            exponents = (
                2 * torch.arange(count, device=device, dtype=self.dtype) / (self.head_dim // 2)
            )
            periods = self.base**exponents
        with torch.no_grad():
            self.periods.copy_(periods)

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(sin, cos), each [height * width, head_dim]; cached unless an augmentation draws."""
        if self.training and self.augments:
            return rope_table(
                height,
                width,
                self.head_dim,
                periods=self.periods,
                normalize=self.normalize,
                dtype=self.dtype,
                **self.augmentation,
            )
        return while_unchanged(_tables, (self.periods,), height, width, self.normalize, self.dtype)


def _tables(
    periods: Tensor, height: int, width: int, normalize: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sin, cos) of a grid without augmentation."""
    head_dim = 4 * len(periods)
    return rope_table(height, width, head_dim, periods=periods, normalize=normalize, dtype=dtype)
