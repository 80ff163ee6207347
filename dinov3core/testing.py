"""Examples of every loss op at awkward sizes, and the numerics contract they are held to.

The contract (`errors`): against the plain formula in float64, the error of an op stays within twice
that of the plain formula in float32, both on the same (rounded) inputs, plus a few roundings of the
result's own dtype. The table serves
the tests on any device: `for case in CASES: errors(case, torch.bfloat16, "cuda")`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3core import ops
from dinov3core.ops import reference

TEACHER = 0.07  # temperature
ROUNDINGS = 8  # of float32: a plain formula may be right by luck


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        op, label: what is called, and what is awkward about it.
        inputs: float32 tensors made from a generator; the first `leaves` of them get gradients.
        leaves: how many.
        ours, plain: the op and its reference as functions of the inputs, with a floating tensor of
            any shape as result.
        exponent: how far from 0 the exponents of terms that matter lie (log2); float32 resolves
            them that much worse.
    """

    op: str
    label: str
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    leaves: int
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exponent: float = 0.0

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"


class Errors(NamedTuple):
    """Worst relative errors against float64 of one result: |got - want| / max |want|."""

    ours: float
    plain: float
    allowed: float


def draw(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """The inputs of a case in a dtype; the leaves require gradients."""
    made = [x.to(device, dtype) for x in case.inputs(torch.Generator().manual_seed(seed))]
    return tuple(x.requires_grad_(i < case.leaves) for i, x in enumerate(made))


def results(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], leaves: int
) -> list[Tensor]:
    """The output of a function, and the gradients of a fixed combination of its entries."""
    output = function(*inputs)
    if not leaves:
        return [output]
    ramp = torch.linspace(
        0.5, 1.5, output.numel(), device=output.device, dtype=output.dtype
    ).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs[:leaves], ramp)]


def errors(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> list[Errors]:
    """The contract's three numbers for the output and each gradient of a case."""
    inputs = draw(case, dtype, device, seed)

    def of(function: Callable[..., Tensor], as_dtype: torch.dtype) -> list[Tensor]:
        cast = tuple(x.detach().to(as_dtype).requires_grad_(x.requires_grad) for x in inputs)
        return results(function, cast, case.leaves)

    columns = of(case.ours, dtype), of(case.plain, torch.float32), of(case.plain, torch.float64)
    return [
        _errors(*column, ROUNDINGS + case.exponent / 2) for column in zip(*columns, strict=True)
    ]


def _errors(ours: Tensor, plain: Tensor, exact: Tensor, roundings: float) -> Errors:
    size = float(exact.abs().max())
    worst = [float((x.double() - exact).abs().max()) / size for x in (ours, plain)]
    kind = torch.finfo(ours.dtype)
    stored = (kind.eps + kind.smallest_normal * kind.eps / size) if kind.bits < 32 else 0.0
    return Errors(*worst, 2 * worst[1] + roundings * torch.finfo(torch.float32).eps + stored)


def _normal(*shape: int, std: float = 1.0) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator) * std


