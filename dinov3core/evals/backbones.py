"""What the evaluations call a backbone, raw pixels as one, and when two backbones are the same.

Shapes: B images, C channels, D width, h x w patches.
"""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.pixels import checked_pixels
from dinov3core.image_statistics import ImageStatistics
from dinov3core.models import Features

_SIDE = 32  # of the image that stands for CLS; see `pixel_features`
_PATCH_SIDE = 8
_AT_ONCE = 256  # images whose floats are in memory together


@runtime_checkable
class FeatureExtractor(Protocol):
    """An nn.Module that can be judged: any of ours, or a wrapper with these three names."""

    patch_size: int
    # of the images it was trained on; None: not known, pixels are normalised with those of the data
    statistics: ImageStatistics | None

    def features(self, images: Tensor) -> Features:
        """Of normalised images [B, C, H, W], sides multiples of the patch size.

        Returns:
            cls [B, D], registers [B, R, D] and patches [B, D, H / patch, W / patch].
        """
        ...


class PixelBackbone(nn.Module):
    """Raw pixels as features: what every task gives without learning.

    CLS is the image averaged to 32 x 32, centred by its own mean (see `pixel_features`); a patch is
    its own pixels, averaged to at most 8 x 8. The widths differ: C * 1024 and C * 64.

    Args:
        patch_size: side of a patch in pixels.
        channels: of the images.
    """

    def __init__(self, patch_size: int = 16, channels: int = 3):
        super().__init__()
        if patch_size < 1 or channels < 1:
            raise ValueError(
                f"expected a patch and channels of at least 1, got {patch_size} and {channels}"
            )
        self.patch_size = patch_size
        self.in_channels = channels
        self.statistics = ImageStatistics((0.0,) * channels, (1.0,) * channels)
        self.side = next(
            side for side in range(min(_PATCH_SIDE, patch_size), 0, -1) if patch_size % side == 0
        )

    def features(self, images: Tensor) -> Features:
        images = images.float()
        cls = _centred_thumbnails(images)
        height, width = (length // self.patch_size for length in images.shape[2:])
        whole = images[:, :, : height * self.patch_size, : width * self.patch_size]
        cells = F.avg_pool2d(whole, self.patch_size // self.side)
        patches = F.pixel_unshuffle(cells, self.side)
        registers = patches.new_zeros(len(images), 0, patches.shape[1])
        return Features(cls, registers, patches)


def pixel_features(images: Tensor) -> Tensor:
    """Raw pixels as features [B, C * 1024], the baseline that a trained model has to beat.

    Each image [C, H, W], uint8 or float in [0, 1], is averaged to 32 x 32 and centred by its own
    mean, so that cosine similarity compares patterns and not brightness; without it nearly all
    cosines of natural images lie above 0.8.
    """
    return torch.cat([_centred_thumbnails(checked_pixels(some)) for some in images.split(_AT_ONCE)])


def _centred_thumbnails(images: Tensor) -> Tensor:
    thumbnails = F.adaptive_avg_pool2d(images, _SIDE).flatten(1)
    return thumbnails - thumbnails.mean(1, keepdim=True)


def known_statistics(backbone: nn.Module) -> ImageStatistics:
    """The image statistics that a backbone states; a ValueError when it states none."""
    if backbone.statistics is None:
        raise ValueError(
            "image statistics: expected them with the backbone, got none; set backbone.statistics "
            "to those of your data, e.g. with dinov3core.evals.reading.measured_statistics"
        )
    return backbone.statistics


def fingerprint(backbone: nn.Module) -> str:
    """SHA-256 of class, structure, settings, statistics and weights: equal where features are.

    Settings are the plain attributes (numbers, words, flags, tuples and dataclasses of them) of all
    submodules, as weights alone do not tell the number of heads or the RoPE base.
    """
    total = hashlib.sha256(repr(backbone).encode())
    total.update(json.dumps(getattr(backbone, "statistics", None)).encode())
    for name, module in backbone.named_modules():
        plain = {
            key: repr(value)
            for key, value in vars(module).items()
            if key != "training" and _is_plain(value)
        }
        total.update(json.dumps([name, type(module).__qualname__, plain], sort_keys=True).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, item.name)) for item in fields(value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)
