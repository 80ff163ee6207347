"""Adapting does no harm, and the naive recipe does: k-NN on the images that are trained on.

The backbone has learned to tell colours apart, which the colour jitter of the objective calls
noise: new heads and a high rate make it forget them at once.
"""

import sys
from colorsys import hsv_to_rgb
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it off the path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import metrics_of

from dinov3core.train.engine.config import Data, Pretrain
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule
from dinov3core.train.recipes.adapt import adapt
from dinov3core.train.recipes.quickstart import quickstart

HUES = 8
STEPS = 40


def draw_colours(folder: Path) -> None:
    """Blobs in eight hues of any brightness; the hue is the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 24)):
        for hue in range(HUES):
            place = folder / split / f"hue{hue}"
            place.mkdir(parents=True)
            for index in range(count):
                turned = (hue + rng.uniform(-0.3, 0.3)) / HUES
                colour = np.array(hsv_to_rgb(turned % 1, rng.uniform(0.4, 0.9), 1.0))
                light = np.kron(rng.uniform(0.2, 1.0, (4, 4, 1)), np.ones((8, 8, 1)))
                pixels = light * colour + rng.normal(0, 0.05, (32, 32, 3))
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
    recipe = replace(recipe, crops=crops, backbone=backbone)
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(sized(recipe, images, out))
    return out


def knn_of(out: Path) -> list[float]:
    return [row["knn"] for row in metrics_of(out) if row.get("event") == "eval"]


def careful(weights: Path, images: Path, out: Path) -> Pretrain:
    """The recipe, with a rate and a teacher for 40 steps instead of 4,000."""
    recipe = adapt(str(weights))
    optim = replace(recipe.optim, lr=replace(recipe.optim.lr, end=5e-4))
    momentum = PhasedSchedule(0.9, 0.9, 0.9)
    teacher = replace(recipe.teacher, momentum=momentum)
    return sized(replace(recipe, optim=optim, teacher=teacher), images, out)


def naive(weights: Path, images: Path, out: Path) -> Pretrain:
    """Everything at once, new heads, no Gram loss; the same crops."""
    recipe = careful(weights, images, out)
    quick = quickstart()
    optim = replace(quick.optim, lr=CosineSchedule(1e-2, 1e-4, warmup_epochs=0.5))
    return replace(recipe, name="naive", gram=None, optim=optim, guard=Guard())


def test_the_recipe_does_no_harm_and_the_naive_one_does(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    kept = pretrain(careful(weights, images, tmp_path / "careful"))
    pretrain(naive(weights, images, tmp_path / "naive"))
    start, *with_care = knn_of(tmp_path / "careful")
    begun, *without = knn_of(tmp_path / "naive")
    print(start, with_care, without)
    assert start == begun > 60
    assert min(with_care) >= start - 2 and kept["stopped"] == ""
    assert min(without) < start - 10


def test_the_guard_would_have_stopped_the_naive_one(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    recipe = replace(naive(weights, images, tmp_path / "run"), guard=Guard(margin=2.0))
    summary = pretrain(recipe)
    assert summary["steps"] < STEPS
    assert summary["stopped"].startswith("stopped by the guard after step")
