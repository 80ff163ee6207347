"""What the students of a distillation share on this process: the teacher, and its pass."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3core.data.loader import BatchSettings
from dinov3core.image_statistics import ImageStatistics
from dinov3core.models.presets import Backbone
from dinov3core.train.engine.building import begin_with_layers
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.cache import CachedHeads, CachedTeacher
from dinov3core.train.engine.distillation.exchange import Exchange, Plan
from dinov3core.train.engine.distillation.features import (
    FeatureDistillation,
    FeaturePass,
    open_teachers,
)
from dinov3core.train.engine.distillation.frozen_features import Pixels
from dinov3core.train.engine.distillation.heads import FrozenHeads, SharedPass, SharedViews, Views
from dinov3core.train.engine.distillation.settings import Distill, Features, Heads, Student
from dinov3core.train.engine.methods import HeadDistillation, Method
from dinov3core.train.engine.named_models import NO_RECIPES, Recipes
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import prepare

Say = Callable[[str], None]


@dataclass(frozen=True)
class Shared:
    """What is there once, for all students.

    Args:
        lesson: the part of a step that is done once, teacher and exchange.
        method_of: how a student learns.
        teachers: as the lesson asks them, with their cache where there is one.
    """

    lesson: SharedViews
    method_of: Callable[[Student], Method]
    teachers: tuple[Any, ...]

    def in_words(self) -> list[str]:
        """Sentences on who loaded what, and what a cache saved."""
        cached = [teacher for teacher in self.teachers if isinstance(teacher, CachedTeacher)]
        return [self.lesson.exchange.plan.in_words(), *(teacher.in_words() for teacher in cached)]


def batch_settings(distill: Distill, images: int) -> BatchSettings:
    """Of the shared views, for a batch of so many images."""
    base = distill.base
    return BatchSettings(
        distill.crops,
        base.masks,
        images,
        distill.patch_size,
        base.run.seed,
        views=distill.cache_views,
    )


def open_shared(
    distill: Distill,
    students: tuple[Student, ...],
    world: World,
    part: World,
    say: Say,
    recipes: Recipes = NO_RECIPES,
) -> Shared:
    """Open the teacher, on all processes together.

    Args:
        students: complete, see `Distill.students_for`.
        part: this process among those of its range.
        say: shows a line to the user.
        recipes: see `open_backbone`.

    Raises:
        ConfigError: it cannot be opened, or a student does not match it.
    """
    ranges = [student.ranks or (0, world.size) for student in students]
    exchange = Exchange(Plan.even(world.size, ranges, distill.global_batch), world)
    batches = batch_settings(distill, distill.global_batch // part.size)
    crops = distill.crops
    views = Views(
        crops.global_count,
        crops.local_count,
        distill.patch_size,
        lambda step: batches.masks_at(step, part.rank),
    )
    opened = _Opening(distill, students, world, part, say)
    if isinstance(distill.teacher, Heads):
        return opened.of_heads(distill.teacher, exchange, views)
    return opened.of_features(distill.teacher, exchange, views, recipes)


@dataclass(frozen=True)
class _Opening:
    distill: Distill
    students: tuple[Student, ...]
    world: World
    part: World
    say: Say

    def of_heads(self, heads: Heads, exchange: Exchange, views: Views) -> Shared:
        teacher: Any = FrozenHeads.open(heads.folder, self.world, self.say)
        backbone = teacher.networks.backbone
        for student in self.students:
            for complaint in teacher.complaints(student.name, student.recipe):
                raise ConfigError(complaint)
        if self.distill.cache:
            teacher = CachedHeads(teacher, Path(self.distill.cache), self.say)
        base = prepare(self.distill.base, self.world.device)
        lesson = SharedPass(
            teacher,
            exchange,
            self.part,
            views,
            iterations=base.loss.sinkhorn_iterations,
            precision=base.run.precision,
        )

        def method_of(student: Student) -> Method:
            return HeadDistillation(student.recipe, self.part, _beginning(student, backbone))

        return Shared(lesson, method_of, (teacher,))

    def of_features(
        self, features: Features, exchange: Exchange, views: Views, recipes: Recipes
    ) -> Shared:
        crops = self.distill.crops
        channels = self.students[0].recipe.backbone.in_channels
        seen = Pixels(channels, ImageStatistics(crops.mean, crops.std), self.distill.grid)
        plain = open_teachers(features, seen, self.world.device, recipes)
        for student in self.students:
            if student.start != "random":
                raise ConfigError(
                    f"student {student.name}: start {student.start} takes layers of a teacher with "
                    "heads; give --run.init FILE to start from weights, or --start random"
                )
        teachers: list[Any] = list(plain)
        if self.distill.cache:
            folder = Path(self.distill.cache)
            teachers = [CachedTeacher(teacher, folder, self.say) for teacher in plain]
        precision = prepare(self.distill.base, self.world.device).run.precision
        lesson = FeaturePass(teachers, exchange, self.part, views, precision=precision)

        def method_of(student: Student) -> Method:
            return FeatureDistillation(student.recipe, self.part, features, plain)

        return Shared(lesson, method_of, tuple(teachers))


def _beginning(student: Student, teacher: Backbone) -> Callable[[Backbone], None] | None:
    """What makes a fresh backbone begin with layers of the teacher; None: it stays as it is."""
    start = student.start
    if start == "random":
        return None
    return lambda backbone: begin_with_layers(backbone, teacher, start)
