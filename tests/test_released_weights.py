"""Released weights against published features, where somebody has them: nothing is downloaded."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3core.checkpoints import load_model, published, save_weights
from dinov3core.models import IMAGENET, build, list_models


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_released_weights_give_the_published_features(name):
    """DINOV3CORE_WEIGHTS: a folder with NAME.pth, NAME.safetensors or NAME, and the photograph."""
    folder = Path(os.environ.get("DINOV3CORE_WEIGHTS", "/nonexistent"))
    paths = [folder / f"{name}{suffix}" for suffix in (".pth", ".safetensors", "")]
    weights = next((path for path in paths if path.exists()), None)
    if weights is None:
        pytest.skip(
            f"set DINOV3CORE_WEIGHTS to a folder that holds released weights as {name}.pth or "
            f"{name}/"
        )
    assert published.check(weights, folder / "000000039769.jpg").name == name


def test_every_release_has_ten_published_values():
    assert {len(values) for values in published.PUBLISHED.values()} == {10}
    unpublished = {"vitl16plus", "vitso400m16", "vithuge216", "vitgiant216", "vit_nano8"}
    assert set(list_models()) - set(published.PUBLISHED) == unpublished


@pytest.fixture
def files(tmp_path):
    """Weights and a photograph of our own."""
    torch.manual_seed(0)
    save_weights(build("vit_nano8", patch_size=16), tmp_path / "mine.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "mine.safetensors", tmp_path / "photograph.png"


def test_other_weights_are_refused_with_the_nearest_release(files):
    with pytest.raises(
        ValueError,
        match=r"mine.safetensors: expected the published features .* nearest, [a-z0-9_]+;",
    ):
        published.check(*files)
    with pytest.raises(ValueError, match="expected COCO val2017 image 000000039769, got no image"):
        published.check(files[0], files[0])


def test_values_are_read_where_they_were_published(files, monkeypatch):
    """As resized floats with ImageNet statistics; a hair beyond the tolerance is told apart."""
    pixels = torch.from_numpy(np.array(Image.open(files[1]))).movedim(-1, 0)[None] / 255
    pixels = torch.nn.functional.interpolate(
        pixels, size=(224, 224), mode="bilinear", antialias=True
    )
    features = load_model(files[0]).model.features(IMAGENET.normalise(pixels), reshape=False)
    values = torch.cat([features.cls[0, :5], features.patches[0, 0, :5]]).detach()
    monkeypatch.setitem(published.PUBLISHED, "mine", values + 0.9e-3)
    assert published.check(*files).name == "mine"
    monkeypatch.setitem(published.PUBLISHED, "mine", values + 1.1e-3)
    with pytest.raises(ValueError, match=r"differ by 0\.0011 from the nearest, mine"):
        published.check(*files)
