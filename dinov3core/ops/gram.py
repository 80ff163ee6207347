"""gram_loss: how far apart two sets of patches are in their similarities, without n x n memory.

Shapes: G Grams (images, or 1 for the whole batch), n rows of each, D channels. S, T are the
(normalised) student and teacher rows. With A = S - T and C = S + T the residual is

    E = S S' - T T' = (A C' + C A') / 2,

which keeps its relative accuracy however close the student is to the teacher, and gives two ways to
the loss:

* mid-point form, O(n D^2):  ||E||^2 = 1/2 [<A'A, C'C> + <A'C, (A'C)'>],
                             d||E||^2 / dS = 4 E S = A (C'A + C'C) + C (A'A + A'C);
* residual form, O(n^2 D):   E = (X + X') / 2 with X = A C', some images or rows at a time.

The textbook ||S'S||^2 - 2 ||S'T||^2 + ||T'T||^2 cancels: 10 % off in float32 at n = 4096, D = 384
when S is within 1e-3 of T. Clamped similarities need S S' and T T' apart, so they always take the
residual form.

The loss is a scalar, so its gradient is known up to one factor as soon as the residual is: it is
computed in the forward while the residual is at hand (one [G, n, D] tensor is saved), and the
backward only scales it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.dispatch import runs_kernels
from dinov3core.ops.registration import (
    accumulation_dtype,
    first_order_only,
    full_precision,
    wide_product,
    without_products,
)
from dinov3core.ops.unit_rows import unit_rows, unit_rows_backward

NEGATIVES = ("keep", "clip", "clip_teacher")
EPS = 1e-12  # F.normalize's floor under a row's norm
# Rows per channel from which the mid-point form is taken: 10 n D^2 flops against 4 n^2 D cross at
# 2.5. Measured with gradient at D = 384 on two cores, mid-point against residual: 8.5 and 5.9 ms at
# n = 600, 10.7 and 9.9 at 800, 6.8 and 11.6 at 1024.
MIDPOINT_FROM = 2.0
SLAB_ELEMENTS = 1 << 22  # of the residual at once: 16 MB in float32


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """The mean squared difference of two Gram matrices (anchoring: DINOv3 paper, section 4.2).

    Args:
        student: [B, N, Ds] patches, or [n, Ds] rows with per_image=False.
        teacher: [B, N, Dt] or [n, Dt]; widths may differ. A constant: it receives no gradient.
        normalize: take cosine similarities (rows divided by max(norm, 1e-12)) instead of dot
            products.
        per_image: one N x N Gram per image; False: a single Gram over all rows of the batch.
        negatives: "keep"; "clip" sets negative similarities of both sides to 0; "clip_teacher"
            those of the teacher only, which is what the published code does under its
            `remove_only_teacher_neg`.

    Returns:
        The mean over all Gram entries, a float32 scalar (float64 for float64 inputs); 0 when there
        are no rows.

    Raises:
        ValueError: on other shapes, unequal row counts, dtypes that are not floating, or an unknown
            `negatives`.
    """
    _check(student, teacher, per_image, negatives)
    if not per_image:
        student = student.flatten(0, -2)[None]
        teacher = teacher.flatten(0, -2)[None]
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    return _gram_loss(student, teacher.detach(), normalize, negatives, with_gradient)[0]


def _check(student: Tensor, teacher: Tensor, per_image: bool, negatives: str) -> None:
    allowed = (3,) if per_image else (2, 3)
    if student.ndim not in allowed or student.shape[:-1] != teacher.shape[:-1]:
        expected = "[B, N, D]" if per_image else "[B, N, D] or [n, D]"
        raise ValueError(
            f"gram_loss(per_image={per_image}) expects student and teacher {expected} with equal "
            f"row counts, got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(
            f"gram_loss expects floating features, got {student.dtype} and {teacher.dtype}"
        )
    if negatives not in NEGATIVES:
        raise ValueError(
            f"gram_loss: negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}"
        )


@torch.library.custom_op("dinov3core::gram_loss", mutates_args=())
@full_precision
def _gram_loss(
    student: Tensor, teacher: Tensor, normalize: bool, negatives: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss; dstudent [G, n, Ds] in the accumulation dtype, empty without `with_gradient`."""
    G, n, channels = student.shape
    width = max(channels, teacher.shape[2])
    if not takes_midpoint(n, width, negatives) and runs_kernels("gram_loss", student):
        from dinov3core.kernels import gram as kernels

        return kernels.loss(student, teacher, normalize, negatives, with_gradient, EPS)
    dtype = accumulation_dtype(student.dtype)
    S = student.to(dtype)
    T = teacher.to(dtype)
    if normalize:
        S = unit_rows(S, EPS)
        T = unit_rows(T, EPS)
    S = _padded(S, width)
    T = _padded(T, width)

    if takes_midpoint(n, width, negatives):
        # for the tensor cores: A, C in bfloat16 leave the loss 5e-5 and the gradient 5e-3 off,
        # however close S is to T
        narrow = torch.bfloat16 if student.is_cuda and student.dtype == torch.bfloat16 else dtype
        A = S - T
        C = S + T if T is teacher else T.add_(S)  # in place in a copy that nobody else sees
        square, dS = _midpoint(A.to(narrow), C.to(narrow), with_gradient)
    else:
        square, dS = _residual(S, T, negatives, with_gradient)

    entries = max(1, G * n**2)
    loss = square / entries
    if dS is None:
        return loss, student.new_empty(0, dtype=dtype)
    dunit = dS.div_(entries)[..., :channels]  # the padding of a narrower student has no gradient
    if normalize:
        return loss, unit_rows_backward(student, S[..., :channels], dunit, EPS)
    return loss, dunit.contiguous()


