"""gram_loss: which form runs where, what the forms add to the textbook one, what is refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dinov3core.ops import gram, gram_loss, reference


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "width"), [(40, 16), (33, 16), (17, 16), (5, 16)])
def test_both_forms_are_the_same_function(
    monkeypatch: pytest.MonkeyPatch, n: int, width: int
) -> None:
    student = rows(2, n, width).double().requires_grad_()
    teacher = rows(2, n, width, seed=1).double()
    forms = []
    for threshold in (0.0, 1e9):
        monkeypatch.setattr(gram, "MIDPOINT_FROM", threshold)
        loss = gram_loss(student, teacher)
        forms.append((loss, *torch.autograd.grad(loss, student)))
    for midpoint, residual in zip(*forms, strict=True):
        torch.testing.assert_close(midpoint, residual, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("negatives", gram.NEGATIVES)
@pytest.mark.parametrize("elements", [1, 700, 5000])
def test_slabs_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, negatives: str, elements: int
) -> None:
    """1: one row at a time; 700: rows of one image; 5000: several images."""
    student = rows(5, 37, 24).double().requires_grad_()
    teacher = rows(5, 37, 24, seed=1).double()
    want = gram_loss(student, teacher, negatives=negatives)
    monkeypatch.setattr(gram, "SLAB_ELEMENTS", elements)
    got = gram_loss(student, teacher, negatives=negatives)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(x, student)[0] for x in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("negatives", gram.NEGATIVES)
@pytest.mark.parametrize("n", [40, 5])
def test_a_teacher_of_another_dtype_is_rounded_to_the_students(n: int, negatives: str) -> None:
    student = rows(2, n, 16).requires_grad_()
    teacher = rows(2, n, 16, seed=1).double()
    losses = [gram_loss(student, x, negatives=negatives) for x in (teacher, teacher.float())]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 5, 16)])
def test_features_are_left_alone(shape: tuple[int, ...], normalize: bool) -> None:
    """The sum of both is formed in place, in a copy that normalising makes or does not make."""
    student = rows(*shape).requires_grad_()
    teacher = rows(*shape, seed=1)
    before = student.detach().clone(), teacher.clone()
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            gram_loss(student, teacher, normalize=normalize).backward()
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_cheaper_form_by_shape() -> None:
    assert gram.takes_midpoint(4096, 384, "keep")
    assert not gram.takes_midpoint(256, 384, "keep")
    assert not gram.takes_midpoint(4096, 384, "clip")


@pytest.mark.parametrize(("n", "products"), [(100, 10 * 100 * 8**2), (12, 4 * 12**2 * 8)])
def test_flops_are_counted(n: int, products: int) -> None:
    student = rows(3, n, 8).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        gram_loss(student, rows(3, n, 8, seed=1))
    assert counter.get_total_flops() == 3 * products


@pytest.mark.parametrize("distance", [1.0, 0.03, 0.001])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_midpoint_keeps_its_accuracy_near_the_teacher(distance: float, narrow: torch.dtype) -> None:
    """Also in bfloat16, as tensor cores get A and C; the textbook form is 90 % off there."""
    teacher = rows(1500, 128) + 1.0
    S, T = (
        F.normalize(x.double(), dim=-1)
        for x in (teacher + distance * rows(1500, 128, seed=1), teacher)
    )
    residual = S @ S.T - T @ T.T
    A, C = ((x[None]).float().to(narrow) for x in (S - T, S + T))
    square, gradient = gram._midpoint(A, C, True)
    loss_error = abs(float(square / residual.square().sum()) - 1)
    exact = 4 * residual @ S
    gradient_error = float((gradient[0].double() - exact).norm() / exact.norm())
    assert loss_error < (1e-4 if narrow == torch.bfloat16 else 1e-5)
    assert gradient_error < (5e-3 if narrow == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(2, 9, 16), (1, 300, 16)])
def test_equal_features_have_no_loss_and_no_gradient(shape: tuple[int, ...]) -> None:
    student = rows(*shape).requires_grad_()
    loss = gram_loss(student, student.detach())
    loss.backward()
    assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, requires_grad=True)
    loss = gram_loss(student, torch.zeros(shape))
    loss.backward()
    assert loss == 0 and student.grad.shape == shape


def test_zero_rows_are_finite() -> None:
    student = torch.zeros(2, 6, 8, requires_grad=True)
    loss = gram_loss(student, rows(2, 6, 8))
    loss.backward()
    want = reference.gram_loss(student, rows(2, 6, 8))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(student.grad, torch.autograd.grad(want, student)[0])


def test_without_gradient_none_is_computed() -> None:
    student = rows(2, 6, 8).requires_grad_()
    with torch.no_grad():
        assert not gram_loss(student, rows(2, 6, 8)).requires_grad
    assert (
        torch.ops.dinov3core.gram_loss(student.detach(), student.detach(), True, "keep", False)[
            1
        ].numel()
        == 0
    )


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 5, 8), (2, 6, 8), {}, r"equal row counts, got \[2, 5, 8\] and \[2, 6, 8\]"),
        ((5, 8), (5, 8), {}, r"per_image=True\) expects student and teacher \[B, N, D\]"),
        ((5,), (5,), {"per_image": False}, r"\[B, N, D\] or \[n, D\]"),
        (
            (2, 5, 8),
            (2, 5, 8),
            {"negatives": "remove"},
            "must be one of keep, clip, clip_teacher, got 'remove'",
        ),
    ],
)
def test_refusals(student: tuple, teacher: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram_loss(torch.zeros(student), torch.zeros(teacher), **options)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating features, got torch\.int64"):
        gram_loss(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3))
