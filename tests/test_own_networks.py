"""Networks of your own as students: what they give, what is checked, what is left of a run."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    checkpoint_of,
    made_up_batch,
    metrics_of,
    tensors_of,
    tiny_convnext,
    with_run,
)
from torch import Tensor, nn

from dinov3core.checkpoints import load_model, save_weights
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.models import AsBackbone, ModuleSettings
from dinov3core.models.head import ProjectionHead
from dinov3core.models.networks import Networks
from dinov3core.train.engine.building import build_networks, layer_complaints
from dinov3core.train.engine.config import ConfigError, Earlier, File, GramAnchor, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.named_models import open_backbone
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse

ALONE = World(0, 1, torch.device("cpu"))
SOURCE = """
from dinov3core.models import AsBackbone
from torch import nn

def net():
    layers = nn.Conv2d(3, 12, 16, 16), nn.GELU(), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 1)
    return AsBackbone(nn.Sequential(*layers), width=12, patch_size=16)

def averaged():
    return AsBackbone(nn.Sequential(nn.Conv2d(3, 12, 16, 16), nn.BatchNorm2d(12)), width=12)

def overlapping():
    return AsBackbone(nn.Conv2d(3, 12, 16, 8), width=12)

def bare():
    return nn.Conv2d(3, 12, 16, 16)
"""


class Tokens(nn.Module):
    """CLS, two registers and patches of 8 px, as a model of transformers gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, 3, 10))

    def forward(self, images: Tensor) -> object:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.prefix.expand(len(images), -1, -1), patches], 1)
        return type("Output", (), {"last_hidden_state": tokens})

    def forward_features(self, images: Tensor) -> Tensor:
        return self.patches(images)


# --- what they give


def test_tokens_are_cls_registers_and_patches() -> None:
    model = Tokens()
    backbone = AsBackbone(model, width=10, patch_size=8, prefix_tokens=3)
    images = torch.randn(2, 3, 16, 24)
    want = model(images).last_hidden_state
    tokens = backbone.forward_features(images)
    assert torch.equal(tokens.cls, want[:, 0]) and torch.equal(tokens.registers, want[:, 1:3])
    assert torch.equal(tokens.patches, want[:, 3:])
    features = backbone.features(images)
    assert torch.equal(features.patches, want[:, 3:].mT.unflatten(2, (2, 3)))
    chosen = backbone.forward_chosen([images], [None], torch.tensor([0, 7]))
    assert torch.equal(chosen.patches, torch.stack([want[0, 3], want[1, 4]]))
    with pytest.raises(ValueError, match=r"^norm: expected True, as Tokens gives"):
        backbone.features(images, norm=False)


def test_of_a_map_cls_is_the_mean_patch() -> None:
    model = Tokens()
    backbone = AsBackbone(model, width=10, patch_size=8, prefix_tokens=3, method="forward_features")
    images = torch.randn(2, 3, 16, 24)
    tokens = backbone.forward_features(images)
    assert torch.equal(tokens.patches, model.patches(images).flatten(2).mT)
    assert torch.equal(tokens.cls, tokens.patches.mean(1)) and tokens.registers.shape == (2, 0, 10)


def test_hidden_patches_are_not_seen() -> None:
    backbone = AsBackbone(Tokens(), width=10, patch_size=8, prefix_tokens=3)
    images = torch.randn(1, 3, 16, 16)
    masks = torch.tensor([[True, False, False, True]])
    patches = backbone.forward_features(images, masks).patches
    nothing = backbone.module.patches.bias
    assert torch.equal(patches[0, 0], nothing) and torch.equal(patches[0, 3], nothing)
    seen = backbone.forward_features(images).patches
    torch.testing.assert_close(patches[0, 1:3], seen[0, 1:3])


@pytest.mark.parametrize("stated", [{"width": 11}, {"patch_size": 16}, {"prefix_tokens": 1}])
def test_another_shape_than_stated_is_one_sentence(stated: dict[str, int]) -> None:
    backbone = AsBackbone(Tokens(), **{"width": 10, "patch_size": 8, "prefix_tokens": 3} | stated)
    with pytest.raises(ValueError, match=r"^Tokens: expected \d tokens and .* state its width"):
        backbone(torch.randn(1, 3, 16, 16))


