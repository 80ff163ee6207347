"""Recipes: no dead field, one sentence for wrong input, published numbers as published."""

import ast
import dataclasses
import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3core.data import crops, masks
from dinov3core.models import (
    ConvNeXtSettings,
    HeadSettings,
    ModuleSettings,
    RopeSettings,
    VitSettings,
)
from dinov3core.train.engine import config
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.imagenet import vitl16_im1k
from dinov3core.train.recipes.registry import RECIPES

ROOT = Path(__file__).resolve().parents[1]

# What code calls an instance of each class; validation (_complaints) does not count as use. In the
# file of the class itself that is also `settings`.
OWNERS = {
    config.Pretrain: {"recipe"},
    VitSettings: {"backbone"},
    ConvNeXtSettings: {"backbone"},
    ModuleSettings: {"backbone"},
    RopeSettings: {"rope"},
    HeadSettings: {"dino", "ibot"},
    config.Loss: {"loss"},
    config.GramAnchor: {"gram"},
    config.Ema: {"teacher"},
    config.Snapshot: {"teacher"},
    config.File: {"teacher"},
    crops.CropSettings: {"crops"},
    masks.MaskSettings: {"masks"},
    config.Data: {"data"},
    config.Optim: {"optim"},
    config.Teacher: {"teacher"},
    config.Run: {"run"},
    Guard: {"guard"},
}


def reads_of(tree: ast.AST, self_is: str = "self") -> Iterator[tuple[str, str]]:
    """(owner, attribute) of every attribute read; in a class, `self` is called after it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_complaints"):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = (
                owner.id
                if isinstance(owner, ast.Name)
                else owner.attr
                if isinstance(owner, ast.Attribute)
                else ""
            )
            yield (self_is if name == "self" else name), node.attr
        yield from reads_of(node, node.name if isinstance(node, ast.ClassDef) else self_is)


def reads_in(path: Path) -> set[tuple[str, str]]:
    return set(reads_of(ast.parse(path.read_text())))


@pytest.fixture(scope="module")
def reads() -> set[tuple[str, str]]:
    files = [path for room in ("train", "dinov3core") for path in (ROOT / room).rglob("*.py")]
    return {read for path in files for read in reads_in(path)}


FIELDS = [(kind, field.name) for kind in OWNERS for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_field_is_read(reads: set[tuple[str, str]], kind: type, field: str) -> None:
    names = OWNERS[kind] | {kind.__name__}
    stated_by = next(base for base in kind.__mro__ if field in base.__annotations__)
    at_home = reads_in(Path(inspect.getfile(stated_by)))
    assert ("settings", field) in at_home or any((name, field) in reads for name in names), (
        f"nothing reads {kind.__name__}.{field}"
    )


def test_every_part_of_a_recipe_is_covered() -> None:
    recipe = dataclasses.replace(vitl16_im1k(), gram=config.GramAnchor())
    parts = {type(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)} - {str}
    networks = {ConvNeXtSettings, ModuleSettings}
    inner = networks | {RopeSettings, config.Ema, config.Snapshot, config.File}
    assert parts == OWNERS.keys() - inner - {config.Pretrain}


def run_command(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[object, str]:
    """Exit status and words of `python train/pretrain.py ARGV`, boxes and line breaks removed."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train" / "pretrain.py"), run_name="__main__")
    code = stopped.value.code
    said = capsys.readouterr().err + (code if isinstance(code, str) else "")
    return code, re.sub(r"[^ -~]+|\s+", " ", said)


