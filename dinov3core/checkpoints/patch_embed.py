"""Patch embeddings for other channel counts and patch sizes, with the response to RGB images kept.

Shapes: D width, C channels, p patch side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def adapt_patch_embed(
    weight: Tensor, in_channels: int, patch_size: int, rgb_channels: Sequence[int] = (0, 1, 2)
) -> Tensor:
    """The weight [D, 3, p, p] of a patch embedding, for other channels and another patch size.

    Channels: with three or more, the RGB kernels move to `rgb_channels` and all others start at
    zero, so an image's tokens do not depend on the new channels yet. With one or two, each gets an
    equal share of the sum over RGB: an image whose channels are equal keeps its tokens.

    Patch size: the kernel w' that minimises the difference between <w', resize(x)> and <w, x> over
    all patches x; it is zero for a larger `patch_size` (Beyer et al. 2023, FlexiViT, equation 3;
    bilinear resize).

    Args:
        rgb_channels: which of the new channels are red, green and blue.

    Raises:
        ValueError: when the channels cannot be matched.
    """
    stored = weight.shape[1]
    if in_channels != stored:
        if stored != 3:
            raise ValueError(
                f"patch embedding: expected 3 stored channels to spread over {in_channels}, got "
                f"{stored}; build the model with in_channels={stored}"
            )
        weight = _spread_rgb(weight, in_channels, rgb_channels)
    return weight if weight.shape[-1] == patch_size else _resize(weight, patch_size)


def _spread_rgb(weight: Tensor, in_channels: int, rgb_channels: Sequence[int]) -> Tensor:
    if in_channels < 3:
        return weight.sum(1, keepdim=True).expand(-1, in_channels, -1, -1) / in_channels
    if len(set(rgb_channels)) != 3 or not all(0 <= c < in_channels for c in rgb_channels):
        raise ValueError(
            f"rgb_channels: expected 3 different channels below {in_channels}, got "
            f"{tuple(rgb_channels)}"
        )
    spread = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    spread[:, list(rgb_channels)] = weight
    return spread


def _resize(weight: Tensor, patch_size: int) -> Tensor:
    """Pseudo-inverse resize: with R the resize matrix, the least-squares w' of R^T w' = w."""
    side = weight.shape[-1]
    identity = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    size = (patch_size, patch_size)
    images = F.interpolate(identity, size=size, mode="bilinear", antialias=True)
    resize = images.flatten(1)  # R^T: [p * p, p' * p']
    kernels = weight.double().flatten(2) @ torch.linalg.pinv(resize).mT
    return kernels.unflatten(2, size).to(weight.dtype)
