"""What a distillation is made of: what students share, and one sentence for what cannot work."""

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import tiny_recipe, with_run

from dinov3core.bounds import complaints
from dinov3core.data.sizes import CropSizes
from dinov3core.train.engine.config import ConfigError, GramAnchor, Pretrain
from dinov3core.train.engine.distillation.settings import (
    Distill,
    Features,
    FeatureTeacher,
    Heads,
    Student,
)
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import constant

BASE = replace(tiny_recipe(), name="tiny_distill", gram=None)


def distillation(*students: Student, **fields) -> Distill:
    """A distillation of two students, or of those given."""
    pair = (Student("small", BASE), Student("large", BASE))
    whole = Distill(Heads("quickstart"), BASE, students or pair, global_batch=12)
    return replace(whole, **fields)


def seeing(recipe: Pretrain, **fields) -> Pretrain:
    return replace(recipe, crops=replace(recipe.crops, **fields))


# --- what is shared, and what follows


def test_students_are_complete_recipes_of_their_processes() -> None:
    whole = distillation(Student("small", BASE, (0, 1)), Student("large", BASE, (1, 4)))
    whole = replace(whole, base=with_run(BASE, out="a/b"))
    small, large = whole.students_for(4)
    assert (small.ranks, large.ranks) == ((0, 1), (1, 4))
    assert (small.recipe.run.batch_size, large.recipe.run.batch_size) == (12, 4)
    assert (small.recipe.folder, large.recipe.folder) == (Path("a/b/small"), Path("a/b/large"))
    assert [one.recipe.name for one in (small, large)] == ["small", "large"]
    for student, processes in ((small, 1), (large, 3)):
        assert resolve(student.recipe, processes).steps == 8


def test_without_ranks_all_processes_train_all_students() -> None:
    students = distillation().students_for(3)
    assert [one.ranks for one in students] == [(0, 3), (0, 3)]
    assert [one.recipe.run.batch_size for one in students] == [4, 4]
    assert distillation().folder == Path("runs/tiny_distill")


def test_what_is_shared_comes_from_the_base_and_the_rest_from_the_student() -> None:
    own = replace(
        seeing(BASE, global_size=72, local_size=48),
        backbone=replace(BASE.backbone, patch_size=24),
        optim=replace(BASE.optim, lr=constant(3e-3)),
    )
    (student,) = distillation(Student("own", own)).students_for(1)
    assert student.recipe.optim == own.optim and student.recipe.backbone == own.backbone
    assert student.recipe.crops == own.crops
    assert student.grid == (3, 3)
    whole = distillation(Student("own", own))
    assert whole.grid == (3, 3) and whole.patch_size == 8  # of views of 24 px


