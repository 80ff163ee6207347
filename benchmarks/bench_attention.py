"""RoPE attention against SDPA with separate rotation, the written-out formula, their compiled form,
and xformers.
"""

import pytest

from benchmarks.cases import Case, attention_cases
from benchmarks.comparison import Setting, measure
from benchmarks.conftest import scale_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = attention_cases(scale_of(metafunc.config))
    pairs = [(case, direction) for case in cases for direction in case.passes]
    metafunc.parametrize(
        "case, direction", pairs, ids=[f"{case.name} {direction}" for case, direction in pairs]
    )


@pytest.mark.benchmark(group="rope_attention")
def test_attention(case: Case, direction: str, setting: Setting, drive, keep) -> None:
    keep(measure(case, direction, setting, drive))
