"""What ops share: their precision, and one sentence for a second derivative."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulation dtype: a product of narrow operands is not rounded to their dtype
    on its way out.
    """
    wide = accumulation_dtype(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def full_precision(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation with autocast off and its products of float32 matrices in float32.

    A loss keeps the dtypes it is given and accumulates in float32. An autocast dispatch rule would
    cast the inputs first: for [R, K] logits in bfloat16 that is a float32 copy of them.
    TensorFloat-32, which training allows for the layers of the network, would keep 11 bits of rows
    whose small differences are what the losses are about.
    """

    @functools.wraps(implementation)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            allowed = _product_precision()
            if allowed == "highest":  # asked first: entering a context takes longer
                return implementation(first, *rest)
            with _by_newer_names() if allowed is None else _by_older_name(allowed):
                return implementation(first, *rest)

    return run


def _product_precision() -> str | None:
    """What torch may do with float32 matrices; None when its newer names were used to say so."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # how it refuses to read what the newer names have set
        return None


@contextlib.contextmanager
def _by_older_name(allowed: str) -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


@contextlib.contextmanager
def _by_newer_names() -> Iterator[None]:
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # an object in sys.modules
    backends = torch.backends.cuda.matmul, mkldnn
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def first_order_only(backward_op: CustomOpDef, name: str) -> None:
    """Refuse a second derivative through `backward_op` with one sentence; create_graph=True alone
    stays allowed.
    """

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name} can be differentiated once: no second derivative is implemented"
        )

    backward_op.register_autograd(refuse)


def without_products(*packets: torch._ops.OpOverloadPacket) -> None:
    """Tell torch's FLOP counter, which counts matrix products only, that these ops have none."""
    register_flop_formula(list(packets))(lambda *args, **kwargs: 0)
