"""One, four and thirteen channels on rectangles, from files to training steps and features."""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_recipe

from dinov3core.checkpoints import load_model
from dinov3core.extract import main as extract
from dinov3core.models import ImageStatistics
from dinov3core.train.engine.loop import pretrain

SCALE = 10000  # of the stored integers, as satellite reflectances have it


def smooth(channels, rng):
    """An image [H, W, C], not square, smooth enough to have something to learn."""
    coarse = torch.from_numpy(rng.random((1, channels, 4, 5)))
    fine = torch.nn.functional.interpolate(
        coarse, size=(40, 56), mode="bicubic", align_corners=True
    )[0].clamp(0, 1)
    return (fine.movedim(0, -1).numpy() * SCALE).astype(np.uint16)


def goes_through(tmp_path, arrays):
    """Train two steps on `arrays` [H, W, C] saved as files, then extract features."""
    folder, channels = tmp_path / "images", arrays[0].shape[2]
    folder.mkdir()
    for index, array in enumerate(arrays):
        np.save(folder / f"{index:03d}.npy", array)
    recipe = tiny_recipe()
    mean, std = (0.5,) * channels, (0.25,) * channels
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, in_channels=channels),
        crops=replace(recipe.crops, global_size=(24, 32), local_size=(16, 24), mean=mean, std=std),
        data=replace(recipe.data, source=str(folder), channel_scale=float(SCALE), probe="none"),
        run=replace(recipe.run, epoch_steps=2, out=str(tmp_path / "run")),
    )
    summary = pretrain(recipe)
    assert summary["steps"] == 2 and summary["bad_steps"] == summary["skipped_images"] == 0

    model, report = load_model(tmp_path / "run")
    assert model.in_channels == channels and report.loaded == report.total
    assert model.statistics == ImageStatistics(mean, std)
    out = tmp_path / "features.safetensors"
    options = ["--size", "32", "--channel-scale", str(SCALE)]
    extract([str(folder), "--model", str(tmp_path / "run"), "--out", str(out), *options])
    found = load_file(out)
    assert found["readable"].all() and len(found["cls"]) == len(arrays)
    assert torch.isfinite(found["cls"]).all() and found["cls"].std(0).min() > 0


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_made_up_bands(tmp_path, channels):
    rng = np.random.default_rng(0)
    goes_through(tmp_path, [smooth(channels, rng) for _ in range(8)])


def test_sentinel_2(tmp_path):
    path = Path(os.environ.get("DINOV3CORE_DATA", "/nonexistent")) / "ms" / "eurosat_ms270.npz"
    if not path.is_file():
        pytest.skip("set DINOV3CORE_DATA to a folder of image sets with ms/eurosat_ms270.npz")
    with np.load(path) as file:
        bands = file["hi"][:12].astype(np.uint16) * 256 + file["lo"][:12]
    goes_through(tmp_path, list(bands.transpose(0, 2, 3, 1)))
