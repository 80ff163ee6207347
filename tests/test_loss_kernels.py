"""The Triton kernels of the loss ops, through the ops themselves, in Triton's interpreter on CPU
tensors.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
import triton
import triton.language as tl

from dinov3core import ops
from dinov3core.kernels import cross_entropy, gram, sinkhorn, tiles
from dinov3core.ops import reference, registration
from dinov3core.testing import CASES, TEACHER, Case, draw, errors, results

pytestmark = [
    pytest.mark.skipif(
        not tiles.interpreted(), reason="TRITON_INTERPRET=1 was not set before Triton was imported"
    ),
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning:triton"
    ),  # lanes beyond the last row compute on infinities
]

SLOW = {
    "wider student",
    "more rows than prototypes",
}  # the same code paths as other cases, in more tiles
KERNEL_CASES = [
    case
    for case in CASES
    if case.op != "koleo_loss"
    and case.label.split(",")[0] not in SLOW
    and not case.label.startswith("assignment, more")
]
NARROW_CASES = [
    case for case in KERNEL_CASES if "odd sizes" in case.label or "several" in case.label
]


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the path of CUDA tensors."""
    monkeypatch.setattr(registration, "_has_kernels", lambda device: True)


def unfused(case: Case) -> Case:
    """The interpreter rounds scale * logit before adding the offset, which a GPU's fused
    multiply-add does not.
    """
    if "huge logits" not in case.label or case.op != "sinkhorn":
        return case
    return case._replace(
        exponent=4 * 50 / TEACHER / math.log(2)
    )  # four standard deviations of its logits


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_numerics_contract(case: Case) -> None:
    for found in errors(unfused(case), torch.float32):
        assert found.ours <= found.allowed, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_numerics_contract_narrow(case: Case, dtype: torch.dtype) -> None:
    for found in errors(case, dtype):
        assert found.ours <= found.allowed, found


@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_strided_rows(case: Case) -> None:
    """Rows further apart than they are wide, and columns apart where a kernel needs them dense."""
    inputs = draw(case, torch.float32)
    wide = tuple(
        torch.cat([x.detach(), x.detach()], -1)[..., : x.shape[-1]].requires_grad_(x.requires_grad)
        for x in inputs
    )
    apart = tuple(
        torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_(x.requires_grad) for x in inputs
    )
    want = results(case.ours, inputs, case.leaves)
    for strided in (wide, apart):
        for a, b in zip(results(case.ours, strided, case.leaves), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 4, 64])
