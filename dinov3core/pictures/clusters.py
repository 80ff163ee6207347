"""k-means over feature rows: groups that share a colour in a picture, the same on every run.

Shapes: N rows, D width, K clusters.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """Groups numbered by size, the largest first."""

    labels: Tensor  # int64 [N]
    centres: Tensor  # fp64 [K, D]; fewer than asked for when there are fewer different rows
    spread: float  # sum of squared distances to the own centre


def kmeans(
    rows_ND: Tensor, count: int, *, seed: int = 0, restarts: int = 4, iterations: int = 100
) -> Clusters:
    """The best of several runs of Lloyd's algorithm from k-means++ seeds.

    Seeds after Arthur and Vassilvitskii 2007. In double precision on the CPU and from a generator
    of its own, so that the same rows give the same groups.

    Args:
        rows_ND: finite features; normalise them to group by direction.
        count: clusters at most.
        restarts: how many runs.
    """
    if rows_ND.ndim != 2 or not 1 <= count <= len(rows_ND):
        raise ValueError(
            f"rows: expected [N, D] with at least count rows, got {list(rows_ND.shape)} for "
            f"{count} clusters; ask for 1 to N clusters"
        )
    if not rows_ND.isfinite().all():
        raise ValueError(
            "rows: expected finite features, got NaN or infinity; the model that made them has "
            "diverged"
        )
    rows = rows_ND.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(rows, _seeds(rows, count, generator), iterations) for _ in range(restarts)]
    return _largest_first(min(runs, key=lambda clusters: clusters.spread))


def match_labels(labels: Tensor, reference: Tensor, count: int) -> Tensor:
    """Labels renamed to agree with `reference`, so that pictures of two models share colours.

    Pairs of labels that overlap most are matched first, which need not be the best matching of all.

    Args:
        labels, reference: of one shape, all below `count`.
    """
    pairs = (labels * count + reference).flatten()
    overlap = torch.bincount(pairs, minlength=count * count).view(count, count)
    renamed = torch.empty(count, dtype=labels.dtype)
    for _ in range(count):
        own, other = divmod(int(overlap.argmax()), count)
        renamed[own] = other
        overlap[own] = -1
        overlap[:, other] = -1
    return renamed[labels]


def _seeds(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows drawn with probability proportional to the squared distance to those drawn before."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count and nearest.max() > 0:
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]


def _lloyd(rows: Tensor, centres: Tensor, iterations: int) -> Clusters:
    labels: Tensor | None = None
    for _ in range(iterations):
        previous = labels
        distances, labels = _assign(rows, centres)
        if previous is not None and torch.equal(previous, labels):
            break
        sizes = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        # A centre that lost all its rows starts again at the row that is worst served.
        centres = torch.where(
            (sizes > 0)[:, None], sums / sizes.clamp_min(1)[:, None], rows[distances.argmax()]
        )
    distances, labels = _assign(rows, centres)
    return Clusters(labels, centres, distances.sum().item())


def _assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance [N] to the nearest centre, and which one it is [N]."""
    products = rows.square().sum(1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(1)
    distances, labels = products.min(1)
    return distances.clamp_min(0), labels


def _largest_first(clusters: Clusters) -> Clusters:
    order = torch.bincount(clusters.labels, minlength=len(clusters.centres)).argsort(
        descending=True, stable=True
    )
    return Clusters(order.argsort()[clusters.labels], clusters.centres[order], clusters.spread)
