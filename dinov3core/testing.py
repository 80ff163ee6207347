"""Examples of every op at awkward sizes, and the numerics contract they are held to.

The contract (`judged`): against the plain formula in float64, the error of an op stays within twice
that of the plain formula, both on the same (rounded) inputs, plus a few roundings. The table serves
the tests, the benchmarks and any device: `for case in CASES: errors(case, torch.bfloat16, "cuda")`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        plain_dtype: the plain formula's. Losses are float32 inside whatever they are given; None
            is the dtype of the inputs.
        roundings: to the dtype of the inputs, which the plain formula does not share: the stored
            gradient of a loss; of attention also the probabilities and their gradients.
        tensor_cores: the op multiplies on a GPU's tensor cores, which take no float32.
        large: minutes in the interpreter.
    """

    op: str
    label: str
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    leaves: int
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exponent: float = 0.0
    plain_dtype: torch.dtype | None = torch.float32
    roundings: int = 1
    tensor_cores: bool = False
    large: bool = False

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"

    def takes(self, dtype: torch.dtype, device: str | torch.device) -> bool:
        """Whether `ours` runs on inputs of this dtype there."""
        on_gpu = torch.device(device).type == "cuda"
        return not (self.tensor_cores and on_gpu and dtype == torch.float32)


class Errors(NamedTuple):
    """Worst relative errors against float64 of one result: largest error / largest value."""

    ours: float
    plain: float
    allowed: float


def judged(
    ours: Tensor, plain: Tensor, exact: Tensor, exponent: float = 0.0, roundings: int = 0
) -> Errors:
    """The contract: twice the error of the plain formula, and what it may be better by luck.

    That is 8 roundings of float32, more where exponents are large, and `roundings` of the result's
    own dtype where it is narrower.
    """
    size = float(exact.abs().max())
    errors = [float((x.double() - exact).abs().max()) / size for x in (ours, plain)]
    of_float32 = (ROUNDINGS + exponent / 2) * torch.finfo(torch.float32).eps
    kind = torch.finfo(ours.dtype)
    # below its normal numbers a dtype has a fixed step
    step = kind.eps + kind.smallest_normal * kind.eps / size if kind.bits < 32 else 0.0
    return Errors(*errors, 2 * errors[1] + of_float32 + roundings * step)


def draw(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """The inputs of a case in a dtype; the leaves require gradients."""
    inputs = [x.to(device, dtype) for x in case.inputs(torch.Generator().manual_seed(seed))]
    return tuple(x.requires_grad_(i < case.leaves) for i, x in enumerate(inputs))


def results(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], leaves: int
) -> list[Tensor]:
    """The output of a function, and the gradients of a fixed combination of its entries."""
    output = function(*inputs)
    if not leaves:
        return [output]
    weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device, dtype=output.dtype)
    weights[
        1::2
    ] *= -1  # a gradient that is nearly constant would hide some of an attention's terms
    weights = weights.view_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs[:leaves], weights)]


def errors(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> list[Errors]:
    """The contract's three numbers for the output and each gradient of a case."""
    inputs = draw(case, dtype, device, seed)

    def of(function: Callable[..., Tensor], as_dtype: torch.dtype) -> list[Tensor]:
        cast = tuple(x.detach().to(as_dtype).requires_grad_(x.requires_grad) for x in inputs)
        return results(function, cast, case.leaves)

    plain_dtype = case.plain_dtype or dtype
    columns = of(case.ours, dtype), of(case.plain, plain_dtype), of(case.plain, torch.float64)
    return [
        judged(*row, exponent=case.exponent, roundings=case.roundings)
        for row in zip(*columns, strict=True)
    ]


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


def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(sin, cos) of float32 angles, in float32, or in float64 for a float64 formula."""
    angles = angles.float().tile(2)
    return angles.sin(), angles.cos()


def _attention_case(tokens: int, width: int) -> Case:
    """The fused kernels on two images, two heads, and rows of qkv that lie apart."""
    prefix = min(5, tokens - 1)

    def ours(qkv: Tensor, angles: Tensor) -> Tensor:
        apart = F.pad(qkv, (0, 8))[..., :width]  # a slice of something else
        tables = _tables(angles)
        return ops.rope_attention(apart, *tables, prefix_tokens=prefix, backend="triton")

    def plain(qkv: Tensor, angles: Tensor) -> Tensor:
        tables = (x.to(_table_dtype(qkv)) for x in _tables(angles))
        return reference.rope_attention(qkv, *tables, prefix_tokens=prefix)

    angles = _normal(tokens - prefix, width // 2, std=3.0)
    return Case(
        "rope_attention",
        f"{tokens} tokens, head width {width}",
        _all(_normal(2, tokens, 3, 2, width), angles),
        1,
        ours,
        plain,
        plain_dtype=None,
        roundings=4,
        tensor_cores=True,
        large=tokens > 54 or width > 32,
    )


def _table_dtype(qkv: Tensor) -> torch.dtype:
    """Tables stay float32 beside narrower inputs."""
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _packed_case() -> Case:
    """Two crop sets in one call, against each on its own."""
    counts = (2, 3)
    lengths = (18, 6)
    prefix = 2
    width = 32
    tokens = [count * length for count, length in zip(counts, lengths, strict=True)]

    def ours(qkv: Tensor, *angles: Tensor) -> Tensor:
        groups = [(count, *_tables(x)) for count, x in zip(counts, angles, strict=True)]
        return ops.rope_attention_packed(qkv, groups, prefix_tokens=prefix, backend="triton")

    def plain(qkv: Tensor, *angles: Tensor) -> Tensor:
        outs = []
        for part, length, x in zip(qkv.split(tokens), lengths, angles, strict=True):
            tables = (table.to(_table_dtype(qkv)) for table in _tables(x))
            images = part.unflatten(0, (-1, length))
            out = reference.rope_attention(images, *tables, prefix_tokens=prefix)
            outs.append(out.flatten(0, 1))
        return torch.cat(outs)

    angles = [_normal(length - prefix, width // 2, std=3.0) for length in lengths]
    return Case(
        "rope_attention_packed",
        "two crop sets",
        _all(_normal(sum(tokens), 3, 2, width), *angles),
        1,
        ours,
        plain,
        plain_dtype=None,
        roundings=4,
        tensor_cores=True,
    )


def _attention_cases() -> Iterator[Case]:
    """One tile, several that stay on the chip, a stream of them, with every remainder between."""
    for tokens, width in itertools.product((1, 2, 37, 54, 201, 261, 1029), (32, 64, 128)):
        yield _attention_case(tokens, width)
    yield _packed_case()


LOSSES: tuple[Case, ...] = (
    *_gram_cases(),
    *_sinkhorn_cases(),
    *_cross_entropy_cases(),
    *_linear_cases(),
    *_koleo_cases(),
)
# needs Triton, and a GPU or its interpreter
ATTENTION: tuple[Case, ...] = tuple(_attention_cases())
CASES: tuple[Case, ...] = (*LOSSES, *ATTENTION)
