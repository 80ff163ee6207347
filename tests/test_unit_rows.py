"""Rows divided by their norm: the gradient is autograd's, also at the floor under the norm."""

import pytest
import torch

from dinov3core.ops import gram, koleo
from dinov3core.ops.unit_rows import unit_rows, unit_rows_backward


def rows_of_all_sizes(eps: float) -> torch.Tensor:
    """Ordinary rows, one far below the floor, one right under it, and a row of zeros."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, 7, generator=g, dtype=torch.float64)
    rows[0, 1] *= 0.01 * eps / rows[0, 1].norm()
    rows[1, 2] *= 0.99 * eps / rows[1, 2].norm()
    rows[1, 3] = 0
    return rows


@pytest.mark.parametrize("eps", [gram.EPS, koleo.EPS, 0.1])
def test_gradient_is_that_of_autograd(eps: float) -> None:
    rows = rows_of_all_sizes(eps).requires_grad_()
    dunit = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).double()
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=eps)
    torch.testing.assert_close(unit_rows(rows.detach(), eps), unit.detach())
    (want,) = torch.autograd.grad(unit, rows, dunit)
    got = unit_rows_backward(rows.detach(), unit.detach(), dunit, eps)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_narrow_rows_are_divided_in_float32() -> None:
    rows = rows_of_all_sizes(0.1).bfloat16()
    unit = unit_rows(rows, 0.1)
    assert unit.dtype == torch.float32
    assert unit_rows_backward(rows, unit, torch.ones_like(unit), 0.1).dtype == torch.float32
    torch.testing.assert_close(unit, unit_rows(rows.float(), 0.1), rtol=0, atol=0)


def test_inputs_are_left_alone() -> None:
    rows, dunit = rows_of_all_sizes(0.1), torch.ones(2, 4, 7, dtype=torch.float64)
    unit = unit_rows(rows, 0.1)
    before = rows.clone(), unit.clone(), dunit.clone()
    unit_rows_backward(rows, unit, dunit, 0.1)
    for tensor, copy in zip((rows, unit, dunit), before, strict=True):
        assert torch.equal(tensor, copy)
