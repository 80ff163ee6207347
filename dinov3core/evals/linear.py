"""A linear probe: one linear layer per learning rate on frozen vectors, all trained in one pass.

Shapes: N images, B of a step, D width, G learning rates, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.data.labelled import Labelled, split_by_class
from dinov3core.data.progress import progress
from dinov3core.evals.cache import CENTRE, Embedder
from dinov3core.evals.frozen import check_rows

# The published grid, to be multiplied by batch / 256 (DINOv2 paper, appendix B.3; DINOv3 uses it
# unchanged).
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
HELD_OUT = 0.1  # of the training images, to choose the learning rate on
INIT_STD = 0.01
MOMENTUM = 0.9

PROTOCOL = (
    "Frozen CLS and mean patch of the last layer, concatenated; one linear layer per learning "
    "rate, SGD with momentum 0.9, cosine to 0, no weight decay; learning rate chosen on a "
    "class-balanced 10 % of the training images, then trained on all of them. Features are "
    "computed once from a central crop: no random crops or flips, unlike the published protocol, "
    "which also chooses the classifier on the images it reports on."
)


class LinearProbes(NamedTuple):
    """G classifiers that were trained side by side."""

    weight: Tensor  # [D, G, C]
    bias: Tensor  # [G, C]

    def top1(self, features: Tensor, labels: Tensor, chunk: int = 8192) -> Tensor:
        """Percent correct of each classifier, [G], on features [N, D]."""
        hits = [
            (self.logits(x).argmax(2) == y[:, None]).sum(0)
            for x, y in zip(features.split(chunk), labels.split(chunk))
        ]
        return 100 * torch.stack(hits).sum(0).double() / len(features)

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, G, C]."""
        return (features @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias


def linear(
    backbone: nn.Module,
    data: Labelled,
    *,
    embedder: Embedder = CENTRE,
    learning_rates: Sequence[float] = LEARNING_RATES,
    iterations: int = 12_500,
    batch_size: int = 256,
    seed: int = 0,
) -> dict:
    """Accuracy in percent of a linear classifier on frozen features, on `data.test`.

    The published protocol picks the best of its classifiers on the images it reports; here the
    choice is made on a held-out part of the training images, which costs a little accuracy and
    keeps the figure honest.

    Raises:
        ValueError, DataError: see `Embedder` and `fit_linear`.
    """
    train = embedder(backbone, data.train)
    test = embedder(backbone, data.test)
    features = train.both
    device = embedder.device
    training = {"iterations": iterations, "batch_size": batch_size, "seed": seed}
    settings = {"classes": len(data.class_names), "device": device, **training}

    # The rate is chosen on training images that are left out; then all of them are used.
    parts = split_by_class(train.labels.numpy(), HELD_OUT, seed)
    fit, held = (torch.from_numpy(rows) for rows in parts)
    grid = fit_linear(features[fit], train.labels[fit], learning_rates, **settings)
    scores = grid.top1(features[held].to(device), train.labels[held].to(device))
    best = int(scores.argmax())
    final = fit_linear(features, train.labels, [learning_rates[best]], **settings)

    queries = test.both.to(device)
    truth = test.labels.to(device)
    return {
        "top1": final.top1(queries, truth).item(),
        "top5": _top5(final, queries, truth),
        "learning_rate": learning_rates[best],
        "held_out_top1": {
            f"{rate:g}": round(score, 3) for rate, score in zip(learning_rates, scores.tolist())
        },
        **train.record(test),
        "protocol": {
            "text": PROTOCOL,
            "size": embedder.size,
            "resize": embedder.resize,
            **training,
        },
    }


def fit_linear(
    features: Tensor,
    labels: Tensor,
    learning_rates: Sequence[float],
    *,
    classes: int,
    iterations: int = 12_500,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearProbes:
    """Train one softmax classifier per learning rate by SGD on the same batches.

    All G weights lie side by side in one matrix [D, G * C], so that a step is two products however
    many rates there are. The gradient of cross-entropy is (softmax - one-hot) / B.

    Args:
        features: [N, D]; labels: int64 [N] in 0..classes-1.
        learning_rates: for a batch of 256, scaled linearly with the batch, annealed to 0 by a
            cosine.

    Raises:
        ValueError: sizes or labels that do not match, features with NaN, fewer than two classes.
    """
    check_features(features, labels, classes)
    generator = torch.Generator().manual_seed(seed)
    width = features.shape[1]
    points = len(learning_rates)
    size = min(batch_size, len(features))
    start = INIT_STD * torch.randn(width, 1, classes, generator=generator)
    weight = start.repeat(1, points, 1).flatten(1).to(device)  # every rate starts alike
    bias = torch.zeros(points * classes, device=device)
    weight_speed = torch.zeros_like(weight)
    bias_speed = torch.zeros_like(bias)
    rates = torch.tensor(learning_rates, device=device).mul(size / 256).repeat_interleave(classes)
    cosine = (1 + torch.cos(torch.pi * torch.arange(iterations) / iterations)) / 2
    batches = _batches(features.float().to(device), labels.to(device), size, generator)
    for step in progress(range(iterations), desc="linear probe", unit="step", leave=True):
        x, y = next(batches)
        logits = torch.addmm(bias, x, weight).unflatten(1, (points, classes))
        # dlogits = (softmax - one-hot) / B, with the one-hot subtracted in place.
        dlogits = torch.softmax(logits, 2)
        minus_one = dlogits.new_full((1, 1, 1), -1.0).expand(size, points, 1)
        dlogits.scatter_add_(2, y[:, None, None].expand(-1, points, 1), minus_one)
        dlogits = dlogits.flatten(1).mul_(1 / size)
        rate = rates * cosine[step].item()
        weight_speed.addmm_(x.T, dlogits, beta=MOMENTUM)
        bias_speed.mul_(MOMENTUM).add_(dlogits.sum(0))
        weight.addcmul_(weight_speed, rate, value=-1)
        bias.addcmul_(bias_speed, rate, value=-1)
    return LinearProbes(
        weight.unflatten(1, (points, classes)), bias.unflatten(0, (points, classes))
    )


def check_features(features: Tensor, labels: Tensor, classes: int) -> None:
    """Refuse features [N, D] and labels [N] that train no classifier, with a ValueError."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            "features, labels: expected [N, D] and [N] with N >= 1, got "
            f"{list(features.shape)} and {list(labels.shape)}"
        )
    check_rows(features, "features")
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: expected 0 to {classes - 1}, got {low} to {high}; pass the number of classes"
        )
    if low == high:
        raise ValueError(
            f"labels: expected at least two classes, got only {low}; a classifier would say nothing"
        )


def _batches(
    features: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in a new order every pass; rows that fill no batch wait for the next pass."""
    while True:
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order[: len(order) // size * size].split(size):
            yield features[rows], labels[rows]


def _top5(probes: LinearProbes, features: Tensor, labels: Tensor) -> float:
    logits = probes.logits(features)[:, 0]
    picked = logits.topk(min(5, logits.shape[1])).indices
    return 100 * (picked == labels[:, None]).any(1).double().mean().item()
