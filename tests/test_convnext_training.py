"""A ConvNeXt as the network of a run: what it sees, what it learns with, what is left of it."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import (
    checkpoint_of,
    made_up_batch,
    metrics_of,
    tensors_of,
    tiny_convnext,
    tiny_recipe,
    with_run,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

import dinov3core
from dinov3core.checkpoints import load_model
from dinov3core.data.sizes import CropSizes
from dinov3core.models import ConvNeXt, ConvNeXtSettings
from dinov3core.models.outputs import hide_patches
from dinov3core.models.presets import list_models, settings_of
from dinov3core.train.engine import changes, optim, stages
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.named_models import open_backbone
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse

ALONE = World(0, 1, torch.device("cpu"))


# --- what it sees


@pytest.mark.parametrize("size", [(96, 64), (100, 70)])  # pixels beyond the last whole patch stay
def test_nothing_of_a_hidden_patch_reaches_an_output(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = ConvNeXt(tiny_convnext().backbone)
    masks = torch.tensor([[False, True, False, False, True, False], [False] * 6])
    images = torch.randn(2, 3, *size)
    repainted = images.clone()
    repainted[0, :, :32, 32:64] = 7.0
    repainted[0, :, 64:96, :32] = -7.0
    seen = model.forward_features(images, masks)
    same = model.forward_features(repainted, masks)
    assert torch.equal(same.cls, seen.cls) and torch.equal(same.patches, seen.patches)
    repainted[0, :, 32:64, :32] = 3.0  # patch 2 is not hidden
    assert not torch.equal(model(repainted, masks), seen.cls)


def test_hidden_patches_have_the_mean_colour() -> None:
    images = torch.ones(1, 2, 70, 64)
    hidden = hide_patches(images, torch.tensor([[False, True, False, False]]), 32)
    assert (hidden[0, :, :32, 32:] == 0).all() and hidden.sum() == images.sum() - 2 * 32 * 32
    assert images.min() == 1  # the images themselves are as they were
    with pytest.raises(ValueError, match=r"masks: expected bool \[1, 4\] for 70 x 64 px and p"):
        hide_patches(images, torch.zeros(1, 6, dtype=torch.bool), 32)


def test_chosen_tokens_are_those_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    model = ConvNeXt(tiny_convnext().backbone)
    images = [torch.randn(2, 3, 96, 64), torch.randn(3, 3, 32, 32)]
    masks = torch.rand(2, 6) < 0.5
    rows = torch.tensor([1, 4, 11])
    tokens = model.forward_features(images, [masks, None])
    chosen = model.forward_chosen(images, [masks, None], rows)
    assert torch.equal(chosen.patches, tokens[0].patches.flatten(0, 1)[rows])
    assert all(torch.equal(a, b.cls) for a, b in zip(chosen.cls, tokens, strict=True))
    everything = model.forward_chosen(images, [masks, None])
    assert torch.equal(everything.patches, tokens[0].patches.flatten(0, 1))


# --- what it learns with


def test_there_is_one_rate_and_decay_by_the_published_names() -> None:
    student = build_networks(tiny_convnext())
    groups = optim.param_groups(student, 1.0, 1.0)
    assert {group["lr_multiplier"] for group in groups} == {1.0}
    decayed = {
        parameter for group in groups if group["wd_multiplier"] for parameter in group["params"]
    }
    named = dict(student.backbone.named_parameters())
    assert named["downsample_layers.0.1.weight"] in decayed  # a norm whose name does not say so
    for name in ("norm.weight", "stages.0.0.norm.weight", "stages.0.0.gamma", "norm.bias"):
        assert named[name] not in decayed
    assert optim.largest_multiplier(4, 1.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--optim.layer-decay 0.9", r"optim.layer_decay 0.9 and optim.patch_embed_lr 1 are for bl"),
        ("--optim.patch-embed-lr 0.2", r"optim.layer_decay 1 and optim.patch_embed_lr 0.2 are for"),
        ("--backbone.map-stride 16", r"backbone.map_stride 16 resamples maps of a model in use"),
        ("--backbone.depths 1 1 1", r"backbone.depths: expected a number for each of the 4 stages"),
        ("--backbone.widths 8 8 8 8 8", r"backbone.widths: expected a number for each of the 4 st"),
        (
            "--backbone.depths 1 1 0 1",
            r"backbone.depths: expected at least 1 and at most 1024",
        ),
        ("--backbone.drop-path 1", r"backbone.drop_path: expected at least 0 and below 1, got 1.0"),
        ("--backbone.in-channels 0", r"backbone.in_channels: expected at least 1 and at most 4096"),
        (
            "--crops.global-size 80",
            r"global crop 80 is not a multiple of the patch 32; use 64",
        ),
        ("--backbone.width 64", r"--backbone.width is an option of --backbone vit; give both"),
        ("--backbone resnet", r"--backbone: expected vit, convnext or module, got 'resnet'"),
    ],
)
def test_what_a_convnext_cannot_do_is_refused(change: str, sentence: str) -> None:
    command = "quickstart --backbone convnext --crops.local-size 32 --optim.layer-decay 1"
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        resolve(parse([*command.split(), "--optim.patch-embed-lr", "1", *change.split()]), 1)


def test_the_command_line_chooses_the_kind() -> None:
    command = "quickstart --backbone convnext --backbone.depths 1 1 2 1 --backbone.widths 8 8 8 16"
    backbone = parse(command.split()).backbone
    assert backbone == ConvNeXtSettings((1, 1, 2, 1), (8, 8, 8, 16))
    assert (backbone.width, backbone.patch_size) == (16, 32)
    assert parse(["quickstart", "--backbone", "vit"]) == parse(["quickstart"])


@pytest.mark.parametrize("name", list_models())
def test_settings_of_a_name_are_those_of_the_network(name: str) -> None:
    settings = settings_of(name)
    with torch.device("meta"):
        model = dinov3core.models.build(name)
    assert model.settings == settings
    for field in ("width", "patch_size", "in_channels"):
        assert getattr(model, field) == getattr(settings, field)


def test_another_kind_of_network_does_not_continue_a_run() -> None:
    before = changes.stated(tiny_recipe(), 1)
    stage = with_run(tiny_convnext(), from_="tiny")
    with pytest.raises(ConfigError, match=r"was trained with backbone vit and this stage has"):
        stages.check_fit(stage, before)
    stages.check_fit(stage, changes.stated(tiny_convnext(), 1))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_weight_of_the_student_learns(accumulation: int) -> None:
    recipe = with_run(tiny_convnext(), accumulation=accumulation)
    trainer = Trainer(recipe, ALONE)
    before = {name: value.clone() for name, value in trainer.student.named_parameters()}
    report = trainer.step(made_up_batch(recipe, 4), 0)
    assert report.finite and report.values["ibot"] > 0 and report.values["gram"] > 0
    after = dict(trainer.student.named_parameters())
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_micro_batches_add_up_to_the_batch() -> None:
    values = []
    for accumulation in (1, 2):
        recipe = with_run(tiny_convnext(), accumulation=accumulation)
        values.append(Trainer(recipe, ALONE).step(made_up_batch(recipe, 4), 0).values)
    whole, parts = values
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)
def test_every_size_has_graphs_of_its_own_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_module = CompileCounter(), nn.Module.compile
    options = {"backend": counter, "fullgraph": True}
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **own: compile_module(self, **options, **own)
    )
    torch._dynamo.reset()
    recipe = tiny_convnext()
    several = replace(recipe.crops, other_sizes=(CropSizes(0.5, 64, 32),))
    recipe = with_run(replace(recipe, crops=several), compile=True, epoch_steps=40)
    trainer = Trainer(recipe, ALONE)
    of_each_size = [replace(recipe, crops=crops) for crops in recipe.crops.of_each_size]
    graphs_after = []
    for passing in range(3):
        for place, of_size in enumerate(of_each_size):
            step = 2 * passing + place
            trainer.step(made_up_batch(of_size, 4, seed=step), step)
        graphs_after.append(counter.frame_count)

    # Each of 4 stages: the student's for two sizes of global crops and one of local ones, and those
    # of both teachers for the global ones. Heads: those of student and teacher, for two sizes.
    stages_of_all = 4 * (3 + 2)
    assert graphs_after == graphs_after[:1] * 3
    assert stages_of_all < graphs_after[0] <= stages_of_all + 4


# --- what is left of it


def small_run(out: Path) -> Pretrain:
    recipe = tiny_convnext()
    data = replace(recipe.data, scenes=32, scene_size=96)
    fields = dict(epoch_steps=4, checkpoint_every=2, eval_every=2, log_every=1, out=str(out))
    return with_run(replace(recipe, data=data, name="convnext"), **fields)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convnext") / "run"
    summary = pretrain(small_run(out))
    assert summary["steps"] == 4 and summary["knn_after"] is not None
    return out


def test_a_resumed_run_is_the_same_to_the_last_bit(straight: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(checkpoint_of(resumed, 4))
    (resumed / "summary.json").unlink()
    pretrain(small_run(resumed))
    want = tensors_of(straight, 4, tmp_path / "straight.pt")
    got = tensors_of(resumed, 4, tmp_path / "resumed.pt")
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    assert metrics_of(resumed) == metrics_of(straight)


def test_the_teacher_of_a_run_is_a_model_like_any_other(straight: Path, tmp_path: Path) -> None:
    model, report = load_model(straight)
    assert isinstance(model, ConvNeXt) and report.layout == "dinov3core"
    tensors = tensors_of(straight, 4, tmp_path / "straight.pt")
    assert torch.equal(model.stages[2][1].gamma, tensors["teacher.backbone.stages.2.1.gamma"])
    opened = open_backbone(str(straight))
    assert opened.size == 96 and opened.backbone.settings.widths == (8, 12, 16, 32)
    features = dinov3core.load(straight, device="cpu").features(torch.rand(1, 3, 96, 64))
    assert features.cls.shape == (1, 32)


def test_weights_of_a_run_start_another(straight: Path, tmp_path: Path) -> None:
    recipe = with_run(tiny_convnext(), init=str(straight))
    begun = build_networks(recipe).backbone.state_dict()
    assert all(
        torch.equal(begun[name], x) for name, x in load_model(straight)[0].state_dict().items()
    )
    with pytest.raises(ConfigError, match=r"^run.init: .* expected "):
        build_networks(with_run(tiny_recipe(), init=str(straight)))
