"""Rotary position embedding of a patch grid: periods as a buffer, tables on demand, augmentation in
training.
"""

import torch
from torch import Tensor, nn

from dinov3core.ops import rope_table
from dinov3core.ops.rope import rope_periods


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
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.reset_periods()

    @property
    def augments(self) -> bool:
        return any(strength is not None for strength in self.augmentation.values())

    def reset_periods(self) -> None:
        """Fill the buffer: base ** (4k / d), or log-spaced from min_period to max_period when both
        are given.
        """
        periods = rope_periods(
            self.head_dim,
            base=self.base,
            min_period=self.min_period,
            max_period=self.max_period,
            dtype=self.dtype,
            device=self.periods.device,
        )
        with torch.no_grad():
            self.periods.copy_(periods)

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(sin, cos), each [height * width, head_dim]; cached unless an augmentation draws."""
        if self.training and self.augments:
            return self._table(height, width, self.augmentation)
        if torch.compiler.is_compiling():
            return self._table(height, width, {})
        key = (height, width, self.periods.device, self.periods._version)
        if key not in self._tables:
            if (
                len(self._tables) > 32
            ):  # endless sizes (tiled extraction) must not grow without bound
                self._tables.clear()
            self._tables[key] = self._table(height, width, {})
        return self._tables[key]

    def _table(
        self, height: int, width: int, augmentation: dict[str, float | None]
    ) -> tuple[Tensor, Tensor]:
        return rope_table(
            height,
            width,
            self.head_dim,
            periods=self.periods,
            normalize=self.normalize,
            dtype=self.dtype,
            device=self.periods.device,
            **augmentation,
        )
