"""--plan: an exact search for processes, its table, and costs that are measured or counted."""

import itertools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import tiny_command, tiny_recipe

from dinov3core.models import ConvNeXtSettings, VitSettings
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation import plan as planning
from dinov3core.train.engine.distillation.command import PlanOptions
from dinov3core.train.engine.distillation.layout import (
    Costs,
    Layout,
    Place,
    proposed,
    shared_by_all,
)
from dinov3core.train.engine.distillation.plan import (
    Example,
    forward_tflop,
    measured,
    options_for,
    plan_in_words,
    table,
)
from dinov3core.train.engine.distillation.settings import (
    Distill,
    Features,
    FeatureTeacher,
    Heads,
    Student,
)
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.distill import distill_vit
from dinov3core.train.recipes.registry import distillation, planned
from dinov3core.train.recipes.vit7b16 import vit7b16_highres

ALONE = World(0, 1, torch.device("cpu"))
COSTS = Costs(2.0, {"small": 1.0, "large": 3.0})


# --- layouts


def test_a_step_waits_for_the_largest_share_and_then_for_the_slowest() -> None:
    layout = Layout((Place(("small",), (0, 1)), Place(("large",), (1, 3))), images=8)
    assert layout.processes == 3
    assert layout.teacher_cost(COSTS) == 6  # 3 of 8 images
    assert [layout.cost(place, COSTS) for place in layout.places] == [8, 12]
    assert layout.step_cost(COSTS) == 18
    # of 3 * 18 the teacher works 16 and the students 8 + 24
    assert layout.idle_share(COSTS) == pytest.approx(1 - 48 / 54)


def test_nobody_waits_where_all_train_all() -> None:
    assert shared_by_all(["small", "large"], 8, 4).idle_share(COSTS) == pytest.approx(0)
    assert shared_by_all(["small", "large"], 8, 8).step_cost(COSTS) == 2 + 4


def groupings(names: list[str]) -> Iterator[list[list[str]]]:
    """Every way to put students into groups."""
    if not names:
        yield []
        return
    first, *others = names
    for rest in groupings(others):
        yield [[first], *rest]
        for place, group in enumerate(rest):
            yield [*rest[:place], [first, *group], *rest[place + 1 :]]


def by_trying(costs: Costs, images: int, processes: int) -> tuple[int, float] | None:
    """(number of ranges, slowest students) of the best layout, found by looking at all of them."""
    divisors = [count for count in range(1, processes + 1) if images % count == 0]
    best = None
    for groups in groupings(list(costs.students)):
        weights = [sum(costs.students[name] for name in group) for group in groups]
        for counts in itertools.product(divisors, repeat=len(groups)):
            if sum(counts) != processes:
                continue
            slowest = max(w * images / n for w, n in zip(weights, counts, strict=True))
            key = (-len(groups), slowest)
            best = key if best is None else min(best, key)
    return None if best is None else (-best[0], best[1])


@pytest.mark.parametrize("seed", range(60))
def test_the_search_is_as_good_as_trying_everything(seed: int) -> None:
    draws = random.Random(seed)
    students = draws.randint(1, 4)
    processes = draws.randint(1, 12)
    images = draws.choice([6, 7, 8, 12, 16, 18, 24, 30, 36, 60])
    costs = Costs(1.0, {f"s{one}": draws.choice([1, 2, 3, 5, 0.7]) for one in range(students)})
    best = by_trying(costs, images, processes)
    if best is None:
        with pytest.raises(ConfigError, match=f"cannot be divided among {processes} processes"):
            proposed(costs, images, processes)
        return
    layout = proposed(costs, images, processes)
    slowest = max(layout.cost(place, costs) for place in layout.places)
    assert (len(layout.places), slowest) == (best[0], pytest.approx(best[1]))
    # a layout that a run takes: all students, all processes, whole shares of images
    assert sorted(name for place in layout.places for name in place.students) == sorted(
        costs.students
    )
    ends = [place.ranks for place in layout.places]
    assert ends[0][0] == 0 and ends[-1][1] == processes
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))
    assert all(images % place.processes == 0 for place in layout.places)


