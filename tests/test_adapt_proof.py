"""Adapting does no harm where a naive run does: k-NN on the images that are trained on.

Two proofs. A fast one, with true measurements: on images of colours, the recipe keeps what a small
network knows, and a run at a reckless rate forgets it and is stopped by the guard. And that of the
trial in LOG.md, on a finished quick start, whose folder DINOV3CORE_QUICKSTART names (three minutes
of one core): new heads at the quick start's own rate lose points there, the recipe does not.
"""

import os
import sys
from colorsys import hsv_to_rgb
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it off the path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import metrics_of

from benchmarks.learning import adapt_trial
from dinov3core.train.engine.config import Data, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.schedules import constant
from dinov3core.train.recipes.adapt import adapt
from dinov3core.train.recipes.quickstart import quickstart

HUES = 16
STEPS = 24


def draw_colours(folder: Path) -> None:
    """Blobs in sixteen hues of any brightness and saturation; the hue is the class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for hue in range(HUES):
            place = folder / split / f"hue{hue}"
            place.mkdir(parents=True)
            for index in range(20):
                turned = (hue + rng.uniform(-0.3, 0.3)) / HUES
                colour = np.array(hsv_to_rgb(turned % 1, rng.uniform(0.25, 0.9), 1.0))
                light = np.kron(rng.uniform(0.2, 1.0, (4, 4, 1)), np.ones((8, 8, 1)))
                pixels = light * colour + rng.normal(0, 0.1, (32, 32, 3))
                image = (pixels.clip(0, 1) * 255).astype(np.uint8)
                Image.fromarray(image).save(place / f"{index:02}.png")


def sized(recipe: Pretrain, images: Path, out: Path) -> Pretrain:
    crops = replace(recipe.crops, global_size=32, local_size=16, local_count=1)
    data = Data(source=str(images / "train"), probe=str(images), workers=0)
    run = replace(
        recipe.run,
        steps=STEPS,
        batch_size=16,
        device="cpu",
        threads=1,
        eval_every=STEPS // 4,
        checkpoint_every=STEPS,
        out=str(out),
    )
    return replace(recipe, crops=crops, data=data, run=run)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    draw_colours(folder)
    return folder


@pytest.fixture(scope="module")
def weights(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network trained without any distortion of colours."""
    recipe = quickstart()
    crops = replace(recipe.crops, jitter_probability=0.0, grayscale=0.0)
    backbone = replace(recipe.backbone, width=48, depth=2)
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(sized(replace(recipe, crops=crops, backbone=backbone), images, out))
    return out


def knn_of(out: Path) -> list[float]:
    return [row["knn"] for row in metrics_of(out) if row.get("event") == "eval"]


def careful(weights: Path, images: Path, out: Path) -> Pretrain:
    """The recipe, with a rate and a teacher for 24 steps instead of 4,000."""
    recipe = adapt(str(weights))
    optim = replace(recipe.optim, lr=replace(recipe.optim.lr, end=5e-4))
    teacher = replace(recipe.teacher, momentum=constant(0.9))
    return sized(replace(recipe, optim=optim, teacher=teacher), images, out)


def test_the_recipe_keeps_what_a_network_knows(weights: Path, images: Path, tmp_path: Path) -> None:
    summary = pretrain(careful(weights, images, tmp_path / "run"))
    start, *during = knn_of(tmp_path / "run")
    assert summary["steps"] == STEPS and summary["stopped"] == ""
    assert start > 70 and min(during) >= start - 1


def test_a_reckless_run_forgets_it_and_is_stopped(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    recipe = careful(weights, images, tmp_path / "run")
    optim = replace(quickstart().optim, lr=constant(0.1))
    summary = pretrain(replace(recipe, gram=None, optim=optim))
    start, *_, last = knn_of(tmp_path / "run")
    assert last < start - 10
    assert summary["steps"] < STEPS
    assert summary["stopped"].startswith("stopped by the guard after step")


def test_the_naive_recipe_ruins_a_quick_start_and_this_one_does_not(tmp_path: Path) -> None:
    init = os.environ.get("DINOV3CORE_QUICKSTART", "")
    if not init:
        pytest.skip("set DINOV3CORE_QUICKSTART to the folder of a finished quick start")
    arguments = adapt_trial.Arguments(init, steps=120, seeds=(1,), out=str(tmp_path))
    images = adapt_trial.Images("scenes", "scenes", "scenes", "scenes")
    runs = {run.arm: run for run in adapt_trial.curves(arguments, images)}
    assert runs["adapt"].lowest < runs["adapt"].error and not runs["adapt"].stopped
    assert runs["naive"].lowest > 3 and runs["published"].lowest > 3
