"""Groups of KoLeo in a recipe: what one process holds of them, and what may be asked of them."""

import sys
from dataclasses import replace
from pathlib import Path

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiny_runs import made_up_batch, tiny_recipe

from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer


def with_koleo(**fields) -> Pretrain:
    recipe = tiny_recipe()
    return replace(recipe, loss=replace(recipe.loss, koleo_distributed=True, **fields))


def test_a_process_alone_holds_its_whole_group() -> None:
    """Of 4 images each: a group of 4 is one process, of 8 a pair of them."""
    recipe = with_koleo(koleo_group_size=4)
    alone = World(0, 1, torch.device("cpu"))
    batch = made_up_batch(recipe, 4)
    grouped, whole = (Trainer(one, alone).step(batch, 0) for one in (recipe, with_koleo()))
    assert grouped.values == whole.values
    with pytest.raises(ConfigError, match=r"koleo_group_size 8 must .* divide the 4 images of a"):
        resolve(with_koleo(koleo_group_size=8), 1)
    resolve(with_koleo(koleo_group_size=8), 4)


def test_neighbours_are_chosen_among_the_group() -> None:
    resolve(with_koleo(koleo_topk=7, koleo_group_size=8), 4)
    with pytest.raises(ConfigError, match="koleo_topk 8 must be below the 8 images"):
        resolve(with_koleo(koleo_topk=8, koleo_group_size=8), 4)
    resolve(with_koleo(koleo_topk=15), 4)
    with pytest.raises(ConfigError, match="koleo_topk 16 must be below the 16 images"):
        resolve(with_koleo(koleo_topk=16), 4)
