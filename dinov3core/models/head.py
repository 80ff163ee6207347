"""The projection head of DINO and iBOT: an MLP to a unit-norm bottleneck, then prototypes without
bias.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """MLP -> L2 normalisation -> prototype logits (Caron et al. 2021, without the weight norm of
    the last layer).

    Args:
        width: input width D.
        prototypes: K, the number of logits.
        hidden: width of the two inner layers (used when layers > 1).
        bottleneck: width E of the normalised vector.
        layers: 3 as published; 1 is a single linear layer to the bottleneck.
        init_std: standard deviation of the MLP weights; biases start at 0.
        prototype_std: the same for the prototypes; None means `init_std`.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        init_std: float = 0.02,
        prototype_std: float | None = None,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        widths = [width] + [hidden] * (layers - 1) + [bottleneck]
        steps: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            steps += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1]) if layers > 1 else steps[0]
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        self.init_std, self.prototype_std = (
            init_std,
            init_std if prototype_std is None else prototype_std,
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights (`init_std`, prototypes `prototype_std`), zero biases."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.init_std, a=-2.0, b=2.0)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.last_layer.weight, std=self.prototype_std, a=-2.0, b=2.0)

    def bottleneck(self, x: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., E]; eps 1e-12, or 1e-6 where float16 would flush it to
        zero.
        """
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]."""
        return self.last_layer(self.bottleneck(x))
