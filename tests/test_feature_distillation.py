"""Students of teachers without heads: what they learn, of whom, and what a checkpoint holds of it."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import snapshot, tiny_recipe, with_run
from torch import nn
from two_processes import joined, run_ranks

from dinov3core.checkpoints import load_model
from dinov3core.data.batch import Batch
from dinov3core.data.masks import batch_masks
from dinov3core.data.scenes import render
from dinov3core.image_statistics import IMAGENET, ImageStatistics
from dinov3core.losses import feature_sums, standardised, statistics_of, unexplained_share
from dinov3core.models import VisionTransformer, VitSettings
from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.checkpoint import CheckpointError, Contents, Kept
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.features import (
    UNUSED_FIELDS,
    FeatureDistillation,
    load_adapters,
    teacher_features,
)
from dinov3core.train.engine.distillation.frozen_features import (
    Backbone,
    FrozenFeatures,
    Pixels,
    open_teacher,
)
from dinov3core.train.engine.distillation.frozen_teacher import TeacherRows
from dinov3core.train.engine.distillation.settings import Features, FeatureTeacher
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import dotted
from dinov3core.train.engine.schedules import constant
from dinov3core.train.engine.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SIDE = 48  # 6 x 6 patches of 8
PIXELS = Pixels(3, IMAGENET, (6, 6))
TWO = Features((FeatureTeacher("a"), FeatureTeacher("b", share=3.0)), 1.0, 0.5)
ONE = Features((FeatureTeacher("a"),))


def recipe_of(**run):
    """The tiny recipe as a student of teachers without heads has it."""
    tiny = tiny_recipe()
    tiny = replace(
        tiny,
        gram=None,
        backbone=replace(tiny.backbone, untie_local_cls_norm=False),
        crops=replace(tiny.crops, global_size=SIDE, local_count=0),
        optim=replace(tiny.optim, lr=constant(5e-3), weight_decay=constant(0.0)),
    )
    return with_run(tiny, **{"epoch_steps": 200, **run})


def batch(step=0, images=4, rank=0):
    """Built-in scenes, each image twice."""
    first = (step * 2 + rank) * images
    pixels = torch.from_numpy(render(range(first, first + images), size=SIDE).images)
    if pixels.shape[-1] == 3:
        pixels = pixels.movedim(-1, 1)
    crops = IMAGENET.normalise(pixels.float() / 255)
    rng = __import__("numpy").random.default_rng(0)
    masks = batch_masks(2 * images, (6, 6), tiny_recipe().masks, rng)
    crops = torch.cat([crops, crops.flip(3)])
    return Batch(crops, crops[:0], None, *masks, range(first, first + images))


def random_vit(patch_size=8, seed=7):
    torch.manual_seed(seed)
    return VisionTransformer(
        VitSettings(
            width=24, depth=1, heads=2, patch_size=patch_size, layer_scale=1.0, init_std=0.2
        )
    )


class Louder(nn.Module):
    """Another module's features, so many times as large."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner = inner
        self.factor = factor

    def forward(self, images):
        return self.factor * self.inner(images)


def convolution(factor=1.0):
    torch.manual_seed(9)
    return Louder(nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Tanh()), factor)


def teachers(factor=1.0, names=("vit", "conv")):
    """A random ViT, and a random convolution whose features are `factor` times as large."""
    both = (
        FrozenFeatures("vit", Backbone(random_vit(), 8, IMAGENET), PIXELS),
        FrozenFeatures("conv", Backbone(convolution(factor), 8), PIXELS),
    )
    return [teacher for teacher in both if teacher.name in names]


def rows_of(teachers, batch):
    return {teacher.name: teacher(batch.global_crops) for teacher in teachers}


def trainer_of(recipe, features, teachers, world=ALONE):
    method = FeatureDistillation(recipe, world, features, teachers)
    return Trainer(recipe, world, method=method)


def trained(features, teachers, steps, different=4):
    """The values of each step, over batches that come again."""
    trainer = trainer_of(recipe_of(), features, teachers)
    values = []
    for step in range(steps):
        views = batch(step % different)
        values.append(trainer.step(views, step, targets=rows_of(teachers, views)).values)
    return trainer, values


def test_two_teachers_of_very_different_magnitude_are_both_matched():
    _, values = trained(TWO, teachers(factor=1000.0), 60)
    for name in ("cls_vit", "patch_vit", "cls_conv", "patch_conv"):
        print(name, values[0][name], values[-1][name])
        assert 0.8 < values[0][name] < 1.5, name
        assert values[-1][name] < 0.5, name
    last = values[-1]
    # shares of 1 and 3, weights of 1 and 0.5
    loss = 0.25 * (last["cls_vit"] + 0.5 * last["patch_vit"])
    loss += 0.75 * (last["cls_conv"] + 0.5 * last["patch_conv"])
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
