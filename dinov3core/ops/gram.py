"""gram_loss: how far apart two sets of patches are in their pairwise similarities, in less than n x
n memory.

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
computed in the forward while the residual is at hand (one [G, n, D] tensor is kept), and the
backward only scales it.
"""

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
    """Anchor patch similarities: the mean squared difference of two Gram matrices (DINOv3 paper,
    section 4.2).

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
        student, teacher = student.flatten(0, -2)[None], teacher.flatten(0, -2)[None]
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
    """The loss, and its gradient [G, n, Ds] in the accumulation dtype (empty without
    `with_gradient`).
    """
    rows, width = student.shape[1], max(student.shape[2], teacher.shape[2])
    if not takes_midpoint(rows, width, negatives) and runs_kernels("gram_loss", student):
        from dinov3core.kernels import gram as kernels

        return kernels.loss(student, teacher, normalize, negatives, with_gradient, EPS)
    dtype = accumulation_dtype(student.dtype)
    S, T = student.to(dtype), teacher.to(dtype)
    if normalize:
        S, T = F.normalize(S, dim=-1, eps=EPS), F.normalize(T, dim=-1, eps=EPS)
    S, T = _padded(S, width), _padded(T, width)
    if takes_midpoint(rows, width, negatives):
        # for the tensor cores: A, C in bfloat16 leave the loss 5e-5 and the gradient 5e-3 off,
        # however close S is to T
        narrow = torch.bfloat16 if student.is_cuda and student.dtype == torch.bfloat16 else dtype
        A, C = S - T, S + T if T is teacher else T.add_(S)
        square, gradient = _midpoint(A.to(narrow), C.to(narrow), with_gradient)
    else:
        square, gradient = _residual(S, T, negatives, with_gradient)
    entries = max(1, len(student) * rows**2)
    if gradient is None:
        return square / entries, student.new_empty(0, dtype=dtype)
    gradient, unit = (tensor[..., : student.shape[-1]] for tensor in (gradient.div_(entries), S))
    return square / entries, _through_normalize(
        student, unit, gradient
    ) if normalize else gradient.contiguous()


def takes_midpoint(rows: int, width: int, negatives: str) -> bool:
    """Whether the D x D form is the cheaper one."""
    return negatives == "keep" and rows > MIDPOINT_FROM * width


def _padded(rows: Tensor, width: int) -> Tensor:
    """With zero channels, which change no dot product."""
    return F.pad(rows, (0, width - rows.shape[-1])) if rows.shape[-1] < width else rows


def _midpoint(A: Tensor, C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    AA, CC, AC = (wide_product(a.mT, b) for a, b in ((A, A), (C, C), (A, C)))
    square = 0.5 * (torch.sum(AA * CC) + torch.sum(AC * AC.mT))
    if not with_gradient:
        return square, None
    gradient, other = wide_product(A, CC.add_(AC.mT).to(A.dtype)), AA.add_(AC).to(A.dtype)
    if C.dtype == gradient.dtype:
        return square, gradient.baddbmm_(C, other)
    return square, gradient.add_(wide_product(C, other))


def _residual(
    S: Tensor, T: Tensor, negatives: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    square, gradient = S.new_zeros(()), torch.empty_like(S) if with_gradient else None
    residual = _difference if negatives == "keep" else _clipped_difference
    for images, rows in _slabs(S):
        E, reached = residual(S[images], T[images], rows, negatives)
        square += torch.linalg.vecdot(E, E).sum()
        if gradient is not None:
            E = E if reached is None else E.mul_(reached)
            gradient[images, rows] = torch.matmul(E, S[images]).mul_(4)
    return square, gradient


def _difference(S: Tensor, T: Tensor, rows: slice, negatives: str) -> tuple[Tensor, None]:
    A, C = S - T, S + T
    if rows.stop - rows.start < S.shape[1]:
        return torch.baddbmm(C[:, rows] @ A.mT, A[:, rows], C.mT, beta=0.5, alpha=0.5), None
    X = A @ C.mT
    return torch.add(X, X.mT).mul_(0.5), None


def _clipped_difference(
    S: Tensor, T: Tensor, rows: slice, negatives: str
) -> tuple[Tensor, Tensor | None]:
    """The residual with its negative similarities set to 0, and where it depends on the student
    (None: everywhere).
    """
    E, reached = S[:, rows] @ S.mT, None
    if negatives == "clip":
        reached = E > 0
        E.clamp_(min=0)
    E -= (T[:, rows] @ T.mT).clamp_(min=0)
    return E, reached


def _slabs(S: Tensor) -> list[tuple[slice, slice]]:
    """Cut the residual [G, n, n] into pieces of at most SLAB_ELEMENTS: whole images, or rows of one
    image.
    """
    G, n = S.shape[:2]
    if n == 0:
        return []
    images, rows = max(1, SLAB_ELEMENTS // n**2), max(1, min(n, SLAB_ELEMENTS // n))
    return [
        (slice(g, g + images), slice(r, min(r + rows, n)))
        for g in range(0, G, images)
        for r in range(0, n, rows)
    ]


def _through_normalize(features: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to `features` of a function of unit = features / max(norm, EPS)."""
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=unit.dtype)
    radial = torch.linalg.vecdot(unit, gradient).unsqueeze(-1) * (norm > EPS)
    return gradient.addcmul(unit, radial, value=-1).div_(norm.clamp(min=EPS))


@_gram_loss.register_fake
def _(student, teacher, normalize, negatives, with_gradient):
    dtype = accumulation_dtype(student.dtype)
    shape = student.shape if with_gradient else (0,)
    return student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dinov3core::gram_loss_backward", mutates_args=())
@full_precision
def _gram_loss_backward(grad: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    return torch.mul(gradient, grad).to(student.dtype)


@_gram_loss_backward.register_fake
def _(grad, gradient, student):
    return torch.empty_like(gradient, dtype=student.dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_of_gradient):
    if grad is None:
        return None, None, None, None, None
    gradient, student = ctx.saved_tensors
    return _gram_loss_backward(grad, gradient, student), None, None, None, None


_gram_loss.register_autograd(_backward, setup_context=_save)
first_order_only(_gram_loss_backward, "gram_loss")


@register_flop_formula(torch.ops.dinov3core.gram_loss)
def _flops(
    student, teacher, normalize, negatives, with_gradient, *args, out_shape=None, **kwargs
) -> int:
    G, n, width = *student[:2], max(student[2], teacher[2])
    if takes_midpoint(n, width, negatives):
        return (10 if with_gradient else 6) * G * n * width**2
    products = 1 if negatives == "keep" else 2
    return (products + with_gradient) * 2 * G * n**2 * width


without_products(torch.ops.dinov3core.gram_loss_backward)
