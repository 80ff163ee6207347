"""Golden cases: one computation, recorded with inputs, parameters, draws and results.

A folder holds `cases.json` (name, kind, file, settings, tolerance of every case) and one
safetensors or JSON file per case. A tensor's prefix says what it is: in, param, proj (weights of
the scalar that is differentiated), draw, out, grad, grad_in, after. float16 is a container: such
tensors are read as the float32 values they hold.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

COMPARED = ("out.", "grad.", "grad_in.")
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One recorded computation."""

    name: str
    kind: str
    path: Path
    settings: dict
    tolerance: dict[str, float]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        if self.path.suffix != ".safetensors":
            return {}
        stored = load_file(self.path)
        return {name: t.float() if t.dtype == torch.float16 else t for name, t in stored.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def json(self) -> dict | list:
        return json.loads(self.path.read_text())

    @property
    def across_processes(self) -> bool:
        """Whether several processes computed it together, each with inputs of its own."""
        return any(name.startswith("in.rank1.") for name in self.tensors)


def read_cases(folder: Path) -> list[Case]:
    listed = json.loads((folder / "cases.json").read_text())
    return [
        Case(c["name"], c["kind"], folder / c["file"], c["settings"], c.get("tolerance", {}))
        for c in listed
    ]


def compare_exact(case: Case, got: dict[str, Tensor]) -> None:
    """Fail unless `got` holds what is recorded as exact, bit by bit; takes it out."""
    for name, want in case.tensors.items():
        if name.startswith("exact."):
            result = got.pop(name, None)
            assert result is not None and torch.equal(result, want), f"{case.name}: {name} differs"


def compare(case: Case, got: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> None:
    """Fail unless `got` holds exactly the recorded results and each is within tolerance.

    Args:
        got: by full name ("out.loss", "grad_in.x").
        ignored: recorded names that are no results of ours; the caller says why.
    """
    wanted = {n: t for n, t in case.tensors.items() if n.startswith(COMPARED) and n not in ignored}
    assert wanted, f"{case.name} records no result"
    assert got.keys() == wanted.keys(), (
        f"{case.name}: results differ in {sorted(got.keys() ^ wanted.keys())}"
    )
    failures = []
    for name, want in wanted.items():
        prefix = name.split(".")[0]
        error = relative_error(got[name], want, case.under(prefix + ".").values())
        bound = case.tolerance.get(name, case.tolerance[prefix])
        if not error <= bound:
            failures.append(f"{name}: error {error:.3g}, tolerance {bound:.3g}")
    assert not failures, f"{case.name}: " + "; ".join(failures)


def relative_error(got: Tensor, want: Tensor, family: Iterable[Tensor]) -> float:
    """max |got - want| / max(max |want|, 1e-3 M).

    M is the largest absolute value in the family, the tensors of the same prefix: a floor that
    keeps tensors that are zero up to rounding from failing.
    """
    assert got.shape == want.shape, f"shape {list(got.shape)}, recorded {list(want.shape)}"
    got, want = got.detach().double(), want.double()
    largest = max(float(t.double().abs().max()) for t in family if t.numel())
    difference = float((got - want).abs().max())
    return difference / max(float(want.abs().max()), 1e-3 * largest) if difference else 0.0


def scalar_of(case: Case, outputs: Mapping[str, Tensor]) -> Tensor:
    """The scalar that is differentiated: each output times its fixed weights, all summed."""
    return torch.stack(
        [(outputs[name] * weight).sum() for name, weight in case.under("proj.").items()]
    ).sum()


def gradients(module: nn.Module, prefix: str = "grad.") -> dict[str, Tensor]:
    """The parameter gradients by state-dict name; a parameter that took no part has none."""
    return {prefix + name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@contextmanager
def replay(recorded: Iterable[T]) -> Iterator[Callable[[], T]]:
    """Hand out recorded draws one by one; the case fails when more or fewer are asked for."""
    left = deque(recorded)
    yield left.popleft
    assert not left, f"{len(left)} recorded draws were not asked for"
