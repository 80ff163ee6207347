"""Whether the kernels of an op run, and the one reason where they do not."""

import builtins
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinov3core.ops import dispatch
from dinov3core.ops.dispatch import check_backend, is_plain_eager, runs_kernels

pytest.importorskip("triton")

OPS = ("gram_loss", "sinkhorn", "soft_cross_entropy", "rope_attention", "rope_split")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for memory in (dispatch.triton_problem, dispatch._log_once):
        memory.cache_clear()
    yield
    for memory in (dispatch.triton_problem, dispatch._log_once):
        memory.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the path of a GPU's."""
    monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, logger="dinov3core.ops"):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == "dinov3core.ops"]


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cpu_tensors_go_to_torch_without_a_word(
    op: str, device: str, lines: Callable[[], list[str]]
) -> None:
    assert not runs_kernels(op, torch.empty(4, 64, device=device))
    assert lines() == []


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_runs_the_kernels(op: str, lines: Callable[[], list[str]]) -> None:
    assert runs_kernels(op, torch.empty(4, 64, dtype=torch.bfloat16), table=torch.float32)
    assert lines() == []


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("op", "tensor", "table", "reason"),
    [
        *[(op, torch.empty(4, 64).double(), None, "float64") for op in OPS],
        ("rope_attention", torch.empty(4, 48), None, "head width 48: the kernels exist for"),
        ("rope_split", torch.empty(4, 48), None, "head width 48: the kernels exist for"),
        ("rope_split", torch.empty(4, 32), torch.float64, "tables in torch.float64"),
    ],
)
def test_the_log_says_once_why_not(
    op: str,
    tensor: Tensor,
    table: torch.dtype | None,
    reason: str,
    lines: Callable[[], list[str]],
) -> None:
    for _ in range(3):
        assert not runs_kernels(op, tensor, table=table)
    (line,) = lines()
    assert line.startswith(f"{op}: torch operations instead of the Triton kernels: ")
    assert reason in line


@pytest.mark.usefixtures("on_a_gpu", "no_triton")
@pytest.mark.parametrize("op", OPS)
def test_without_triton(op: str, lines: Callable[[], list[str]]) -> None:
    assert not runs_kernels(op, torch.empty(4, 64))
    assert lines() == [
        f"{op}: torch operations instead of the Triton kernels: "
        "Triton is not installed (No module named 'triton')"
    ]
    with pytest.raises(ValueError, match="cannot run here: Triton is not installed"):
        runs_kernels(op, torch.empty(4, 64), backend="triton")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_gpu_without_tiles(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    """Attention needs tiles of this architecture; the rotation alone does not."""
    from dinov3core.kernels import launch

    monkeypatch.setattr(launch, "architecture", lambda device: "sm_80")
    qkv = torch.empty(4, 64, dtype=torch.bfloat16)
    assert runs_kernels("rope_split", qkv, table=torch.float32)
    assert not runs_kernels("rope_attention", qkv, table=torch.float32)
    assert "no spill-free tiles are known for sm_80 at head width 64" in lines()[0]
    assert dispatch.longest_sequence(qkv) == 0


def test_other_accelerators_are_named(lines: Callable[[], list[str]]) -> None:
    class Elsewhere:
        """A tensor of a device that this machine does not have."""

        device, dtype, shape = torch.device("mps"), torch.float32, (4, 64)

    assert not runs_kernels("gram_loss", Elsewhere())  # type: ignore[arg-type]
    assert lines()[0].endswith("written for CUDA and ROCm devices, not 'mps'")


@pytest.mark.parametrize("op", OPS)
def test_triton_by_name(
    op: str, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    """On CPU tensors where the interpreter runs kernels, elsewhere a ValueError."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert runs_kernels(op, torch.empty(4, 64, dtype=torch.bfloat16), backend="triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    sentence = (
        f"{op}: backend='triton' cannot run here: Triton kernels run on CPU tensors only in the "
        r"interpreter .*; use backend='auto'"
    )
    with pytest.raises(ValueError, match=sentence):
        runs_kernels(op, torch.empty(4, 64), backend="triton")
    assert lines() == []


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("backend", ["torch", "xformers"])
def test_other_backends_run_no_kernel(backend: str, lines: Callable[[], list[str]]) -> None:
    assert not runs_kernels("rope_attention", torch.empty(4, 48), backend=backend)
    assert lines() == []


def test_backends_are_listed() -> None:
    with pytest.raises(ValueError, match=r"gram_loss: expected backend .*'torch'\), got 'cuda'"):
        check_backend("gram_loss", "cuda", ("auto", "torch"))


@pytest.mark.usefixtures("on_a_gpu")
def test_the_answer_is_a_constant_of_a_compiled_graph(lines: Callable[[], list[str]]) -> None:
    """Also where the head width is a symbol of it, as at the second width."""

    def function(x: Tensor) -> Tensor:
        answer = runs_kernels("rope_attention", x)
        return x * (2 if answer else 3) + dispatch.longest_sequence(x)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for width in (64, 48):
        x = torch.ones(4, width, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), function(x))
    (line,) = lines()
    assert "head width 48" in line


class Subclass(Tensor):
    pass


def test_what_may_go_around_the_dispatcher() -> None:
    x = torch.ones(3)
    assert is_plain_eager(x) and is_plain_eager(torch.nn.Parameter(x))
    assert not is_plain_eager(x.as_subclass(Subclass))
    assert not is_plain_eager(x.to("meta"))
    with FlopCounterMode(display=False):
        assert not is_plain_eager(x)
    answers = []
    torch.vmap(lambda y: answers.append(is_plain_eager(y)) or y)(x)
    traced = torch.compile(lambda y: y + is_plain_eager(y), backend="eager", fullgraph=True)
    assert answers == [False] and torch.equal(traced(x), x)