def takes_midpoint(rows: int, width: int, negatives: str) -> bool:
    """Whether the D x D form is the cheaper one."""
    return negatives == "keep" and rows > MIDPOINT_FROM * width


def _padded(rows: Tensor, width: int) -> Tensor:
    """With zero channels, which change no dot product."""
    return F.pad(rows, (0, width - rows.shape[-1])) if rows.shape[-1] < width else rows


def _midpoint(A: Tensor, C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """||E||^2 and 4 E S through the D x D products of A = S - T and C = S + T."""
    AA, CC, AC = (wide_product(a.mT, b) for a, b in ((A, A), (C, C), (A, C)))
    square = 0.5 * (torch.sum(AA * CC) + torch.sum(AC * AC.mT))
    if not with_gradient:
        return square, None
    # 4 E S = A (C'A + C'C) + C (A'A + A'C); the sums overwrite products that are used up
    dS = wide_product(A, CC.add_(AC.mT).to(A.dtype))
    with_C = AA.add_(AC).to(A.dtype)
    if C.dtype == dS.dtype:
        return square, dS.baddbmm_(C, with_C)
    return square, dS.add_(wide_product(C, with_C))


class _Slab(NamedTuple):
    """Some images of a residual [G, n, n], or some rows of one."""

    images: slice
    rows: slice


def _residual(
    S: Tensor, T: Tensor, negatives: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """||E||^2 and 4 E S from the residual E itself, a slab of it at a time."""
    square = S.new_zeros(())
    dS = torch.empty_like(S) if with_gradient else None
    difference = _difference if negatives == "keep" else _clipped_difference
    for slab in _slabs(S):
        E, reached = difference(S[slab.images], T[slab.images], slab.rows, negatives)
        square += torch.linalg.vecdot(E, E).sum()
        if dS is not None:
            E = E if reached is None else E.mul_(reached)
            dS[slab.images, slab.rows] = torch.matmul(E, S[slab.images]).mul_(4)
    return square, dS


def _difference(S: Tensor, T: Tensor, rows: slice, negatives: str) -> tuple[Tensor, None]:
    """Some rows of E = (A C' + C A') / 2, symmetric, so one product does where all are wanted."""
    A = S - T
    C = S + T
    if rows.stop - rows.start < S.shape[1]:
        return torch.baddbmm(C[:, rows] @ A.mT, A[:, rows], C.mT, beta=0.5, alpha=0.5), None
    X = A @ C.mT
    return torch.add(X, X.mT).mul_(0.5), None


def _clipped_difference(
    S: Tensor, T: Tensor, rows: slice, negatives: str
) -> tuple[Tensor, Tensor | None]:
    """The same of clamped similarities, and where E depends on the student (None: everywhere)."""
    E = S[:, rows] @ S.mT
    reached = None
    if negatives == "clip":
        reached = E > 0
        E.clamp_(min=0)
    E -= (T[:, rows] @ T.mT).clamp_(min=0)
    return E, reached


def _slabs(S: Tensor) -> list[_Slab]:
    """Cut the residual [G, n, n] into pieces of at most SLAB_ELEMENTS entries."""
    G, n = S.shape[:2]
    if n == 0:
        return []
    images = max(1, SLAB_ELEMENTS // n**2)
    rows = max(1, min(n, SLAB_ELEMENTS // n))
    return [
        _Slab(slice(g, g + images), slice(r, min(r + rows, n)))
        for g in range(0, G, images)
        for r in range(0, n, rows)
    ]


@_gram_loss.register_fake
def _(
    student: Tensor, teacher: Tensor, normalize: bool, negatives: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    shape = student.shape if with_gradient else (0,)
    return student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dinov3core::gram_loss_backward", mutates_args=())
@full_precision
def _gram_loss_backward(dloss: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    """dstudent: the forward's gradient of the loss, times dloss."""
    return torch.mul(gradient, dloss).to(student.dtype)


@_gram_loss_backward.register_fake
def _(dloss: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=student.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, *_ = inputs
    _, gradient = output
    ctx.save_for_backward(gradient, student)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 5
    gradient, student = ctx.saved_tensors
    return _gram_loss_backward(dloss, gradient, student), *(None,) * 4


_gram_loss.register_autograd(_backward, setup_context=_save)
first_order_only(_gram_loss_backward, "gram_loss")


@register_flop_formula(torch.ops.dinov3core.gram_loss)
def _flops(
    student: torch.Size,
    teacher: torch.Size,
    normalize: bool,
    negatives: str,
    with_gradient: bool,
    **options: Any,
) -> int:
    G, n, channels = student
    width = max(channels, teacher[2])
    if takes_midpoint(n, width, negatives):
        return (10 if with_gradient else 6) * G * n * width**2
    products = (1 if negatives == "keep" else 2) + with_gradient
    return products * 2 * G * n**2 * width


without_products(torch.ops.dinov3core.gram_loss_backward)