def test_sums_in_parts(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Few rows are shared by several programs: 1 part, 4, and as many as there are tiles."""
    monkeypatch.setattr(sinkhorn, "PROGRAMS", programs)
    monkeypatch.setattr(sinkhorn, "BLOCK_K", 16)
    teacher, student = torch.randn(9, 100), torch.randn(9, 100, requires_grad=True)
    loss = ops.soft_cross_entropy(student, ops.sinkhorn(teacher, 0.07))
    target, rows = reference.sinkhorn(teacher.double(), 0.07), torch.arange(9)[:, None]
    want = reference.soft_cross_entropy(student.double(), target, rows).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_parts_cover_every_term_once() -> None:
    for blocks, length, block in (
        (1, 1, 8),
        (3, 1000, 8),
        (1, 5000, 512),
        (2000, 4096, 512),
        (7, 0, 8),
    ):
        parts, each = sinkhorn.parts_of(blocks, length, block)
        assert each % block == 0 and (parts - 1) * each < max(1, length) <= parts * each


def test_forbidden_prototypes_and_no_rows() -> None:
    logits = torch.randn(6, 40)
    logits[:, [3, 39]] = -torch.inf
    assignment = ops.sinkhorn(logits, 0.1)
    allowed = [k for k in range(40) if k not in (3, 39)]
    assert (assignment.dense()[:, [3, 39]] == 0).all()
    torch.testing.assert_close(
        assignment.dense()[:, allowed], ops.sinkhorn(logits[:, allowed], 0.1).dense()
    )
    assert ops.soft_cross_entropy(torch.randn(6, 40), assignment).isfinite()
    nothing = ops.sinkhorn(torch.zeros(0, 40), 0.1)
    assert ops.soft_cross_entropy(torch.zeros(0, 40), nothing) == 0


def test_target_row_out_of_range_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at the indices; what would be a read out of bounds must be visible in
    the loss.
    """
    monkeypatch.setattr("dinov3core.ops.cross_entropy.check_range", lambda pairs, count: None)
    rows = torch.tensor([0, 3, -1])
    loss = ops.soft_cross_entropy(
        torch.randn(3, 20),
        ops.sinkhorn(torch.randn(3, 20), 0.1),
        target_rows=rows,
        reduction="none",
    )
    assert loss[0].isfinite() and loss[1].isnan() and loss[2] == 0


@pytest.mark.parametrize(
    ("images", "rows", "negatives"), [(1, 300, "clip"), (3, 150, "clip_teacher"), (3, 40, "keep")]
)
def test_residual_in_slabs(
    monkeypatch: pytest.MonkeyPatch, images: int, rows: int, negatives: str
) -> None:
    """Rows of an image where one does not fit, images where several do."""
    monkeypatch.setattr(gram, "SLAB_BYTES", 4 * 150 * 130)
    student, teacher = (
        torch.randn(images, rows, 24, requires_grad=True),
        torch.randn(images, rows, 24),
    )
    loss = ops.gram_loss(student, teacher, negatives=negatives)
    want = reference.gram_loss(student.double(), teacher.double(), negatives=negatives)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6 * float(gradients[1].abs().max()))


def test_slabs_cover_every_row_once() -> None:
    for images, rows, itemsize in ((1, 5, 4), (100, 2304, 2), (2, 50000, 2), (3, 7, 0)):
        seen = [
            (i, first, last)
            for part, first, last in gram._slabs(images, rows, itemsize)
            for i in range(images)[part]
        ]
        for image in range(images):
            cuts = [(first, last) for i, first, last in seen if i == image]
            assert [c[0] for c in cuts] == [0, *(c[1] for c in cuts[:-1])] and cuts[-1][1] == rows


@triton.jit
def _write_tiles(out, count, tiles):
    tile = tl.program_id(0)
    row, column = gram.upper_tile(tile, tiles)
    tl.store(out + 2 * tile, row)
    tl.store(out + 2 * tile + 1, column)


@pytest.mark.parametrize("tiles", [1, 2, 7, 18])
def test_triangle_is_visited_once(tiles: int) -> None:
    count = tiles * (tiles + 1) // 2
    out = torch.empty(count, 2, dtype=torch.int32)
    _write_tiles[(count,)](out, count, tiles)
    assert out.tolist() == [[i, j] for i in range(tiles) for j in range(i, tiles)]


def test_bfloat16_products_are_widened_in_the_interpreter() -> None:
    """Its tl.dot multiplies the bits of bfloat16 numbers as integers, without a word."""
    assert tiles.dot_dtype(torch.bfloat16) == tl.float32


@pytest.mark.parametrize(
    "module", [cross_entropy, gram, sinkhorn], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_shipped_configurations_describe_their_kernels(module) -> None:
    listed = list(module.CONFIGURATIONS())
    kernels = {
        name
        for name, value in vars(module).items()
        if name.startswith("_") and hasattr(value, "arg_names")
    }
    launched = kernels - {"_similarity", "_target_sum"}  # called by others
    assert {build.fn.__name__ for build in listed} == launched
    for build in listed:
        assert list(build.signature) == list(build.fn.arg_names)
        assert {name for name, kind in build.signature.items() if kind == "constexpr"} == set(
            build.constexprs
        )
        assert set(build.attrs) <= set(build.signature)
