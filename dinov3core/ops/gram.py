"""gram_loss: how far apart two sets of patches are in their pairwise similarities, in less than n x n memory.

Shapes: G Grams (images, or 1 for the whole batch), n rows of each, D channels. S, T are the (normalised) student and
teacher rows. With A = S - T and C = S + T the residual is

    E = S S' - T T' = (A C' + C A') / 2,

which keeps its relative accuracy however close the student is to the teacher, and gives two ways to the loss:

* mid-point form, O(n D^2):  ||E||^2 = 1/2 [<A'A, C'C> + <A'C, (A'C)'>],
                             d||E||^2 / dS = 4 E S = A (C'A + C'C) + C (A'A + A'C);
* residual form, O(n^2 D):   E = 1/2 [A|C] [C|A]', a slab of rows at a time.

The textbook ||S'S||^2 - 2 ||S'T||^2 + ||T'T||^2 cancels: 10 % off in float32 at n = 4096, D = 384 when S is within 1e-3
of T. Clamped similarities need S S' and T T' apart, so they always take the residual form.

The loss is a scalar, so its gradient is known up to one factor as soon as the residual is: it is computed in the
forward while the residual is at hand (one [G, n, D] tensor is kept), and the backward only scales it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops.registration import accumulation_dtype, first_order_only, outside_autocast

NEGATIVES = ("keep", "clip", "clip_teacher")
EPS = 1e-12  # F.normalize's floor under a row's norm
MIDPOINT_FROM = 1.25  # rows per channel: 10 n D^2 flops against 6 n^2 D, and no n x n slab to stream
SLAB_ELEMENTS = 1 << 22  # of the residual at once: 16 MB in float32


def gram_loss(
    student: Tensor, teacher: Tensor, *, normalize: bool = True, per_image: bool = True, negatives: str = "keep"
) -> Tensor:
    """Anchor patch similarities: the mean squared difference of two Gram matrices (DINOv3 paper, section 4.2).

    Args:
        student: [B, N, Ds] patches, or [n, Ds] rows with per_image=False.
        teacher: [B, N, Dt] or [n, Dt]; widths may differ. A constant: it receives no gradient.
        normalize: take cosine similarities (rows divided by max(norm, 1e-12)) instead of dot products.
        per_image: one N x N Gram per image; False: a single Gram over all rows of the batch.
        negatives: "keep"; "clip" sets negative similarities of both sides to 0; "clip_teacher" those of the teacher
            only, which is what the published code does under its `remove_only_teacher_neg`.

    Returns:
        The mean over all Gram entries, a float32 scalar (float64 for float64 inputs); 0 when there are no rows.

    Raises:
        ValueError: on other shapes, unequal row counts, dtypes that are not floating, or an unknown `negatives`.
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
            f"gram_loss(per_image={per_image}) expects student and teacher {expected} with equal row counts, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"gram_loss expects floating features, got {student.dtype} and {teacher.dtype}")
    if negatives not in NEGATIVES:
        raise ValueError(f"gram_loss: negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")


