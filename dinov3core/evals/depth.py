"""Depth from one image with a linear head: what frozen patches know about space.

The protocol is that of DINOv3 on NYU (Simeoni et al. 2025, section 6.1; bins after Bhat et al.
2021, "AdaBins", loss after Eigen et al. 2014 in the form of Lee et al. 2019): batch norm and a 1x1
convolution to 256 bins, of which the depth is the weighted mean. Published: 38,400 iterations of 16
augmented crops at learning rate 3e-4; here features of fixed windows are computed once, so that a
laptop can train the head, at a rate that gets there in 2,000 (at 1e-3 it does not; LOG.md). The
published crop of NYU's invalid border is a matter of the data: set those depths to 0.

Shapes: B windows, D width, H x W pixels, h x w patches.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import Ranged
from dinov3core.evals.dense_head import DenseHead, DenseSettings, DenseTask, WindowCache, fit_head
from dinov3core.evals.frozen import FrozenEncoder

PROTOCOL = (
    "Frozen patches of the last layer after the final norm; batch norm, 1x1 convolution to 256 "
    "bins between 0.001 m and the farthest depth, trained with AdamW (warm-up, cosine) on features "
    "of fixed windows, computed once, without augmentation. Test: sliding windows, mean with the "
    "mirror image; errors per image over known depths, then their mean."
)

DEPTH = DenseSettings(learning_rate=1e-2, weight_decay=1e-4)
BINS = 256
NEAREST = 1e-3  # metres; depths below are unknown
LEVEL = 0.1  # added to every rectified output, so that no bin is ever lost to the gradient
MEAN_WEIGHT = 0.15  # of the squared mean of the log difference, beside its variance
MEAN_ONLY = 100  # iterations without the variance
WARMUP = 1 / 3  # share of the iterations; published: 12,800 of 38,400
CLIP = 35.0


class DepthErrors(NamedTuple):
    """Errors of one image over its known pixels; NaN without one."""

    rmse: float  # metres
    abs_rel: float  # |predicted - true| / true
    a1: float  # percent of pixels within a factor of 1.25


class BinMean(nn.Module):
    """The mean of bins from `NEAREST` to `farthest`, weighted by rectified outputs plus 0.1."""

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
    settings: DenseSettings = DEPTH,
    *,
    farthest: float | None = None,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train a linear head on frozen patch features and report depth errors on the test split.

    The prediction is the mean over the image and its mirror image, over sliding windows.

    Args:
        settings: e.g. `dataclasses.replace(DEPTH, iterations=38_400)`.
        farthest: metres of the last bin; deeper pixels count as unknown. None: the largest training
            depth.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        `rmse` (metres), `abs_rel`, `a1` (percent), each the mean over images with a known pixel;
        `train_loss`, `unreadable` images, and the `protocol`.

    Raises:
        DataError: depths of another size than their image, or no known depth.
        ValueError: settings out of range, or features that are not finite.
    """
    if farthest is not None and not farthest > NEAREST:
        raise ValueError(f"farthest: expected more than {NEAREST} m, got {farthest}")
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast_dtype)
    task = DenseTask(encoder, data, settings, "depth")
    with task.seeded():
        cache = _known_windows(task, math.inf if farthest is None else farthest)
        if farthest is None:
            farthest = max(one[known(one, math.inf)].max().item() for one in cache.targets)
        head = DenseHead(cache.width, BINS).to(encoder.device)
        metres = nn.Sequential(head, BinMean(farthest).to(encoder.device))

        def loss_at(step: int) -> Tensor:
            features, target = cache.batch(settings.batch_size)
            size = tuple(target.shape[1:])
            predicted = F.interpolate(metres(features), size=size, mode="bilinear")[:, 0]
            mask = known(target, farthest)
            return sig_loss(predicted, target, mask, with_variance=step >= MEAN_ONLY)

        loss = fit_head(head, loss_at, settings, warmup=WARMUP, clip=CLIP)

    averages = _errors_on_test(task, metres, farthest)
    if math.isnan(averages.rmse):
        raise DataError(
            f"depth: expected test depths from {NEAREST} to {farthest:g} m, got none; check the "
            "targets"
        )
    return {
        **averages._asdict(),
        "train_loss": loss,
        "unreadable": len(task.train.unreadable) + len(task.test.unreadable),
        "protocol": {"text": PROTOCOL, "farthest": farthest, **task.protocol()},
    }


def _known_windows(task: DenseTask, farthest: float) -> WindowCache:
    """Features and depths of the training windows that have a known pixel."""

    def depths_of(target: Tensor, grid: tuple[int, int], index: int) -> Tensor | None:
        return target.float() if known(target, farthest).any() else None

    return WindowCache(task, depths_of)


def _errors_on_test(task: DenseTask, metres: nn.Module, farthest: float) -> DepthErrors:
    """Mean errors over the test images that have a known pixel."""
    errors = []
    for _, pair in task.test:
        views = (pair.image, pair.image.flip(2))
        ahead, mirrored = (task.predict(metres, view) for view in views)
        average = (ahead + mirrored.flip(2)) / 2
        size = tuple(pair.target.shape)
        predicted = F.interpolate(average[None], size=size, mode="bilinear")[0, 0]
        errors.append(errors_of(predicted.cpu(), pair.target, farthest))
    return DepthErrors(*torch.tensor(errors, dtype=torch.float64).nanmean(0).tolist())


def known(target: Tensor, farthest: float) -> Tensor:
    """Pixels of known depth, bool: from `NEAREST` to `farthest`, neither NaN nor infinite."""
    return (target >= NEAREST) & (target <= farthest) & (target < torch.inf)


def sig_loss(
    predicted: Tensor, target: Tensor, mask: Tensor, *, with_variance: bool = True
) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of the log differences g: mostly blind to a wrong scale.

    Args:
        predicted, target: in metres, of one shape.
        mask: the pixels that count.
        with_variance: False leaves var(g) out.
    """
    gap = (predicted[mask] + NEAREST).log() - (target[mask] + NEAREST).log()
    squares = MEAN_WEIGHT * gap.mean().square()
    if with_variance and len(gap) > 1:
        squares = squares + gap.var()
    return (squares + 1e-12).sqrt()  # at 0 the root has no gradient


def errors_of(predicted: Tensor, target: Tensor, farthest: float) -> DepthErrors:
    """Errors of one image over its known pixels; predictions are clipped to the known range."""
    mask = known(target, farthest)
    guess = predicted[mask].double().clamp(NEAREST, farthest)
    truth = target[mask].double()
    ratio = torch.maximum(guess / truth, truth / guess)
    return DepthErrors(
        (guess - truth).square().mean().sqrt().item(),
        ((guess - truth).abs() / truth).mean().item(),
        100 * (ratio < 1.25).double().mean().item(),
    )
