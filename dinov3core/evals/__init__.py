"""What features are worth: `task(backbone, data) -> dict` for every task.

Data come from `dinov3core.data.datasets`, backbones from `dinov3core.checkpoints.load_model`.
"""

from dinov3core.evals.correspondence import Warp, correspondence
from dinov3core.evals.dense import dense
from dinov3core.evals.dense_head import DenseSettings
from dinov3core.evals.depth import DEPTH, depth
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import knn
from dinov3core.evals.linear import linear
from dinov3core.evals.logistic import logreg
from dinov3core.evals.resolution import resolution
from dinov3core.evals.segmentation import SEGMENTATION, segmentation
from dinov3core.evals.tracking import Propagation, tracking

__all__ = [
    "DEPTH",
    "SEGMENTATION",
    "DenseSettings",
    "FrozenEncoder",
    "Propagation",
    "Warp",
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
