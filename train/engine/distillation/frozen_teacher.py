"""What a frozen teacher is to a distillation: one call that gives rows of CLS tokens and patches.

Teacher and students see the same crops and speak of the same patches: patch p of a teacher is where
patch p of a student is. A teacher whose patches are of another size therefore sees the crops
resized, to the side at which its patch grid is the students'. Its input alone is resized; the
students keep the crops as they are. (Published code asks for that by a factor that it never finds:
a teacher of 16-pixel patches beside a ConvNeXt of stride 32 at 512 pixels then has a grid of 32 x
32 for one of 16 x 16, and the rows compared are of different places.)

Shapes: n crops, P patches of a crop, E and E' widths of a teacher's rows.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor


class TeacherRows(NamedTuple):
    """What a teacher says of crops."""

    cls: Tensor  # [n, E]
    patches: Tensor  # [n * P, E'] crop after crop, or of these the rows that were asked for


class FrozenTeacher(Protocol):
    """A network that never changes; the same on all processes.

    Attributes:
        name: for people.
        patch_size: side in pixels of what one of its patches covers.
        fingerprint: tells its weights from others.
    """

    name: str
    patch_size: int
    fingerprint: str

    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        """The rows of crops.

        Args:
            crops: [n, C, H, W] at its own input size; see `teacher_input`. n may be 0.
            rows: int64 [m] among the n * P patches: only these; None: all of them.
        """
        ...


class HeadTeacher(FrozenTeacher, Protocol):
    """A frozen teacher with heads: its rows are the bottlenecks of these, E and E' wide."""

    def cls_logits(self, bottlenecks: Tensor) -> Tensor:
        """Rows [n, E] of CLS tokens -> [n, K] over the prototypes of their head."""
        ...

    def patch_logits(self, bottlenecks: Tensor) -> Tensor:
        """Rows [m, E'] of patches -> [m, K'] over the prototypes of theirs."""
        ...


def patch_grid(crops: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of crops [n, C, H, W]."""
    height, width = crops.shape[-2:]
    return height // patch_size, width // patch_size


def teacher_input(crops: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Crops [n, C, H, W] at the size at which a teacher's patches lie on `grid`.

    Args:
        grid: of the students, rows and columns.
        patch_size: of the teacher.
    """
    rows, columns = grid
    return at_size(crops, (rows * patch_size, columns * patch_size))


def at_size(crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops [n, C, H, W] at another size, bilinear and antialiased; themselves at their own."""
    if tuple(crops.shape[-2:]) == size:
        return crops
    return F.interpolate(crops, size=size, mode="bilinear", antialias=True, align_corners=False)
