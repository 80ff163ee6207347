"""Patch embeddings for other channels and patch sizes answer as before to what they knew."""

import pytest
import torch

from dinov3core.checkpoints import adapt_patch_embed, load_model, load_weights, save_weights
from dinov3core.models import build

VIT = dict(depth=2, width=48, heads=3)


def made():
    torch.manual_seed(0)
    model = build("vit_nano8", **VIT, layer_scale=1.0)
    torch.nn.init.normal_(model.patch_embed.proj.bias)
    return model.eval()


@pytest.fixture
def file(tmp_path):
    save_weights(made(), tmp_path / "rgb.safetensors")
    return tmp_path / "rgb.safetensors"


@pytest.mark.parametrize("channels, rgb", [(4, (0, 1, 2)), (13, (3, 2, 1))])
def test_rgb_response_survives_more_channels(file, channels, rgb):
    images = torch.rand(2, channels, 32, 48)
    want = made().features(images[:, list(rgb)])
    for model in (build("vit_nano8", **VIT, layer_scale=1.0, in_channels=channels), None):
        if model is None:
            model, report = load_model(file, in_channels=channels, rgb_channels=rgb)
        else:
            report = load_weights(model, file, adapt_input=True, rgb_channels=rgb)
        assert report.adapted == f"3 channels, 8 px -> {channels} channels, 8 px"
        torch.testing.assert_close(model.eval().features(images).patches, want.patches)


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_images_survive_fewer_channels(file, channels):
    model, _ = load_model(file, in_channels=channels)
    grey = torch.rand(2, 1, 32, 48)
    want = made().features(grey.expand(-1, 3, -1, -1)).patches
    torch.testing.assert_close(
        model.features(grey.expand(-1, channels, -1, -1)).patches, want, rtol=1e-4, atol=1e-5
    )


def test_larger_patches_see_resized_images_as_the_smaller_saw_the_originals():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    patches = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    larger = adapt_patch_embed(weight, 3, 14)
    resized = torch.nn.functional.interpolate(patches, size=(14, 14), mode="bilinear")
    want, got = (
        torch.einsum("dchw,nchw->nd", w, x) for w, x in ((weight, patches), (larger, resized))
    )
    torch.testing.assert_close(got, want)


def test_smaller_patches_are_the_least_squares_solution():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    pixels = torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    resize = torch.nn.functional.interpolate(
        pixels, size=(8, 8), mode="bilinear", antialias=True
    ).flatten(1)
    smaller = adapt_patch_embed(weight, 3, 8)
    residual = smaller.flatten(2) @ resize.T - weight.flatten(2)
    torch.testing.assert_close(residual @ resize, torch.zeros(5, 3, 64, dtype=torch.float64))


def test_input_is_adapted_only_on_request(file):
    for change in (dict(in_channels=4), dict(patch_size=16)):
        with pytest.raises(ValueError, match="pass adapt_input=True"):
            load_weights(build("vit_nano8", **VIT, **change), file)
    model, report = load_model(file, patch_size=16)
    assert model.patch_size == 16 and report.adapted.endswith("3 channels, 16 px")
    with pytest.raises(ValueError, match="rgb_channels: expected 3 different"):
        load_model(file, in_channels=4, rgb_channels=(0, 1, 4))
    with pytest.raises(ValueError, match="expected 3 stored channels"):
        adapt_patch_embed(torch.ones(5, 4, 8, 8), 6, 8)
