"""The contract of every loss op: numerics, dtypes, strides, autocast, compile, memory and more."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from dinov3core import ops
from dinov3core.testing import LOSSES, Case, draw, errors, results

ONE_OF_EACH = [
    next(c for c in LOSSES if c.op == op and "odd sizes" in c.label)
    for op in sorted({c.op for c in LOSSES})
]
SEVERAL = next(c for c in LOSSES if c.label == "assignment, several targets")
DIFFERENTIABLE = [c for c in ONE_OF_EACH if c.leaves] + [SEVERAL]
every_op = pytest.mark.parametrize("case", [*ONE_OF_EACH, SEVERAL], ids=str)
every_loss = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)


def equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_numerics_contract(case: Case, dtype: torch.dtype) -> None:
    for seed in range(2):
        for error in errors(case, dtype, seed=seed):
            assert error.ours <= error.allowed, error


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_float64_is_the_mathematics(case: Case) -> None:
    """What remains in float64 is rounding, whose size the exponents of the case bound."""
    inputs = draw(case, torch.float64)
    scale = 1e-13 * (10 + case.exponent + float(max(x.detach().abs().max() for x in inputs)) / 0.07)
    for got, want in zip(
        results(case.ours, inputs, case.leaves),
        results(case.plain, inputs, case.leaves),
        strict=True,
    ):
        assert got.dtype == torch.float64
        assert float((got - want).abs().max()) <= scale * max(1.0, float(want.abs().max()))


@every_op
def test_strides_do_not_matter(case: Case) -> None:
    inputs = draw(case, torch.float32)
    strided = tuple(
        torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_(x.requires_grad)
        for x in inputs
    )
    assert not strided[0].is_contiguous()
    for a, b in zip(*(results(case.ours, x, case.leaves) for x in (inputs, strided)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_op
def test_two_runs_agree_bit_by_bit(case: Case) -> None:
    inputs = draw(case, torch.bfloat16)
    equal(results(case.ours, inputs, case.leaves), results(case.ours, inputs, case.leaves))


@every_op
def test_compiles_whole(case: Case) -> None:
    inputs = draw(case, torch.float32)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager", dynamic=False)
    equal(results(compiled, inputs, case.leaves), results(case.ours, inputs, case.leaves))


@every_loss
def test_selective_checkpointing_sees_the_op(case: Case) -> None:
    inputs = draw(case, torch.float32)
    seen = []

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        seen.append(op.name())
        ours = op.name().startswith("dinov3core::")
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*leaves: Tensor) -> Tensor:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(case.ours, *leaves, use_reentrant=False, context_fn=contexts)

    equal(results(checkpointed, inputs, case.leaves), results(case.ours, inputs, case.leaves))
    assert any(name.startswith("dinov3core::") for name in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_op
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    """A loss keeps its inputs' dtypes and is float32 inside; only the linear layer is cast."""
    inputs = draw(case, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(case.ours, inputs, case.leaves)
    if case.op == "linear_soft_cross_entropy":
        features, weight, teacher = inputs
        layer = tuple(x.bfloat16().detach().requires_grad_() for x in (features, weight))
        want = results(case.ours, (*layer, teacher), case.leaves)
        want = [want[0], *(x.to(dtype) for x in want[1:])]
    else:
        want = results(case.ours, inputs, case.leaves)
    equal(got, want)


@every_loss
def test_second_derivative_is_refused_in_a_sentence(case: Case) -> None:
    inputs = draw(case, torch.float32)
    gradients = torch.autograd.grad(
        case.ours(*inputs).sum(), inputs[: case.leaves], create_graph=True
    )
    with pytest.raises(NotImplementedError, match=f"{case.op} can be differentiated once"):
        gradients[0].sum().backward()


@every_loss
def test_targets_are_constants(case: Case) -> None:
    inputs = tuple(x.detach().requires_grad_() for x in draw(case, torch.float32))
    gradients = torch.autograd.grad(case.ours(*inputs).sum(), inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [i < case.leaves for i in range(len(inputs))]


def op_calls() -> list[tuple[str, tuple]]:
    """Every registered operator with arguments, gradients wanted where there is a formula."""
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(shape, requires_grad=True)  # noqa: E731
    logits = torch.randn(6, 9)
    pairs = torch.tensor([[0, 1], [2, -1]] * 3)
    target = tuple(vars(ops.sinkhorn(logits, 0.07).normalized()).values())
    ones = torch.ones(6)
    rows = torch.ones(6)
    scale = torch.tensor(3.0)
    return [
        ("gram_loss", (leaf(2, 5, 16), torch.randn(2, 5, 8), True, "keep", True)),
        ("gram_loss", (leaf(1, 40, 8), torch.randn(1, 40, 8), True, "keep", True)),
        ("gram_loss", (torch.randn(2, 5, 16), torch.randn(2, 5, 16), False, "clip", False)),
        (
            "gram_loss_backward",
            (torch.tensor(2.0), torch.randn(2, 5, 16), torch.randn(2, 5, 16).bfloat16()),
        ),
        ("koleo", (leaf(6, 4), leaf(12, 4), 6, 2)),
        (
            "koleo_backward",
            (
                torch.tensor(1.0),
                torch.randn(3, 4),
                torch.randn(3, 4),
                torch.tensor([[1], [2], [0]]),
            ),
        ),
        ("sinkhorn_start", (logits, scale)),
        ("sinkhorn_step", (logits, *target[1:4:2], scale)),
        ("sinkhorn_rows", (logits, *target[1:4:2], scale)),
        ("sinkhorn_dense", (logits, *target[1:4:2], scale)),
        ("soft_cross_entropy", (leaf(6, 9), *target, pairs, 0.1)),
        ("soft_cross_entropy", (leaf(6, 9), logits, None, None, None, None, None, 0.1)),
        (
            "soft_cross_entropy_backward",
            (torch.randn(6, 9), ones, rows, ones, ones, *target, pairs, 0.1),
        ),
        ("linear_soft_cross_entropy", (leaf(6, 4), leaf(9, 4), *target, pairs, 0.1)),
        (
            "linear_soft_cross_entropy_backward",
            (
                torch.randn(6, 4),
                torch.randn(9, 4),
                ones,
                rows,
                ones,
                ones,
                *target,
                pairs,
                0.1,
                True,
            ),
        ),
    ]


@pytest.mark.parametrize(("name", "arguments"), op_calls(), ids=[name for name, _ in op_calls()])
def test_registration(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.dinov3core, name).default, arguments)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes alive at once of what `call` allocates."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    moves = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for move in sorted(moves, key=lambda e: e.start_ns()):
        alive += move.nbytes()
        peak = max(peak, alive)
    return peak


def test_the_memory_instrument_counts() -> None:
    assert 8e6 <= peak_bytes(lambda: torch.ones(1000, 1000) + torch.ones(1000, 1000)) <= 12.1e6


def test_nothing_of_the_size_of_the_logits_is_stored() -> None:
    """1024 x 4096: 16 MB in float32, of which a backward must write one."""
    teacher = torch.randn(1024, 4096)
    student = torch.randn(1024, 4096, requires_grad=True)
    features = torch.randn(1024, 64, requires_grad=True)
    weight = torch.randn(4096, 64, requires_grad=True)
    assert peak_bytes(lambda: ops.sinkhorn(teacher, 0.07)) < teacher.nbytes / 3
    targets = ops.sinkhorn(teacher, 0.07)
    assert (
        peak_bytes(lambda: ops.soft_cross_entropy(student, targets).backward())
        < 2.4 * teacher.nbytes
    )
    fused = peak_bytes(lambda: ops.linear_soft_cross_entropy(features, weight, targets).backward())
    assert fused < teacher.nbytes / 2


def test_no_similarity_matrix_is_stored() -> None:
    """4096 rows: a Gram takes 64 MB, the plain formula several."""
    student = torch.randn(4096, 32, requires_grad=True)
    teacher = torch.randn(4096, 32)
    gram = 4096**2 * 4
    assert (
        peak_bytes(lambda: ops.gram_loss(student, teacher, per_image=False).backward()) < gram / 8
    )
    assert (
        peak_bytes(
            lambda: ops.gram_loss(student, teacher, per_image=False, negatives="clip").backward()
        )
        < gram
    )


def test_every_op_tells_the_flop_counter_what_it_costs() -> None:
    """The counter silently leaves out an op without a formula."""
    known = {str(op) for op in FlopCounterMode(display=False).flop_registry}
    losses = (
        "gram_loss",
        "koleo",
        "soft_cross_entropy",
        "linear_soft_cross_entropy",
        "rope_attention",
    )
    parts = [f"sinkhorn_{part}" for part in ("start", "step", "rows")]
    for name in [*losses, *(f"{loss}_backward" for loss in losses), *parts]:
        assert hasattr(torch.ops.dinov3core, name)
        assert f"dinov3core.{name}" in known


def test_balancing_counts_its_column_sums() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.sinkhorn(torch.randn(6, 9), 0.1, iterations=3)
    assert counter.get_total_flops() == 2 * (2 * 6 * 9)


def _any_batch() -> dict[str, Callable[[Tensor], Tensor]]:
    """Every op as a function of rows [B, 432]."""
    weight = torch.randn(33, 12, requires_grad=True)
    sin, cos = ops.rope_table(2, 4, 8)
    return {
        "rope_attention": lambda x: ops.rope_attention(
            x.view(-1, 9, 3, 2, 8), sin, cos, prefix_tokens=1
        ),
        "gram_loss": lambda x: ops.gram_loss(x.view(-1, 9, 48), x.detach().view(-1, 9, 48) + 1),
        "sinkhorn": lambda x: ops.soft_cross_entropy(x, ops.sinkhorn(x + 1, 0.07)),
        "linear": lambda x: ops.linear_soft_cross_entropy(
            x[:, :12], weight, ops.sinkhorn(x[:, :33], 0.07)
        ),
        "koleo_loss": lambda x: ops.koleo_loss(x),
    }


@pytest.mark.parametrize("name", list(_any_batch()))
def test_five_batch_sizes_compile_at_most_twice(name: str) -> None:
    """Once for the first size, once for any other."""
    call = _any_batch()[name]
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=compiles)
    for images in (2, 3, 5, 8, 13):
        x = torch.randn(images, 9 * 3 * 2 * 8, requires_grad=True)
        got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, call))
        torch.testing.assert_close(got, want)
    assert compiles.frame_count <= 2
