"""Multinomial logistic regression on the frozen CLS token: a probe without a learning rate.

Protocol of the DINOv2 and DINOv3 papers (scikit-learn's L-BFGS, 45 values of C from 1e-6 to 1e5,
float64).
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn

from dinov3core.data.labelled import Labelled, split_by_class
from dinov3core.data.progress import progress
from dinov3core.evals.cache import WHOLE, Embedded, Embedder
from dinov3core.evals.linear import check_features

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

PENALTIES = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
HELD_OUT = 0.1
ITERATIONS = 1000
TOLERANCE = 1e-12

PROTOCOL = (
    "Frozen CLS of the last layer, not normalised, float64; multinomial logistic regression with "
    "an L2 penalty by L-BFGS; C chosen on a class-balanced 10 % of the training images, then "
    "fitted on all of them. Deviation: along the grid of C each fit starts from the one before."
)


class Rows(NamedTuple):
    """What scikit-learn fits: float64 features [N, D] and labels [N]."""

    features: np.ndarray
    labels: np.ndarray


def logreg(
    backbone: nn.Module,
    data: Labelled,
    *,
    embedder: Embedder = WHOLE,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> dict:
    """Accuracy in percent of logistic regression on CLS tokens, on `data.test`.

    Args:
        penalties: the inverse strengths C to choose from.
        iterations: of L-BFGS at most, for every C.

    Raises:
        ValueError, DataError: see `Embedder`; ImportError: scikit-learn is missing.
    """
    train = embedder(backbone, data.train)
    test = embedder(backbone, data.test)
    check_features(train.cls, train.labels, len(data.class_names))

    # C is chosen on training images that are left out; then all of them are used.
    fit, held = split_by_class(train.labels.numpy(), HELD_OUT, seed)
    scores, stopped = score_penalties(_rows(train, fit), _rows(train, held), penalties, iterations)
    best = int(np.argmax(scores))
    final = _regression(iterations)
    final.set_params(C=penalties[best])
    stopped += _fitted(final, *_rows(train))
    return {
        "top1": _top1(final, _rows(test)),
        "c": penalties[best],
        "held_out_top1": {f"{c:.3g}": round(score, 3) for c, score in zip(penalties, scores)},
        "unconverged": stopped,
        **train.record(test),
        "protocol": {
            "text": PROTOCOL,
            "size": embedder.size,
            "resize": embedder.resize,
            "iterations": iterations,
            "tolerance": TOLERANCE,
            "seed": seed,
        },
    }


def score_penalties(
    fit: Rows, held: Rows, penalties: Sequence[float], iterations: int = ITERATIONS
) -> tuple[list[float], int]:
    """Percent correct on `held` for every C, and how many fits on `fit` did not converge."""
    model = _regression(iterations)
    scores: list[float] = []
    stopped = 0
    for penalty in progress(penalties, desc="logistic regression", unit="fit", leave=True):
        model.set_params(C=penalty)
        stopped += _fitted(model, *fit)
        scores.append(_top1(model, held))
    return scores, stopped


def _top1(model: "LogisticRegression", rows: Rows) -> float:
    """Percent correct."""
    return 100 * float((model.predict(rows.features) == rows.labels).mean())


def _regression(iterations: int) -> "LogisticRegression":
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "logreg: expected scikit-learn, found none; install it with pip install "
            "'dinov3core[eval]'"
        ) from error
    return LogisticRegression(max_iter=iterations, tol=TOLERANCE, warm_start=True)


def _fitted(model: "LogisticRegression", features: np.ndarray, labels: np.ndarray) -> bool:
    """Fit in place; whether it stopped at the limit of iterations."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    return bool(model.n_iter_.max() >= model.max_iter)


def _rows(embedded: Embedded, rows: np.ndarray | slice = slice(None)) -> Rows:
    return Rows(embedded.cls.double().numpy()[rows], embedded.labels.numpy()[rows])
