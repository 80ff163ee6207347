"""What features are worth: `task(backbone, data) -> dict` for every task, data from
`dinov3core.data.datasets`.
"""

from dinov3core.evals.correspondence import correspondence
from dinov3core.evals.dense import dense
from dinov3core.evals.depth import depth
from dinov3core.evals.knn import knn
from dinov3core.evals.linear import linear
from dinov3core.evals.logistic import logreg
from dinov3core.evals.resolution import resolution
from dinov3core.evals.segmentation import segmentation
from dinov3core.evals.tracking import tracking

__all__ = [
    "correspondence",
    "dense",
    "depth",
    "knn",
    "linear",
    "logreg",
    "resolution",
    "segmentation",
    "tracking",
]
