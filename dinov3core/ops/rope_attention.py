"""rope_attention: rotary position embedding and softmax attention straight from the qkv projection.

Shapes: B images, N = prefix + P tokens, T packed tokens of several crop sets, H heads, d head
width, h = d / 2. q, k, v are read from the projection's own [T, 3, H, d] layout and d(qkv) is
written in it: no transposes, no concatenation with the prefix tokens. The op keeps qkv, the output
and one log-sum-exp per row for its backward, which rotates again; plain eager calls on a CPU also
keep the rotated q and k.

Every form is one op, `dinov3core::rope_attention`, over packed groups of equally long sequences.
What it means is
written in reference.rope_attention. float16 is accepted: whatever could overflow it (scores,
softmax statistics, accumulators) is float32.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3core.ops import rope_attention_cpu
from dinov3core.ops.backend import check_backend, device_problem, log_once
from dinov3core.ops.registration import first_order_only
from dinov3core.ops.rope_split import sdpa_attention, xformers_attention

BACKENDS = ("auto", "triton", "torch", "xformers")
ROTATIONS = ("half", "interleaved")
Group = tuple[int, Tensor, Tensor]  # (images, sin, cos)


def rope_attention(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Attention with rotary positions over equally long sequences: qkv [B, N, 3, H, d] -> [B, N, H,
    d].

    Args:
        sin, cos: [P, d] tables of `rope_table` for the last P = N - prefix_tokens tokens, or both
            None for no rotation. Their first d / 2 columns are read. They get no gradient. q and k
            are rotated in the dtype of the tables: in registers for float32, with the roundings of
            bfloat16 arithmetic for bfloat16.
        prefix_tokens: leading tokens (CLS, registers) that are not rotated.
        scale: factor of the scores, 1 / sqrt(d) by default.
        rotation: which channels angle k turns: "half" (k, k + d / 2) or "interleaved" (2 k, 2 k +
            1).
        backend: "auto", "torch", "triton" or "xformers".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"rope_attention: expected qkv [B, N, 3, H, d], got shape {tuple(qkv.shape)}"
        )
    images, length = qkv.shape[:2]
    if (sin is None) != (cos is None):
        raise ValueError(
            "rope_attention: expected sin and cos, or None for both, got only one of them"
        )
    if sin is not None and sin.shape[0] + prefix_tokens != length:
        raise ValueError(
            f"rope_attention: expected N = prefix_tokens + rows of sin, got N={length}, "
            f"prefix_tokens={prefix_tokens} and {sin.shape[0]} rows"
        )
    tables = ([], []) if sin is None else ([sin], [cos])
    out = _attend(
        qkv.flatten(0, 1), *tables, [images], [length], prefix_tokens, scale, rotation, backend
    )
    return out.unflatten(0, (images, length))


def rope_attention_packed(
    qkv: Tensor,
    groups: Sequence[Group],
    *,
    prefix_tokens: int = 0,
    scale: float | None = None,
    rotation: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Attention over crop sets of different lengths in one call: qkv [T, 3, H, d] -> [T, H, d].

    Args:
        groups: (count, sin, cos) per crop set: `count` images of prefix_tokens + len(sin) tokens
            each, laid one after the other along T. Tokens see their own image only.

    The other arguments and the errors are those of `rope_attention`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"rope_attention_packed: expected qkv [T, 3, H, d], got shape {tuple(qkv.shape)}"
        )
    if not groups or any(sin is None or cos is None for _, sin, cos in groups):
        raise ValueError(
            "rope_attention_packed: expected one or more groups (count, sin, cos) with tables, got "
            "none"
        )
    counts, sins, coss = (list(column) for column in zip(*groups, strict=True))
    lengths = [prefix_tokens + sin.shape[0] for sin in sins]
    tokens = sum(count * length for count, length in zip(counts, lengths, strict=True))
    if tokens != qkv.shape[0]:
        raise ValueError(
            f"rope_attention_packed: expected the groups to hold T={qkv.shape[0]} tokens, got "
            f"{tokens} (counts {counts}, lengths {lengths})"
        )
    return _attend(qkv, sins, coss, counts, lengths, prefix_tokens, scale, rotation, backend)


def _attend(
    qkv: Tensor,
    sins: list[Tensor],
    coss: list[Tensor],
    counts: list[int],
    lengths: list[int],
    prefix: int,
    scale: float | None,
    rotation: str,
    backend: str,
) -> Tensor:
    """Check once, cast for autocast, choose the path: the fused op on the CPU and in Triton, else
    rope_split + SDPA.
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    _check(qkv, sins, coss, prefix, scale, rotation, backend)
    device = qkv.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        qkv = qkv.to(
            torch.get_autocast_dtype(device)
        )  # tables stay as they are: they are a float32 island
    arguments = qkv, sins, coss, counts, lengths, prefix, scale, rotation == "interleaved"
    if backend == "xformers":
        return xformers_attention(*arguments)
    if device in ("cpu", "meta") and backend != "triton":
        return _fused(*arguments, False)
    fits = _fits(qkv, sins, lengths, backend)
    if all(fits):
        return _fused(*arguments, True)
    if not any(fits):
        return sdpa_attention(*arguments)
    return _each_group(qkv, sins, coss, counts, lengths, fits, arguments[5:])