def _all(
    *makers: Callable[[torch.Generator], Tensor],
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: tuple(make(generator) for make in makers)


def _gram_cases() -> Iterator[Case]:
    def case(label: str, inputs: Callable, **options: object) -> Case:
        return Case(
            "gram_loss",
            label,
            inputs,
            1,
            lambda s, t: ops.gram_loss(s, t, **options),
            lambda s, t: reference.gram_loss(s, t, **options),
        )

    def near(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        teacher = torch.randn((2, 130, 24), generator=generator)
        return teacher + 0.01 * torch.randn(teacher.shape, generator=generator), teacher

    def repeated(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn((2, 5, 24), generator=generator).repeat(1, 8, 1) for _ in range(2))

    for negatives in ("keep", "clip", "clip_teacher"):
        options = {"negatives": negatives}
        yield case(
            f"one row, {negatives}",
            _all(_normal(1, 1, 16), _normal(1, 1, 16, std=0.3)),
            normalize=False,
            **options,
        )
        yield case(
            f"odd sizes, {negatives}", _all(_normal(2, 33, 48), _normal(2, 33, 48)), **options
        )
        yield case(
            f"wider teacher, {negatives}", _all(_normal(3, 70, 16), _normal(3, 70, 40)), **options
        )
        yield case(
            f"wider student, {negatives}", _all(_normal(1, 197, 40), _normal(1, 197, 16)), **options
        )
        yield case(
            f"whole batch, {negatives}",
            _all(_normal(3, 50, 20), _normal(3, 50, 20)),
            per_image=False,
            **options,
        )
        yield case(
            f"raw rows, {negatives}",
            _all(_normal(2, 65, 24), _normal(2, 65, 24)),
            normalize=False,
            **options,
        )
        yield case(f"repeated rows, {negatives}", repeated, **options)
    yield case("two dimensions", _all(_normal(17, 20), _normal(17, 20)), per_image=False)
    yield case("student near teacher", near)


def _teacher(
    rows: int, prototypes: int, std: float = 0.5, far: float = 0.0
) -> Callable[[torch.Generator], Tensor]:
    """Teacher logits; `far` moves every third row that much below the others."""

    def make(generator: torch.Generator) -> Tensor:
        logits = torch.randn((rows, prototypes), generator=generator) * std
        logits[::3] -= far
        return logits

    return make


TEACHERS = {
    "one row": (1, 7, 0.5, 0.0),
    "one prototype": (5, 1, 0.5, 0.0),
    "odd sizes": (13, 131, 0.5, 0.0),
    "more rows than prototypes": (70, 9, 0.5, 0.0),
    "huge logits": (12, 65, 50.0, 0.0),
    "rows far below": (12, 65, 0.5, 8.0),
}
FAR_LOG2 = 8.0 / TEACHER / math.log(2)


def _sinkhorn_cases() -> Iterator[Case]:
    for label, sizes in TEACHERS.items():
        for iterations in (1, 3):
            yield Case(
                "sinkhorn",
                f"{label}, {iterations} iterations",
                _all(_teacher(*sizes)),
                0,
                lambda t, n=iterations: ops.sinkhorn(t, TEACHER, iterations=n).dense(),
                lambda t, n=iterations: reference.sinkhorn(t, TEACHER, iterations=n),
                exponent=FAR_LOG2 if label == "rows far below" else 0.0,
            )


def _pairs(students: int, targets: int, device: torch.device) -> Tensor:
    """Target rows [students, 3]: shared, skipped, and the same one twice."""
    rows = torch.arange(students, device=device)
    return torch.stack(
        [rows % targets, torch.where(rows % 2 == 0, -1, (rows + 1) % targets), rows % targets], 1
    )


def _cross_entropy_cases() -> Iterator[Case]:
    for label, (count, prototypes, std, far) in TEACHERS.items():
        if prototypes == 1:
            continue  # the loss is 0: no size to measure errors by
        teacher = _teacher(count, prototypes, std, far)
        one = torch.arange(count)[:, None]
        yield Case(
            "soft_cross_entropy",
            f"assignment, {label}",
            _all(_normal(count, prototypes, std=std), teacher),
            1,
            lambda s, t: ops.soft_cross_entropy(s, ops.sinkhorn(t, TEACHER), reduction="none"),
            lambda s, t, one=one: reference.soft_cross_entropy(
                s, reference.sinkhorn(t, TEACHER), one.to(s.device)
            ),
            exponent=FAR_LOG2 if label == "rows far below" else 0.0,
        )
    yield Case(
        "soft_cross_entropy",
        "assignment, several targets",
        _all(_normal(31, 131), _teacher(6, 131)),
        1,
        lambda s, t: ops.soft_cross_entropy(
            s, ops.sinkhorn(t, TEACHER), target_rows=_pairs(31, 6, s.device), reduction="none"
        ),
        lambda s, t: reference.soft_cross_entropy(
            s, reference.sinkhorn(t, TEACHER), _pairs(31, 6, s.device)
        ),
    )
    yield Case(
        "soft_cross_entropy",
        "dense targets of any mass, several",
        _all(_normal(31, 131), _normal(6, 131)),
        1,
        lambda s, t: ops.soft_cross_entropy(
            s, t, target_rows=_pairs(31, 6, s.device), reduction="none"
        ),
        lambda s, t: reference.soft_cross_entropy(s, t, _pairs(31, 6, s.device)),
    )


def _linear_cases() -> Iterator[Case]:
    for label, count, width, prototypes in (
        ("one row", 1, 8, 5),
        ("odd sizes", 37, 24, 131),
        ("one feature", 9, 1, 33),
    ):
        yield Case(
            "linear_soft_cross_entropy",
            label,
            _all(
                _normal(count, width, std=width**-0.5),
                _normal(prototypes, width, std=0.5),
                _teacher(4, prototypes),
            ),
            2,
            lambda f, w, t, n=count: ops.linear_soft_cross_entropy(
                f, w, ops.sinkhorn(t, TEACHER), target_rows=_pairs(n, 4, f.device), reduction="none"
            ),
            lambda f, w, t, n=count: reference.soft_cross_entropy(
                f @ w.mT, reference.sinkhorn(t, TEACHER), _pairs(n, 4, f.device)
            ),
        )


def _koleo_cases() -> Iterator[Case]:
    for label, count, width, topk in (
        ("two rows", 2, 3, 1),
        ("odd sizes", 33, 20, 1),
        ("three neighbours", 33, 20, 3),
    ):
        yield Case(
            "koleo_loss",
            label,
            _all(_normal(count, width)),
            1,
            lambda x, k=topk: ops.koleo_loss(x, topk=k),
            lambda x, k=topk: reference.koleo_loss(x, topk=k),
        )


CASES: tuple[Case, ...] = (
    *_gram_cases(),
    *_sinkhorn_cases(),
    *_cross_entropy_cases(),
    *_linear_cases(),
    *_koleo_cases(),
)
