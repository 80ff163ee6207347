"""What segmentation and depth share: a linear head on frozen patches, its training and its use.

The head is batch norm and one 1x1 convolution. Shapes: B windows, D width, K outputs, h x w
patches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.progress import progress
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import Pairs
from dinov3core.evals.windows import resolve_side, resolve_windows

CACHE_BYTES = 8 * 2**30  # patch features held in memory at most
HALF_LIMIT = 65504.0  # the largest fp16
AT_ONCE = 8  # windows of a test image


@dataclass(frozen=True)
class DenseSettings:
    """How a linear head on frozen patches is trained and tested.

    Args:
        learning_rate, weight_decay, iterations, batch_size: of AdamW; a batch is of windows.
        side: the shorter side of resized images; None: that of the first one, on the patch grid, at
            most 512.
        window, stride: of the sliding windows, in training and in the test; None: `side`, two
            thirds of the window.
        train_images, test_images: at most so many, evenly spread over the split; None: all.
        seed: of the head and of the batches.
    """

    learning_rate: float
    weight_decay: float
    iterations: int = 2000
    batch_size: int = 16
    side: int | None = None
    window: int | None = None
    stride: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    seed: int = 0


class DenseTask:
    """A backbone, the pairs it is trained and tested on, and the windows that it sees of them.

    Args:
        data: with `train` and `test`, sources of pairs.
        name: of the task, for messages.

    Raises:
        DataError: an empty split; ValueError: settings out of range, or no image statistics.
    """

    def __init__(self, encoder: FrozenEncoder, data: Any, settings: DenseSettings, name: str):
        self.encoder = encoder
        self.settings = settings
        self.name = name
        self.train = Pairs(data.train, settings.train_images, f"{name}: training images")
        self.test = Pairs(data.test, settings.test_images, f"{name}: test images")
        side = resolve_side(settings.side, self.train.first().image, encoder.patch_size)
        self.windows = resolve_windows(side, settings.window, settings.stride, encoder.patch_size)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Random numbers from the seed; the caller's go on as if nothing had been drawn."""
        device = self.encoder.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            yield

    def predict(self, head: nn.Module, pixels_CHW: Tensor) -> Tensor:
        """Head outputs of one image by sliding windows, [K, H', W'] at its resized size."""
        views = self.windows.cut_image(pixels_CHW)
        with torch.no_grad():
            outputs = [head(self.encoder.finite(some).patches) for some in views.split(AT_ONCE)]
        return self.windows.joined(torch.cat(outputs), self.windows.size_of(pixels_CHW))

    def protocol(self) -> dict[str, Any]:
        """What a result says of the settings, with images counted and sizes known."""
        settings = self.settings
        return {
            **self.windows._asdict(),
            "iterations": settings.iterations,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "train_images": len(self.train.indices),
            "test_images": len(self.test.indices),
            "seed": settings.seed,
        }


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


def fit_head(
    head: DenseHead,
    loss_at: Callable[[int], Tensor],
    settings: DenseSettings,
    *,
    warmup: float,
    clip: float | None = None,
) -> float:
    """Train a head with AdamW; the learning rate rises linearly, then falls to 0 by a cosine.

    Args:
        loss_at: the loss of the head on the batch of an iteration.
        warmup: share of the iterations in which the rate rises.
        clip: largest gradient norm; None: any.

    Returns:
        The mean loss of the last tenth of the iterations.

    Raises:
        ValueError: no iteration, or a loss that is not finite.
    """
    iterations = settings.iterations
    learning_rate = settings.learning_rate
    if iterations < 1 or learning_rate <= 0:
        raise ValueError(
            f"expected at least 1 iteration and a positive learning rate, got {iterations} and "
            f"{learning_rate}"
        )
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=learning_rate, weight_decay=settings.weight_decay
    )
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
    """The learning rate at `step` over its peak: linear from 1e-6, as published, then a cosine."""
    rising = round(warmup * iterations)
    if step < rising:
        return 1e-6 + (1 - 1e-6) * step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, iterations - rising)))


class WindowCache:
    """Frozen features of all training windows, in half precision, each with its target.

    Args:
        task: what is trained on what.
        target_of: (target [window, window], patch grid, index of the image) to what the loss needs
            of it; None drops the window.

    Raises:
        ValueError: more than `CACHE_BYTES`, or features that are not finite.
        DataError: no window is left.
    """

    def __init__(
        self,
        task: DenseTask,
        target_of: Callable[[Tensor, tuple[int, int], int], Tensor | None],
    ):
        encoder = task.encoder
        windows = task.windows
        self.device = encoder.device
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        held = 0  # bytes
        for images, (index, pair) in enumerate(task.train, start=1):
            views = windows.cut_image(pair.image)
            for view, window_target in zip(views, windows.cut_target(pair.target), strict=True):
                patches = encoder.finite(view[None]).patches[0]
                target = target_of(window_target, tuple(patches.shape[1:]), index)
                if target is None:
                    continue
                self.features.append(patches.clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu())
                self.targets.append(target)
                held += self.features[-1].nbytes + target.nbytes
            # The first image tells how much all will take; later ones may be larger.
            check_cache(held, len(task.train.indices) if images == 1 else 1, task.name)
        if not self.features:
            raise DataError(
                f"{task.name}: expected pixels of a known target in the training split, got none; "
                "check them"
            )
        self.width = self.features[0].shape[0]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random windows, with replacement, on the backbone's device.

        Returns:
            Features [B, D, h, w] in float32, and their targets.
        """
        chosen = torch.randint(len(self.features), (size,)).tolist()
        features = torch.stack([self.features[index] for index in chosen])
        targets = torch.stack([self.targets[index] for index in chosen])
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