SHARED = {
    "run.seed": with_run(BASE, seed=7),
    "run.epochs": with_run(BASE, epochs=2),  # lengths that differ
    "run.steps": with_run(BASE, steps=3),
    "masks.ratio_max": replace(BASE, masks=replace(BASE.masks, ratio_max=0.3)),
    "data.scenes": replace(BASE, data=replace(BASE.data, scenes=9)),
    "crops.hue": seeing(BASE, hue=0.3),
    "crops.local_count": seeing(BASE, local_count=2),
    "teacher.temperature.start": replace(
        BASE, teacher=replace(BASE.teacher, temperature=constant(0.2))
    ),
    "loss.sinkhorn_iterations": replace(BASE, loss=replace(BASE.loss, sinkhorn_iterations=9)),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_cannot_differ(name: str) -> None:
    whole = distillation(Student("small", SHARED[name]), Student("large", BASE))
    option = name.replace("_", "-")
    with pytest.raises(
        ConfigError, match=f"^student small: {name} is .* give it once, as --{option}$"
    ):
        whole.students_for(1)
    same = replace(
        distillation(Student("small", SHARED[name]), Student("large", SHARED[name])),
        base=SHARED[name],
    )
    assert len(same.students_for(1)) == 2


# --- one sentence for what cannot work


def two(first: tuple[int, int] | None, second: tuple[int, int] | None) -> Distill:
    return distillation(Student("small", BASE, first), Student("large", BASE, second))


REFUSED: dict[str, tuple[Distill, int, str]] = {
    "overlap": (
        two((0, 2), (1, 3)),
        3,
        "students small and large overlap: processes 0 to 1 and 1 to 2; give both the same",
    ),
    "one inside another": (two((0, 1), None), 3, "students small and large overlap: "),
    "uncovered": (two((0, 1), (2, 3)), 3, "process 1 of 3 would train no student; give ranks"),
    "uncovered end": (two((0, 1), (1, 2)), 6, "processes 2 to 5 of 6 would train no student"),
    "beyond the world": (
        two((0, 2), (2, 6)),
        4,
        "student large is trained by processes 2 to 5, and the number of processes is 4; start",
    ),
    "no processes": (two((1, 1), (0, 3)), 3, "student small: ranks 1 1 are no processes"),
    "below zero": (two((-1, 1), (1, 3)), 3, "student small: ranks -1 1 are no processes"),
    "batch": (
        two((0, 1), (1, 6)),
        6,
        "global_batch 12 cannot be divided among the 5 processes of student large; expected a mul",
    ),
    "grids": (
        distillation(Student("small", BASE), Student("large", seeing(BASE, global_size=32))),
        1,
        "students small and large have patch grids of 3x3 and 4x4; the teacher has one for all",
    ),
    "grid of the views": (
        distillation(
            base=seeing(BASE, global_size=(24, 25)),
            students=tuple(Student(name, BASE) for name in ("small", "large")),
        ),
        1,
        "crops.global_size 24x25 of the views that are made: expected square patches in a grid of",
    ),
    "gram": (
        distillation(Student("small", replace(BASE, gram=GramAnchor()))),
        1,
        "student small: gram anchors a student to an earlier teacher of its own",
    ),
    "names": (distillation(Student("a-b", BASE), Student("A_b", BASE)), 1, "students a-b and A_b"),
    "same names": (
        distillation(Student("a", BASE), Student("a", BASE)),
        1,
        "students a and a would share a folder and options; give each a name of its own",
    ),
    "no folder name": (distillation(Student("a/b", BASE)), 1, "student 'a/b': expected a name of"),
    "point": (distillation(Student("a.b", BASE)), 1, "student 'a.b': expected a name of letters"),
    "empty name": (distillation(Student("", BASE)), 1, "student '': expected a name of letters"),
    "an option's name": (
        distillation(Student("optim", BASE)),
        1,
        "student 'optim': --optim is an option already; give the student another name",
    ),
    "a word of the command": (
        distillation(Student("plan-ranks", BASE)),
        1,
        "student 'plan-ranks': --plan-ranks is an option already",
    ),
    "nobody": (distillation(students=()), 1, "a distillation needs a student"),
    "no views to compare": (
        distillation(
            base=seeing(BASE, local_count=0, global_count=1),
            students=(Student("a", seeing(BASE, local_count=0, global_count=1)),),
        ),
        1,
        "crops.local_count 0 and crops.global_count 1 leave the DINO term nothing to compare",
    ),
    "sizes": (
        distillation(
            base=seeing(BASE, other_sizes=(CropSizes(0.5, 32, 16),)),
            students=(Student("a", seeing(BASE, other_sizes=(CropSizes(0.5, 32, 16),))),),
        ),
        1,
        "crops.other_sizes: the views of a distillation have one size",
    ),
    "cache": (distillation(cache_views=4), 1, "cache_views 4 repeats views .* give --cache DIR"),
    "from": (
        distillation(Student("a", with_run(BASE, from_="quickstart"))),
        1,
        "student a: run.from continues a pretraining run.* give --a.run.init quickstart",
    ),
    "two beginnings": (
        distillation(Student("a", with_run(BASE, init="w.pth"), start="first")),
        1,
        "student a: run.init w.pth and start first both say what to start from",
    ),
    "no run": (distillation(teacher=Heads()), 1, "teacher.run: expected the run whose teacher"),
    "no weights": (
        distillation(teacher=Features()),
        1,
        "teacher.teachers: expected weights to learn from, got none; give --teacher.teachers FILE",
    ),
    "nameless weights": (
        distillation(teacher=Features((FeatureTeacher(),))),
        1,
        r"teacher.teachers\[0\].weights: expected a file or folder, got none",
    ),
    "a value of a student": (
        distillation(Student("a", replace(BASE, optim=replace(BASE.optim, clip=0.0)))),
        1,
        "a.optim.clip: expected at least 1e-06 and at most 1000000000, got 0.0",
    ),
    "a value of the whole": (distillation(global_batch=0), 1, "global_batch: expected at least 1"),
    "a word of the start": (
        distillation(Student("a", BASE, start="last")),  # type: ignore[arg-type]
        1,
        r"students\[0\].start: expected one of random, first, spaced, got 'last'",
    ),
    "what one student alone cannot": (
        distillation(Student("a", replace(BASE, dino=replace(BASE.dino, prototypes=3)))),
        1,
        "student a: dino.prototypes is 3 for 12 images a step",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_gets_one_sentence(case: str) -> None:
    whole, processes, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^{sentence}") as refused:
        whole.students_for(processes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ("quickstart", "python train/pretrain.py quickstart"),
        ("a b/run", "python train/pretrain.py RECIPE --run.out 'a b/run'"),
    ],
)
def test_a_missing_teacher_names_the_command_that_makes_it(
    run: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = Heads(run)
    with pytest.raises(ConfigError, match=f"make it first: {re.escape(command)}, or give another"):
        teacher.check()
    teacher.folder.mkdir(parents=True)
    teacher.check()


# --- teachers as words


@pytest.mark.parametrize(
    ("text", "teacher"),
    [
        ("weights.pth", FeatureTeacher("weights.pth")),
        ("a/b,size=224", FeatureTeacher("a/b", 224)),
        ("timm:x=f.pth,share=0.5,size=96", FeatureTeacher("timm:x=f.pth", 96, 0.5)),
    ],
)
def test_a_teacher_is_read_from_a_word_and_written_as_one(
    text: str, teacher: FeatureTeacher
) -> None:
    assert FeatureTeacher.from_text(text) == teacher
    assert FeatureTeacher.from_text(str(teacher)) == teacher


@pytest.mark.parametrize("text", ["", ",size=3", "a,b", "a,size", "a,size=x", "a,size=1,size=2"])
def test_another_word_is_no_teacher(text: str) -> None:
    with pytest.raises(ValueError, match="expected a teacher as WEIGHTS"):
        FeatureTeacher.from_text(text)


def test_fields_of_teachers_have_bounds() -> None:
    (sentence,) = complaints(FeatureTeacher("a", share=0.0), "teacher.")
    assert sentence.startswith("teacher.share: expected above 0")


@pytest.mark.parametrize("ranks", list(itertools.product(range(4), repeat=4)))
def test_two_ranges_are_equal_or_divide_the_processes(ranks: tuple[int, int, int, int]) -> None:
    ranges = {ranks[:2], ranks[2:]}
    members = [set(range(first, past)) for first, past in ranges]
    covered = set().union(*members)
    whole = two(ranks[:2], ranks[2:])
    if all(members) and covered == {0, 1, 2} and sum(map(len, members)) == 3:
        assert len(whole.students_for(3)) == 2
    else:
        with pytest.raises(ConfigError):
            whole.students_for(3)
