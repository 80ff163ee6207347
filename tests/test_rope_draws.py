"""Shift, jitter and rescale: drawn per block or per pass, by whom, and the same when repeated."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiny_runs import made_up_batch, tiny_recipe, with_run
from torch import Tensor

from dinov3core.models.rope import RopeSettings
from dinov3core.models.vit import VisionTransformer, VitSettings
from dinov3core.ops import rope
from dinov3core.ops.rope import RopeDraws
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
DEPTH = 3
STRENGTHS = {"shift": 0.5, "jitter": 2.0, "rescale": 3.0}
DRAWS = ("block", "forward")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RopeDraws]]:
    """Every draw of shift, jitter and rescale."""
    draws: list[RopeDraws] = []
    draw = rope.rope_draws

    def recording(**options: object) -> RopeDraws:
        one = draw(**options)
        if any(value is not None for value in one):
            draws.append(one)
        return one

    monkeypatch.setattr(rope, "rope_draws", recording)
    yield draws


def network(draw: str, **strengths: float) -> VisionTransformer:
    torch.manual_seed(0)
    settings = RopeSettings(draw=draw, **(strengths or STRENGTHS))
    size = {"width": 16, "depth": DEPTH, "heads": 2, "patch_size": 4}
    return VisionTransformer(VitSettings(**size, layer_scale=1.0, rope=settings, init_std=0.2))


def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, side, 12, generator=generator) for side in (16, 8)]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("draw", DRAWS)
def test_how_often_is_drawn(draw: str, strength: str, drawn: list[RopeDraws]) -> None:
    """For each crop set; a pass for chosen tokens draws as often as one for all."""
    model = network(draw, **{strength: STRENGTHS[strength]}).train()
    a_pass = 2 * (DEPTH if draw == "block" else 1)
    model.forward_features(views())
    assert len(drawn) == a_pass
    model.forward_chosen(views(), [None, None])
    assert len(drawn) == 2 * a_pass
    values = {tuple(getattr(one, strength).tolist()) for one in drawn}
    assert len(values) == len(drawn)  # no two alike: crop sets and passes have their own
    others = [name for name in STRENGTHS if name != strength]
    assert all(getattr(one, name) is None for one in drawn for name in others)


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_keep_to_their_strengths(draw: str, drawn: list[RopeDraws]) -> None:
    model = network(draw).train()
    for _ in range(20):
        model.forward_features(views())
    shifts = torch.stack([one.shift for one in drawn])
    jitters = torch.stack([one.jitter for one in drawn]).log()
    rescales = torch.stack([one.rescale for one in drawn]).log()
    assert shifts.shape[1] == jitters.shape[1] == 2 and rescales.shape[1] == 1
    for values, bound in ((shifts, 0.5), (jitters, math.log(2)), (rescales, math.log(3))):
        assert values.abs().max() <= bound + 1e-6
        assert values.min() < -0.5 * bound and values.max() > 0.5 * bound


def test_one_draw_is_what_every_block_reads() -> None:
    tables: list[Tensor] = []
    model = network("forward").train()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: tables.append(inputs[1].tables[0]))
    model.forward_features(views())
    assert len(tables) == DEPTH and all(torch.equal(table, tables[0]) for table in tables)


@pytest.mark.parametrize("draw", DRAWS)
def test_compiled_blocks_read_the_same_draws(draw: str) -> None:
    model = network(draw).train()
    torch.manual_seed(5)
    want = model.forward_features(views())
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.manual_seed(5)
    got = model.forward_features(views())
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(other.patches, one.patches)
    torch.manual_seed(6)
    assert not torch.equal(model.forward_features(views())[0].cls, want[0].cls)


def recipe_that_draws(draw: str, accumulation: int):
    recipe = with_run(tiny_recipe(), accumulation=accumulation)
    settings = RopeSettings(draw=draw, **STRENGTHS)
    return replace(recipe, backbone=replace(recipe.backbone, rope=settings, drop_path=0.3))


@pytest.mark.parametrize("draw", DRAWS)
def test_teachers_never_draw(draw: str, drawn: list[RopeDraws]) -> None:
    """The student does, for its two crop sets."""
    recipe = recipe_that_draws(draw, accumulation=1)
    trainer = Trainer(recipe, ALONE)
    assert trainer.gram_teacher is not None
    trainer.step(made_up_batch(recipe, 4), 0)
    assert len(drawn) == 2 * (recipe.backbone.depth if draw == "block" else 1)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_repeated_pass_of_accumulation_draws_the_same(
    draw: str, drawn: list[RopeDraws]
) -> None:
    """KoLeo of a whole batch is taken in a pass of its own, before the one that learns."""
    recipe = recipe_that_draws(draw, accumulation=2)
    trainer = Trainer(recipe, ALONE)
    tokens: list[Tensor] = []
    trainer.student.register_forward_hook(
        lambda module, inputs, output: tokens.append(output.cls.detach())
    )
    trainer.step(made_up_batch(recipe, 4), 0)
    first, second, first_again, second_again = tokens
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    half = len(drawn) // 2
    for one, again in zip(drawn[:half], drawn[half:], strict=True):
        assert all(map(torch.equal, one, again))
