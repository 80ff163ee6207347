"""No field of a recipe gives a traceback: a value is refused in one sentence, or the run runs.

`DINOV3CORE_FUZZ=7` repeats the drawn trials with seven times as many.
"""

import contextlib
import io
import json
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from PIL import Image
from tiny_runs import made_up_batch, tiny_command, tiny_recipe

from dinov3core.bounds import Bounds, Field, complaints, fields_of
from dinov3core.data.crops import CropSettings, MultiCrop
from dinov3core.data.errors import DataError
from dinov3core.data.masks import MaskSettings
from dinov3core.data.sizes import CropSizes
from dinov3core.models import HeadSettings, RopeSettings, VitSettings
from dinov3core.train.engine import config
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import dotted
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse

TRIALS = 30 * int(os.environ.get("DINOV3CORE_FUZZ", "1"))
KINDS = (
    *(config.Pretrain, VitSettings, RopeSettings, HeadSettings, config.Loss),
    *(config.GramAnchor, config.Ema, config.Snapshot, config.File),
    *(CropSettings, MaskSettings, config.Data, config.Optim, config.Teacher, config.Run),
    *(CosineSchedule, PhasedSchedule, Guard),
)
NUMBERS = {int, float}


def numeric(kind: Any) -> bool:
    """Whether a value of this type is a number, or holds some."""
    return kind in NUMBERS or any(numeric(inner) for inner in get_args(kind))


@pytest.mark.parametrize(
    ("owner", "field"),
    [(owner, field) for owner in (*KINDS, CropSizes) for field in fields_of(owner)],
    ids=lambda part: part.name if isinstance(part, Field) else part.__name__,
)
def test_every_number_has_bounds(owner: type, field: Field) -> None:
    """A schedule has those of its values."""
    if numeric(field.kind) or field.kind == CosineSchedule | PhasedSchedule:
        assert field.bounds is not None, f"{owner.__name__}.{field.name} states no bounds"


def test_the_kinds_are_those_of_a_recipe() -> None:
    def kinds(value: object) -> Iterator[type]:
        if is_dataclass(value):
            yield type(value)
            for item in fields(value):
                yield from kinds(getattr(value, item.name))

    teachers = (config.Ema(), config.Snapshot(), config.File())
    recipes = [replace(parse(["vits16_1gpu"]), gram=config.GramAnchor(one)) for one in teachers]
    assert {kind for recipe in recipes for kind in kinds(recipe)} == set(KINDS)


def with_field(settings: Any, name: str, value: object) -> Any:
    """A dataclass tree with one leaf, by its dotted name, replaced."""
    part, _, rest = name.partition(".")
    part = next(field.name for field in fields_of(type(settings)) if field.word == part)
    changed = with_field(getattr(settings, part), rest, value) if rest else value
    return replace(settings, **{part: changed})


LEAVES = [name for name, _ in dotted(tiny_recipe())]
NUMERIC = [name for name, value in dotted(tiny_recipe()) if type(value) in (int, float)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 10**400], ids=str)
def test_no_number_without_end_is_accepted(value: float) -> None:
    for name in NUMERIC:
        with pytest.raises(ConfigError, match=name.rpartition(".")[0]):
            resolve(with_field(tiny_recipe(), name, value), 1)


OTHER_TYPES = ("text", None, True, 2.5, [3], (1, "a"), np.int64(3), b"x")


@pytest.mark.parametrize("value", OTHER_TYPES, ids=repr)
def test_values_of_another_type_are_refused_by_name(value: object) -> None:
    recipe = with_field(tiny_recipe(), "run.epochs", 1.0)
    for name, default in dotted(recipe):
        if type(value) is type(default):
            continue
        with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got "):
            resolve(with_field(recipe, name, value), 1)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("optim.lr.base", "nan", "optim.lr.base: expected at least -1000000 and at .*, got nan"),
        (
            "optim.lr.base",
            "-1",
            "optim.lr: expected .* at most 10 at every step, got -0.1.* at step 1 of 20",
        ),
        ("optim.lr.base", "1e308", "optim.lr.base: expected at least -1000000 .*, got 1e.308"),
        ("optim.lr.final", "1e5", "optim.lr: expected .* at every step, got .* of 20, from Cos"),
        ("optim.beta1", "1", "optim.beta1: expected at least 0 and below 1, got 1.0"),
        ("optim.beta2", "2", "optim.beta2: expected at least 0 and below 1, got 2.0"),
        ("optim.eps", "0", "optim.eps: expected at least 1e-15 and at most 1, got 0.0"),
        ("optim.layer-decay", "0", "optim.layer_decay: expected above 0 and at most 1, got 0.0"),
        ("loss.dino-weight", "-0.5", "loss.dino_weight: expected at least 0 and .*, got -0.5"),
        ("loss.student-temperature", "0", "loss.student_temperature: .* at least 0.001 .*, got 0"),
        ("loss.sinkhorn-iterations", "1001", "loss.sinkhorn_iterations: .* at most 1000, got 1001"),
        ("teacher.momentum.peak", "1.5", "teacher.momentum: .* at most 1 at every step, got 1.5"),
        (
            "teacher.temperature.end",
            "0",
            "teacher.temperature: expected at least 0.001 .* got 0.0005.* at step 17 of 20",
        ),
        ("backbone.rope.jitter", "0.5", "backbone.rope.jitter: .* at most 1000, or 0, got 0.5"),
        ("backbone.rope.base", "0", "backbone.rope.base: expected at least 0.01"),
        ("backbone.drop-path", "1", "backbone.drop_path: expected at least 0 and below 1, got 1.0"),
        ("backbone.ffn-ratio", "0.01", "backbone.ffn_ratio 0.01 of a width of 32 leaves no"),
        ("crops.hue", "0.6", "crops.hue: expected at least 0 and at most 0.5, got 0.6"),
        ("data.scenes", "10000001", "data.scenes: expected .* at most 10000000, got 10000001"),
        ("run.epochs", "nan", "run.epochs: expected above 0 and at most 1000000, got nan"),
        ("run.epoch-steps", "10000001", "run.epochs 1 of run.epoch_steps 10000001: .*00001"),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        resolve(parse(tiny_command(Path("run"), f"--{field}={value}")), 1)


