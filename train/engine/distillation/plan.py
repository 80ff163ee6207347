"""`--plan`: what teacher and students cost here, and how many processes each student should have.

Costs are measured with the teacher's own pass and the students' own steps, on made-up images, in
this one process; or they are given. Beside the proposal stand the layout of the recipe, the one in
which all processes train all students, and, as an example, the published one, whose costs are
predicted from counted operations.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3core.data.batch import Batch
from dinov3core.data.loader import BatchSettings
from dinov3core.data.masks import masked_total
from dinov3core.data.sizes import pair
from dinov3core.image_statistics import ImageStatistics
from dinov3core.train.engine import parallel
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.command import PlanOptions
from dinov3core.train.engine.distillation.exchange import Exchange
from dinov3core.train.engine.distillation.exchange import Plan as Loads
from dinov3core.train.engine.distillation.features import (
    FeatureDistillation,
    FeaturePass,
    open_teachers,
)
from dinov3core.train.engine.distillation.frozen_features import Pixels
from dinov3core.train.engine.distillation.heads import (
    FrozenHeads,
    SharedPass,
    SharedViews,
    Views,
    as_seen_by,
)
from dinov3core.train.engine.distillation.layout import (
    Costs,
    Layout,
    Place,
    proposed,
    shared_by_all,
)
from dinov3core.train.engine.distillation.settings import Distill, Features, Heads, Student
from dinov3core.train.engine.environment import device_name
from dinov3core.train.engine.methods import HeadDistillation, Method
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer, prepare

MOST_IMAGES = 32  # of a measured step; larger ones cost the same per image
WARM_UPS = 2
REPEATS = 5
COUNTED_IMAGES = 16  # of a counted pass: enough that masked patches are whole numbers
STEP_OVER_FORWARD = 3.0  # forward, and a backward of two products for each of its own
MethodOf = Callable[[Pretrain], Method]


class Example(NamedTuple):
    """A published layout."""

    distill: Distill
    teacher: Pretrain  # the recipe of its teacher


def plan_in_words(distill: Distill, options: PlanOptions, example: Example) -> str:
    """The answer to `--plan`.

    Args:
        distill: the recipe, with its options applied.
        options: costs that are given, and the number of processes.
        example: a layout to compare with.

    Raises:
        ConfigError: the teacher cannot be opened, or the images cannot be divided.
    """
    if parallel.processes() > 1:
        raise ConfigError(
            "--plan measures in one process; start it with python, and give the number of "
            "processes by --plan-ranks"
        )
    missing = {"teacher", *(one.name for one in distill.students)} - options.seconds.keys()
    seconds = dict(options.seconds)
    origin = "as given"
    if missing:
        with parallel.start(distill.base.run.device, distill.base.run.threads) as world:
            seconds |= measured(distill, missing, world)
            origin = f"measured here, on {device_name(world.device)}"
            if options.seconds:
                origin += f", but for those given ({', '.join(options.seconds)})"
    costs = Costs(seconds["teacher"], {one.name: seconds[one.name] for one in distill.students})
    return "\n".join(
        [
            f"{distill.name}: milliseconds per image, {origin}: "
            + ", ".join(f"{name} {1e3 * value:.3g}" for name, value in _named(costs)),
            *_own_tables(distill, costs, options.ranks),
            *_example_tables(example),
        ]
    )


def _named(costs: Costs) -> Iterator[tuple[str, float]]:
    yield "teacher", costs.teacher
    yield from costs.students.items()


# --- tables


def _own_tables(distill: Distill, costs: Costs, processes: int) -> Iterator[str]:
    of_recipe = _layout_of(distill)
    processes = processes or (of_recipe.processes if of_recipe else len(distill.students))
    images = distill.global_batch
    layout = proposed(costs, images, processes)
    unit = "seconds"
    yield from table(f"proposed for {processes} processes", layout, costs, unit)
    yield "  " + options_for(layout)
    if of_recipe and of_recipe.places != layout.places:
        yield from table("as the recipe has it", of_recipe, costs, unit)
    if images % processes == 0 and len(layout.places) > 1:
        everywhere = shared_by_all(list(costs.students), images, processes)
        yield from table("all processes train all students", everywhere, costs, unit)
        yield (
            "  --ranks None; nobody waits, but every process holds all students, and KoLeo "
            f"compares {images // processes} images"
        )


def _example_tables(example: Example) -> Iterator[str]:
    distill = example.distill
    costs = predicted(example)
    layout = _layout_of(distill)
    assert layout is not None
    title = f"example: {distill.name}, as published"
    yield from table(title, layout, costs, "TFLOP")
    yield (
        "  predicted, not measured: counted operations of forward passes, a training step taken "
        f"as {STEP_OVER_FORWARD:g} of them, all processes equally fast"
    )
    best = proposed(costs, distill.global_batch, layout.processes)
    yield from table("example: proposed for the same", best, costs, "TFLOP")


def _layout_of(distill: Distill) -> Layout | None:
    """The layout that a recipe states; None where its students are for all processes."""
    together: dict[tuple[int, int], list[str]] = {}
    for student in distill.students:
        if student.ranks is None:
            return None
        together.setdefault(student.ranks, []).append(student.name)
    places = [Place(tuple(names), ranks) for ranks, names in sorted(together.items())]
    return Layout(tuple(places), distill.global_batch)


def table(title: str, layout: Layout, costs: Costs, unit: str) -> Iterator[str]:
    """Lines on a layout: who trains what, how many images, how long, how long it waits."""
    step = layout.step_cost(costs)
    width = max(len(title), *(len(", ".join(place.students)) + 2 for place in layout.places))
    yield ""
    yield f"{title:{width}}  {'ranks':>9}  {'images':>7}  {unit:>9}  {'waits':>6}"
    shares = sorted({layout.images // layout.processes, -(-layout.images // layout.processes)})
    images = " or ".join(map(str, shares))
    teacher = layout.teacher_cost(costs)
    ranks = _shown((0, layout.processes))
    yield f"{'  teacher':{width}}  {ranks:>9}  {images:>7}  {teacher:9.4g}"
    for place in layout.places:
        cost = layout.cost(place, costs)
        waits = 1 - (teacher + cost) / step
        yield (
            f"{'  ' + ', '.join(place.students):{width}}  {_shown(place.ranks):>9}  "
            f"{layout.images // place.processes:7}  {cost:9.4g}  {waits:6.1%}"
        )
    yield f"  a step: {step:.4g} {unit}, of which processes wait {layout.idle_share(costs):.1%}"


def _shown(ranks: tuple[int, int]) -> str:
    first, past = ranks
    return f"{first}-{past - 1}" if past - first > 1 else f"{first}"


def options_for(layout: Layout) -> str:
    """The options of train/distill.py that ask for a layout."""
    return " ".join(
        f"--{name}.ranks {place.ranks[0]} {place.ranks[1]}"
        for place in layout.places
        for name in place.students
    )


# --- measuring


def measured(distill: Distill, wanted: Collection[str], world: World) -> dict[str, float]:
    """Seconds per image of a pass of the teacher ("teacher") and of steps of students, by name.

    Each is the median of a few, after warming up, on a batch of made-up images.

    Args:
        wanted: of which.
        world: of one process.

    Raises:
        ConfigError: the teacher cannot be opened, or a student cannot be made.
    """
    images = min(distill.global_batch, MOST_IMAGES)
    alone = [replace(one, ranks=None, recipe=_fresh(one.recipe)) for one in distill.students]
    smaller = replace(distill, students=tuple(alone), global_batch=images)
    students = smaller.students_for(1)
    shared, method_of = _opened(smaller, world)
    loaded = made_up(smaller)
    temperature = distill.base.teacher.temperature.start or 1.0

    seconds = {}
    share = shared(loaded, 0, temperature)
    if "teacher" in wanted:
        seconds["teacher"] = _median(lambda _: shared(loaded, 0, temperature), world) / images
    for student in students:
        if student.name in wanted:
            step = _step_of(student, share.batch, share.targets, method_of, world)
            seconds[student.name] = _median(step, world) / images
    return seconds


def _fresh(recipe: Pretrain) -> Pretrain:
    """A recipe that starts from random weights, which are as fast as any."""
    return replace(recipe, run=replace(recipe.run, init=""))


def _opened(distill: Distill, world: World) -> tuple[SharedViews, MethodOf]:
    """The teacher's pass, and how a student learns from it, on this one process."""
    exchange = Exchange(Loads.even(1, [(0, 1)], distill.global_batch), world)
    views = Views(
        distill.crops.global_count,
        distill.crops.local_count,
        distill.patch_size,
        lambda step: _settings(distill).masks_at(step, 0),
    )
    base = prepare(distill.base, world.device)
    precision = base.run.precision
    if isinstance(distill.teacher, Heads):
        distill.teacher.check()
        teacher = FrozenHeads.open(distill.teacher.folder, world, lambda _: None)
        for student in distill.students:
            for complaint in teacher.complaints(student.name, student.recipe):
                raise ConfigError(complaint)
        shared = SharedPass(teacher, exchange, world, views, precision=precision)
        return shared, lambda recipe: HeadDistillation(recipe, world)

    features: Features = distill.teacher
    channels = distill.students[0].recipe.backbone.in_channels
    seen = ImageStatistics(distill.crops.mean, distill.crops.std)
    teachers = open_teachers(features, Pixels(channels, seen, distill.grid), world.device)
    of_features = FeaturePass(teachers, exchange, world, views, precision=precision)
    return of_features, lambda recipe: FeatureDistillation(recipe, world, features, teachers)


