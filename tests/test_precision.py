"""Products of float32 matrices where TensorFloat-32 is allowed: what losses keep of their accuracy.

A GPU that may round float32 operands to TensorFloat-32 keeps 11 bits of each. Simulated here: for
torch's products by a dispatch mode that rounds when torch would let a GPU do so, for the Gram
kernel by its own arithmetic in torch.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3core.ops import cross_entropy, gram, koleo, linear_cross_entropy, reference, registration

sinkhorn = importlib.import_module("dinov3core.ops.sinkhorn")  # the package exports the function
DISTANCES = [1.0, 3e-3, 1e-3, 3e-4]  # of student and teacher rows of unit variance
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_", "mv"}


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits after the leading one, halves away from 0, as `cvt.rna.tf32.f32` does."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Where(TorchDispatchMode):
    """Round float32 operands of matrix products as a GPU would, where the setting allows it."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if allowed and func.overloadpacket.__name__ in PRODUCTS:
            *rest, a, b = args
            args = (*rest, *(tf32(x) if x.dtype == torch.float32 else x for x in (a, b)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["older name", "newer name"])
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """As the training loop sets it on a GPU, by either of torch's names for it."""
    before = torch.get_float32_matmul_precision()
    if request.param == "older name":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # given back
    torch.set_float32_matmul_precision(before)


def near(distance: float, rows: int = 196, width: int = 96) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, rows, width, generator=g)
    return teacher + distance * torch.randn(teacher.shape, generator=g), teacher


def plain_gram(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = reference.gram_loss(leaf, teacher)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def errors(approximate: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative, of the loss and of the gradient."""
    loss, gradient = (x.double() for x in approximate)
    return float((loss / exact[0] - 1).abs()), float((gradient - exact[1]).norm() / exact[1].norm())


def check_contract(result: tuple[Tensor, Tensor], student: Tensor, teacher: Tensor) -> None:
    """At most twice the error of the plain float32 formula; of the loss, often lucky, also 1e-5."""
    exact = plain_gram(student.double(), teacher.double())
    ours = errors(result, exact)
    plain = errors(plain_gram(student, teacher), exact)
    assert ours[0] <= max(2 * plain[0], 1e-5) and ours[1] <= 2 * plain[1], (ours, plain)


@pytest.mark.usefixtures("allowed")
class TestProductsOfTorch:
    def test_the_simulation_rounds(self) -> None:
        with Tf32Where():
            assert float(torch.full((1, 2), 1 + 2**-12) @ torch.ones(2, 1)) == 2.0

    @pytest.mark.parametrize("distance", DISTANCES)
    @pytest.mark.parametrize("rows", [60, 196])
    def test_gram_forms(self, distance: float, rows: int) -> None:
        """Residual form with 60 rows of 96 channels, mid-point form with 196 of 48."""
        student, teacher = near(distance, rows, 96 if rows == 60 else 48)
        assert gram.takes_midpoint(rows, student.shape[2], "keep") == (rows == 196)
        with Tf32Where():
            result = gram._gram_loss._init_fn(student, teacher, True, "keep", True)
        check_contract(result, student, teacher)

    def test_nearest_neighbours(self) -> None:
        """Rows a hundredth apart: TensorFloat-32 finds other neighbours for many of them."""
        g = torch.Generator().manual_seed(0)
        rows = torch.randn(64, generator=g) + 0.01 * torch.randn(40, 64, generator=g)
        exact = koleo._koleo._init_fn(rows.double(), rows.double(), 0, 1)[1]
        with Tf32Where():
            _, neighbours = koleo._koleo._init_fn(rows, rows, 0, 1)
            z = torch.nn.functional.normalize(rows)
            rounded = (z @ z.mT).fill_diagonal_(-1).argmax(1, keepdim=True)
        assert torch.equal(neighbours, exact)
        assert (rounded != exact).float().mean() > 0.3

    def test_sinkhorn_column_sums(self) -> None:
        logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
        column = torch.zeros(30)
        arguments = logits, -14.4 * logits.amax(0), column, torch.tensor(14.4)
        want = sinkhorn._sinkhorn_step._init_fn(*arguments)
        with Tf32Where():
            result = sinkhorn._sinkhorn_step._init_fn(*arguments)
        for a, b in zip(result, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_loss_op_is_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each implementation that is registered looks at the setting before anything else."""
    entered: list[str] = []

    def note() -> None:
        entered.append("")
        raise InterruptedError

    monkeypatch.setattr(registration, "_product_precision", note)
    modules = gram, koleo, sinkhorn, cross_entropy, linear_cross_entropy
    ops = [x for m in modules for x in vars(m).values() if isinstance(x, torch.library.CustomOpDef)]
    for op in ops:
        with pytest.raises(InterruptedError):
            op._init_fn(torch.zeros(1))
    assert len(entered) == len(ops) >= 10


def one_product(a: Tensor, b: Tensor) -> Tensor:
    return tf32(a) @ tf32(b)


def three_products(a: Tensor, b: Tensor) -> Tensor:
    """What rounding leaves of an operand is a second one; small times small is left out."""
    large_a = tf32(a)
    large_b = tf32(b)
    small_a = tf32(a - large_a)
    small_b = tf32(b - large_b)
    return small_a @ large_b + large_a @ small_b + large_a @ large_b


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tf32": one_product,
    "tf32x3": three_products,
    "ieee": torch.matmul,
}


def gram_kernel(student: Tensor, teacher: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """kernels/gram.py on float32 rows, in torch: products of raw rows, scaled after; then dS."""
    inverse = [1 / torch.linalg.vector_norm(x, dim=-1) for x in (student, teacher)]
    similarities = [
        FORMS[precision](x, x.mT) * n[..., :, None] * n[..., None, :]
        for x, n in zip((student, teacher), inverse, strict=True)
    ]
    residual = similarities[0] - similarities[1]
    norm = inverse[0]
    gradient = (residual * norm[..., None, :]) @ student * (4 / residual.numel())
    unit = student * norm[..., None]
    radial = (unit * gradient).sum(-1, keepdim=True)
    return residual.square().mean(), (gradient - unit * radial) * norm[..., None]


@pytest.mark.parametrize("distance", DISTANCES)
def test_gram_kernel_on_float32_rows(distance: float) -> None:
    tiles = pytest.importorskip("dinov3core.kernels.tiles", exc_type=ImportError)
    precision = tiles.dot_precision(torch.float32, "sm_90")
    student, teacher = near(distance)
    check_contract(gram_kernel(student, teacher, precision), student, teacher)


@pytest.mark.parametrize(("distance", "loss", "gradient"), [(3e-3, 5e-3, 0.05), (1e-3, 0.05, 0.2)])
def test_one_product_would_not_do(distance: float, loss: float, gradient: float) -> None:
    student, teacher = near(distance)
    exact = plain_gram(student.double(), teacher.double())
    error = errors(gram_kernel(student, teacher, "tf32"), exact)
    assert error[0] > loss and error[1] > gradient


def test_precision_of_other_rows() -> None:
    tiles = pytest.importorskip("dinov3core.kernels.tiles", exc_type=ImportError)
    assert tiles.dot_precision(torch.float32, "gfx942") == "ieee"  # AMD's own float32 products
    for dtype in (torch.bfloat16, torch.float16):
        assert tiles.dot_precision(dtype, "sm_90") == "ieee"  # exact anyway
