"""A whole training step, student to moving average, against the same algorithm written plainly in
torch.
"""

import pytest

from benchmarks import steps
from benchmarks.comparison import Setting
from benchmarks.conftest import scale_of
from dinov3core.train.engine.config import Pretrain


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    recipes = steps.recipes(scale_of(metafunc.config))
    metafunc.parametrize("recipe", recipes, ids=[recipe.name for recipe in recipes])


@pytest.mark.benchmark(group="training_step")
def test_step(recipe: Pretrain, setting: Setting, drive, keep) -> None:
    keep(steps.measure(recipe, setting, drive))