def _settings(distill: Distill) -> BatchSettings:
    base = distill.base
    return BatchSettings(base.crops, base.masks, distill.global_batch, distill.patch_size)


def made_up(distill: Distill) -> Batch:
    """A batch of noise in the views that students share."""
    images = distill.global_batch
    crops = distill.crops
    channels = distill.students[0].recipe.backbone.in_channels
    draws = torch.Generator().manual_seed(0)
    masks = _settings(distill).masks_at(0, 0)
    sizes = (
        (crops.global_count * images, channels, *pair(crops.global_size)),
        (crops.local_count * images, channels, *pair(crops.local_size)),
    )
    views = [torch.randn(size, generator=draws) for size in sizes]
    return Batch(*views, None, *masks, positions=range(images))


def _step_of(
    student: Student, batch: Batch, targets: Any, method_of: MethodOf, world: World
) -> Callable[[int], object]:
    recipe = prepare(student.recipe, world.device)
    trainer = Trainer(recipe, world, method=method_of(recipe))
    last = trainer.resolved.steps - 1

    def step(number: int) -> None:
        seen = as_seen_by(batch, recipe.crops, recipe.run.seed, 0)
        trainer.step(seen, min(number, last), targets=targets)

    return step


def _median(work: Callable[[int], object], world: World) -> float:
    """Seconds of a piece of work that is told its number."""
    times = []
    for number in range(WARM_UPS + REPEATS):
        began = time.perf_counter()
        work(number)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UPS:])


