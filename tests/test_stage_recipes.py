"""Recipes of stages: the published numbers of the 7B model, and what the smaller ones share."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3core.data.crops import sized_crops
from dinov3core.models import build
from dinov3core.models.rope import RopeSettings
from dinov3core.train.engine import stages
from dinov3core.train.engine.changes import stated
from dinov3core.train.engine.config import Earlier, Pretrain
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import PhasedSchedule, values
from dinov3core.train.recipes.registry import CHAINS, RECIPES
from dinov3core.train.recipes.vit7b16 import (
    vit7b16_gram,
    vit7b16_highres,
    vit7b16_pretrain,
)

PROCESSES = 256
PUBLISHED = (vit7b16_pretrain, vit7b16_gram, vit7b16_highres)
HAND_OVER = 1_000_000  # the step at which the published Gram terms are switched on


def test_the_network_is_the_released_one() -> None:
    with torch.device("meta"):
        released = build("vit7b16").settings
    for recipe in PUBLISHED:
        trained = recipe().backbone
        assert trained.drop_path == 0.4
        assert trained.rope == RopeSettings(rescale=2.0, dtype="bf16")
        assert replace(trained, drop_path=0.0, rope=released.rope) == released
        dino = recipe().dino
        ibot = recipe().ibot
        assert (dino.prototypes, dino.bottleneck, dino.hidden) == (262144, 512, 8192)
        assert (ibot.prototypes, ibot.bottleneck, ibot.hidden) == (98304, 384, 4096)


@pytest.mark.parametrize(
    ("recipe", "steps", "images", "crops"),
    [
        (vit7b16_pretrain, 1_000_000, 4096, (256, 112, None)),
        (vit7b16_gram, 200_000, 4096, (256, 112, 512)),
        (vit7b16_highres, 30_000, 2048, (512, 112, 768)),
    ],
)
def test_lengths_batches_and_crops(recipe: object, steps: int, images: int, crops: tuple) -> None:
    run: Pretrain = recipe()
    resolved = resolve(run, PROCESSES)
    assert resolved.steps == steps and run.run.batch_size * PROCESSES == images
    gram_size = run.gram and run.gram.crop_size
    assert (run.crops.global_size, run.crops.local_size, gram_size) == crops
    assert run.crops.local_count == 8 and not run.crops.flip
    optim = run.optim
    assert (optim.beta1, optim.beta2, optim.clip) == (0.9, 0.99, 30.0)
    assert (optim.layer_decay, optim.patch_embed_lr) == (0.98, 0.2)
    assert set(resolved.schedules["weight_decay"]) == {0.04}
    assert run.loss.koleo_weight == 0.1 and run.loss.dino_weight == run.loss.ibot_weight == 1.0


@pytest.mark.parametrize(
    ("recipe", "name", "step", "value"),
    [
        (vit7b16_pretrain, "lr", 0, 0.0),
        (vit7b16_pretrain, "lr", 1, 4e-9),
        (vit7b16_pretrain, "lr", 99_999, 3.99996e-4),
        (vit7b16_pretrain, "lr", 100_000, 4e-4),
        (vit7b16_pretrain, "lr", 999_999, 4e-4),
        (vit7b16_pretrain, "last_layer_lr", 4_999, 0.0),
        (vit7b16_pretrain, "last_layer_lr", 5_000, 2e-5),
        (vit7b16_pretrain, "momentum", 0, 0.994),
        (vit7b16_pretrain, "teacher_temperature", 0, 0.04),
        (vit7b16_pretrain, "teacher_temperature", 50_000, 0.055),
        (vit7b16_pretrain, "teacher_temperature", 100_000, 0.07),
        (vit7b16_gram, "lr", 0, 2.4e-4),
        (vit7b16_gram, "last_layer_lr", 0, 2.4e-4),
        (vit7b16_gram, "gram_weight", 0, 0.0),
        (vit7b16_gram, "gram_weight", 500, 1.001572),
        (vit7b16_gram, "gram_weight", 999, 2.0),
        (vit7b16_gram, "local_weight", 500, 0.749607),
        (vit7b16_gram, "local_weight", 1000, 0.5),
        (vit7b16_gram, "momentum", 0, 0.999),
        (vit7b16_highres, "lr", 0, 0.0),
        (vit7b16_highres, "lr", 5_000, 3.536090e-5),
        (vit7b16_highres, "lr", 9_999, 7.071068e-5),
        (vit7b16_highres, "lr", 29_999, 7.071068e-5),
        (vit7b16_highres, "gram_weight", 0, 1.5),
        (vit7b16_highres, "local_weight", 0, 0.5),
        (vit7b16_highres, "teacher_temperature", 0, 0.07),
        (vit7b16_highres, "momentum", 0, 0.999),
    ],
)
def test_schedules_at_published_steps(recipe: object, name: str, step: int, value: float) -> None:
    series = resolve(recipe(), PROCESSES).schedules[name]
    assert series[step] == pytest.approx(value, rel=5e-7, abs=1e-12)


def test_the_gram_stage_is_the_end_of_the_published_schedules() -> None:
    """There the run is continued, and every schedule is written from its first step."""
    length = HAND_OVER + 200_000
    published = {
        "lr": PhasedSchedule(0.0, 2.4e-4, 2.4e-4, warmup_epochs=100.0),
        "teacher_temperature": PhasedSchedule(0.04, 0.07, 0.07, warmup_epochs=100.0),
        "local_weight": PhasedSchedule(1.0, 1.0, 0.5, warmup_epochs=1000.0, cosine_epochs=1.0),
        "gram_weight": PhasedSchedule(0.0, 0.0, 2.0, warmup_epochs=1000.0, cosine_epochs=1.0),
        "momentum": PhasedSchedule(0.999, 0.999, 0.999),
        "weight_decay": PhasedSchedule(0.04, 0.04, 0.04),
    }
    schedules = resolve(vit7b16_gram(), PROCESSES).schedules
    for name, schedule in published.items():
        whole = values(schedule, length, 1000)
        np.testing.assert_allclose(schedules[name], whole[HAND_OVER:], rtol=1e-15, err_msg=name)
    last_layer = schedules["last_layer_lr"]  # the published freeze of 5000 steps is long over
    assert np.array_equal(last_layer, schedules["lr"])


def refreshes(recipe: Pretrain) -> list[int]:
    """The steps of a run after which its Gram teacher is taken anew."""
    resolved = resolve(recipe, PROCESSES)
    assert resolved.refreshes.begins_before(0) != isinstance(recipe.gram.teacher, Earlier)
    steps: list[int] = []
    for step in range(resolved.steps):
        if resolved.refreshes.due_after(step, len(steps)):
            steps.append(step)
    return steps


def test_gram_teachers_are_taken_anew_as_published() -> None:
    published = [1_009_999, 1_019_999, 1_029_999]
    assert [HAND_OVER + step for step in refreshes(vit7b16_gram())] == published
    assert refreshes(vit7b16_highres()) == []
    small = RECIPES["vits16_gram"]()
    of_length = [(step + 1) / small.run.total_steps for step in refreshes(small)]
    assert of_length == [(step + 1 - HAND_OVER) / 200_000 for step in published]


def test_the_sizes_of_high_resolution() -> None:
    recipe = vit7b16_highres()
    drawn = sized_crops(recipe.crops, recipe.gram.crops)
    rows = [(crops.global_size, crops.local_size, gram.size) for crops, gram in drawn]
    assert rows == [
        (512, 112, 768),
        (768, 112, 1152),
        (768, 160, 1152),  # 168 published, of which 10 x 10 patches are read
        (768, 224, 1152),
        (768, 336, 1152),
    ]
    assert recipe.crops.shares == pytest.approx((0.3, 0.3, 0.3, 0.05, 0.05))
    assert all(gram == 1.5 * side for side, _, gram in rows)


def test_koleo_of_high_resolution_searches_among_two_processes() -> None:
    loss = vit7b16_highres().loss
    assert (loss.koleo_distributed, loss.koleo_group_size, loss.koleo_topk) == (True, 16, 1)
    assert not vit7b16_gram().loss.koleo_distributed


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0].__name__)
def test_stages_of_a_chain_fit_each_other(chain: tuple) -> None:
    pretraining, gram, highres = (recipe() for recipe in chain)
    assert [run.run.take for run in (gram, highres)] == ["run", "teacher"]
    for before, stage in ((pretraining, gram), (gram, highres)):
        resolve(stage, PROCESSES if "7b" in stage.name else 1)
        stages.check_fit(stage, stated(before, 1))
        assert stage.data.source == pretraining.data.source
        assert stage.run.epochs < pretraining.run.epochs
    sides = [crops.global_size for crops in highres.crops.of_each_size]
    assert max(sides) >= 2 * pretraining.crops.global_size
    if gram.gram.crop_size:
        assert gram.gram.crop_size == 2 * gram.crops.global_size
        assert highres.gram.crop_size == 1.5 * highres.crops.global_size


def test_the_gram_teacher_of_the_quick_start_is_kept() -> None:
    step = RECIPES["quickstart_gram"]().gram.teacher.step
    run = RECIPES["quickstart"]().run
    assert step and step % run.keep_every == 0


def test_no_global_crop_of_a_scene_is_enlarged() -> None:
    recipe = RECIPES["quickstart_highres"]()
    sides = [crops.global_size for crops in recipe.crops.of_each_size]
    assert recipe.data.scene_size >= max(sides)
