"""The linear head of the dense evaluations, batch norm and one 1x1 convolution on frozen patches:
training and use.

Shapes: B windows, D width, K outputs, h x w patches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.progress import progress
from dinov3core.evals.windows import (
    Frozen,
    Pairs,
    cut,
    join,
    resize,
    resize_target,
    shorter_side_to,
    window_origins,
)

CACHE_BYTES = 8 * 2**30  # patch features held in memory at most
HALF_LIMIT = 65504.0  # the largest fp16
AT_ONCE = 8  # windows of a test image


class DenseHead(nn.Module):
    """Dropout of whole channels, batch norm, 1x1 convolution: [B, D, h, w] -> [B, K, h, w].

    Dropout stands before the norm, as in the published head; the convolution starts at N(0, 0.01)
    and bias 0.
    """

    def __init__(self, width: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(width)
        self.predict = nn.Conv2d(width, outputs, 1)
        nn.init.normal_(self.predict.weight, std=0.01)
        nn.init.zeros_(self.predict.bias)

    def forward(self, patches: Tensor) -> Tensor:
        return self.predict(self.norm(self.dropout(patches)))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`; afterwards the caller's go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def fit_head(
    head: DenseHead,
    loss_at: Callable[[int], Tensor],
    *,
    iterations: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    clip: float | None = None,
) -> float:
    """Train a head with AdamW: linear warm-up over a share `warmup` of the iterations, then cosine
    to 0.

    Args:
        loss_at: the loss of the head on the batch of an iteration.
        clip: largest gradient norm.

    Returns:
        The mean loss of the last tenth of the iterations.

    Raises:
        ValueError: no iteration, or a loss that is not finite.
    """
    if iterations < 1 or learning_rate <= 0:
        raise ValueError(
            f"expected at least 1 iteration and a positive learning rate, got {iterations} and "
            f"{learning_rate}"
        )
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    head.train()
    recent: deque[float] = deque(maxlen=max(1, iterations // 10))
    bar = progress(range(iterations), desc="head", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_at(step, iterations, warmup)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(head.parameters(), clip)
        optimizer.step()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise ValueError(
                f"head: expected a finite loss, got {recent[-1]} at iteration {step}; lower the "
                "learning rate"
            )
        bar.set_postfix(loss=f"{recent[-1]:.3f}", refresh=False)
    head.eval()
    return sum(recent) / len(recent)


def rate_at(step: int, iterations: int, warmup: float) -> float:
    """The learning rate at `step` as a share of its peak: linear from 1e-6 (the published ratio),
    then cosine to 0.
    """
    rising = round(warmup * iterations)
    if step < rising:
        return 1e-6 + (1 - 1e-6) * step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, iterations - rising)))


class WindowCache:
    """Frozen features of all training windows, in half precision, each with what the loss needs of
    its target.

    Args:
        wanted: (target [window, window], patch grid, index of the image) to what is kept of it;
            None drops the window.
        task: for messages.

    Raises:
        ValueError: more than `CACHE_BYTES`, or features that are not finite.
        DataError: no window is kept.
    """

    def __init__(
        self,
        read: Frozen,
        pairs: Pairs,
        wanted: Callable[[Tensor, tuple[int, int], int], Tensor | None],
        *,
        side: int,
        window: int,
        stride: int,
        task: str,
    ):
        self.device = read.device
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        held = 0
        for images, (index, pair) in enumerate(pairs, start=1):
            size = shorter_side_to(side, *pair.target.shape)
            origins = window_origins(*size, window, stride)
            targets = cut(resize_target(pair.target, size)[None], origins, window)[:, 0]
            for view, target in zip(cut(resize(pair.image, size), origins, window), targets):
                patches = read(view[None]).patches[0]
                kept = wanted(target, tuple(patches.shape[1:]), index)
                if kept is not None:
                    self.features.append(patches.clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu())
                    self.targets.append(kept)
                    held += self.features[-1].nbytes + kept.nbytes
            # The first image tells how much all will take; later ones may be larger.
            check_cache(held, len(pairs.indices) if images == 1 else 1, task)
        self.unreadable = len(pairs.unreadable)
        if not self.features:
            raise DataError(
                f"{task}: expected pixels of a known target in the training split, got none; check "
                "them"
            )
        self.width = self.features[0].shape[0]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random windows, with replacement, on the backbone's device: features [B, D, h, w] in
        fp32, and targets.
        """
        chosen = torch.randint(len(self.features), (size,)).tolist()
        features, targets = (
            torch.stack([kept[i] for i in chosen]) for kept in (self.features, self.targets)
        )
        return features.to(self.device).float(), targets.to(self.device)


def check_cache(bytes_per_image: int, images: int, task: str) -> None:
    """Refuse to fill the memory with features.

    Raises:
        ValueError: more than `CACHE_BYTES`.
    """
    wanted = bytes_per_image * images
    if wanted > CACHE_BYTES:
        raise ValueError(
            f"{task}: expected features of at most {CACHE_BYTES / 2**30:.0f} GiB in memory, got "
            f"about {wanted / 2**30:.1f} GiB; use fewer train_images or a smaller side"
        )


def predict(
    read: Frozen, head: nn.Module, pixels_CHW: Tensor, side: int, window: int, stride: int
) -> Tensor:
    """Head outputs of one image by sliding windows, [K, H', W'] at the resized size; overlaps are
    averaged.
    """
    size = shorter_side_to(side, *pixels_CHW.shape[1:])
    origins = window_origins(*size, window, stride)
    views = cut(resize(pixels_CHW, size), origins, window)
    with torch.no_grad():
        outputs = torch.cat([head(read(some).patches) for some in views.split(AT_ONCE)])
    return join(outputs, origins, size, window)