WRONG = [
    (
        "quikstart",
        r"error: unknown recipe 'quikstart'; did you mean quickstart\? Known: .*vitl16_im1k",
    ),
    ("zzz", r"error: unknown recipe 'zzz' *Known: quickstart"),
    ("quickstart --run.nothing-like-it 3", r"Unrecognized options: --run.nothing-like-it"),
    (
        "quickstart --run.epoks 3",
        r"Unrecognized options: --run.epoks.*Perhaps you meant.*--run.epochs",
    ),
    ("--run.batch-sise 3", r"Perhaps you meant.*--run.batch-size"),
    ("quickstart --run.epochs many", r"Error parsing --run.epochs: could not convert .*'many'"),
    ("quickstart --run.batch-size 2.5", r"Error parsing --run.batch-size.*'2.5'"),
    ("quickstart --backbone.ffn swigluu", r"invalid choice 'swigluu'.*'swiglu64'"),
    (
        "quickstart --crops.global-size 50",
        r"error: global crop 50 is not a multiple of the patch 8; use 48 or 56",
    ),
    ("quickstart --crops.local-size 4", r"error: local crop 4 is smaller than the patch 8"),
    ("quickstart --run.accumulation 3", r"error: run.batch_size 64 must be a multiple of .* 3"),
    (
        "quickstart --dino.prototypes 63",
        r"error: dino.prototypes is 63 for 64 images a step: .* at least 64",
    ),
    ("quickstart --run.epochs 0", r"error: run.epochs: expected above 0 and at most 1000000, got"),
    ("quickstart --run.epochs 0.25", r"error: optim.lr: a warm-up of 0.5 epochs is 50 steps but"),
    ("quickstart --optim.lr 1e-3", r"error: --optim.lr is a schedule: give --optim.lr.base 1e-3"),
    ("quickstart --optim.lr.base nan", r"error: optim.lr.base: expected at least .* got nan"),
    ("quickstart --optim.lr.base -1", r"error: optim.lr: expected at least 0 .* at step 1 of 600"),
    ("quickstart --optim.beta2 2", r"error: optim.beta2: expected at least 0 and below 1, got 2.0"),
    ("quickstart --loss.dino-weight -1", r"error: loss.dino_weight: expected at least 0 .* got -1"),
    ("quickstart --run.epochs nan", r"error: run.epochs: expected above 0 .* got nan"),
    ("quickstart --run.steps -1", r"error: run.steps: expected at least 0 .* got -1"),
    ("quickstart --backbone.width 1000000000", r"error: backbone.width: .* at most 65536, got 10"),
    (
        "quickstart --loss.koleo-group-size 96",
        r"error: loss.koleo_group_size 96 must be a multiple of the 64",
    ),
    (
        "quickstart --loss.koleo-group-size 64",
        r"error: loss.koleo_group_size 64 spans processes, but loss.koleo_distributed is False",
    ),
    (
        "quickstart --loss.koleo-weight 0 --loss.koleo-topk 64",
        r"error: loss.koleo_topk 64 must be below the 64 images it chooses among",
    ),
    (
        "quickstart --backbone.rope.base 0 --backbone.rope.min-period 0.5",
        r"error: backbone.rope.base: expected at least 0.01, or 0 beside both min_period and",
    ),
    (
        "quickstart --backbone.rope.max-period 8",
        r"max_period: expected 0 beside a base of 100.0, got 0.0 and 8.0; set .*base to 0",
    ),
    ("quickstart --backbone.in-channels 4", r"error: the built-in scenes have 3 channels"),
    (
        "quickstart --gram yes",
        r"error: --gram: expected none, or an option of it such as --gram.teacher, got 'yes'",
    ),
    (
        "quickstart --gram none --gram.tokens all",
        r"error: --gram none leaves no --gram.tokens; drop one of them",
    ),
    (
        "quickstart --gram.teacher yes",
        r"error: --gram.teacher: expected ema, snapshot, file or earlier, got 'yes'",
    ),
    (
        "quickstart --gram.teacher.every 3",
        r"error: --gram.teacher.every is an option of --gram.teacher snapshot; give both",
    ),
    ("quickstart --gram.weight 2", r"error: --gram.weight is a schedule: give --gram.weight.start"),
    ("quickstart --gram.teacher.epoks 3", r"Unrecognized options: --gram.teacher.epoks"),
    ("quickstart --gram.tokens some", r"invalid choice 'some' for argument '--gram.tokens'"),
    ("quickstart --gram.teacher file", r"error: gram.teacher.path: expected a file of weights, .*"),
]


@pytest.mark.parametrize(("command", "sentence"), WRONG)
def test_wrong_input_is_answered_in_one_sentence(
    command: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run_command(command.split(), monkeypatch, capsys)
    assert code not in (0, None)
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve_and_say_what_they_are(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name and recipe == parse([name])
    if name == "adapt":  # which starts from the weights that one names
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, init="weights"))
    resolved = resolve(recipe, 2)  # a KoLeo group may span two processes
    assert {len(series) for series in resolved.schedules.values()} == {recipe.run.total_steps}
    assert "Command: " in RECIPES[name].__doc__


def test_overrides_reach_every_level() -> None:
    made = parse(
        ["vitl16_im1k", "--run.batch-size", "8", "--backbone.rope.rescale", "2", "--optim.clip=30"]
    )
    assert (made.run.batch_size, made.backbone.rope.rescale, made.optim.clip) == (8, 2.0, 30.0)


