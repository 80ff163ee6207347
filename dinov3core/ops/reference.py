"""What every op means, in plain torch, in any floating dtype: for the reader, and for the tests.

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
    """Rotate the tokens after `prefix` of x [B, N, H, d] by tables sin, cos [N - prefix, d].

    The first d / 2 columns of a table are read. Angle k turns the channel pair (k, k + d / 2)
    ("half") or (2 k, 2 k + 1) ("interleaved"); Su et al. 2021, equation 34. x is cast to the dtype
    of the table, rotated there, and cast back; prefix tokens take the casts only.
    """
    if sin is None or cos is None:
        return x
    half = x.shape[-1] // 2
    pair = -1 if rotation == "interleaved" else -2  # the axis of the two channels of a pair
    s = sin[:, None, :half]
    c = cos[:, None, :half]

    table_x = x.to(sin.dtype)
    patches = table_x[:, prefix:]
    shape = (half, 2) if rotation == "interleaved" else (2, half)
    a, b = patches.reshape(*patches.shape[:-1], *shape).unbind(pair)
    turned = torch.stack([a * c - b * s, b * c + a * s], pair)
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
    """softmax(rope(q) rope(k)' * scale) v of every head: qkv [B, N, 3, H, d] -> [B, N, H, d]."""
    q, k, v = qkv.unbind(2)
    q, k = (rope_rotate(x, sin, cos, prefix_tokens, rotation) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """Mean squared difference of two N x N matrices of dot products.

    Negative ones are set to 0 in both ("clip") or in the teacher's ("clip_teacher").
    """
    if not per_image:
        student = student.flatten(0, -2)
        teacher = teacher.flatten(0, -2)
    if normalize:
        student = F.normalize(student, dim=-1)
        teacher = F.normalize(teacher, dim=-1)
    student_gram = student @ student.mT
    teacher_gram = teacher @ teacher.mT
    if negatives != "keep":
        teacher_gram = teacher_gram.clamp(min=0)
    if negatives == "clip":
        student_gram = student_gram.clamp(min=0)
    return (student_gram - teacher_gram).square().mean()


def sinkhorn(logits: Tensor, temperature: float, *, iterations: int = 3) -> Tensor:
    """Probabilities [R, K]: exp(logits / temperature), columns and then rows divided by their sums.

    In logarithms, so that nothing overflows.
    """
    log_q = logits / temperature
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, target_rows: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """[R]: the sum of a row's cross-entropies with its J dense targets; target row -1: none."""
    log_p = (logits / temperature).log_softmax(1)
    pairs = -(targets[target_rows.clamp(min=0)] * log_p[:, None]).sum(-1)
    return (pairs * (target_rows >= 0)).sum(1)


def koleo_loss(features: Tensor, *, topk: int = 1) -> Tensor:
    """-mean ln of the distances between unit rows and their topk most similar other rows."""
    z = F.normalize(features, dim=-1, eps=1e-8)
    similarity = (z @ z.mT).detach().fill_diagonal_(-torch.inf)
    neighbours = similarity.topk(topk, dim=1).indices
    return -((z[:, None] - z[neighbours] + 1e-8).norm(dim=-1) + 1e-8).log().mean()