def _each_group(qkv, sins, coss, counts, lengths, fits, rest) -> Tensor:
    """Long and short crop sets in one call: each takes its own path."""
    parts = qkv.split([count * length for count, length in zip(counts, lengths, strict=True)])
    outs = []
    for index, (part, fit) in enumerate(zip(parts, fits, strict=True)):
        one = slice(index, index + 1)
        arguments = part, sins[one], coss[one], counts[one], lengths[one], *rest
        outs.append(_fused(*arguments, True) if fit else sdpa_attention(*arguments))
    return torch.cat(outs)


def _fits(qkv: Tensor, sins: list[Tensor], lengths: list[int], backend: str) -> list[bool]:
    """Which groups the Triton kernels take: all for "triton", for "auto" those where they are
    expected to win.
    """
    if backend == "torch":
        return [False] * len(lengths)
    table = sins[0].dtype if sins else None
    longest, problem = _kernel_limit(qkv.device, qkv.dtype, qkv.shape[-1], table, backend)
    if backend == "triton":
        if problem is not None:
            raise ValueError(
                f"rope_attention: backend='triton' cannot run here: {problem}; use backend='auto'"
            )
        return [True] * len(lengths)
    return [problem is None and length <= longest for length in lengths]


@torch.compiler.assume_constant_result
def _kernel_limit(
    device: torch.device, dtype: torch.dtype, width: int, table: torch.dtype | None, backend: str
) -> tuple[int, str | None]:
    """(longest sequence worth the fused kernel, why it cannot run at all or None).

    A constant of a compiled graph, so that the log line is written while tracing: in the graph it
    would break it.
    """
    longest, problem = _limit(device, dtype, width, table)
    if problem is not None and backend == "auto":
        log_once(f"rope_attention: torch's attention instead of the fused kernel: {problem}")
    return longest, problem


def _limit(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    table: torch.dtype | None,
) -> tuple[int, str | None]:
    if (problem := device_problem(device)) is not None:
        return 0, problem
    from dinov3core.kernels import rope_attention as kernels

    return kernels.limit(device, dtype, width, table)


def _check(
    qkv: Tensor,
    sins: list[Tensor],
    coss: list[Tensor],
    prefix: int,
    scale: float,
    rotation: str,
    backend: str,
) -> None:
    check_backend("rope_attention", backend, BACKENDS)
    if rotation not in ROTATIONS:
        raise ValueError(
            f"rope_attention: expected rotation to be one of {ROTATIONS}, got {rotation!r}"
        )
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"rope_attention: expected a floating dtype, got {qkv.dtype}")
    if prefix < 0:
        raise ValueError(f"rope_attention: expected prefix_tokens >= 0, got {prefix}")
    if scale <= 0:
        raise ValueError(f"rope_attention: expected scale > 0, got {scale}")
    width = qkv.shape[-1]
    if sins and width % 2:
        raise ValueError(
            f"rope_attention: expected an even head width to rotate pairs of channels, got {width}"
        )
    for sin, cos in zip(sins, coss, strict=True):
        if sin.dim() != 2 or sin.shape != cos.shape or sin.shape[1] != width:
            raise ValueError(
                f"rope_attention: expected sin and cos [P, {width}], got {tuple(sin.shape)} and "
                f"{tuple(cos.shape)}"
            )
        if sin.dtype != cos.dtype or sin.device != qkv.device or cos.device != qkv.device:
            raise ValueError(
                f"rope_attention: expected sin and cos of one dtype on {qkv.device}, got "
                f"{sin.dtype} on {sin.device} and {cos.dtype} on {cos.device}"
            )
        if sin.requires_grad or cos.requires_grad:
            raise ValueError(
                "rope_attention: expected constant tables, got ones that require grad; detach them"
            )


def _fused(qkv, sins, coss, counts, lengths, prefix, scale, interleaved, triton: bool) -> Tensor:
    arguments = qkv, sins, coss, counts, lengths, prefix, scale, interleaved, triton
    if _observed(qkv):
        return rope_attention_op(*arguments)[0]
    if not (qkv.requires_grad and torch.is_grad_enabled()):
        return (_forward(*arguments) if triton else rope_attention_cpu.attend(*arguments[:-1]))[0]
    return (_Unobserved if triton else _UnobservedOnCPU).apply(*arguments)