def test_students_share_processes_where_there_are_too_few() -> None:
    costs = Costs(1.0, {"a": 1.0, "b": 4.0, "c": 2.0})
    assert proposed(costs, 8, 1) == shared_by_all(["a", "b", "c"], 8, 1)
    (first, second) = proposed(costs, 8, 2).places
    assert first == Place(("a", "c"), (0, 1)) and second == Place(("b",), (1, 2))


def test_processes_that_cannot_be_filled_are_refused_with_a_number_that_can() -> None:
    with pytest.raises(ConfigError, match=r"8 images a step .* 7 processes.*; 6 can$"):
        proposed(COSTS, 8, 7)


# --- costs


def test_operations_are_those_of_matrices_and_attention() -> None:
    """By hand, for the smallest ViT: 2 * inputs * outputs * rows for every linear layer."""
    recipe = tiny_recipe()
    head = replace(recipe.dino, prototypes=16, hidden=8, bottleneck=4, layers=1)
    recipe = replace(
        recipe,
        backbone=VitSettings(width=8, depth=1, heads=1, patch_size=8, registers=0),
        dino=head,
        ibot=head,
        crops=replace(recipe.crops, global_size=16, local_size=8, local_count=1),
        masks=replace(recipe.masks, probability=1.0, ratio_min=0.5, ratio_max=0.5),
    )
    per_image = [(2, 4), (1, 1)]  # crops and their patches
    patches = sum(crops * count for crops, count in per_image)
    tokens = sum(crops * (count + 1) for crops, count in per_image)
    attention = sum(crops * 4 * (count + 1) ** 2 * 8 for crops, count in per_image)
    rows = 3 + 2 * 2  # class rows of 3 crops, 2 masked patches of 2: all that the last block gives
    linear = tokens * 2 * 8 * 24 + rows * 2 * 8 * (8 + 32 + 32)
    embedding = patches * 2 * 3 * 64 * 8
    heads = rows * 2 * (8 * 4 + 4 * 16)
    expected = attention + linear + embedding + heads
    assert forward_tflop(recipe) * 1e12 == pytest.approx(expected)


def test_a_convnext_is_counted() -> None:
    recipe = replace(
        tiny_recipe(),
        backbone=ConvNeXtSettings((1, 1, 1, 1), (8, 16, 32, 64)),
        crops=replace(tiny_recipe().crops, global_size=64, local_size=32),
    )
    doubled = replace(recipe, backbone=ConvNeXtSettings((1, 1, 2, 1), (8, 16, 32, 64)))
    assert 0 < forward_tflop(recipe) < forward_tflop(doubled)


def test_the_published_layout_waits_as_predicted() -> None:
    example = Example(distill_vit(), vit7b16_highres())
    costs = planning.predicted(example)
    layout = planning._layout_of(example.distill)
    assert layout.processes == 296
    assert costs.teacher == pytest.approx(4.18, abs=0.05)  # TFLOP of two crops of 261 tokens
    assert layout.idle_share(costs) == pytest.approx(0.230, abs=0.005)
    best = proposed(costs, 1920, 296)
    assert best.idle_share(costs) < 0.06


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    pretrain(parse(tiny_command(out, "--run.steps", "1", "--data.probe", "none")), argv=[])
    return out


def tiny_distillation(teacher: Path) -> Distill:
    base = replace(tiny_recipe(), name="tiny", gram=None)
    base = replace(base, crops=replace(base.crops, local_count=2))
    convnext = replace(
        base,
        backbone=ConvNeXtSettings((1, 1, 1, 1), (8, 8, 16, 16)),
        crops=replace(base.crops, global_size=96, local_size=64),
        optim=replace(base.optim, layer_decay=1.0, patch_embed_lr=1.0),
    )
    students = (Student("vit", base, (0, 1)), Student("convnext", convnext, (1, 3)))
    return Distill(Heads(str(teacher)), base, students, global_batch=4)


