"""Backbones that know the answer, or nothing, and small data for the dense evaluations."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import UnreadableImage
from dinov3core.data.labelled import Pair
from dinov3core.models import ImageStatistics


class Features(NamedTuple):
    cls: Tensor
    registers: Tensor
    patches: Tensor


class Stub(nn.Module):
    """A backbone from a function of patch means [B, C, h, w]; its CLS is the mean patch."""

    def __init__(self, of_means=lambda means: means, patch_size: int = 8):
        super().__init__()
        self.patch_size, self.of_means = patch_size, of_means
        self.statistics = ImageStatistics((0.0,) * 3, (1.0,) * 3)

    def features(self, images: Tensor) -> Features:
        assert not torch.is_grad_enabled() and not self.training
        patches = self.of_means(F.avg_pool2d(images, self.patch_size))
        return Features(
            patches.mean((2, 3)), patches.new_zeros(len(images), 0, patches.shape[1]), patches
        )


def noise(width: int = 16) -> Stub:
    """Features that say nothing about the image."""
    generator = torch.Generator().manual_seed(0)
    return Stub(lambda means: torch.randn(len(means), width, *means.shape[2:], generator=generator))


def one_hot(classes: int) -> Stub:
    """Features that are the class, drawn as red = (class + 0.5) / classes."""
    return Stub(
        lambda m: (
            F.one_hot((m[:, 0] * classes).long().clamp(0, classes - 1), classes)
            .movedim(3, 1)
            .float()
        )
    )


def diverged() -> Stub:
    return Stub(lambda means: means * torch.nan)


class PairList:
    """Pairs in memory; None stands for a broken file."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor] | None]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> Pair:
        if self.pairs[index] is None:
            raise UnreadableImage(self.name(index), "broken")
        return Pair(*self.pairs[index])

    def name(self, index: int) -> str:
        return f"pair {index}"


def classes_drawn(
    count: int, classes: int, side: int = 64, cell: int = 8, seed: int = 0
) -> PairList:
    """Images of random squares of `cell` pixels on the grid, red by class, some of no class."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        coarse = torch.randint(
            classes, (2 * side // cell // 4, 2 * side // cell // 4), generator=generator
        )
        target = coarse.repeat_interleave(2 * cell, 0).repeat_interleave(2 * cell, 1)[:side, :side]
        image = torch.stack(
            [(target + 0.5) / classes, torch.rand(side, side, generator=generator), target * 0.0]
        )
        target = target.clone()
        target[:3] = 255
        pairs.append((image, target))
    return PairList(pairs)
