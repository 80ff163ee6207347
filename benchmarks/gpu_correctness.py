"""Every op on the device against its float64 reference, and twice for bit-equality.

`python -m benchmarks.gpu_correctness` runs the small cases: for the sanitizers.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dinov3core import testing

DTYPES = (torch.float32, torch.bfloat16)


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, check) of every case and dtype; a check returns an entry, or raises AssertionError.

    Args:
        small: only what the interpreter and the sanitizers do quickly, in one dtype each.
    """
    for case in testing.CASES:
        if small and case.large:
            continue
        dtypes = [dtype for dtype in DTYPES if case.takes(dtype, device)]
        for dtype in dtypes[:1] if small else dtypes:
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            yield name, partial(check, case, dtype, device)


def check(case: testing.Case, dtype: torch.dtype, device: torch.device) -> dict:
    """The numerics contract, and two runs bit by bit; returns the error closest to its bound."""
    errors = testing.errors(case, dtype, device)
    for error in errors:
        assert error.ours <= error.allowed, f"error {error.ours:.3g}, allowed {error.allowed:.3g}"
    inputs = testing.draw(case, dtype, device)
    runs = [testing.results(case.ours, inputs, case.leaves) for _ in range(2)]
    for index, (first, second) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(first, second), f"result {index} differs between two runs"
    closest = max(errors, key=lambda error: error.ours / max(error.allowed, 1e-30))
    said = f"error {closest.ours:.2g} of {closest.allowed:.2g} allowed"
    return {**closest._asdict(), "said": said}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(
            "error: no GPU here; python -m benchmarks.gpu --part correctness --dry-run works on a "
            "CPU"
        )
    for _, work in checks(torch.device("cuda"), small=True):
        work()
