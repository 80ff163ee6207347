"""The linear head of the dense evaluations and its training: batch norm and one 1x1 convolution on frozen patches.

Shapes: B windows, D width, K outputs, h x w patches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

CACHE_BYTES = 8 * 2**30  # patch features held in memory at most


class DenseHead(nn.Module):
    """Dropout of whole channels, batch norm, 1x1 convolution: [B, D, h, w] -> [B, K, h, w].

    Dropout stands before the norm, as in the published head; the convolution starts at N(0, 0.01) and bias 0.
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
    """Train a head with AdamW: linear warm-up over a share `warmup` of the iterations, then cosine to 0.

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
            f"expected at least 1 iteration and a positive learning rate, got {iterations} and {learning_rate}"
        )
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    head.train()
    recent: deque[float] = deque(maxlen=max(1, iterations // 10))
    bar = tqdm(range(iterations), desc="head", unit="it", disable=None, leave=False)
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
                f"head: expected a finite loss, got {recent[-1]} at iteration {step}; lower the learning rate"
            )
        bar.set_postfix(loss=f"{recent[-1]:.3f}", refresh=False)
    head.eval()
    return sum(recent) / len(recent)


def rate_at(step: int, iterations: int, warmup: float) -> float:
    """The learning rate at `step` as a share of its peak: linear from 1e-6 (the published ratio), then cosine to 0."""
    rising = round(warmup * iterations)
    if step < rising:
        return 1e-6 + (1 - 1e-6) * step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, iterations - rising)))


def check_cache(bytes_per_image: int, images: int, task: str) -> None:
    """Refuse to fill the memory with features.

    Raises:
        ValueError: more than `CACHE_BYTES`.
    """
    wanted = bytes_per_image * images
    if wanted > CACHE_BYTES:
        raise ValueError(
            f"{task}: expected features of at most {CACHE_BYTES / 2**30:.0f} GiB in memory, got about "
            f"{wanted / 2**30:.1f} GiB; use fewer train_images or a smaller side"
        )
