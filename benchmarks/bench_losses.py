"""Gram, Sinkhorn, cross-entropies and KoLeo against their plain formulas and those compiled."""

import pytest

from benchmarks.cases import Case, loss_cases
from benchmarks.comparison import Setting, measure
from benchmarks.conftest import scale_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = loss_cases(scale_of(metafunc.config))
    pairs = [(case, direction) for case in cases for direction in case.passes]
    metafunc.parametrize(
        "case, direction", pairs, ids=[f"{case.name} {direction}" for case, direction in pairs]
    )


@pytest.mark.benchmark(group="losses")
def test_losses(case: Case, direction: str, setting: Setting, drive, keep) -> None:
    keep(measure(case, direction, setting, drive))
