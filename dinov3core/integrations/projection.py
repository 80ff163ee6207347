"""q, k and v of three separate linear layers in the packed layout that rope_attention reads.

Shapes: B images, N tokens, D width, H heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project_qkv(x: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], heads: int) -> Tensor:
    """[B, N, 3, H, d] from q, k and v layers; a missing bias counts as zero.

    With more tokens than channels it is cheaper to lay the weights side by side, so that one
    product writes the packed result, than to copy three results together. Layers that are more than
    a linear map (adapters, hooks, quantisation) are called as they are.
    """
    B, N, D = x.shape
    if B * N >= D and all(_is_plain(layer) for layer in layers):
        weight = torch.cat([layer.weight for layer in layers])
        qkv = F.linear(x, weight, _biases(layers))
    else:
        qkv = torch.stack([layer(x) for layer in layers], 2)
    return qkv.view(B, N, 3, heads, -1)


def _is_plain(layer: nn.Module) -> bool:
    hooked = (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
    )
    return type(layer) is nn.Linear and not hooked


def _biases(layers: tuple[nn.Linear, ...]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([_bias(layer) for layer in layers])


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
