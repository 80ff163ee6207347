"""Which path a call takes, and why: the one place where every op asks whether its kernels may run.

What is known here is the machine: whether Triton can be imported, whether the device is a GPU. What
kernels do not take (a dtype, a head width, a GPU without tiles), their own files say.
"""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("dinov3core.ops")


def check_backend(op: str, backend: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `backend` is one of `allowed`."""
    if backend not in allowed:
        raise ValueError(f"{op}: expected backend to be one of {allowed}, got {backend!r}")


def runs_kernels(
    op: str, tensor: Tensor, *, backend: str = "auto", table: torch.dtype | None = None
) -> bool:
    """Whether a call of an op runs its Triton kernels.

    Args:
        op: the public name; "rope_split" is the rotation of rope_attention alone.
        tensor: the first input. Its device and dtype count, and for attention its last side, the
            head width.
        backend: "auto": yes on a GPU, unless something is in the way, which the log says once.
            "triton": yes, on CPU tensors too if Triton interprets its kernels. Another: no.
        table: dtype of the rotation tables, if there are any.

    Raises:
        ValueError: backend "triton" where the kernels cannot run, with the reason.
    """
    if backend not in ("auto", "triton"):
        return False
    if backend == "auto" and tensor.device.type in ("cpu", "meta") and not is_gpu(tensor.device):
        return False
    width = _number(tensor.shape[-1])
    problem = _problem(op, tensor.device, tensor.dtype, width, table, backend == "auto")
    if problem is not None and backend == "triton":
        raise ValueError(f"{op}: backend='triton' cannot run here: {problem}; use backend='auto'")
    return problem is None


# A constant of a compiled graph, so that the log line is written while tracing: in the graph it
# would break it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _problem(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    table: torch.dtype | None,
    logged: bool,
) -> str | None:
    """Why the kernels of an op cannot run, or None."""
    problem = _device_problem(device)
    if problem is None:
        problem = _input_problem(op, device, dtype, width, table)
    if problem is not None and logged:
        _log_once(f"{op}: torch operations instead of the Triton kernels: {problem}")
    return problem


def _device_problem(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a device, or None."""
    if (problem := triton_problem()) is not None:
        return problem
    if is_gpu(device) or (device.type == "cpu" and interpreted()):
        return None
    if device.type == "cpu":
        return (
            "Triton kernels run on CPU tensors only in the interpreter (TRITON_INTERPRET=1 before "
            "the import)"
        )
    return f"the Triton kernels were written for CUDA and ROCm devices, not {device.type!r}"


def _input_problem(
    op: str, device: torch.device, dtype: torch.dtype, width: int, table: torch.dtype | None
) -> str | None:
    """What the kernels of an op do not take, or None."""
    if op == "rope_attention":
        from dinov3core.kernels import rope_attention

        return rope_attention.problem(device, dtype, width, table)
    if op == "rope_split":
        from dinov3core.kernels import rope

        return rope.problem(dtype, width, table)
    return "float64 inputs" if dtype == torch.float64 else None


def longest_sequence(qkv: Tensor) -> int:
    """Up to how many tokens the attention kernels are expected to beat torch's attention."""
    longest: int = _longest_sequence(qkv.device, _number(qkv.shape[-1]))
    return longest


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _longest_sequence(device: torch.device, width: int) -> int:
    from dinov3core.kernels import launch

    choice = launch.rope_attention(device, width)
    return 0 if choice is None else choice.longest


def _number(size: int) -> int:
    """A size as a number where a compiler traces it as a symbol, which int() would stay."""
    return len(range(size))


def is_gpu(device: torch.device) -> bool:
    """Whether a device is of the kind that the kernels were written for; ROCm's are "cuda" too."""
    return device.type == "cuda"


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, or None.

    Not asked at import: the ops need torch alone.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1 before its import)."""
    if triton_problem() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def is_plain_eager(tensor: Tensor) -> bool:
    """Whether nothing but autograd takes part in a call: then it may go around torch's dispatcher.

    Others would have to see the op as an op: a tracer, a dispatch mode, a tensor subclass, a
    transform of torch.func.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
