"""Backbones of any kind as teachers: their own features, on the students' grid, or one sentence."""

import contextlib
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov3core.checkpoints import save_weights
from dinov3core.image_statistics import IMAGENET, SATELLITE, ImageStatistics
from dinov3core.losses import resize_patches
from dinov3core.models import ConvNeXt, ConvNeXtSettings, VisionTransformer, VitSettings
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.frozen_features import (
    Backbone,
    FrozenFeatures,
    Pixels,
    open_teacher,
    teacher_names,
)
from dinov3core.train.engine.distillation.frozen_teacher import teacher_input

HALF = ImageStatistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def vit(patch_size=8, statistics=IMAGENET):
    torch.manual_seed(0)
    settings = VitSettings(
        width=32, depth=2, heads=2, patch_size=patch_size, registers=2, layer_scale=1.0
    )
    model = VisionTransformer(settings).eval()
    model.statistics = statistics
    return model


def pixels(grid=(6, 6), statistics=IMAGENET, channels=3):
    return Pixels(channels, statistics, grid)


def crops(side=48, count=3, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, side, side, generator=generator)


def package(name):
    """A package that only these tests need, or a word on why they skip."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        pytest.skip(f"{name} cannot be imported here ({error})")


def same(teacher, images, cls, patches):
    rows = teacher(images)
    torch.testing.assert_close(rows.cls, cls, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(rows.patches, patches.flatten(0, 1), rtol=1e-5, atol=2e-5)


def test_our_model_by_its_file(tmp_path):
    model = vit()
    save_weights(model, tmp_path / "weights.safetensors")
    teacher = open_teacher("ours", str(tmp_path / "weights.safetensors"), pixels())
    with torch.no_grad():
        tokens = model.forward_features(crops())
    same(teacher, crops(), tokens.cls, tokens.patches)
    assert (teacher.name, teacher.patch_size) == ("ours", 8)
    assert (teacher.cls_width, teacher.patch_width) == (32, 32)


def test_rows_asked_for_and_no_crops():
    teacher = FrozenFeatures("ours", Backbone(vit(), 8), pixels())
    chosen = torch.tensor([107, 0, 40])
    assert torch.equal(teacher(crops(), chosen).patches, teacher(crops()).patches[chosen])
    none = teacher(crops(count=0))
    assert (none.cls.shape, none.patches.shape) == ((0, 32), (0, 32))


def test_it_never_changes_and_keeps_no_graph():
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = FrozenFeatures("ours", Backbone(model, 8), pixels())
    images = crops().requires_grad_()
    assert not teacher(images).cls.requires_grad
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("patch_size", [4, 16])
def test_patches_of_another_size_see_the_crops_resized(patch_size):
    model = vit(patch_size)
    teacher = FrozenFeatures("ours", Backbone(model, patch_size), pixels())
    resized = teacher_input(crops(), (6, 6), patch_size)
    assert resized.shape[-1] == 6 * patch_size
    with torch.no_grad():
        tokens = model.forward_features(resized)
    same(teacher, crops(), tokens.cls, tokens.patches)
    same(teacher, resized, tokens.cls, tokens.patches)  # and nothing where that was done already


def test_another_grid_is_resized_to_the_students():
    """A teacher at 32 pixels has 4 x 4 patches of 8, and its students 6 x 6."""
    model = vit()
    teacher = FrozenFeatures("ours", Backbone(model, 8), pixels(), size=32)
    small = F.interpolate(crops(), size=(32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        tokens = model.forward_features(small)
    patches = resize_patches(tokens.patches, (4, 4), (6, 6), mode="bilinear", antialias=True)
    assert patches.shape[1] == 36
    same(teacher, crops(), tokens.cls, patches)


def test_pixels_are_restated_for_its_own_statistics():
    """The same picture, as the run and as the teacher normalises it."""
    model = vit(statistics=SATELLITE)
    picture = torch.rand(2, 3, 48, 48)
    teacher = FrozenFeatures("ours", Backbone(model, 8, SATELLITE), pixels(statistics=IMAGENET))
    with torch.no_grad():
        tokens = model.forward_features(SATELLITE.normalise(picture))
    same(teacher, IMAGENET.normalise(picture), tokens.cls, tokens.patches)
    with torch.no_grad():
        unlike = model.forward_features(IMAGENET.normalise(picture))
    assert (unlike.cls - tokens.cls).abs().max() > 1e-3  # else nothing was tested


class Returning(nn.Module):
    """A module of somebody who hands over what `view` makes of a map [n, 5, h, w]."""

    def __init__(self, view):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)
        self.view = view

    def forward(self, images):
        return self.view(self.conv(images))


def test_any_module_that_returns_a_map():
    module = Returning(lambda grid: grid)
    teacher = FrozenFeatures("mine", Backbone(module, 8), pixels())
    with torch.no_grad():
        patches = module(crops()).flatten(2).mT
    same(teacher, crops(), patches.mean(1), patches)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_any_module_that_returns_tokens(prefix):
    def tokens(grid):
        patches = grid.flatten(2).mT
        return torch.cat([patches[:, :prefix] + 7, patches], 1)

    module = Returning(tokens)
    teacher = FrozenFeatures("mine", Backbone(module, 8, prefix_tokens=prefix), pixels())
    with torch.no_grad():
        output = module(crops())
    cls = output[:, 0] if prefix else output.mean(1)
    same(teacher, crops(), cls, output[:, prefix:])


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (lambda grid: grid.flatten(2).mT, "expected 6 x 6 patches, got 35"),
        (lambda grid: grid[..., 1:], "expected 6 x 6 patches, got 6 x 5"),
        (lambda grid: grid.mean((2, 3)), r"got \[1, 5\]"),
        (lambda grid: {"features": grid}, "got dict"),
    ],
    ids=["a token short", "a column short", "pooled", "a dictionary"],
)
def test_what_is_no_features_gets_a_sentence(view, word):
    with pytest.raises(ValueError, match=f"teacher mine gives no features .* {word}"):
        FrozenFeatures("mine", Backbone(Returning(view), 8), pixels())


def test_a_size_off_its_patches():
    with pytest.raises(ValueError, match="size 50; give size=48 or size=56"):
        FrozenFeatures("mine", Backbone(vit(), 8), pixels(), size=50)


def test_a_grid_that_is_no_square():
    model = vit()
    teacher = FrozenFeatures("ours", Backbone(model, 8), pixels(grid=(3, 6)), size=48)
    assert teacher.input_size == (48, 96)
    assert teacher(torch.randn(2, 3, 24, 48)).patches.shape == (2 * 18, 32)


def test_our_convnext():
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtSettings(depths=(1, 1, 1, 1), widths=(8, 12, 16, 24))).eval()
    teacher = FrozenFeatures("convnext", Backbone(model, model.patch_size), pixels(grid=(2, 2)))
    with torch.no_grad():
        tokens = model.forward_features(crops(side=64))
    same(teacher, crops(side=64), tokens.cls, tokens.patches)


def test_fingerprints_tell_weights_statistics_and_sizes_apart():
    model = vit()
    other = vit()
    with torch.no_grad():
        other.norm.bias[3] += 1e-6
    prints = [
        FrozenFeatures("ours", backbone, seen, size=size).fingerprint
        for backbone, seen, size in [
            (Backbone(model, 8, IMAGENET), pixels(), 0),
            (Backbone(other, 8, IMAGENET), pixels(), 0),
            (Backbone(model, 8, SATELLITE), pixels(), 0),
            (Backbone(model, 8, IMAGENET), pixels(statistics=HALF), 0),
            (Backbone(model, 8, IMAGENET), pixels(), 96),
            (Backbone(model, 8, IMAGENET), pixels(grid=(12, 12)), 96),
            (Backbone(model, 8, IMAGENET), pixels(grid=(4, 4)), 96),
        ]
    ]
    assert len(set(prints)) == len(prints)
    again = FrozenFeatures("another name", Backbone(vit(), 8, IMAGENET), pixels())
    assert again.fingerprint == prints[0]


def test_names_of_teachers():
    given = ["runs/vitb/", "timm:vit_small_patch14_dinov2.lvd142m", "weights/a.b.pth"]
    given += ["transformers:facebook/dinov2-small", "other/vitb", "timm:vit_tiny=weights/x.pth"]
    want = ["vitb", "vit_small_patch14_dinov2_lvd142m", "a_b", "dinov2-small", "vitb_no2", "x"]
    assert teacher_names(given) == want


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_package_that_is_missing_is_named(kind, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    with pytest.raises(ConfigError, match=f"needs the package {kind}.* pip install {kind}$"):
        open_teacher("theirs", f"{kind}:anything", pixels())


def test_nothing_there_names_the_other_ways():
    with pytest.raises(ConfigError, match=r"teacher.teachers: .*timm:NAME or transformers:NAME"):
        open_teacher("theirs", "timmm:vit", pixels())


# Models of timm, with random weights.


def timm_file(timm, name, tmp_path, **arguments):
    """A model of timm with random weights, and a file of them."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    file = tmp_path / "weights.safetensors"
    importlib.import_module("safetensors.torch").save_file(model.state_dict(), file)
    return model, file