PUBLISHED = [
    # architecture
    ("backbone.width", 1024), ("backbone.depth", 24), ("backbone.heads", 16),
    ("backbone.patch_size", 16), ("backbone.ffn", "mlp"), ("backbone.ffn_ratio", 4.0),
    ("backbone.norm", "layernorm"), ("backbone.registers", 0), ("backbone.qkv_bias", True),
    ("backbone.mask_k_bias", False), ("backbone.proj_bias", True), ("backbone.ffn_bias", True),
    ("backbone.untie_cls_norm", False),
    ("backbone.untie_local_cls_norm", False), ("backbone.drop_path", 0.3),
    ("backbone.layer_scale", 1e-5), ("backbone.init_std", 0.02), ("backbone.rope.base", 100.0),
    ("backbone.rope.normalize", "separate"), ("backbone.rope.shift", 0.0),
    ("backbone.rope.jitter", 0.0), ("backbone.rope.rescale", 0.0), ("backbone.rope.dtype", "bf16"),
    # heads
    *((f"{head}.{name}", value) for head in ("dino", "ibot") for name, value in (
        ("prototypes", 65536), ("hidden", 2048), ("bottleneck", 256), ("layers", 3),
        ("init_std", 0.02), ("prototype_std", 0.02))),
    # objective
    ("loss.dino_weight", 1.0), ("loss.ibot_weight", 1.0), ("loss.koleo_weight", 0.1),
    ("loss.koleo_distributed", False), ("loss.koleo_topk", 1), ("loss.student_temperature", 0.1),
    ("loss.sinkhorn_iterations", 3), ("loss.skip_same_crop", True), ("gram", None),
    # data
    ("crops.global_size", 224), ("crops.local_size", 96),
    ("crops.global_count", 2), ("crops.local_count", 8), ("crops.global_scale", (0.32, 1.0)),
    ("crops.local_scale", (0.05, 0.32)), ("crops.aspect", (3 / 4, 4 / 3)), ("crops.flip", True),
    ("crops.jitter_probability", 0.8), ("crops.brightness", 0.4), ("crops.contrast", 0.4),
    ("crops.saturation", 0.2), ("crops.hue", 0.1), ("crops.grayscale", 0.2),
    ("crops.solarize", 0.2), ("crops.blur", "executed"), ("crops.share_color_jitter", False),
    ("crops.local_inside_global", False), ("crops.rotation", 0.0),
    ("crops.mean", (0.485, 0.456, 0.406)), ("crops.std", (0.229, 0.224, 0.225)),
    ("masks.probability", 0.5), ("masks.ratio_min", 0.1), ("masks.ratio_max", 0.5),
    ("masks.circular_shift", False), ("data.workers", 10),
    # optimisation
    ("optim.lr_scaling", "sqrt_wrt_1024"), ("optim.beta1", 0.9), ("optim.beta2", 0.999),
    ("optim.eps", 1e-8), ("optim.clip", 3.0), ("optim.layer_decay", 0.9),
    ("optim.patch_embed_lr", 0.2), ("optim.freeze_last_layer_epochs", 1.0),
    # length
    ("run.epochs", 100), ("run.epoch_steps", 1250), ("run.total_steps", 125_000),
    ("run.batch_size", 64), ("run.accumulation", 1), ("run.precision", "bf16"),
    ("run.checkpoint_every", 3750), ("run.keep_checkpoints", 3), ("run.seed", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PUBLISHED)
def test_vitl16_im1k_is_the_published_recipe(name: str, value: object) -> None:
    found: object = vitl16_im1k()
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("series", "step", "value"),
    [
        ("lr", 0, 0.0),
        ("lr", 1, 4.525845e-7),
        ("lr", 12_499, 5.656854e-3),
        ("lr", 12_500, 5.656854e-3),
        ("lr", 62_500, 3.319992e-3),
        ("lr", 124_999, 1.0000011e-6),
        ("last_layer_lr", 1249, 0.0),
        ("last_layer_lr", 12_499, 5.656854e-3),
        ("weight_decay", 0, 0.04),
        ("weight_decay", 62_500, 0.22),
        ("momentum", 0, 0.992),
        ("momentum", 62_500, 0.996),
        ("teacher_temperature", 0, 0.04),
        ("teacher_temperature", 37_499, 0.07),
        ("teacher_temperature", 124_999, 0.07),
        ("local_weight", 1000, 1.0),
        ("gram_weight", 1000, 0.0),
    ],
)
def test_vitl16_im1k_follows_the_published_schedules(series: str, step: int, value: float) -> None:
    resolved = resolve(vitl16_im1k(), 32)  # 4 nodes of 8 processes
    assert resolved.schedules[series][step] == pytest.approx(value, rel=5e-7, abs=1e-15)


def test_block_masks_have_the_published_limits() -> None:
    assert (masks.MIN_BLOCK, masks.MAX_BLOCK_SHARE, masks.BLOCK_ASPECT, masks.ATTEMPTS) == (
        4,
        0.5,
        (0.3, 1 / 0.3),
        10,
    )


def test_the_last_layer_is_held_for_one_epoch_and_then_follows() -> None:
    schedules = resolve(vitl16_im1k(), 32).schedules
    assert not schedules["last_layer_lr"][:1250].any()
    assert (schedules["last_layer_lr"][1250:] == schedules["lr"][1250:]).all()
