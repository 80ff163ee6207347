"""What features are worth: `task(backbone, data) -> dict` for every task, data from `dinov3core.data.datasets`."""

from dinov3core.evals.knn import knn
from dinov3core.evals.linear import linear
from dinov3core.evals.logistic import logreg

__all__ = ["knn", "linear", "logreg"]
