"""What every op means, in plain torch, for the reader and for the tests: the oracle, in any
floating dtype.

Slow on purpose. Called with float64 inputs these functions are the reference of the numerics
contract; called with the dtype of a test case they are the plain formula whose error an op may
exceed at most twofold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_rotate(
    x: Tensor, sin: Tensor | None, cos: Tensor | None, prefix: int = 0, rotation: str = "half"
) -> Tensor:
    """Rotate the tokens after `prefix` of x [B, N, H, d] by the first d / 2 columns of sin, cos [N
    - prefix, d].

    Angle k turns the channel pair (k, k + d / 2) ("half") or (2 k, 2 k + 1) ("interleaved"). x is
    cast to the dtype of the table, rotated there, and cast back; prefix tokens take the casts only
    (Su et al. 2021, equation 34).
    """
    if sin is None:
        return x
    half = x.shape[-1] // 2
    table_x = x.to(sin.dtype)
    pairs = table_x.unflatten(-1, (half, 2) if rotation == "interleaved" else (2, half))
    a, b = pairs.unbind(-1 if rotation == "interleaved" else -2)
    s, c = sin[:, None, :half], cos[:, None, :half]
    a_patch, b_patch = a[:, prefix:], b[:, prefix:]
    turned = torch.stack(
        [a_patch * c - b_patch * s, b_patch * c + a_patch * s],
        -1 if rotation == "interleaved" else -2,
    )
    return torch.cat([table_x[:, :prefix], turned.flatten(-2)], 1).to(x.dtype)


def rope_attention(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
) -> Tensor:
    """softmax(rope(q) rope(k)^T * scale) v per image and head: qkv [B, N, 3, H, d] -> [B, N, H, d]."""
    q, k, v = qkv.unbind(2)
    q, k = (rope_rotate(x, sin, cos, prefix_tokens, rotation) for x in (q, k))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """Mean squared difference of the two N x N matrices of dot products; "clip_teacher" clamps one
    of them.
    """
    if not per_image:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    student_gram, teacher_gram = student @ student.mT, teacher @ teacher.mT
    if negatives != "keep":
        teacher_gram = teacher_gram.clamp(min=0)
    if negatives == "clip":
        student_gram = student_gram.clamp(min=0)
    return (student_gram - teacher_gram).square().mean()


def sinkhorn(logits: Tensor, temperature: float, *, iterations: int = 3) -> Tensor:
    """Probabilities [R, K]: columns, then rows, of exp(logits / temperature) divided by their sums;
    in logarithms.
    """
    log_q = logits / temperature
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, target_rows: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """[R]: cross-entropy of each row with its dense targets, target_rows [R, J], summed over J; -1
    stands for none.
    """
    log_p = (logits / temperature).log_softmax(1)
    pairs = -(targets[target_rows.clamp(min=0)] * log_p[:, None]).sum(-1)
    return (pairs * (target_rows >= 0)).sum(1)


def koleo_loss(features: Tensor, *, topk: int = 1) -> Tensor:
    """-mean ln of the distances between unit rows and their topk most similar other rows."""
    z = F.normalize(features, dim=-1, eps=1e-8)
    similarity = (z @ z.mT).detach().fill_diagonal_(-torch.inf)
    neighbours = similarity.topk(topk, dim=1).indices
    return -((z[:, None] - z[neighbours] + 1e-8).norm(dim=-1) + 1e-8).log().mean()