# --- in a run


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user, on the path."""
    (tmp_path / "my_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


def own_recipe(make: str = "my_nets:net", **settings: int) -> Pretrain:
    recipe = tiny_convnext()
    return replace(
        recipe,
        name="own",
        backbone=ModuleSettings(make, **{"width": 12} | settings),
        crops=replace(recipe.crops, global_size=48, local_size=16),
        data=replace(recipe.data, scenes=32, scene_size=48),
    )


def run_in(out: Path) -> Pretrain:
    fields = dict(epoch_steps=4, checkpoint_every=2, eval_every=2, log_every=1, out=str(out))
    return with_run(own_recipe(), **fields)


def test_a_network_of_ones_own_trains_resumes_and_leaves_its_weights(
    nets: None, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    summary = pretrain(run_in(out))
    assert summary["steps"] == 4 and summary["knn_after"] is not None

    resumed = Path(shutil.copytree(out, tmp_path / "resumed"))
    shutil.rmtree(checkpoint_of(resumed, 4))
    (resumed / "summary.json").unlink()
    pretrain(run_in(resumed))
    want = tensors_of(out, 4, tmp_path / "straight.pt")
    got = tensors_of(resumed, 4, tmp_path / "resumed.pt")
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    assert metrics_of(resumed) == metrics_of(out)

    file = checkpoint_of(out, 4) / "teacher.safetensors"
    backbone = build_networks(own_recipe()).backbone
    backbone.load_state_dict(load_file(file))
    assert torch.equal(backbone.module[0].weight, want["teacher.backbone.module.0.weight"])
    encoder = FrozenEncoder(backbone)
    assert encoder(torch.rand(1, 3, 32, 48)).patches.shape == (1, 12, 2, 3)
    sentence = r"expected a network of this project, got the state dict of one of your own .AsBack"
    for load in (load_model, lambda path: open_backbone(str(path))):
        for place in (out, file):
            with pytest.raises(ValueError, match=sentence):
                load(place)
    with pytest.raises(ValueError, match=r"^format: expected dinov3core for a network of your own"):
        save_weights(backbone, tmp_path / "folder", "huggingface")


def test_networks_from_python_train_as_well() -> None:
    """`Trainer(initial=...)` asks nobody for the function that makes them."""
    recipe = own_recipe("nowhere:net", width=10, patch_size=8)
    backbone = AsBackbone(Tokens(), width=10, patch_size=8, prefix_tokens=3)
    heads = [ProjectionHead(10, head) for head in (recipe.dino, recipe.ibot)]
    trainer = Trainer(recipe, ALONE, Networks(backbone, *heads))
    before = backbone.module.prefix.clone()
    report = trainer.step(made_up_batch(recipe, 4), 0)
    assert report.finite and report.values["ibot"] > 0
    assert not torch.equal(before, trainer.student.backbone.module.prefix)


def test_the_command_line_names_the_function(nets: None) -> None:
    command = "quickstart --backbone module --backbone.make my_nets:net --backbone.width 12"
    command += " --optim.layer-decay 1 --optim.patch-embed-lr 1 --crops.local-size 32"
    recipe = parse(command.split())
    assert recipe.backbone == ModuleSettings("my_nets:net", width=12)
    resolve(recipe, 1)
    assert isinstance(build_networks(recipe).backbone, AsBackbone)


@pytest.mark.parametrize(
    ("make", "settings", "sentence"),
    [
        ("my_nets:absent", {}, r"backbone.make my_nets:absent: module 'my_nets' has no attribute"),
        ("no_nets:net", {}, r"backbone.make no_nets:net: No module named 'no_nets'; write PACKAGE"),
        ("my_nets:bare", {}, r"backbone.make my_nets:bare: expected a FeatureModule, got Conv2d; "),
        ("my_nets:net", {"width": 13}, r"backbone.width: expected 12, as my_nets:net makes it, go"),
        ("my_nets:averaged", {}, r"module.1 is a BatchNorm, whose running statistics the average "),
        ("my_nets:overlapping", {}, r"Conv2d: expected 0 tokens and 3 x 3 patches of 12 channels "),
    ],
)
def test_a_function_that_makes_no_student_is_one_sentence(
    nets: None, make: str, settings: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"^a network of this recipe cannot be built: {sentence}"):
        build_networks(own_recipe(make, **settings))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: replace(r, backbone=ModuleSettings("net")), r"backbone.make: expected the func"),
        (lambda r: with_run(r, init="x"), r"run.init loads weights into networks of this project"),
        (lambda r: with_run(r, compile=True), r"run.compile compiles parts of networks of this p"),
        (lambda r: replace(r, gram=GramAnchor(File("x"))), r"gram.teacher file and earlier load n"),
        (
            lambda r: with_run(replace(r, gram=GramAnchor(Earlier())), from_="x"),
            r"gram.teacher file and earlier load networks of this project",
        ),
        (
            lambda r: replace(r, optim=replace(r.optim, layer_decay=0.9)),
            r"optim.layer_decay 0.9 and optim.patch_embed_lr 1 are for blocks and patch embedding ",
        ),
    ],
)
def test_what_needs_a_network_of_this_project_is_refused(change, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        resolve(change(own_recipe()), 1)


def test_it_begins_with_no_layers_of_a_teacher() -> None:
    (complaint,) = layer_complaints(own_recipe().backbone, tiny_convnext().backbone)
    assert complaint.startswith("the student is a network of your own and the teacher a ConvNeXt,")


# --- those of timm


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("vit_tiny_patch16_224", {"width": 192, "prefix_tokens": 1}),
        ("convnext_atto", {"width": 320, "patch_size": 32}),
    ],
)
def test_a_model_of_timm_learns(name: str, stated: dict[str, int]) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        pytest.skip(f"timm, which needs torchvision, cannot be imported here ({error})")
    sized = {"dynamic_img_size": True} if "vit" in name else {}
    model = timm.create_model(name, num_classes=0, **sized)
    backbone = AsBackbone(model, method="forward_features", **stated)
    recipe = replace(
        own_recipe(width=stated["width"], patch_size=backbone.patch_size),
        crops=replace(tiny_convnext().crops, global_size=64, local_size=32),
    )
    heads = [ProjectionHead(backbone.width, head) for head in (recipe.dino, recipe.ibot)]
    trainer = Trainer(recipe, ALONE, Networks(backbone, *heads))
    first = next(value for name, value in model.named_parameters() if name.endswith("bias"))
    before = first.clone()  # of the layer that sees the image; nothing decays it
    assert trainer.step(made_up_batch(recipe, 4), 0).finite
    assert not torch.equal(first, before)
