"""The projection head of DINO and iBOT: an MLP to a unit-norm bottleneck, then prototypes."""

import itertools
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.bounds import Bounds, Std, Width


@dataclass(frozen=True)
class HeadSettings:
    """A projection head: K prototypes over a normalised bottleneck."""

    prototypes: Annotated[int, Bounds(1, 2**24)] = 65536
    """K, the classes that teacher and student agree on."""
    hidden: Width = 2048
    """Width of the inner layers."""
    bottleneck: Width = 256
    """Width of the normalised vector before the prototypes."""
    layers: Annotated[int, Bounds(1, 64)] = 3
    """Linear layers up to the bottleneck; 1: no inner layer."""
    init_std: Std = 0.02
    """Standard deviation of initial weights."""
    prototype_std: Std = 0.02
    """The same for the prototypes."""


class ProjectionHead(nn.Module):
    """MLP -> L2 normalisation -> prototype logits (Caron et al. 2021).

    Prototypes have neither bias nor weight norm.

    Args:
        width: input width D.

    Raises:
        ValueError: fewer than one layer.
    """

    def __init__(self, width: int, settings: HeadSettings):
        super().__init__()
        if settings.layers < 1:
            raise ValueError(f"layers: expected at least 1, got {settings.layers}")
        self.settings = settings
        inner = [settings.hidden] * (settings.layers - 1)
        steps: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([width, *inner, settings.bottleneck]):
            steps += [nn.Linear(fan_in, fan_out), nn.GELU()]
        del steps[-1]  # the bottleneck is linear
        # A lone layer is the MLP itself; its keys are mlp.weight and mlp.bias.
        self.mlp = nn.Sequential(*steps) if settings.layers > 1 else steps[0]
        self.last_layer = nn.Linear(settings.bottleneck, settings.prototypes, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of the stated deviations, zero biases."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.settings.init_std, a=-2.0, b=2.0)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(
            self.last_layer.weight, std=self.settings.prototype_std, a=-2.0, b=2.0
        )

    def bottleneck(self, x: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., E]."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # float16 would flush 1e-12 to zero
        return F.normalize(x, dim=-1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]."""
        return self.last_layer(self.bottleneck(x))
