"""The recipes of train/distill.py: published numbers, and students that fit one another."""

from pathlib import Path

import pytest
import torch

from dinov3core.models import ConvNeXtSettings, VitSettings
from dinov3core.train.engine.distillation.settings import Distill, Heads, Student
from dinov3core.train.engine.resolved import Resolved, resolve
from dinov3core.train.recipes.distill import distill_convnext, distill_vit, quickstart_distill
from dinov3core.train.recipes.quickstart import quickstart
from dinov3core.train.recipes.registry import DISTILLATIONS, RECIPES, distillation

PROCESSES = {"quickstart_distill": 1, "distill_vit": 296, "distill_convnext": 128}


def students(whole: Distill) -> dict[str, Student]:
    return {one.name: one for one in whole.students_for(PROCESSES[whole.name])}


def resolved(student: Student) -> Resolved:
    first, past = student.ranks
    return resolve(student.recipe, past - first)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_every_recipe_has_its_name_and_students_that_fit(name: str) -> None:
    whole = DISTILLATIONS[name]()
    assert whole.name == name and len(students(whole)) == len(whole.students)
    summary = (DISTILLATIONS[name].__doc__ or "").splitlines()[0]
    assert 20 < len(summary) < 100
    # the teacher's run is made by a recipe of that name, with as many prototypes
    teacher = RECIPES[whole.teacher.run]()
    for student in whole.students:
        assert student.recipe.dino.prototypes == teacher.dino.prototypes
        assert student.recipe.ibot.prototypes == teacher.ibot.prototypes


def test_the_published_layout_of_vits() -> None:
    """Figures of the reference configuration; recipe.md 7.3, 7.4 and 9.2 of the specification."""
    whole = distill_vit()
    layout = {name: (one.ranks, one.recipe.run.batch_size) for name, one in students(whole).items()}
    assert layout == {
        "vits16": ((0, 48), 40),
        "vits16plus": ((48, 96), 40),
        "vitb16": ((96, 176), 24),
        "vitl16": ((176, 296), 16),
    }
    for student in students(whole).values():
        numbers = resolved(student)
        rate, momentum = numbers.schedules["lr"], numbers.schedules["momentum"]
        assert numbers.steps == 25_000
        assert rate[0] == 0 and rate[6250] == pytest.approx(1.317122e-4, rel=1e-6)
        assert rate[12_499:] == pytest.approx(2.633913e-4, rel=1e-6)
        assert momentum[12_500] == pytest.approx(0.9970002, abs=5e-8)
        assert set(numbers.schedules["teacher_temperature"]) == {0.07}
    assert whole.grid == (16, 16) and whole.patch_size == 16


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vits16", 21.6), ("vits16plus", 28.7), ("vitb16", 85.7), ("vitl16", 303.2)],
)
def test_the_published_vits_have_their_sizes(name: str, millions: float) -> None:
    from dinov3core.models import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(students(distill_vit())[name].recipe.backbone)
    count = sum(weights.numel() for weights in network.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05)


def test_the_published_convnexts() -> None:
    whole = distill_convnext()
    rates = {"tiny": 1.6e-3, "small": 1.6e-3, "base": 0.8e-3, "large": 0.8e-3}
    decays = {"tiny": 0.04, "small": 0.04, "base": 0.02, "large": 0.04}
    for name, student in students(whole).items():
        size = name.removeprefix("convnext_")
        numbers = resolved(student)
        assert numbers.steps == 625_000
        assert numbers.schedules["lr"].max() == pytest.approx(rates[size])
        assert numbers.schedules["lr"][0] == 1e-6
        assert numbers.schedules["lr"][-1] == pytest.approx(8e-6)  # 1e-6 scaled for 4096 images
        assert numbers.schedules["weight_decay"][0] == decays[size]
        assert numbers.schedules["weight_decay"][312_500] == pytest.approx((decays[size] + 0.2) / 2)
        assert numbers.schedules["momentum"][312_500] == pytest.approx(0.997)
        assert numbers.schedules["teacher_temperature"][75_000] == pytest.approx(0.055)
        assert numbers.schedules["teacher_temperature"][150_000:] == pytest.approx(0.07)
        assert student.recipe.run.batch_size == 128
    assert whole.grid == (16, 16) and whole.patch_size == 32  # the teacher's is 16 at 256 px


def test_the_quick_start_has_smaller_students_of_two_kinds() -> None:
    whole = quickstart_distill()
    teacher = quickstart()
    assert whole.teacher == Heads("quickstart") and whole.teacher.folder == Path("runs/quickstart")
    assert whole.crops == teacher.crops and whole.base.masks == teacher.masks
    assert whole.grid == (6, 6)
    backbones = [student.recipe.backbone for student in whole.students]
    assert [type(one) for one in backbones] == [VitSettings, VitSettings, ConvNeXtSettings]
    vits = backbones[:2]
    assert all(one.width < teacher.backbone.width and one.heads <= 3 for one in vits)
    assert vits[0] != vits[1]
    sizes = [student.recipe.crops.global_size for student in whole.students]
    assert sizes == [48, 48, 192]


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ("", "runs/quickstart_distill"),
        ("--data.source a/photos", "runs/quickstart_distill-photos"),
        ("--data.source a/photos --run.out o", "o"),
    ],
)
def test_the_quick_start_on_other_images_has_its_own_folder(options: str, folder: str) -> None:
    whole = distillation(options.split()).distill
    assert whole.folder == Path(folder)
    for student in whole.students_for(1):
        assert student.recipe.folder == Path(folder) / student.name
