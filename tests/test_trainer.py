"""A step weighs its terms as the recipe says; the Gram teacher is updated when it should be."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import made_up_batch, tiny_recipe

from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.teacher import Refreshes
from dinov3core.train.engine.trainer import Trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_the_sum_of_its_terms_with_the_weights_of_the_recipe(accumulation: int) -> None:
    recipe = tiny_recipe()
    recipe = replace(
        recipe,
        loss=replace(recipe.loss, dino_weight=0.9, ibot_weight=0.4),
        run=replace(recipe.run, accumulation=accumulation),
    )
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")))
    values = trainer.step(made_up_batch(recipe, 4), 0).values
    # 2 global and 3 local crops: 2 pairs of global crops, 6 of a global and a local one
    dino = 2 / 8 * values["dino_global"] + 6 / 8 * 0.7 * values["dino_local"]
    koleo = 2 * values["koleo"]  # reported is the mean over global crops
    loss = 0.9 * dino + 0.4 * values["ibot"] + 0.5 * koleo + 2.0 * values["gram"]
    assert values["loss"] == pytest.approx(loss, rel=1e-6)


def refreshed(rule: Refreshes, steps: int) -> list[int]:
    """The steps after which the teacher of a run of so many is refreshed."""
    due: list[int] = []
    for step in range(steps):
        if rule.due_after(step, len(due)):
            due.append(step)
    return due


def test_a_file_is_refreshed_after_multiples_of_the_interval() -> None:
    rule = Refreshes(first=None, every=3, at_most=0)
    assert refreshed(rule, 15) == [2, 5, 8, 11, 14]
    assert not any(rule.begins_before(step) for step in range(15))


def test_a_snapshot_is_taken_before_its_step_and_refreshed_from_the_next_multiple_on() -> None:
    rule = Refreshes(first=6, every=3, at_most=0)
    assert [step for step in range(15) if rule.begins_before(step)] == [6]
    assert refreshed(rule, 15) == [8, 11, 14]
    assert refreshed(Refreshes(first=5, every=3, at_most=0), 15) == [5, 8, 11, 14]


def test_refreshes_end_with_the_last_one_allowed_and_an_interval_of_0_means_none() -> None:
    assert refreshed(Refreshes(first=None, every=3, at_most=2), 15) == [2, 5]
    assert refreshed(Refreshes(first=6, every=0, at_most=0), 15) == []


def test_the_published_stage_refreshes_its_teacher_three_times() -> None:
    """After iterations 1,009,999, 1,019,999 and 1,029,999 of a run continued at one million."""
    rule = Refreshes(first=None, every=10_000, at_most=3)
    assert refreshed(rule, 60_000) == [9_999, 19_999, 29_999]
