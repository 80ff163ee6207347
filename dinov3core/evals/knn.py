"""Weighted k-nearest-neighbour classification of frozen features: a test without training.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
3.4: neighbours vote with weight exp(cosine / 0.07). Shapes: N bank rows, Q queries, D width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.labelled import Labelled
from dinov3core.evals.cache import CENTRE, Embedder
from dinov3core.evals.frozen import check_rows
from dinov3core.ops.registration import full_precision

# 2**23 fp32 similarities are 32 MiB: at a bank of 50,000 the rows of a chunk are still in cache
# when their maxima are taken (2 cores: chunks of 128 rows 0.70 s, of 256 rows 1.01 s for the bare
# product with 5,000 queries of width 384).
_CHUNK = 2**23
# Columns per group of the two-stage selection: 16 was best or level for k = 20 and 200 among 8, 16
# and 50.
_GROUP = 16
NEIGHBOURS = (10, 20, 100, 200)

PROTOCOL = (
    "Frozen CLS of the last layer, L2-normalised; exact k nearest of the training images by "
    "cosine, weighted by softmax(cosine / 0.07) over the largest k."
)


class Neighbours(NamedTuple):
    """The nearest bank rows of every query, best first."""

    similarities: Tensor  # cosines [Q, k]
    indices: Tensor  # of bank rows, int64 [Q, k]


class Accuracy(NamedTuple):
    """k-NN accuracy in percent by number of neighbours; `top1[20]` is usually reported."""

    top1: dict[int, float]
    top5: dict[int, float]


def knn(
    backbone: nn.Module,
    data: Labelled,
    *,
    embedder: Embedder = CENTRE,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
) -> dict:
    """k-NN accuracy in percent on `data.test` with `data.train` as the bank.

    Args:
        k: numbers of neighbours; those beyond the size of the bank are left out.

    Raises:
        ValueError, DataError: see `Embedder` and `knn_accuracy`.
    """
    bank = embedder(backbone, data.train)
    queries = embedder(backbone, data.test)
    counts = [count for count in k if count <= len(bank.cls)] or [len(bank.cls)]
    settings = {"k": counts, "temperature": temperature}
    columns = (bank.cls, bank.labels, queries.cls, queries.labels)
    accuracy = knn_accuracy(*(column.to(embedder.device) for column in columns), **settings)
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        **bank.record(queries),
        "protocol": {
            "text": PROTOCOL,
            "size": embedder.size,
            "resize": embedder.resize,
            **settings,
        },
    }


def nearest(bank: Tensor, queries: Tensor, k: int) -> Neighbours:
    """The k bank rows of largest cosine similarity to each query; exact.

    The matrix of all similarities is never held.

    Args:
        bank: [N, D]; queries: [Q, D]. Any floating dtype; compared in float32.

    Raises:
        ValueError: sizes that do not match, k outside 1..N, NaN or infinite features.
    """
    _check_features(bank, queries)
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"k: expected 1 to {len(bank)} (the bank's rows), got {k}; use fewer neighbours or a "
            "larger bank"
        )
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    chunks = queries.split(max(16, _CHUNK // len(bank)))
    best = [_select(_cosines(chunk, bank), k) for chunk in chunks]
    return Neighbours(*(torch.cat(column) for column in zip(*best)))


@full_precision  # a training run lets products use TensorFloat-32, which reorders near neighbours
def _cosines(queries: Tensor, bank: Tensor) -> Tensor:
    """[Q, N] of unit rows."""
    return queries @ bank.T


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> Accuracy:
    """Top-1 and top-5 accuracy of the weighted vote of the nearest bank rows.

    The weights are softmax(cosine / temperature) over the max(k) nearest; each k sums its first k
    of them per class.

    Args:
        bank: [N, D] features with bank_labels [N]; queries: [Q, D] features with query_labels [Q].
            Labels are any integers; a query whose label the bank lacks counts as wrong.

    Raises:
        ValueError: what `nearest` refuses, labels that do not match, a bank of one class only, no
            k.
    """
    if not k:
        raise ValueError("k: expected at least one number of neighbours, got none")
    _check_labels(bank, bank_labels, "bank_labels")
    _check_labels(queries, query_labels, "query_labels")
    classes, votes_for = bank_labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"bank_labels: expected at least two classes, got only {classes.tolist()}; k-NN "
            "accuracy would say nothing"
        )
    neighbours = nearest(bank, queries, max(k))
    weights = torch.softmax(neighbours.similarities / temperature, dim=1)
    truth = query_labels.to(classes.device)
    top1: dict[int, float] = {}
    top5: dict[int, float] = {}
    for count, scores in _votes(
        weights, votes_for[neighbours.indices], sorted(set(k)), len(classes)
    ):
        score, picked = scores.topk(min(5, len(classes)))
        # A class without any vote is no prediction, although topk fills its row with such classes.
        hits = (classes[picked] == truth[:, None]) & (score > 0)
        top1[count] = 100 * hits[:, 0].double().mean().item()
        top5[count] = 100 * hits.any(1).double().mean().item()
    return Accuracy(top1, top5)


def standard_error(percent: float, count: int) -> float:
    """Of an accuracy in percent of `count` independent images, in points: binomial."""
    share = percent / 100
    return 100 * (share * (1 - share) / count) ** 0.5


def _select(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk in two stages: the k largest lie in the k groups of largest maxima."""
    columns = similarities.shape[1]
    groups = columns // _GROUP
    if groups < 4 * k:
        return similarities.topk(k)
    # Strided groups (columns j, j + groups, ...): the maximum runs along contiguous memory.
    body = similarities[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
    best = body.amax(1).topk(k, sorted=False).indices  # groups, by their first column
    starts = groups * torch.arange(_GROUP, device=best.device)
    tail = torch.arange(groups * _GROUP, columns, device=best.device).expand(len(best), -1)
    candidates = torch.cat([(best[:, None] + starts[:, None]).flatten(1), tail], 1)
    values, places = similarities.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)


def _votes(
    weights: Tensor, labels: Tensor, counts: list[int], classes: int
) -> Iterator[tuple[int, Tensor]]:
    """Class scores [Q, classes] of the first `count` neighbours, for each ascending count."""
    scores = weights.new_zeros(len(weights), classes)
    done = 0
    for count in counts:
        scores.scatter_add_(1, labels[:, done:count], weights[:, done:count])
        done = count
        yield count, scores


def _check_features(bank: Tensor, queries: Tensor) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"features: expected bank [N, D] and queries [Q, D] of one width, "
            f"got {list(bank.shape)} and {list(queries.shape)}"
        )
    for name, features in (("bank", bank), ("queries", queries)):
        if not len(features):
            raise ValueError(f"{name}: expected at least one row, got none")
        check_rows(features, name)


def _check_labels(features: Tensor, labels: Tensor, name: str) -> None:
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{name}: expected {len(features)} integers, one per row, got {list(labels.shape)} of "
            f"{labels.dtype}"
        )
