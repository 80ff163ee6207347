"""Patch embeddings for other channels and patch sizes answer as before to what they knew."""

import pytest
import torch

from dinov3core.checkpoints import adapt_patch_embed, load_model, load_weights, save_weights
from dinov3core.models import ImageStatistics, build

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
        places = ", ".join(map(str, rgb))
        assert report.adapted == (
            f"3 channels, 8 px -> {channels} channels, 8 px; "
            f"red, green and blue are channels {places}, all others start at zero"
        )
        torch.testing.assert_close(model.eval().features(images).patches, want.patches)


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_images_survive_fewer_channels(file, channels):
    model, _ = load_model(file, in_channels=channels)
    grey = torch.rand(2, 1, 32, 48)
    want = made().features(grey.expand(-1, 3, -1, -1)).patches
    torch.testing.assert_close(
        model.features(grey.expand(-1, channels, -1, -1)).patches, want, rtol=1e-4, atol=1e-5
    )


GREY = dict(adapt_input=True, rgb_channels=())
PHOTOS = ImageStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def statistics_of(channels):
    """Another mean and deviation in every channel."""
    steps = range(channels)
    return ImageStatistics(
        tuple(0.1 + 0.05 * c for c in steps), tuple(0.05 + 0.03 * c for c in steps)
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_a_grey_image_in_all_channels_keeps_its_response(tmp_path, channels):
    """What is normalised by three means before is normalised by others now: pixels decide."""
    model = made()
    model.statistics = PHOTOS
    save_weights(model, tmp_path / "rgb.safetensors")
    grey = torch.rand(2, 1, 32, 48)
    want = model.features(PHOTOS.normalise(grey.expand(-1, 3, -1, -1)))
    wider = build("vit_nano8", **VIT, layer_scale=1.0, in_channels=channels)
    now = statistics_of(channels)
    report = load_weights(wider, tmp_path / "rgb.safetensors", statistics=now, **GREY)
    assert wider.statistics == now
    assert report.adapted == (
        f"3 channels, 8 px -> {channels} channels, 8 px; every channel has an equal share, so that "
        "grey images keep their response; restated for the image statistics of this run"
    )
    got = wider.eval().features(now.normalise(grey.expand(-1, channels, -1, -1)))
    torch.testing.assert_close(got.patches, want.patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 13])
def test_a_colour_image_keeps_its_response_under_other_statistics(tmp_path, channels):
    model = made()
    model.statistics = PHOTOS
    save_weights(model, tmp_path / "rgb.safetensors")
    rgb = (0, 1, 2) if channels == 3 else (3, 2, 1)
    images = torch.rand(2, channels, 32, 48)
    want = model.features(PHOTOS.normalise(images[:, list(rgb)]))
    wider = build("vit_nano8", **VIT, layer_scale=1.0, in_channels=channels)
    now = statistics_of(channels)
    options = dict(adapt_input=True, rgb_channels=rgb, statistics=now)
    load_weights(wider, tmp_path / "rgb.safetensors", **options)
    got = wider.eval().features(now.normalise(images))
    torch.testing.assert_close(got.patches, want.patches, rtol=1e-4, atol=1e-4)


def test_many_channels_go_back_to_one(tmp_path):
    torch.manual_seed(0)
    wide = build("vit_nano8", **VIT, layer_scale=1.0, in_channels=13).eval()
    save_weights(wide, tmp_path / "wide.safetensors")
    one = build("vit_nano8", **VIT, layer_scale=1.0, in_channels=1).eval()
    load_weights(one, tmp_path / "wide.safetensors", **GREY)
    grey = torch.rand(2, 1, 32, 48)
    want = wide.features(grey.expand(-1, 13, -1, -1)).patches
    torch.testing.assert_close(one.features(grey).patches, want, rtol=1e-4, atol=1e-4)


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