def _observed(qkv: Tensor) -> bool:
    """Whether anything (a tracer, a dispatch mode, a tensor subclass, a transform) wants to see the
    op as an op.
    """
    return (
        torch.compiler.is_compiling()
        or qkv.is_meta
        or type(qkv) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _Unobserved(torch.autograd.Function):
    """The op without the dispatcher, for plain eager calls: the same functions, 230 us less per
    forward and backward.

    545 -> 315 us at 8 tokens on one core of a Xeon, torch 2.13: on a GPU a block of a small model
    is not longer.
    """

    @staticmethod
    def forward(ctx, qkv, sins, coss, *rest):
        out, lse = _forward(qkv, sins, coss, *rest)
        ctx.save_for_backward(qkv, out, lse, *sins, *coss)
        ctx.tables, ctx.rest = len(sins), rest
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse, *tables = ctx.saved_tensors
        sins, coss = tables[: ctx.tables], tables[ctx.tables :]
        differentiate = (
            rope_attention_backward_op if torch.is_grad_enabled() else _backward
        )  # the op refuses a second
        return differentiate(grad, qkv, out, lse, sins, coss, *ctx.rest), *([None] * 8)


class _UnobservedOnCPU(torch.autograd.Function):
    """The same on the CPU.

    Keeps the rotated q and k, as SDPA after a separate rotation does: 3 to 5 % less time.
    """

    @staticmethod
    def forward(ctx, qkv, sins, coss, *rest):
        out, kept = rope_attention_cpu.attend(qkv, sins, coss, *rest[:-1])
        ctx.save_for_backward(qkv, out, *sins, *coss, *itertools.chain(*kept))
        ctx.tables, ctx.rest = len(sins), rest
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, *others = ctx.saved_tensors
        sins, coss, kept = (
            others[: ctx.tables],
            others[ctx.tables : 2 * ctx.tables],
            others[2 * ctx.tables :],
        )
        kept = [
            rope_attention_cpu.Kept(*kept[first : first + 3]) for first in range(0, len(kept), 3)
        ]
        if torch.is_grad_enabled():  # the op refuses a second derivative
            lse = rope_attention_cpu.packed_lse(kept)
            dqkv = rope_attention_backward_op(grad, qkv, out, lse, sins, coss, *ctx.rest)
        else:
            dqkv = rope_attention_cpu.backward_from(
                kept, grad, qkv, out, sins, coss, *ctx.rest[:-1]
            )
        return dqkv, *([None] * 8)


def _forward(
    qkv: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    scale: float,
    interleaved: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, d] -> out [T, H, d] and the log-sum-exp of the scores [H, T] that the backward
    needs.
    """
    if triton:
        from dinov3core.kernels import rope_attention as kernels

        return kernels.forward(qkv, sins, coss, counts, lengths, prefix, scale, interleaved)
    return rope_attention_cpu.forward(qkv, sins, coss, counts, lengths, prefix, scale, interleaved)


def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    sins: Sequence[Tensor],
    coss: Sequence[Tensor],
    counts: Sequence[int],
    lengths: Sequence[int],
    prefix: int,
    scale: float,
    interleaved: bool,
    triton: bool,
) -> Tensor:
    """d(qkv) [T, 3, H, d] from d(out) [T, H, d]."""
    if triton:
        from dinov3core.kernels import rope_attention_backward as kernels

        return kernels.backward(
            grad, qkv, out, lse, sins, coss, counts, lengths, prefix, scale, interleaved
        )
    return rope_attention_cpu.backward(
        grad, qkv, out, lse, sins, coss, counts, lengths, prefix, scale, interleaved
    )


rope_attention_op = torch.library.custom_op("dinov3core::rope_attention", _forward, mutates_args=())
rope_attention_backward_op = torch.library.custom_op(
    "dinov3core::rope_attention_backward", _backward, mutates_args=()
)


@rope_attention_op.register_fake
def _(qkv, *rest):
    tokens, _, heads, width = qkv.shape
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(tokens, heads, width), qkv.new_empty(heads, tokens, dtype=statistics)


@rope_attention_backward_op.register_fake
def _(grad, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, sins, coss, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, *sins, *coss)
    ctx.tables = len(sins)


def _backward_of_op(ctx, grad, _):
    qkv, out, lse, *tables = ctx.saved_tensors
    none = [None] * ctx.tables
    dqkv = rope_attention_backward_op(
        grad, qkv, out, lse, tables[: ctx.tables], tables[ctx.tables :], *ctx.rest
    )
    return dqkv, none, none, *([None] * 6)


rope_attention_op.register_autograd(_backward_of_op, setup_context=_save)
first_order_only(rope_attention_backward_op, "rope_attention")


@register_flop_formula(torch.ops.dinov3core.rope_attention)
def _forward_flops(qkv_shape, sins, coss, counts, lengths, *rest, **kwargs) -> int:
    """Two products of N x N x d per image and head; the rotation is not counted."""
    heads, width = qkv_shape[2:]
    return sum(
        4 * count * length**2 * heads * width for count, length in zip(counts, lengths, strict=True)
    )


@register_flop_formula(torch.ops.dinov3core.rope_attention_backward)
def _backward_flops(
    grad_shape, qkv_shape, o_shape, lse_shape, sins, coss, counts, lengths, *rest, **kwargs
) -> int:
    """Five products: the scores again, dV, dP, dQ, dK."""
    return _forward_flops(qkv_shape, sins, coss, counts, lengths) * 5 // 2