# --- predicting


def predicted(example: Example) -> Costs:
    """Operations per image in units of 10^12, counted on networks without weights.

    The teacher sees the global crops, students all; heads see class rows and masked patches. A
    student's step is taken as `STEP_OVER_FORWARD` forward passes.
    """
    distill = example.distill
    views = replace(distill.crops, local_count=0)
    patch = example.teacher.backbone.patch_size
    rows, columns = distill.grid
    views = replace(views, global_size=(rows * patch, columns * patch))
    teacher = replace(example.teacher, crops=views, masks=distill.base.masks)
    return Costs(
        forward_tflop(teacher),
        {one.name: STEP_OVER_FORWARD * forward_tflop(one.recipe) for one in distill.students},
    )


def forward_tflop(recipe: Pretrain) -> float:
    """10^12 operations of a forward pass over the crops of an image, heads included."""
    crops = recipe.crops
    images = COUNTED_IMAGES
    height, width = pair(crops.global_size)
    patches = (height // recipe.backbone.patch_size) * (width // recipe.backbone.patch_size)
    masked = masked_total(crops.global_count * images, patches, recipe.masks)
    channels = recipe.backbone.in_channels
    fresh = replace(recipe, run=replace(recipe.run, init=""))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        networks = build_networks(fresh)
        networks(
            torch.empty(crops.global_count * images, channels, height, width),
            torch.zeros(masked, dtype=torch.int64),
            local_crops=torch.empty(crops.local_count * images, channels, *pair(crops.local_size)),
        )
    return counter.get_total_flops() / images / 1e12