def test_the_ends_of_bounds() -> None:
    assert all(Bounds(0, 1).hold(x) for x in (0, -0.0, 1))
    assert not any(Bounds(0, 1).hold(x) for x in (1.1, -1e-9))
    assert [Bounds(0, 1, open_low=True).hold(x) for x in (0, 1)] == [False, True]
    assert [Bounds(0, 1, open_high=True).hold(x) for x in (0, 1)] == [True, False]
    assert [Bounds(1, 2, off=0).hold(x) for x in (0, 0.5, 1)] == [True, False, True]
    assert not any(Bounds().hold(x) for x in (math.nan, math.inf, -math.inf))
    assert str(Bounds(2, math.inf)) == "at least 2" and str(Bounds()) == "a finite number"


def test_the_longest_texts_are_cut_in_messages() -> None:
    (sentence,) = complaints(replace(MaskSettings(), probability="x" * 10_000))
    assert len(sentence) < 140 and sentence.endswith("...")


VALUES = (
    *("nan", "inf", "-inf", "-1", "-0.0", "0", "0.5", "1", "2", "3"),
    *("1e308", "-1e308", "1e-300", "5e-324"),
    *(
        "1000000000000",
        "999999999999999999999999",
        "1e9",
        "",
        " ",
        "x",
        "None",
        "True",
        "\u00b2",
        "\uff11",
        "\u00fcn\u00ef",
        "\udcff",
    ),
    *("../up", "/dev/null", "x" * 5000, "9" * 5000),
)
COMPILES = "run.compile"  # minutes of a compiler, and nothing about ranges


def drawn(count: int) -> list[tuple[str, str]]:
    """(field, value) pairs, the same at every call; a longer list begins with the shorter one."""
    rng = random.Random(0)
    leaves = [name for name in LEAVES if name != COMPILES]
    return [(rng.choice(leaves), rng.choice(VALUES)) for _ in range(count)]


@pytest.mark.parametrize(("field", "value"), drawn(TRIALS), ids=lambda text: ascii(text)[:40])
def test_any_value_is_refused_in_a_sentence_or_trains(
    field: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--run.steps=2", "--data.probe=none", "--run.checkpoint-every=0", "--run.device=cpu")
    argv = tiny_command(Path("run"), *short, f"--{field.replace('_', '-')}={value}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            recipe = parse(argv)
    except SystemExit as refused:
        assert refused.code not in (0, None) and said.getvalue().strip()
        return
    except ConfigError as refused:
        assert str(refused)
        return
    trains_or_says_why(recipe)


def trains_or_says_why(recipe: Pretrain) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            summary = pretrain(recipe, argv=[])
    except (ConfigError, DataError, TrainingStopped) as refused:
        assert str(refused) and "\n" not in str(refused).strip()
        return
    rows = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert summary["steps"] == recipe.run.total_steps
    assert losses and all(loss is not None and math.isfinite(loss) for loss in losses)


def ends(owner: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of both ends of the bounds of fractional numbers, where included."""
    for field in fields_of(type(owner)):
        value, name = getattr(owner, field.name), prefix + field.name
        if is_dataclass(value):
            yield from ends(value, f"{name}.")
        elif field.kind is float:
            limits = (field.bounds.low, field.bounds.high)
            yield from ((name, float(end)) for end in limits if field.bounds.hold(end))


TRAINED = ("backbone", "dino", "ibot", "loss", "optim", "teacher", "gram")
ENDS = [pair for part in TRAINED for pair in ends(getattr(tiny_recipe(), part), f"{part}.")]


@pytest.mark.parametrize(("name", "value"), ENDS, ids=str)
def test_the_ends_of_every_range_train(name: str, value: float) -> None:
    recipe = with_field(tiny_recipe(), name, value)
    try:
        trainer = Trainer(recipe, World(0, 1, torch.device("cpu")))
    except ConfigError as refused:
        assert name in str(refused) or name.rpartition(".")[0] in str(refused)
        return
    batch = made_up_batch(recipe, recipe.run.batch_size)
    for step in range(3):
        report = trainer.step(batch, step)
        assert report.finite, report.values
    assert all(torch.isfinite(weights).all() for weights in trainer.student.parameters())


CROP_ENDS = list(ends(CropSettings(), "crops."))


@pytest.mark.parametrize(("name", "value"), CROP_ENDS, ids=str)
def test_the_ends_of_every_range_cut_crops(name: str, value: float) -> None:
    settings = with_field(tiny_recipe(), name, value).crops
    views = MultiCrop(settings)(Image.new("RGB", (40, 30), (200, 30, 90)), 0)
    assert all(torch.isfinite(view).all() for view in (*views.global_, *views.local))
