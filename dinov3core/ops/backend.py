"""Which implementation an op uses, and the one log line that says so when it is not the fastest
kind.
"""

import functools
import logging

import torch

logger = logging.getLogger("dinov3core.ops")


def check_backend(op: str, backend: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `backend` is one of `allowed`."""
    if backend not in allowed:
        raise ValueError(f"{op}: expected backend to be one of {allowed}, got {backend!r}")


@functools.cache
def log_once(message: str) -> None:
    """Log a message the first time it is seen in this process."""
    logger.info(message)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported here, or None.

    Not asked at import: the ops need torch alone.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def interpreted() -> bool:
    """True when Triton runs its kernels in the interpreter, on CPU tensors (TRITON_INTERPRET=1
    before its import).
    """
    if triton_problem() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def device_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, or None."""
    if (problem := triton_problem()) is not None:
        return problem
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return None
    if device.type == "cpu":
        return "Triton kernels run on CPU tensors only in the interpreter (TRITON_INTERPRET=1 before the import)"
    return f"the Triton kernels were written for CUDA and ROCm devices, not {device.type!r}"