@torch.library.custom_op("dinov3core::gram_loss", mutates_args=())
@outside_autocast
def _gram_loss(
    student: Tensor, teacher: Tensor, normalize: bool, negatives: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient [G, n, Ds] in the accumulation dtype (empty without `with_gradient`)."""
    dtype = accumulation_dtype(student.dtype)
    S, T = student.to(dtype), teacher.to(dtype)
    if normalize:
        S, T = F.normalize(S, dim=-1, eps=EPS), F.normalize(T, dim=-1, eps=EPS)
    if negatives == "keep":
        S_wide, T_wide = _same_width(S, T)
        form = _midpoint if takes_midpoint(S_wide.shape[1], S_wide.shape[2], negatives) else _residual
        square, gradient = form(S_wide, T_wide, with_gradient)
    else:
        square, gradient = _clipped_residual(S, T, negatives, with_gradient)
    entries = max(1, S.shape[0] * S.shape[1] ** 2)
    if not with_gradient:
        return square / entries, student.new_empty(0, dtype=dtype)
    gradient = gradient[..., : S.shape[-1]] / entries
    return square / entries, _through_normalize(student, S, gradient) if normalize else gradient.contiguous()


def takes_midpoint(rows: int, width: int, negatives: str) -> bool:
    """Whether the D x D form is the cheaper one."""
    return negatives == "keep" and rows > MIDPOINT_FROM * width


def _same_width(S: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Zero channels change no dot product."""
    width = max(S.shape[-1], T.shape[-1])
    return F.pad(S, (0, width - S.shape[-1])), F.pad(T, (0, width - T.shape[-1]))


def _midpoint(S: Tensor, T: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    A, C = S - T, S + T
    AA, CC, AC = A.mT @ A, C.mT @ C, A.mT @ C
    square = 0.5 * (torch.sum(AA * CC) + torch.sum(AC * AC.mT))
    if not with_gradient:
        return square, S
    gradient = A @ CC.add_(AC.mT)
    return square, gradient.baddbmm_(C, AA.add_(AC))


def _residual(S: Tensor, T: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    A, C = S - T, S + T
    left, right = torch.cat((A, C), -1), torch.cat((C, A), -1)
    squares, gradient = [S.new_zeros(())], torch.empty_like(S)
    for images, rows in _slabs(S):
        E = (left[images, rows] @ right[images].mT).mul_(0.5)
        squares.append(torch.sum(E * E))
        if with_gradient:
            gradient[images, rows] = (E @ S[images]).mul_(4)
    return torch.stack(squares).sum(), gradient


def _clipped_residual(S: Tensor, T: Tensor, negatives: str, with_gradient: bool) -> tuple[Tensor, Tensor]:
    squares, gradient = [S.new_zeros(())], torch.empty_like(S)
    for images, rows in _slabs(S):
        E = S[images, rows] @ S[images].mT
        kept = E > 0 if negatives == "clip" else None
        E = E.clamp_(min=0) if negatives == "clip" else E
        E -= (T[images, rows] @ T[images].mT).clamp_(min=0)
        squares.append(torch.sum(E * E))
        if with_gradient:
            E = E.mul_(kept) if kept is not None else E
            gradient[images, rows] = (E @ S[images]).mul_(4)
    return torch.stack(squares).sum(), gradient


def _slabs(S: Tensor) -> list[tuple[slice, slice]]:
    """Cut the residual [G, n, n] into pieces of at most SLAB_ELEMENTS: whole images, or rows of one image."""
    G, n = S.shape[:2]
    if n == 0:
        return []
    images, rows = max(1, SLAB_ELEMENTS // n**2), max(1, min(n, SLAB_ELEMENTS // n))
    return [(slice(g, g + images), slice(r, r + rows)) for g in range(0, G, images) for r in range(0, n, rows)]


def _through_normalize(features: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to `features` of a function of unit = features / max(norm, EPS)."""
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=unit.dtype)
    radial = torch.linalg.vecdot(unit, gradient).unsqueeze(-1) * (norm > EPS)
    return torch.addcmul(gradient, unit, radial, value=-1).div_(norm.clamp(min=EPS))


@_gram_loss.register_fake
def _(student, teacher, normalize, negatives, with_gradient):
    dtype = accumulation_dtype(student.dtype)
    shape = student.shape if with_gradient else (0,)
    return student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dinov3core::gram_loss_backward", mutates_args=())
@outside_autocast
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
def _flops(student, teacher, normalize, negatives, with_gradient, *args, out_shape=None, **kwargs) -> int:
    G, n, width = *student[:2], max(student[2], teacher[2])
    if takes_midpoint(n, width, negatives):
        return (10 if with_gradient else 6) * G * n * width**2
    return (4 * width + (2 * width if with_gradient else 0)) * G * n**2
