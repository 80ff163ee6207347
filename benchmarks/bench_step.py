"""A whole training step, student to moving average, against the same algorithm written plainly in torch."""

import pytest
import torch
from dinov3core.train.config import Pretrain

from benchmarks import steps
from benchmarks.comparison import Setting
from benchmarks.conftest import scale_of
from benchmarks.measure import device_timer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    recipes = steps.recipes(scale_of(metafunc.config))
    metafunc.parametrize("recipe", recipes, ids=[recipe.name for recipe in recipes])


@pytest.mark.benchmark(group="training_step", timer=device_timer)
def test_step(recipe: Pretrain, device: torch.device, setting: Setting, drive, keep) -> None:
    keep(steps.measure(recipe, device, setting.limits, 4 * setting.seconds, setting.compiled, drive))
