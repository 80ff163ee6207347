"""A batch: what the loader makes and a training step takes.

Shapes: B images of this process, G global and L local crops of each, P patches of a global crop, M
masked patches of the batch. Rows are crop-major: crop c of image i is row c * B + i.
"""

from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from dinov3core.data.masks import BatchMasks


@dataclass(frozen=True, eq=False)
class Crops:
    """The views of some images of a step, without masks."""

    global_crops: Tensor  # [G * B, C, H, W] float, normalised
    local_crops: Tensor  # [L * B, C, h, w]
    gram_crops: Tensor | None  # [G * B, C, H', W'] for a Gram teacher of its own
    _: KW_ONLY
    positions: range  # of length B, places in the run's global order
    skipped: list[str] = field(default_factory=list)  # "name: reason" of unreadable images
    upsampled: int = 0  # images smaller than a global or Gram crop

    @property
    def images(self) -> int:
        """B, the images of this process."""
        return len(self.positions)

    @property
    def global_count(self) -> int:
        """G, the global crops of an image."""
        return len(self.global_crops) // self.images

    @property
    def local_count(self) -> int:
        """L, the local crops of an image."""
        return len(self.local_crops) // self.images

    def tensors(self) -> dict[str, Tensor]:
        """What a step computes with, by name; gram_crops only where there are any."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Self:
        """With tensors on `device`; copies from pinned memory to a GPU go on in the background."""
        behind = device.type != "cpu"  # towards the host, the copy could be read too early
        moved = {name: x.to(device, non_blocking=behind) for name, x in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """With tensors in memory that a GPU copies from by itself."""
        return replace(self, **{name: x.pin_memory() for name, x in self.tensors().items()})

    def with_masks(self, masks: BatchMasks) -> "Batch":
        """The batch of these crops and the masks of their global ones."""
        values = {item.name: getattr(self, item.name) for item in fields(Crops)}
        return Batch(**values, **masks._asdict())


@dataclass(frozen=True, eq=False)
class Batch(Crops):
    """One process's share of a training step, or a part of it: crops and masks."""

    masks: Tensor  # bool [G * B, P], True: hidden from the student
    mask_indices: Tensor  # int64 [M], flat positions in `masks`, ascending
    mask_weights: Tensor  # fp32 [M], 1 / masked patches of that crop
