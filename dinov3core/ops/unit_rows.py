"""Rows divided by their norm, and the gradient through that: gram_loss and koleo_loss need both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops.registration import accumulation_dtype


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """rows / max(norm, eps) along the last dimension, in the accumulation dtype."""
    return F.normalize(rows.to(accumulation_dtype(rows.dtype)), dim=-1, eps=eps)


def unit_rows_backward(rows: Tensor, unit: Tensor, dunit: Tensor, eps: float) -> Tensor:
    """drows of a function of unit = unit_rows(rows, eps), from its dunit; in the dtype of dunit.

    drow = (dunit - unit <unit, dunit>) / norm: a unit row does not change along itself. Where the
    norm is at most eps the division is by the constant eps, and nothing is taken out.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=unit.dtype)
    radial = torch.linalg.vecdot(unit, dunit).unsqueeze(-1) * (norm > eps)
    return dunit.addcmul(unit, radial, value=-1).div_(norm.clamp(min=eps))
