"""What the kernel files share: rows cut into tiles, operands of products, the interpreter."""

import contextlib

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EXACT = tl.constexpr("ieee")  # tl.dot rounds no operand; bfloat16 and float16 have nothing to lose


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launch on the device of x: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is dense, as kernels assume; else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def front_remainder(length: int, block: int) -> int:
    """Rows of the first tile, 1 .. block, where all later tiles of `length` rows are whole."""
    return (length - 1) % block + 1


def padded(rows: int) -> int:
    """The smallest of 16, 32, 64, ... that holds `rows` rows (16: the least side of a product)."""
    return max(16, triton.next_power_of_2(rows))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of tl.dot: that of the data; float32 in the interpreter.

    The interpreter's bfloat16 products are wrong.
    """
    names = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
    return tl.float32 if interpreted() else names[str(dtype).removeprefix("torch.")]


def dot_precision(dtype: torch.dtype, target: str) -> str:
    """`input_precision` of tl.dot for operands of `dtype`, whatever torch does with other products.

    kernel      operands on a GPU                   products, all summed in float32
    gram        bfloat16, float16                   exact
                float32, NVIDIA                     three of TensorFloat-32 parts: about 22 bits
                float32, AMD                        float32
    attention   bfloat16, float16 (rope.problem)    exact

    Gram measures differences of two similarities, so its float32 rows keep float32's accuracy: one
    product of TensorFloat-32 has 11 bits. The other kernels multiply no matrices; products outside
    kernels are torch's, under ops.registration.full_precision.
    """
    return "tf32x3" if dtype == torch.float32 and not target.startswith("gfx") else "ieee"
