"""Both soft cross-entropies: the terms they express, skipped pairs, no rows, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.ops import linear_soft_cross_entropy, sinkhorn, soft_cross_entropy


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("skip_same", [False, True])
def test_mean_is_the_image_term(skip_same: bool) -> None:
    """-sum over crops, images, prototypes of t log s / (B s t); same-crop pairs may be left out."""
    S = 4
    T = 2
    B = 3
    K = 7
    student = drawn(S, B, K)
    teacher = sinkhorn(drawn(T * B, K, seed=1), 0.07)
    pairs = torch.einsum(
        "tbk,sbk->st", teacher.dense().unflatten(0, (T, B)), -(student / 0.1).log_softmax(-1)
    )
    count = B * S * T
    if skip_same:
        pairs.fill_diagonal_(0)
        count -= B * min(S, T)
    rows = (torch.arange(T) * B + torch.arange(B)[:, None]).repeat(S, 1)
    if skip_same:
        rows[torch.eye(S, T, dtype=torch.bool).repeat_interleave(B, 0)] = -1
    got = soft_cross_entropy(student.flatten(0, 1), teacher, target_rows=rows)
    torch.testing.assert_close(got, pairs.sum() / count)


def test_weighted_sum_is_the_patch_term() -> None:
    """-sum over masked patches of w_m t log s / N; N counts image-crops without a mask too."""
    masked = 9
    crops = 5
    student = drawn(masked, 7)
    teacher = sinkhorn(drawn(masked, 7, seed=1), 0.07)
    weights = torch.rand(masked, dtype=torch.float64)
    want = -(weights[:, None] * teacher.dense() * (student / 0.1).log_softmax(-1)).sum() / crops
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, weights=weights / crops, reduction="sum"), want
    )
    assert soft_cross_entropy(student, teacher, weights=weights, reduction="none").shape == (
        masked,
    )


def test_assignment_and_its_dense_form_agree() -> None:
    student = drawn(5, 7)
    teacher = sinkhorn(drawn(5, 7, seed=1), 0.07)
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher), soft_cross_entropy(student, teacher.dense())
    )


def test_dense_one_hot_targets_are_ordinary_cross_entropy() -> None:
    student = drawn(5, 7)
    classes = torch.tensor([0, 3, 3, 6, 1])
    got = soft_cross_entropy(student, F.one_hot(classes, 7).double(), temperature=1.0)
    torch.testing.assert_close(got, F.cross_entropy(student, classes))


def test_one_prototype_has_no_loss() -> None:
    student = drawn(5, 1).requires_grad_()
    loss = soft_cross_entropy(student, sinkhorn(drawn(5, 1, seed=1), 0.07))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12 and float(student.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("targets", [2, 1])
@pytest.mark.parametrize("dense", [False, True])
def test_rows_without_a_target_are_left_alone(targets: int, dense: bool) -> None:
    student = drawn(3, 7).requires_grad_()
    teacher = sinkhorn(drawn(4, 7, seed=1), 0.07)
    rows = torch.tensor([[1, 3], [-1, -1], [-1, 0]])[:, 2 - targets :]
    loss_R = soft_cross_entropy(
        student, teacher.dense() if dense else teacher, target_rows=rows, reduction="none"
    )
    (gradient,) = torch.autograd.grad(loss_R.sum(), student)
    assert loss_R[1] == 0 and not gradient[1].any()
    assert (loss_R[[0, 2]] > 0).all() and gradient[[0, 2]].any(1).all()


@pytest.mark.parametrize(
    "rows", [torch.full((3, 2), -1), torch.zeros(0, 2, dtype=torch.int64)], ids=["none", "empty"]
)
def test_no_pairs_is_zero(rows: Tensor) -> None:
    student = drawn(len(rows), 7).requires_grad_()
    loss = soft_cross_entropy(student, sinkhorn(drawn(4, 7), 0.07), target_rows=rows)
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape and not student.grad.any()


def test_no_rows_at_all() -> None:
    assert soft_cross_entropy(torch.zeros(0, 7), sinkhorn(torch.zeros(0, 7), 0.1)) == 0
    assert (
        linear_soft_cross_entropy(
            torch.zeros(0, 3), torch.zeros(7, 3), sinkhorn(torch.zeros(0, 7), 0.1)
        )
        == 0
    )


def test_huge_logits_stay_finite() -> None:
    student = (1e4 * drawn(5, 70)).float().requires_grad_()
    loss = soft_cross_entropy(student, sinkhorn(1e4 * drawn(5, 70, seed=1).float(), 0.07))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("width", [1, 4, 64])
def test_linear_form_is_the_layer_then_the_loss(width: int) -> None:
    """Slabs are as high as a feature is wide, so the widths make 50, 13 and 1 of them."""
    features = drawn(50, width).requires_grad_()
    weight = drawn(31, width, seed=1).requires_grad_()
    targets = sinkhorn(drawn(50, 31, seed=2), 0.07)
    weights = torch.rand(50, dtype=torch.float64)
    got = linear_soft_cross_entropy(features, weight, targets, weights=weights)
    want = soft_cross_entropy(features @ weight.T, targets, weights=weights)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(loss, (features, weight)) for loss in (got, want))
    torch.testing.assert_close(*gradients)


def test_frozen_weight_gets_no_gradient() -> None:
    features = drawn(6, 4).requires_grad_()
    weight = drawn(9, 4)
    linear_soft_cross_entropy(features, weight, sinkhorn(drawn(6, 9), 0.07)).backward()
    assert features.grad is not None and weight.grad is None


TARGETS = sinkhorn(torch.zeros(3, 7), 0.1)


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (
            torch.zeros(3, 8),
            {},
            r"with the student's K, got \[3, 8\], K = \[8\] and targets \[3, 7\]",
        ),
        (
            torch.zeros(3, 7, dtype=torch.int64),
            {},
            "floating student rows and targets, got torch.int64",
        ),
        (torch.zeros(4, 7), {}, "one target per row, got 3 for 4 rows"),
        (torch.zeros(3, 7), {"temperature": 0}, "temperature > 0, got 0"),
        (torch.zeros(3, 7), {"reduction": "average"}, "one of mean, sum, none, got 'average'"),
        (
            torch.zeros(3, 7),
            {"target_rows": torch.zeros(3)},
            r"int64 \[3\] or \[3, J\], got torch.float32 \[3\]",
        ),
        (
            torch.zeros(3, 7),
            {"target_rows": torch.tensor([0, 1, 3])},
            r"in \[-1, 3\) for 3 target rows, got 0 to 3",
        ),
        (torch.zeros(3, 7), {"target_rows": torch.tensor([0, 1, -2])}, "got -2 to 1"),
        (torch.zeros(3, 7), {"weights": torch.ones(2)}, r"weights \[3\], got \[2\]"),
    ],
)
def test_refusals(logits: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_cross_entropy(logits, TARGETS, **options)


def test_rows_without_any_target_row_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one target row for 2 student rows, got none"):
        soft_cross_entropy(torch.zeros(2, 7), torch.zeros(0, 7), target_rows=torch.full((2,), -1))


@pytest.mark.parametrize(("features", "weight"), [((3, 4), (7, 5)), ((3, 4, 1), (7, 4))])
def test_linear_refusals(features: tuple, weight: tuple) -> None:
    with pytest.raises(ValueError, match=r"features \[R, E\] and weight \[K, E\] of one dtype"):
        linear_soft_cross_entropy(torch.zeros(features), torch.zeros(weight), TARGETS)
