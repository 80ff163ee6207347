"""What came of all students of a distillation, gathered from their processes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dinov3core.data.sizes import pair
from dinov3core.train.engine.distillation.classroom import Classroom
from dinov3core.train.engine.distillation.opening import Shared
from dinov3core.train.engine.distillation.page import (
    Costs,
    Outcome,
    StudentOutcome,
    TeacherOutcome,
    write_page,
)
from dinov3core.train.engine.distillation.settings import Distill, Heads, Student
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.session import by_main


class Ended(NamedTuple):
    """What a distillation came to."""

    summary: dict[str, Any]  # of the whole; empty on other than the main process
    failures: dict[str, str]  # by the names of students, on all processes


def conclude(settings: Distill, classroom: Classroom, part: World) -> Ended:
    """Gather what came of every student, and write the page above all of them."""
    world = classroom.world
    own = [
        json.dumps([seat.student.name, seat.failure, seat.summary, _mean(seat.seconds, seat.steps)])
        for seat in classroom.seats
        if part.is_main
    ]
    told = {entry[0]: entry[1:] for entry in map(json.loads, world.gather_texts(own))}
    failures = {name: failure for name, (failure, *_) in told.items() if failure}
    outcomes = tuple(_outcome(student, *told[student.name]) for student in classroom.students)
    waited = classroom.waited
    costs = Costs(
        teacher=_mean(waited["teacher_seconds"], classroom.lessons),
        data=_mean(waited["data_seconds"], classroom.lessons),
    )
    notes = classroom.shared.in_words()
    if world.size > 1:
        notes.append("the time of the teacher is with that of rows on their way")
    teachers = _teachers(settings, classroom.shared)
    outcome = Outcome(settings.name, teachers, outcomes, costs, tuple(notes))

    def write() -> dict[str, Any]:
        return write_page(settings.folder, outcome, world.device)

    return Ended(by_main(world, write) or {}, failures)


def _outcome(
    student: Student, failure: str, summary: dict[str, Any], seconds: float | None
) -> StudentOutcome:
    recipe = student.recipe
    assert student.ranks is not None  # it is complete
    size = pair(recipe.crops.global_size)
    return StudentOutcome(
        student.name, recipe.folder, summary, size, seconds, student.ranks, failure
    )


def _mean(seconds: float, count: int) -> float | None:
    return seconds / count if count else None


def _teachers(settings: Distill, shared: Shared) -> tuple[TeacherOutcome, ...]:
    teacher = settings.teacher
    if isinstance(teacher, Heads):
        places = [teacher.folder]
    else:
        places = [Path(one.weights) for one in teacher.teachers]
    rows, columns = settings.grid
    return tuple(
        TeacherOutcome(one.name, *_of_run(place), (rows * one.patch_size, columns * one.patch_size))
        for one, place in zip(shared.teachers, places, strict=True)
    )


def _of_run(place: Path) -> tuple[dict[str, Any], Path | None]:
    """Scores of a teacher's own run, and its weights, as far as there are any."""
    if not (place / "checkpoints").is_dir():
        return {}, place if place.exists() else None
    files = sorted(place.glob("checkpoints/step_*/teacher.safetensors"))
    names = {
        "knn": "knn_after",
        "knn_error": "knn_after_error",
        "dense_miou": "dense_miou_after",
        "dense_miou_error": "dense_miou_after_error",
    }
    try:
        summary = json.loads((place / "summary.json").read_bytes())
        scores = {name: summary.get(key) for name, key in names.items()}
    except (OSError, ValueError, AttributeError):
        scores = {}
    return scores, files[-1] if files else None
