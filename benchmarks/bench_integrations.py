"""transformers' DINOv3 before and after `accelerate`, forward and training."""

import pytest

from benchmarks.cases import Case
from benchmarks.comparison import Setting, measure
from benchmarks.conftest import scale_of
from benchmarks.integrations import transformers_cases

pytest.importorskip("transformers", reason="pip install transformers to measure its DINOv3 models")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = transformers_cases(scale_of(metafunc.config))
    pairs = [(case, direction) for case in cases for direction in case.passes]
    metafunc.parametrize(
        "case, direction", pairs, ids=[f"{case.name} {direction}" for case, direction in pairs]
    )


@pytest.mark.benchmark(group="transformers")
def test_accelerate(case: Case, direction: str, setting: Setting, drive, keep) -> None:
    keep(measure(case, direction, setting, drive))
