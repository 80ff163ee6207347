"""A student of teachers without heads: a backbone, and for each teacher a small adapter.

An adapter is two linear layers, one for CLS and one for patches, so that whatever a student knows
of a teacher stands in its features and not in the adapter. (With a hidden layer of four widths
patches were matched better and CLS was worth less: k-NN 37.9 for 41.4, three seeds; LOG.md,
2026-11-24.) It comes with what the run has seen of its teacher, by which it can say a teacher's
features in the teacher's own units.

Shapes: n crops, P patches of a crop, D width of the student, E and E' of a teacher's CLS token and
patches.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.models.interface import FeatureModule

INIT_STD = 0.02  # a prediction begins near zero, which is the teacher's mean


class Predicted(NamedTuple):
    """What an adapter says of a teacher's standardised features."""

    cls: Tensor  # [n, E]
    patches: Tensor  # [n * P, E'], crop after crop


class FeatureAdapter(nn.Module):
    """From a student's CLS token and patches to those of one teacher.

    Args:
        width: D.
        cls_width, patch_width: E and E'.

    Attributes:
        cls_sums, patch_sums: fp64 [2 + E] and [2 + E'], sums over all features of the teacher so
            far (`dinov3core.losses.feature_sums`); zeros before the first.
    """

    cls_sums: Tensor
    patch_sums: Tensor

    def __init__(self, width: int, cls_width: int, patch_width: int):
        super().__init__()
        self.cls = nn.Linear(width, cls_width)
        self.patches = nn.Linear(width, patch_width)
        for layer in (self.cls, self.patches):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2.0, b=2.0)
            nn.init.zeros_(layer.bias)
        self.register_buffer("cls_sums", torch.zeros(2 + cls_width, dtype=torch.float64))
        self.register_buffer("patch_sums", torch.zeros(2 + patch_width, dtype=torch.float64))

    def forward(self, cls: Tensor, patches: Tensor) -> Predicted:
        """Predictions from a student's CLS tokens [n, D] and patches [n, P, D]."""
        return Predicted(self.cls(cls), self.patches(patches.flatten(0, 1)))


class FeatureNetworks(nn.Module):
    """A backbone with an adapter for each teacher.

    Args:
        backbone: any of ours, or a module with `forward_features`.
        adapters: by the name of their teacher.
    """

    def __init__(self, backbone: FeatureModule, adapters: Mapping[str, FeatureAdapter]):
        super().__init__()
        self.backbone = backbone
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, crops: Tensor) -> dict[str, Predicted]:
        """What is predicted of each teacher for crops [n, C, H, W]."""
        tokens = self.backbone.forward_features(crops)
        return {
            name: adapter(tokens.cls, tokens.patches) for name, adapter in self.adapters.items()
        }
