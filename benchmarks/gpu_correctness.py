"""Every op on the device against its float64 reference, and twice for bit-equality; `python -m`
runs the small ones.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dinov3core import ops, testing
from dinov3core.ops import reference

LENGTHS, HEAD_DIMS = (1, 2, 37, 54, 201, 261, 1029), (32, 64, 128)
SMALL_LENGTHS, SMALL_HEAD_DIMS = (1, 37, 54), (32,)
Check = Callable[[], dict]


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, Check]]:
    """(name, check) of every op, shape and dtype; a check returns what it found and raises
    AssertionError on a miss.

    Args:
        small: few short sequences in float32, for the interpreter and the sanitizers.
    """
    dtypes = (torch.float32,) if small else (torch.float32, torch.bfloat16)
    lengths, head_dims = (SMALL_LENGTHS, SMALL_HEAD_DIMS) if small else (LENGTHS, HEAD_DIMS)
    for tokens, head_dim, dtype in itertools.product(lengths, head_dims, dtypes):
        prefix = min(5, tokens - 1) if tokens > 1 else 0
        yield (
            f"rope_attention {tokens} tokens, head width {head_dim}, {_name(dtype)}",
            lambda t=tokens, d=head_dim, p=prefix, dt=dtype: _attention(t, d, p, dt, device),
        )
    yield "rope_attention_packed", lambda: _packed(dtypes[-1], device)
    for case, dtype in itertools.product(testing.CASES, dtypes):
        yield f"{case}, {_name(dtype)}", lambda case=case, dtype=dtype: _loss(case, dtype, device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _loss(case: testing.Case, dtype: torch.dtype, device: torch.device) -> dict:
    """The numerics contract of `testing.errors`, and two runs bit by bit."""
    found = testing.errors(case, dtype, device)
    for error in found:
        assert error.ours <= error.allowed, f"error {error.ours:.3g}, allowed {error.allowed:.3g}"
    inputs = testing.draw(case, dtype, device)
    _twice(lambda: testing.results(case.ours, inputs, case.leaves))
    return _said(max(found, key=lambda error: error.ours / max(error.allowed, 1e-30)))


def _said(error: testing.Errors) -> dict:
    """Entry of a passed check: its error closest to what is allowed."""
    return {**error._asdict(), "said": f"error {error.ours:.2g} of {error.allowed:.2g} allowed"}


def _attention(
    tokens: int, head_dim: int, prefix: int, dtype: torch.dtype, device: torch.device
) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(2, tokens, 3, 2, head_dim + 8, generator=generator).to(device, dtype)
    qkv = wide[..., :head_dim]  # strided, as a slice of something else
    angles = 3 * torch.randn(tokens - prefix, head_dim // 2, generator=generator).tile(2).to(device)
    sin, cos = angles.sin(), angles.cos()
    grad = torch.randn(2, tokens, 2, head_dim, generator=generator).to(device, dtype)

    def ours(x: Tensor) -> Tensor:
        return ops.rope_attention(x, sin, cos, prefix_tokens=prefix, backend="triton")

    def plain(x: Tensor) -> Tensor:
        return reference.rope_attention(
            x, sin.to(_table(x)), cos.to(_table(x)), prefix_tokens=prefix
        )

    found = _compare(
        _with_gradient(ours, qkv, grad),
        *(_with_gradient(plain, qkv.to(t), grad) for t in _pair(dtype)),
    )
    _twice(lambda: _with_gradient(ours, qkv, grad))
    return _said(found)


def _packed(dtype: torch.dtype, device: torch.device) -> dict:
    """Two crop sets in one call against each on its own."""
    generator = torch.Generator().manual_seed(0)
    tables = [ops.rope_table(side, side, 32, device=device) for side in (4, 2)]
    counts, lengths = (2, 3), (18, 6)
    sizes = [count * length for count, length in zip(counts, lengths, strict=True)]
    qkv = torch.randn(sum(sizes), 3, 2, 32, generator=generator).to(device, dtype)
    grad = torch.randn(sum(sizes), 2, 32, generator=generator).to(device, dtype)
    groups = [(count, *table) for count, table in zip(counts, tables, strict=True)]

    def ours(x: Tensor) -> Tensor:
        return ops.rope_attention_packed(x, groups, prefix_tokens=2, backend="triton")

    def plain(x: Tensor) -> Tensor:
        parts = zip(x.split(sizes), lengths, tables, strict=True)
        outs = [
            reference.rope_attention(
                part.unflatten(0, (-1, length)),
                sin.to(_table(x)),
                cos.to(_table(x)),
                prefix_tokens=2,
            ).flatten(0, 1)
            for part, length, (sin, cos) in parts
        ]
        return torch.cat(outs)

    found = _compare(
        _with_gradient(ours, qkv, grad),
        *(_with_gradient(plain, qkv.to(t), grad) for t in _pair(dtype)),
    )
    _twice(lambda: _with_gradient(ours, qkv, grad))
    return _said(found)


def _pair(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return dtype, torch.float64


def _table(x: Tensor) -> torch.dtype:
    """Tables stay float32 beside narrower inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_gradient(function: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor) -> list[Tensor]:
    qkv = qkv.detach().requires_grad_()
    output = function(qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, grad.to(output.dtype))]


def _compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> testing.Errors:
    """The contract: at most twice the error of the plain formula in the same dtype, plus four
    roundings.
    """
    found = []
    for got, usual, want in zip(ours, plain, exact, strict=True):
        size = float(want.abs().max())
        errors = [float((x.double() - want).abs().max()) / size for x in (got, usual)]
        found.append(testing.Errors(*errors, 2 * errors[1] + 4 * torch.finfo(got.dtype).eps))
        assert found[-1].ours <= found[-1].allowed, (
            f"error {errors[0]:.3g}, allowed {found[-1].allowed:.3g}"
        )
    return max(found, key=lambda error: error.ours / error.allowed)


def _twice(run: Callable[[], list[Tensor]]) -> None:
    for index, (first, second) in enumerate(zip(run(), run(), strict=True)):
        assert torch.equal(first, second), f"result {index} differs between two runs"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(
            "error: no GPU here; python -m benchmarks.gpu --part correctness --dry-run works on a "
            "CPU"
        )
    for _, check in checks(torch.device("cuda"), small=True):
        check()