@contextlib.contextmanager
def small(timm, monkeypatch, arguments):
    """timm.create_model makes models of this size within."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **(arguments | k)))
    yield
    monkeypatch.setattr(timm, "create_model", create)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_timm_transformer_at_another_size(name, tmp_path, monkeypatch):
    timm = package("timm")
    with small(timm, monkeypatch, dict(depth=2)):
        model, file = timm_file(timm, name, tmp_path, num_classes=0, dynamic_img_size=True)
        teacher = open_teacher("theirs", f"timm:{name}={file}", pixels(statistics=HALF))
    assert teacher.input_size == (96, 96)
    picture = torch.rand(2, 3, 96, 96)
    theirs = ImageStatistics(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std")))
    with torch.no_grad():
        tokens = model.forward_features(theirs.normalise(picture))
    same(teacher, HALF.normalise(picture), tokens[:, 0], tokens[:, model.num_prefix_tokens :])


@pytest.mark.parametrize(
    ("name", "stride", "arguments"),
    [
        ("convnext_atto", 32, {}),
        ("resnet18", 32, {}),
        ("swin_tiny_patch4_window7_224", 32, dict(depths=(1, 1, 1, 1))),
        ("vit_base_patch16_siglip_224", 16, dict(depth=1, embed_dim=64, num_heads=2)),
    ],
)
def test_a_timm_model_without_cls_gives_what_it_pools(
    name, stride, arguments, tmp_path, monkeypatch
):
    timm = package("timm")
    with small(timm, monkeypatch, arguments):
        model, file = timm_file(timm, name, tmp_path, num_classes=0)
        seen = pixels(grid=(224 // stride,) * 2, statistics=HALF)
        teacher = open_teacher("theirs", f"timm:{name}={file}", seen)
    assert (teacher.patch_size, teacher.input_size) == (stride, (224, 224))
    picture = torch.rand(2, 3, 224, 224)
    theirs = ImageStatistics(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std")))
    with torch.no_grad():
        features = model.forward_features(theirs.normalise(picture))
        pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4 and name.startswith("swin"):
        features = features.flatten(1, 2)
    elif features.ndim == 4:
        features = features.flatten(2).mT
    same(teacher, HALF.normalise(picture), pooled, features)


def test_a_head_in_the_file_of_a_timm_model_is_left_aside(tmp_path):
    timm = package("timm")
    _, file = timm_file(timm, "resnet18", tmp_path, num_classes=7)
    open_teacher("theirs", f"timm:resnet18={file}", pixels(grid=(2, 2)))


def test_timm_sentences(tmp_path):
    timm = package("timm")
    with pytest.raises(ConfigError, match="timm:no_such_model cannot be opened: Unknown model"):
        open_teacher("theirs", "timm:no_such_model", pixels())
    _, file = timm_file(timm, "resnet18", tmp_path)
    with pytest.raises(ConfigError, match=r"expected the weights of this model, but .* of another"):
        open_teacher("theirs", f"timm:resnet34={file}", pixels())
    with pytest.raises(ConfigError, match="found nothing there"):
        open_teacher("theirs", f"timm:resnet18={tmp_path / 'nothing.pth'}", pixels())


# Models of transformers, with random weights.

WIDTHS = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)


def transformers_model(kind):
    """(model, tokens before its patches, stride)"""
    transformers = package("transformers")
    torch.manual_seed(0)
    sizes = dict(image_size=64, patch_size=8)
    if kind == "vit":
        config = transformers.ViTConfig(**WIDTHS, **sizes)
        return transformers.ViTModel(config).eval(), 1, 8
    if kind == "dinov2 with registers":
        config = transformers.Dinov2WithRegistersConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, **sizes
        )
        return transformers.Dinov2WithRegistersModel(config).eval(), 5, 8
    if kind == "dinov3":
        config = transformers.DINOv3ViTConfig(**WIDTHS, **sizes, num_register_tokens=3)
        return transformers.DINOv3ViTModel(config).eval(), 4, 8
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**WIDTHS, **sizes)
        return transformers.CLIPVisionModel(config).eval(), 1, 8
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(**WIDTHS, **sizes)
        return transformers.SiglipVisionModel(config).eval(), 0, 8
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config).eval(), 0, 32


def moved(model):
    """Away from initial weights, at which norms change nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "kind", ["vit", "dinov2 with registers", "dinov3", "clip", "siglip", "convnext"]
)
def test_a_transformers_model(kind, tmp_path):
    model, prefix, stride = transformers_model(kind)
    moved(model)
    model.save_pretrained(tmp_path)
    stated = {"image_mean": SATELLITE.mean, "image_std": SATELLITE.std, "image_processor_type": "X"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    seen = pixels(grid=(6, 6), statistics=HALF)
    teacher = open_teacher("theirs", f"transformers:{tmp_path}", seen)
    assert teacher.input_size == (6 * stride, 6 * stride)

    picture = torch.rand(2, 3, 6 * stride, 6 * stride)
    at_another_size = (
        {}
        if kind in ("convnext", "dinov3") or "dinov2" in kind
        else {"interpolate_pos_encoding": True}
    )
    with torch.no_grad():
        output = model(SATELLITE.normalise(picture), **at_another_size)
    hidden = output.last_hidden_state
    if kind == "clip":  # whose CLS alone comes after its last norm
        hidden = getattr(model, "vision_model", model).post_layernorm(hidden)
        torch.testing.assert_close(hidden[:, 0], output.pooler_output)
    if kind == "convnext":
        hidden = hidden.flatten(2).mT
    cls = hidden[:, 0] if prefix else output.pooler_output
    same(teacher, HALF.normalise(picture), cls, hidden[:, prefix:])


def test_transformers_sentences(tmp_path):
    transformers = package("transformers")
    config = transformers.ViTConfig(**WIDTHS, image_size=64, patch_size=8, num_channels=4)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="takes images of 4 channels, and those of this run have 3"
    ):
        open_teacher("theirs", f"transformers:{tmp_path}", pixels())
    # Nothing but tensors is read, and no code.
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_teacher("theirs", f"transformers:{tmp_path}", pixels())
