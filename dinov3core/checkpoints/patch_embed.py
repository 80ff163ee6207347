"""Patch embeddings for other channel counts and patch sizes, with the response to RGB images kept.

Shapes: D width, C channels, p patch side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.models import ImageStatistics

RAW = ImageStatistics((0.0,), (1.0,))  # pixels as they are, of any number of channels


class PatchEmbedding(NamedTuple):
    """The convolution that makes tokens of patches."""

    weight: Tensor  # [D, C, p, p]
    bias: Tensor  # [D]

    def restated(self, before: ImageStatistics, after: ImageStatistics) -> "PatchEmbedding":
        """The same response to an image, once its pixels are normalised by `after`.

        Args:
            before: what this one expects its pixels to be normalised by.
        """
        mean, std = (_per_channel(values) for values in before)
        new_mean, new_std = (_per_channel(values) for values in after)
        kernels = self.weight.double()
        # A pixel is new_std * x + new_mean; (pixel - mean) / std is what the kernels are for.
        shift = (kernels * (new_mean - mean) / std).sum((1, 2, 3))
        weight = (kernels * new_std / std).to(self.weight.dtype)
        return PatchEmbedding(weight, (self.bias.double() + shift).to(self.bias.dtype))


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def adapt_patch_embed(
    weight: Tensor, in_channels: int, patch_size: int, rgb_channels: Sequence[int] = (0, 1, 2)
) -> Tensor:
    """The weight [D, C, p, p] of a patch embedding, for other channels and another patch size.

    Channels, in one of two ways. RGB kernels move to `rgb_channels` and all others start at zero,
    so an image's tokens do not depend on the new channels yet. Or, without `rgb_channels` and
    always for one or two channels, each channel gets an equal share of the sum over those stored:
    an image whose channels are all equal, a grey one, keeps its tokens.

    Patch size: the kernel w' that minimises the difference between <w', resize(x)> and <w, x> over
    all patches x; it is zero for a larger `patch_size` (Beyer et al. 2023, FlexiViT, equation 3;
    bilinear resize).

    Args:
        rgb_channels: which of the new channels are red, green and blue; empty: equal shares.

    Raises:
        ValueError: when the channels cannot be matched.
    """
    stored = weight.shape[1]
    if in_channels != stored and shares_equally(in_channels, rgb_channels):
        weight = weight.sum(1, keepdim=True).expand(-1, in_channels, -1, -1) / in_channels
    elif in_channels != stored:
        if stored != 3:
            raise ValueError(
                f"patch embedding: expected 3 stored channels to spread over {in_channels}, got "
                f"{stored}; build the model with in_channels={stored}, or leave rgb_channels empty"
            )
        weight = _spread_rgb(weight, in_channels, rgb_channels)
    return weight if weight.shape[-1] == patch_size else _resize(weight, patch_size)


def shares_equally(in_channels: int, rgb_channels: Sequence[int]) -> bool:
    """Whether so many channels each get an equal share; else red, green and blue have places."""
    return in_channels < 3 or not rgb_channels


def _spread_rgb(weight: Tensor, in_channels: int, rgb_channels: Sequence[int]) -> Tensor:
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
