"""Students of teachers without heads: what they learn, of whom, and what a checkpoint holds."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import numpy as np
import pytest
import torch
from tiny_runs import snapshot, tiny_recipe, with_run
from torch import nn
from two_processes import joined, run_ranks

from dinov3core.checkpoints import load_model
from dinov3core.data.batch import Batch
from dinov3core.data.masks import BatchMasks, batch_masks
from dinov3core.data.scenes import render
from dinov3core.image_statistics import IMAGENET
from dinov3core.losses import feature_sums, standardised, statistics_of, unexplained_share
from dinov3core.models import VisionTransformer, VitSettings
from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.checkpoint import CheckpointError, Contents, Kept
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.exchange import Exchange, Plan
from dinov3core.train.engine.distillation.features import (
    UNUSED_FIELDS,
    FeatureDistillation,
    FeaturePass,
    load_adapters,
    teacher_features,
)
from dinov3core.train.engine.distillation.frozen_features import (
    Backbone,
    FrozenFeatures,
    Pixels,
    open_teacher,
)
from dinov3core.train.engine.distillation.heads import Views
from dinov3core.train.engine.distillation.settings import (
    Distill,
    Features,
    FeatureTeacher,
    Student,
)
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
    crops = IMAGENET.normalise(pixels.movedim(-1, 1).float() / 255)
    rng = np.random.default_rng(0)
    masks = batch_masks(2 * images, (6, 6), tiny_recipe().masks, rng)
    crops = torch.cat([crops, crops.flip(3)])
    return Batch(crops, crops[:0], None, *masks, positions=range(first, first + images))


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
    for name in ("cls_of_vit", "patches_of_vit", "cls_of_conv", "patches_of_conv"):
        assert 0.8 < values[0][name] < 1.5, name
        assert values[-1][name] < 0.5, name
    last = values[-1]
    # shares of 1 and 3, weights of 1 and 0.5
    loss = 0.25 * (last["cls_of_vit"] + 0.5 * last["patches_of_vit"])
    loss += 0.75 * (last["cls_of_conv"] + 0.5 * last["patches_of_conv"])
    assert last["loss"] == pytest.approx(loss, rel=1e-5)


def test_features_a_hundred_times_as_large_change_nothing():
    """Nor does the student of both teachers hear more of the louder one."""
    trainer, values = trained(TWO, teachers(), 4)
    louder, of_louder = trained(TWO, teachers(factor=100.0), 4)
    for one, other in zip(values, of_louder, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    weights = trainer.student.backbone.state_dict()
    for name, value in louder.student.backbone.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("patch_size", "size", "grid"), [(16, 0, 6), (8, 32, 4), (16, 64, 4)])
def test_a_teacher_of_other_patches_and_grids_is_learned(patch_size, size, grid):
    """Students have 6 x 6 patches of 8 pixels."""
    backbone = Backbone(random_vit(patch_size), patch_size, IMAGENET)
    teacher = FrozenFeatures("vit", backbone, PIXELS, size=size)
    assert teacher.input_size[0] // teacher.patch_size == grid
    _, values = trained(ONE, [teacher], 60)
    assert values[-1]["cls_of_vit"] < 0.7 * values[0]["cls_of_vit"]
    assert values[-1]["patches_of_vit"] < 0.7 * values[0]["patches_of_vit"]


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_random_model_of_another_package_is_learned(package, tmp_path):
    """To 60 % of what is not known of its CLS token and patches, from all of it."""
    try:
        module = importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} cannot be imported here ({error})")
    torch.manual_seed(0)
    if package == "timm":
        model = module.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=0)
        module.models.save_for_hf(model, tmp_path, model_args=dict(depths=(1, 1, 1, 1)))
        weights = f"timm:local-dir:{tmp_path}"
    else:
        sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=1)
        config = module.ViTConfig(
            **sizes, num_attention_heads=2, image_size=64, patch_size=16, initializer_range=0.2
        )
        module.ViTModel(config).save_pretrained(tmp_path)
        weights = f"transformers:{tmp_path}"
    teacher = open_teacher("theirs", weights, PIXELS)
    _, values = trained(ONE, [teacher], 40)
    assert values[-1]["cls_of_theirs"] < 0.6 * values[0]["cls_of_theirs"]
    assert values[-1]["patches_of_theirs"] < 0.6 * values[0]["patches_of_theirs"]


def test_micro_batches_learn_the_same():
    views = batch()
    both = teachers()
    steps = []
    for parts in (1, 2):
        trainer = trainer_of(recipe_of(accumulation=parts), TWO, both)
        values = trainer.step(views, 0, targets=rows_of(both, views)).values
        steps.append((values, snapshot(trainer)))
    (whole, weights), (parted, of_parted) = steps
    assert parted == pytest.approx(whole, rel=1e-4)
    for name, value in weights.items():
        if "sums" in name:
            assert torch.equal(of_parted[name], value), name
    for name in ("student.adapters.vit.cls_sums", "student.adapters.conv.patch_sums"):
        assert weights[name][0] > 0


def test_statistics_are_of_all_rows_so_far_and_begin_with_the_first_batch():
    both = teachers()
    trainer = trainer_of(recipe_of(), TWO, both)
    sums = torch.zeros((), dtype=torch.float64)
    for step in range(2):
        views = batch(step)
        rows = rows_of(both, views)
        predicted = trainer.student(views.global_crops)["vit"]
        values = trainer.step(views, step, targets=rows).values
        sums = sums + feature_sums(rows["vit"].cls)
        known = standardised(rows["vit"].cls, statistics_of(sums))
        want = unexplained_share(predicted.cls, known, len(known)).item()
        assert values["cls_of_vit"] == pytest.approx(want, rel=1e-5)
        assert torch.equal(trainer.student.adapters["vit"].cls_sums, sums)
    assert sums[0] == 2 * 8


def test_nan_of_a_teacher_reaches_neither_weights_nor_statistics():
    both = teachers()
    trainer = trainer_of(recipe_of(), TWO, both)
    views = batch()
    trainer.step(views, 0, targets=rows_of(both, views))
    before = snapshot(trainer)
    rows = rows_of(both, views)
    rows["vit"].patches[3, 1] = torch.nan
    assert not trainer.step(views, 1, targets=rows).finite
    after = snapshot(trainer)
    unlike = [name for name in before if not torch.equal(before[name], after[name])]
    # What was finite is counted: these are the teacher's rows, whatever became of the step.
    counted = ["vit.cls_sums", "conv.cls_sums", "conv.patch_sums"]
    assert sorted(unlike) == sorted(f"student.adapters.{name}" for name in counted)
    assert trainer.step(views, 2, targets=rows_of(both, views)).finite


def test_a_first_batch_with_nan_is_as_if_it_had_never_been():
    both = teachers(names=("vit",))
    views = batch()
    broken = rows_of(both, views)
    broken["vit"].cls[0] = torch.inf
    broken["vit"].patches[0] = torch.nan
    trainer = trainer_of(recipe_of(), ONE, both)
    before = snapshot(trainer)
    assert not trainer.step(views, 0, targets=broken).finite
    assert all(torch.equal(value, before[name]) for name, value in snapshot(trainer).items())


def contents_of(trainer):
    return Contents(trainer.modules(), trainer.optimizer, {})


def test_a_resumed_student_goes_on_bit_for_bit_and_its_export_is_the_backbone_alone(tmp_path):
    both = teachers()
    recipe = recipe_of()
    whole = trainer_of(recipe, TWO, both)
    for step in range(4):
        views = batch(step)
        whole.step(views, step, targets=rows_of(both, views))
        if step == 1:
            checkpoint.save(tmp_path / "checkpoints", 2, contents_of(whole), {}, ALONE, Kept(1))

    resumed = trainer_of(recipe, TWO, both)
    newest = checkpoint.newest_whole(tmp_path / "checkpoints", ALONE)
    checkpoint.load(newest, contents_of(resumed), ALONE)
    for step in range(2, 4):
        views = batch(step)
        resumed.step(views, step, targets=rows_of(both, views))
    want = snapshot(whole)
    assert want["student.adapters.vit.cls_sums"][0] == 4 * 8
    assert all(torch.equal(value, want[name]) for name, value in snapshot(resumed).items())

    exported = load_model(newest.path / "teacher.safetensors")
    assert exported.report.loaded == exported.report.total and not exported.report.aside


def test_adapters_are_there_to_be_loaded_and_speak_in_the_teachers_units(tmp_path):
    """What they leave unexplained is what the term of the run said."""
    both = teachers(factor=1000.0)
    trainer, _ = trained(TWO, both, 60)
    checkpoint.save(tmp_path / "checkpoints", 60, contents_of(trainer), {}, ALONE, Kept(1))
    adapters = load_adapters(tmp_path)
    assert list(adapters) == ["vit", "conv"]

    backbone = load_model(tmp_path / "checkpoints/step_00000060/teacher.safetensors").model
    views = batch(1)
    with torch.no_grad():
        features = backbone.features(views.global_crops, reshape=False)
    said = teacher_features(adapters["conv"], features.cls, features.patches)
    rows = both[1](views.global_crops)
    assert said.patches.shape == (8, 36, 16)
    for got, want in ((said.cls, rows.cls), (said.patches.flatten(0, 1), rows.patches)):
        unexplained = (got - want).square().mean() / want.var(0, correction=0).mean()
        assert unexplained < 0.6  # its scale is 1000, and a mean alone would leave 1

    with pytest.raises(CheckpointError, match="no adapters; expected the folder of a student"):
        load_adapters(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("local", "weights", "words"),
    [
        (2, (1.0, 1.0), "crops.local_count 2: .* give --crops.local-count 0"),
        (0, (0.0, 0.0), "cls_weight and teacher.patch_weight are both 0"),
    ],
)
def test_what_would_do_nothing_is_refused(local, weights, words):
    recipe = recipe_of()
    recipe = replace(recipe, crops=replace(recipe.crops, local_count=local))
    features = Features((FeatureTeacher("a"),), *weights)
    with pytest.raises(ConfigError, match=words):
        FeatureDistillation(recipe, ALONE, features, teachers(names=("vit",)))


def test_targets_have_to_be_given():
    both = teachers()
    trainer = trainer_of(recipe_of(), TWO, both)
    with pytest.raises(ValueError, match="expected the rows of frozen teachers"):
        trainer.step(batch(), 0)


def test_students_get_global_crops_alone_whatever_the_recipe_of_the_whole():
    base = replace(recipe_of(), crops=replace(recipe_of().crops, local_count=3))
    whole = Distill(ONE, base, (Student("small", base),), global_batch=8)
    (student,) = whole.students_for(2)
    assert student.recipe.crops.local_count == whole.crops.local_count == 0
    FeatureDistillation(student.recipe, ALONE, ONE, teachers(names=("vit",)))


def test_unused_fields_are_fields():
    names = [name for name, _ in dotted(recipe_of())]
    for unused in UNUSED_FIELDS:
        assert any(name == unused or name.startswith(f"{unused}.") for name in names), unused


def same_statistics_and_gradients(got, want):
    """To fp32 rounding; AdamW makes more of it where a gradient is near zero."""
    for name, value in want.items():
        if name.endswith(("_sums", "exp_avg")):
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


def in_two_processes(out):
    """Half of a batch each: the statistics are those of all of it, and so is the step."""
    with joined() as world:
        both = teachers()
        trainer = trainer_of(recipe_of(batch_size=2), TWO, both, world)
        for step in range(2):
            views = batch(step, images=2, rank=world.rank)
            trainer.step(views, step, targets=rows_of(both, views))
        torch.save(snapshot(trainer), Path(out) / f"{world.rank}.pt")


def test_two_processes_count_and_learn_as_one(tmp_path):
    run_ranks(Path(__file__), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    both = teachers()
    alone = trainer_of(recipe_of(), TWO, both)
    for step in range(2):
        halves = [batch(step, images=2, rank=rank) for rank in range(2)]
        crops = torch.stack([half.global_crops.unflatten(0, (2, 2)) for half in halves], 1)
        views = replace(batch(step), global_crops=crops.flatten(0, 2))
        alone.step(views, step, targets=rows_of(both, views))
    same_statistics_and_gradients(first, snapshot(alone))
    assert first["student.adapters.vit.cls_sums"][0] == 2 * 8


RANGES = [(0, 1), (1, 3)]


class Counting:
    """A `FrozenTeacher` that remembers how many crops it saw."""

    def __init__(self, teacher):
        self.teacher = teacher
        self.name = teacher.name
        self.crops = 0

    def __call__(self, crops, rows=None):
        self.crops += len(crops)
        return self.teacher(crops, rows)


def loaded_batch(numbers):
    """Both views of the images with these numbers."""
    whole = batch(images=6)
    crops = whole.global_crops.unflatten(0, (2, 6))[:, numbers.start : numbers.stop]
    return replace(whole, global_crops=crops.flatten(0, 1), positions=numbers)


def pass_of(teachers, exchange, part, images):
    masks = batch(images=images)
    masks = BatchMasks(masks.masks, masks.mask_indices, masks.mask_weights)
    return FeaturePass(teachers, exchange, part, Views(2, 0, 8, lambda step: masks))


def in_three_processes(out):
    """One student in process 0, another in processes 1 and 2."""
    with joined() as world:
        parts = [world.part(*ranks) for ranks in RANGES]
        part = next(part for part in parts if part is not None)
        plan = Plan.even(3, RANGES, 4)  # 2, 1 and 1 are loaded, 4, 2 and 2 trained on
        both = [Counting(teacher) for teacher in teachers()]
        numbers = plan.loads(world.rank)
        shared = pass_of(both, Exchange(plan, world), part, len(plan.trains_on(world.rank)))
        share = shared(loaded_batch(numbers), 0, 0.1)

        recipe = recipe_of(batch_size=share.batch.images)
        trainer = trainer_of(recipe, TWO, teachers(), part)
        trainer.step(share.batch, 0, targets=share.targets)
        seen = [teacher.crops for teacher in both]
        values = {"crops": share.batch.global_crops, "targets": dict(share.targets)}
        torch.save(values | {"seen": seen, "after": snapshot(trainer)}, f"{out}/{world.rank}.pt")


def test_rows_travel_to_who_trains_on_them_and_teachers_see_every_crop_once(tmp_path):
    run_ranks(Path(__file__), tmp_path, "three", processes=3)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    assert [sum(result["seen"][i] for result in results) for i in range(2)] == [8, 8]
    for result in results:
        for teacher in teachers():
            want = teacher(result["crops"])
            torch.testing.assert_close(result["targets"][teacher.name].cls, want.cls)
            torch.testing.assert_close(result["targets"][teacher.name].patches, want.patches)

    # Both students saw all images, so their statistics are the same, and those of one process.
    for name in ("vit.cls_sums", "conv.patch_sums"):
        counted = [result["after"][f"student.adapters.{name}"] for result in results]
        torch.testing.assert_close(counted[1], counted[0], rtol=1e-9, atol=1e-6)
        assert torch.equal(counted[1], counted[2])

    whole = loaded_batch(range(4))
    alone = trainer_of(recipe_of(batch_size=4), TWO, teachers())
    alone.step(whole, 0, targets=rows_of(teachers(), whole))
    for result in results:
        same_statistics_and_gradients(result["after"], snapshot(alone))


def test_a_process_alone_copies_nothing():
    views = batch()
    both = teachers()
    shared = pass_of(both, Exchange(Plan.even(1, [(0, 1)], 4), ALONE), ALONE, 4)
    share = shared(views, 0, 0.1)
    assert share.batch.global_crops.data_ptr() == views.global_crops.data_ptr()
    for name, rows in rows_of(both, views).items():
        assert torch.equal(share.targets[name].cls, rows.cls)
        assert torch.equal(share.targets[name].patches, rows.patches)


if __name__ == "__main__":
    run = in_three_processes if "three" in sys.argv else in_two_processes
    run(sys.argv[1])
