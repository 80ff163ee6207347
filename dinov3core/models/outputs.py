"""What backbones return, and what their feature calls share: which layers, pixels and order.

Shapes: B images, P patches (row-major), R registers, D width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Fit = Literal["crop", "pad", "strict"]


class Tokens(NamedTuple):
    """A forward pass over one crop set; all but `prenorm` went through the final norm."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, P, D]
    prenorm: Tensor  # [B, 1 + R + P, D]; a ConvNeXt's holds the patches alone


class ChosenTokens(NamedTuple):
    """The tokens that the losses read, after the final norms."""

    cls: list[Tensor]  # [B, D] of every crop set
    patches: Tensor  # [n, D] of the first crop set


class Features(NamedTuple):
    """Frozen features of one layer."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # a map [B, D, h, w], or [B, P, D] with reshape=False


def features_of(
    cls: Tensor, registers: Tensor, patches_BPD: Tensor, grid: tuple[int, int], reshape: bool
) -> Features:
    """Pack one layer's tokens, the patches as a contiguous map of `grid` if asked for."""
    if not reshape:
        return Features(cls, registers, patches_BPD)
    return Features(cls, registers, torch.unflatten(patches_BPD.mT, 2, grid).contiguous())


def chosen_layers(layers: int | Sequence[int], depth: int) -> list[int]:
    """Indices, ascending, of the last `layers` of `depth` layers, or of those listed."""
    indices = list(range(depth - layers, depth)) if isinstance(layers, int) else sorted(set(layers))
    if not indices or indices[0] < 0 or indices[-1] >= depth:
        raise ValueError(
            f"layers: expected 1 to {depth} or layer indices from 0 to {depth - 1}, got {layers}"
        )
    return indices


def hide_patches(images: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Images with the mean colour, 0 after normalisation, in place of hidden patches.

    It is how a network without a mask token is kept from seeing them: no value of a hidden pixel
    enters its first layer, so none can reach any output.

    Args:
        images: [B, C, H, W], normalised.
        masks: bool [B, P], True: hidden; row-major in the grid of whole patches.

    Raises:
        ValueError: masks of another grid.
    """
    height, width = images.shape[2:]
    rows, columns = height // patch_size, width // patch_size
    if masks.shape != (len(images), rows * columns):
        raise ValueError(
            f"masks: expected bool {[len(images), rows * columns]} for {height} x {width} px and "
            f"patches of {patch_size} px, got {list(masks.shape)}"
        )
    cells = masks.view(-1, 1, rows, columns)
    pixels = cells.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    surplus = (0, width - columns * patch_size, 0, height - rows * patch_size)
    return images.masked_fill(F.pad(pixels, surplus), 0.0)


def fit_to_patches(images: Tensor, patch_size: int, fit: Fit) -> Tensor:
    """Apply the rule for sides that are no multiple of the patch.

    Args:
        images: [B, C, H, W].
        fit: "crop" leaves them to the strided convolutions, which drop the surplus at the bottom
            and right (official); "pad" repeats the last row and column up to the next multiple;
            "strict" refuses.
    """
    if fit not in get_args(Fit):
        raise ValueError(f"fit: expected one of {get_args(Fit)}, got {fit!r}")
    bottom, right = (-side % patch_size for side in images.shape[2:])
    if fit == "crop" or not (bottom or right):
        return images
    if fit == "pad":
        return F.pad(images, (0, right, 0, bottom), mode="replicate")
    raise ValueError(
        f"images: expected sides that are multiples of {patch_size}, got {images.shape[2]} x "
        f'{images.shape[3]}; resize them or pass fit="crop" or fit="pad"'
    )
