"""What every op registers beside its forward: its rule under autocast, and a clear answer to a second derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation with autocast off: a loss keeps the dtypes it is given and accumulates in float32.

    An autocast dispatch rule would cast the inputs first: for [R, K] logits in bfloat16 that is a float32 copy of them.
    """

    @functools.wraps(implementation)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *rest)

    return run


def first_order_only(backward_op: CustomOpDef, name: str) -> None:
    """Refuse a second derivative through `backward_op` with one sentence; create_graph=True alone stays allowed."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} can be differentiated once: no second derivative is implemented")

    backward_op.register_autograd(refuse)
