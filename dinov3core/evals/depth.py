"""Depth from one image with a linear head on frozen patches: what the dense features know about
space.

The protocol is that of DINOv3 on NYU (Simeoni et al. 2025, section 6.1; bins after Bhat et al.
2021, "AdaBins", loss after Eigen et al. 2014 in the form of Lee et al. 2019): batch norm and a 1x1
convolution to 256 bins, of which the
depth is the weighted mean. Published: 38,400 iterations of 16 augmented crops at learning rate
3e-4; here features of fixed windows are computed once, so that a laptop can train the head, at a
rate that gets there in 2,000 (at 1e-3 it does not; LOG.md). The published crop of NYU's invalid
border is a matter of the data: set those depths to 0.

Shapes: B windows, D width, H x W pixels, h x w patches.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import Ranged
from dinov3core.evals.dense_head import DenseHead, WindowCache, fit_head, predict, seeded
from dinov3core.evals.windows import (
    Frozen,
    Pairs,
    resolve_side,
    resolve_window,
)

PROTOCOL = (
    "Frozen patches of the last layer after the final norm; batch norm, 1x1 convolution to 256 "
    "bins between 0.001 m and the farthest depth, trained with AdamW (warm-up, cosine) on features "
    "of fixed windows, computed once, without augmentation. Test: sliding windows, mean with the "
    "mirror image; errors per image over known depths, then their mean."
)

BINS = 256
NEAREST = 1e-3  # metres; depths below are unknown
LEVEL = 0.1  # added to every rectified output, so that no bin is ever lost to the gradient
MEAN_WEIGHT = 0.15  # of the squared mean of the log difference, beside its variance
MEAN_ONLY = 100  # iterations without the variance
WARMUP = 1 / 3  # share of the iterations; published: 12,800 of 38,400
CLIP = 35.0


class Errors(NamedTuple):
    """Errors of one image over its known pixels; NaN without one."""

    rmse: float  # metres
    abs_rel: float  # |predicted - true| / true
    a1: float  # percent of pixels within a factor of 1.25


class BinMean(nn.Module):
    """The mean of bins at equal distances from `NEAREST` to `farthest`, weighted by rectified
    outputs plus 0.1.
    """

    def __init__(self, farthest: float):
        super().__init__()
        self.register_buffer("bins", torch.linspace(NEAREST, farthest, BINS))

    def forward(self, outputs: Tensor) -> Tensor:
        """[B, BINS, h, w] -> metres [B, 1, h, w]."""
        weights = F.relu(outputs) + LEVEL
        return (torch.einsum("bkhw,k->bhw", weights, self.bins) / weights.sum(1))[:, None]


def depth(
    backbone: nn.Module,
    data: Ranged,
    *,
    side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    farthest: float | None = None,
    iterations: int = 2000,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-4,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train a linear head on frozen patch features and report depth errors on the test split.

    The prediction is the mean over the image and its mirror image, over sliding windows.

    Args:
        side: the shorter side of resized images; None: that of the first one, on the patch grid, at
            most 512.
        window, stride: of the sliding windows; None: `side`, two thirds of it.
        farthest: metres of the last bin; deeper pixels count as unknown. None: the largest training
            depth.
        iterations, batch_size, learning_rate, weight_decay: of AdamW; a batch is of windows.
        train_images, test_images: at most so many, evenly spread over the split; None: all.

    Returns:
        `rmse` (metres), `abs_rel`, `a1` (percent), each the mean over images with a known pixel;
        `train_loss`, `unreadable` images, and the `protocol`.

    Raises:
        DataError: depths of another size than their image, or no known depth.
        ValueError: settings out of range, or features that are not finite.
    """
    if farthest is not None and not farthest > NEAREST:
        raise ValueError(f"farthest: expected more than {NEAREST} m, got {farthest}")
    read = Frozen(backbone, device=device, autocast=autocast)
    train = Pairs(data.train, train_images, "depth: training images")
    test = Pairs(data.test, test_images, "depth: test images")
    side = resolve_side(side, train.first().image, read.patch_size)
    window, stride = resolve_window(window, stride, side, read.patch_size)
    with seeded(seed, read.device):
        limit = torch.inf if farthest is None else farthest
        wanted = partial(_if_known, limit)
        cache = WindowCache(
            read, train, wanted, side=side, window=window, stride=stride, task="depth"
        )
        if farthest is None:
            farthest = max(one[known(one, limit)].max().item() for one in cache.targets)
        head = DenseHead(cache.width, BINS).to(read.device)
        metres = nn.Sequential(head, BinMean(farthest).to(read.device))

        def loss_at(step: int) -> Tensor:
            features, target = cache.batch(batch_size)
            predicted = F.interpolate(
                metres(features), size=tuple(target.shape[1:]), mode="bilinear"
            )[:, 0]
            return sig_loss(
                predicted, target, known(target, farthest), with_variance=step >= MEAN_ONLY
            )

        loss = fit_head(
            head,
            loss_at,
            iterations=iterations,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=WARMUP,
            clip=CLIP,
        )
    found = []
    for _, pair in test:
        views = (pair.image, pair.image.flip(2))
        one, mirrored = (predict(read, metres, view, side, window, stride) for view in views)
        average = F.interpolate(
            ((one + mirrored.flip(2)) / 2)[None], size=tuple(pair.target.shape), mode="bilinear"
        )
        found.append(errors_of(average[0, 0].cpu(), pair.target, farthest))
    averages = torch.tensor(found, dtype=torch.float64).nanmean(0).tolist()
    if averages[0] != averages[0]:
        raise DataError(
            f"depth: expected test depths from {NEAREST} to {farthest:g} m, got none; check the "
            "targets"
        )
    return {
        **Errors(*averages)._asdict(),
        "train_loss": loss,
        "unreadable": cache.unreadable + len(test.unreadable),
        "protocol": {
            "text": PROTOCOL,
            "side": side,
            "window": window,
            "stride": stride,
            "farthest": farthest,
            "iterations": iterations,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "train_images": len(train.indices),
            "test_images": len(test.indices),
            "seed": seed,
        },
    }


def _if_known(farthest: float, target: Tensor, grid: tuple[int, int], index: int) -> Tensor | None:
    """The depths of a window with a known pixel; grid and index are of no use here."""
    return target.float() if known(target, farthest).any() else None


def known(target: Tensor, farthest: float) -> Tensor:
    """Pixels of known depth, bool; unknown are 0, NaN, infinity, and what lies outside `NEAREST` ..
    `farthest`.
    """
    return (target >= NEAREST) & (target <= farthest) & (target < torch.inf)


def sig_loss(
    predicted: Tensor, target: Tensor, mask: Tensor, *, with_variance: bool = True
) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of the log differences g of known pixels: mostly blind to a
    wrong scale.
    """
    gap = (predicted[mask] + NEAREST).log() - (target[mask] + NEAREST).log()
    squares = MEAN_WEIGHT * gap.mean().square()
    if with_variance and len(gap) > 1:
        squares = squares + gap.var()
    return (squares + 1e-12).sqrt()  # at 0 the root has no gradient


def errors_of(predicted: Tensor, target: Tensor, farthest: float) -> Errors:
    """Errors of one image, over its known pixels; predictions are clipped to the known range as
    well.
    """
    mask = known(target, farthest)
    guess, truth = predicted[mask].double().clamp(NEAREST, farthest), target[mask].double()
    ratio = torch.maximum(guess / truth, truth / guess)
    return Errors(
        (guess - truth).square().mean().sqrt().item(),
        ((guess - truth).abs() / truth).mean().item(),
        100 * (ratio < 1.25).double().mean().item(),
    )