def test_costs_are_measured_by_the_real_pass_and_steps(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real = planning.Trainer.step

    def counted(trainer, *args, **kwargs):
        steps.append(trainer.recipe.name)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(planning.Trainer, "step", counted)
    whole = tiny_distillation(teacher)
    seconds = measured(whole, {"teacher", "vit", "convnext"}, ALONE)
    assert set(seconds) == {"teacher", "vit", "convnext"}
    assert all(0 < value < 1 for value in seconds.values())
    each = planning.WARM_UPS + planning.REPEATS
    assert [steps.count(name) for name in ("vit", "convnext")] == [each, each]
    assert measured(whole, {"vit"}, ALONE).keys() == {"vit"}


def test_teachers_without_heads_are_measured_too(teacher: Path) -> None:
    whole = tiny_distillation(teacher)

    def without_local(recipe: Pretrain) -> Pretrain:
        backbone = recipe.backbone
        if isinstance(backbone, VitSettings):
            backbone = replace(backbone, untie_local_cls_norm=False)
        return replace(recipe, backbone=backbone, crops=replace(recipe.crops, local_count=0))

    students = tuple(replace(one, recipe=without_local(one.recipe)) for one in whole.students)
    whole = replace(
        whole,
        teacher=Features((FeatureTeacher(str(teacher)),)),
        base=without_local(whole.base),
        students=students,
    )
    seconds = measured(whole, {"teacher", "convnext"}, ALONE)
    assert set(seconds) == {"teacher", "convnext"} and min(seconds.values()) > 0


def test_time_is_a_median_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(number: int) -> None:
        nonlocal now
        now += 100 if number < planning.WARM_UPS else (1, 9, 2, 3, 2)[number - planning.WARM_UPS]

    monkeypatch.setattr(planning.time, "perf_counter", lambda: now)
    assert planning._median(work, ALONE) == 2


# --- what is printed


def small_example() -> Example:
    base = replace(tiny_recipe(), name="published", gram=None)
    students = (Student("a", base, (0, 1)), Student("b", base, (1, 3)))
    return Example(Distill(Heads("t"), base, students, global_batch=4), tiny_recipe())


def test_the_table_says_who_waits() -> None:
    layout = Layout((Place(("small",), (0, 1)), Place(("large",), (1, 3))), images=8)
    assert list(table("by hand", layout, COSTS, "seconds")) == [
        "",
        "by hand        ranks   images    seconds   waits",
        "  teacher        0-2   2 or 3          6",
        "  small            0        8          8   22.2%",
        "  large          1-2        4         12    0.0%",
        "  a step: 18 seconds, of which processes wait 11.1%",
    ]
    assert options_for(layout) == "--small.ranks 0 1 --large.ranks 1 3"


def test_a_plan_of_given_costs_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured", lambda *_: pytest.fail("measured"))
    given = PlanOptions({"teacher": 1e-3, "vit": 2e-3, "convnext": 8e-3})
    words = plan_in_words(tiny_distillation(Path("none")), given, small_example())
    assert words.startswith(
        "tiny: milliseconds per image, as given: teacher 1, vit 2, convnext 8\n\nproposed for 3 pr"
    )
    assert "--vit.ranks 0 1 --convnext.ranks 1 3" in words
    assert "as the recipe has it" not in words  # it is the proposal
    assert "all processes train all students" not in words  # 3 do not divide 4 images
    assert "example: published, as published" in words and "predicted, not measured" in words
    words = plan_in_words(tiny_distillation(Path("none")), replace(given, ranks=4), small_example())
    assert "proposed for 4 processes" in words and "as the recipe has it" in words
    assert "--ranks None; nobody waits" in words and "KoLeo compares 1 images" in words


def test_a_plan_needs_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"make it first: python train/pretrain\.py quickstart"):
        planned(distillation(["--plan", "--run.device", "cpu"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^--plan measures in one process"):
        planned(distillation(["--plan"]))


def test_a_plan_from_a_command_line() -> None:
    given = "teacher=1e-3,vits16=1e-3,vits16plus=1e-3,vitb16=3e-3,vitl16=8e-3"
    words = planned(distillation(["distill_vit", "--plan", given, "--plan-ranks", "64"]))
    assert "proposed for 64 processes" in words and "as the recipe has it" in words
    assert math.isfinite(float(words.rpartition("wait ")[2].rstrip("%")))
