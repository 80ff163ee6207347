"""The numerics contract as a table: errors against float64, ours and plain torch's of equal dtype.

`python -m benchmarks.errors` prints it for this machine's device. The contract is that of
`dinov3core.testing`, which holds the ops to it at awkward sizes; here the sizes are those of
training, scaled down.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case, Inputs, Variant
from dinov3core.testing import Errors, judged


class Row(NamedTuple):
    """The errors of one result: an output, or the gradient of an input."""

    case: str
    dtype: str
    result: str
    errors: Errors


def chosen(small: bool = False) -> list[Case]:
    """One case per op and form."""
    if small:
        return cases.attention_cases("dry") + cases.loss_cases("dry")
    return [
        cases.attention(8, 54, 6, 64),
        cases.attention(4, 261, 6, 64),
        cases.attention(1, 1029, 4, 128),
        cases.packed_attention(2, (201, 41), 6, 64),
        cases.gram(4, 256, 384),
        cases.gram(4, 512, 384, whole_batch=True),
        cases.gram(4, 256, 384, negatives="clip"),
        cases.sinkhorn(128, 8192),
        cases.sinkhorn_cross_entropy(128, 8192),
        cases.multi_crop_cross_entropy(8, 8192),
        cases.linear_cross_entropy(128, 256, 8192),
        cases.koleo(64, 384),
    ]


def rows_of(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """The output of a case and the gradients of its leaves."""
    torch.manual_seed(0)
    inputs = case.make(device, dtype)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    plain = case.variants["sdpa" if "sdpa" in case.variants else "plain"]
    exact = _results(case, plain, wide)
    columns = (_results(case, variant, inputs) for variant in (case.variants["ours"], plain))
    names = ["output", *(f"gradient of {name}" for name in case.leaves)]
    for name, *row in zip(names, *columns, exact, strict=True):
        yield Row(case.name, str(dtype).removeprefix("torch."), name, judged(*row))


def _results(case: Case, variant: Variant, inputs: Inputs) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.leaves}
    output = variant({**inputs, **leaves})
    gradients = (
        torch.autograd.grad(output, list(leaves.values()), inputs.get("dout")) if leaves else ()
    )
    return [case.dense(output).detach(), *gradients]


def table(small: bool = False) -> str:
    """All rows as Markdown."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["| case | dtype | result | ours | plain torch | ours / plain |", "|---" * 6 + "|"]
    for case in chosen(small):
        for dtype in (torch.float32, torch.bfloat16):
            for row in rows_of(case, dtype, device):
                ours, plain, _ = row.errors
                ratio = f"{ours / plain:.2f}" if plain else "-"
                cells = (row.case, row.dtype, row.result, f"{ours:.1e}", f"{plain:.1e}", ratio)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
