"""The command line of a distillation: options of the whole, of all students, of one of them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import tiny_recipe

from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.command import Asked, PlanOptions, parse
from dinov3core.train.engine.distillation.settings import (
    Distill,
    Features,
    FeatureTeacher,
    Heads,
    Student,
)
from dinov3core.train.engine.schedules import CosineSchedule

BASE = replace(tiny_recipe(), name="play", gram=None)
ABOUT = "Distil: `python train/distill.py [recipe]`."


def play() -> Distill:
    """A teacher and three students, one of which sees the views at four times their size.

    Command: python train/distill.py play
    """
    large = replace(
        BASE,
        backbone=replace(BASE.backbone, patch_size=32),
        crops=replace(BASE.crops, global_size=96, local_size=64),
    )
    cosine = replace(BASE, optim=replace(BASE.optim, lr=CosineSchedule(1e-3, 0.0)))
    students = (Student("vits", BASE), Student("vit_b", cosine), Student("large", large))
    return Distill(Heads("quickstart"), BASE, students, global_batch=12)


RECIPES: dict[str, Callable[[], Distill]] = {"play": play}


def asked(options: str) -> Asked:
    return parse(options.split(), RECIPES, ABOUT)


def student_of(options: str, name: str) -> Student:
    return next(one for one in asked(options).distill.students if one.name == name)


# --- whose option it is


def test_without_options_the_first_recipe_is_as_it_is() -> None:
    for options in ("", "play"):
        assert asked(options) == Asked(play(), play(), None)


@pytest.mark.parametrize(
    "options",
    [
        "--optim.clip 1 --vit-b.optim.clip 2",
        "--vit-b.optim.clip 2 --optim.clip 1",
        "play --vit_b.optim.clip=2 --optim.clip=1",
        "--vit_b.optim.clip 7 --optim.clip 1 --vit-b.optim.clip 2",
    ],
)
def test_a_students_option_wins_whatever_the_order(options: str) -> None:
    distill = asked(options).distill
    assert [one.recipe.optim.clip for one in distill.students] == [1.0, 2.0, 1.0]
    assert asked(options).standard == play()


def test_options_of_the_whole() -> None:
    options = "--teacher.run runs/x --global-batch 24 --cache a/b --cache-views 4 --run.out o"
    whole = asked(f"{options} --name mine").distill
    assert whole.teacher == Heads("runs/x")
    assert (whole.global_batch, whole.cache, whole.cache_views) == (24, "a/b", 4)
    assert (whole.folder, whole.name) == (Path("o"), "mine")
    students = whole.students_for(1)
    assert [str(one.recipe.folder) for one in students] == ["o/vits", "o/vit_b", "o/large"]
    assert {one.recipe.run.batch_size for one in students} == {24}


def test_options_of_all_students_keep_what_they_share_equal() -> None:
    options = "--run.epochs 2 --run.seed 5 --masks.ratio-max 0.4 --data.scenes 99"
    options += " --teacher.temperature.end 0.2 --loss.sinkhorn-iterations 4 --crops.hue 0.2"
    whole = asked(options).distill
    for student in whole.students_for(2):
        recipe = student.recipe
        assert (recipe.run.epochs, recipe.run.seed, recipe.data.scenes) == (2, 5, 99)
        assert (recipe.masks.ratio_max, recipe.crops.hue) == (0.4, 0.2)
        assert recipe.teacher.temperature.end == 0.2 and recipe.loss.sinkhorn_iterations == 4


def test_the_average_of_a_student_is_its_own() -> None:
    assert student_of("--teacher.momentum.end 0.5", "large").recipe.teacher.momentum.end == 0.5
    distill = asked("--teacher.run r --vits.teacher.momentum.end 0.5").distill
    assert distill.teacher == Heads("r")
    assert [one.recipe.teacher.momentum.end for one in distill.students] == [0.5, 0.9, 0.9]


def test_places_and_beginnings_of_students() -> None:
    whole = asked("--ranks 0 1 --vits.ranks 1 3 --large.start spaced --vits.ranks None").distill
    assert [one.ranks for one in whole.students] == [None, (0, 1), (0, 1)]
    assert [one.start for one in whole.students] == ["random", "random", "spaced"]


def test_students_go_on_seeing_the_views_in_proportion() -> None:
    whole = asked("--crops.global-size 32 --crops.local-size 8").distill
    sizes = [(s.recipe.crops.global_size, s.recipe.crops.local_size) for s in whole.students]
    assert sizes == [(32, 8), (32, 8), (128, 32)]
    assert whole.crops.global_size == 32 and whole.grid == (4, 4)
    assert len(whole.students_for(1)) == 3
    whole = asked("--crops.global-size 32 48").distill
    assert whole.students[2].recipe.crops.global_size == (128, 192) and whole.grid == (4, 6)
    assert student_of("--large.crops.local-size 128", "large").recipe.crops.local_size == 128


@pytest.mark.parametrize("names", ["large,vits", "vits,large", "vits large"])
def test_some_of_the_students(names: str) -> None:
    answer = asked(f"--optim.clip 1 --students {names} --large.optim.clip 2")
    students = answer.distill.students
    assert [(one.name, one.recipe.optim.clip) for one in students] == [("vits", 1), ("large", 2)]
    assert [one.name for one in answer.standard.students] == ["vits", "large"]


def test_teachers_without_heads() -> None:
    options = "--teacher features --teacher.teachers a.pth,size=64 b,share=2"
    teachers = (FeatureTeacher("a.pth", 64), FeatureTeacher("b", share=2.0))
    assert asked(options).distill.teacher == Features(teachers)


# --- one sentence for what cannot be read


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--vitb.optim.clip 1",
            "--vitb.optim.clip: there is no student vitb; did you mean vit_b. Students: vits, "
            "vit_b, large.",
        ),
        ("--optm.clip 1", "--optm.clip: there is no student optm; did you mean optim. Students"),
        ("--base.optim.clip 1", "--base.optim.clip: there is no student base;"),
        ("--students vits,vit", "--students: there is no student vit; did you mean vits. Students"),
        ("--students", "--students: expected names of vits, vit_b, large, got none"),
        ("--run.batch-size 4", "--run.batch-size: the images of a process follow from"),
        ("--vits.run.batch_size 4", "--vits.run.batch-size: the images of a process follow from"),
        ("--vits.run.out x", "--vits.run.out follows from the whole: a student writes into the"),
        ("--large.name x", "--large.name follows from the whole"),
        (
            "--optim.lr.base 1",
            "--optim.lr.base is no option of student vits; give it to those that have it: "
            "--vit_b.optim.lr.base",
        ),
        ("--optim.lr 1", "--optim.lr is a schedule: give --optim.lr.start 1"),
        ("--vit-b.optim.lr 1", "student vit_b: --optim.lr is a schedule: give --optim.lr.base 1"),
        ("--teacher.teachers a", "--teacher.teachers is an option of --teacher features; give bo"),
        (
            "--teacher features --teacher.run x",
            "--teacher.run is an option of --teacher heads; give both",
        ),
        (
            "--teacher features --teacher.teachers a,sice=3",
            r"teacher.teachers: expected a teacher as WEIGHTS\[,size=PIXELS\]\[,share=NUMBER\], "
            "got 'a,sice=3'",
        ),
        ("--teacher nobody", "--teacher: expected heads or features, got 'nobody'"),
        (
            "--teacher features --teacher.teachers a --loss.ibot-weight 1",
            "--loss.ibot-weight is of a distillation of heads, and --teacher features compares",
        ),
        (
            "--teacher features --teacher.teachers a --crops.local-count 2",
            "--crops.local-count is of a distillation of heads",
        ),
        (
            "--teacher features --teacher.teachers a --vits.dino.hidden 1",
            "--dino.hidden is of a distillation of heads",
        ),
        (
            "--teacher features --teacher.teachers a --teacher.temperature.end 1",
            "--teacher.temperature.end is of a distillation of heads",
        ),
        ("--plan-ranks 3", "--plan-ranks is an option of --plan; give both"),
        ("--plan --plan-ranks 0", "--plan-ranks: expected a number of processes, 1 to 100000, got"),
        ("--plan --plan-ranks x", "--plan-ranks: expected a number of processes, .* got 'x'"),
        (
            "--plan vitb=1",
            "--plan: expected seconds per image as NAME=SECONDS,... of teacher, vits, vit_b, "
            "large, got 'vitb=1'",
        ),
        ("--plan vits", "--plan: expected seconds per image .* got 'vits'"),
        ("--plan vits=0", "--plan: expected seconds per image .* got 'vits=0'"),
        ("--plan vits=nan", "--plan: expected seconds per image .* got 'vits=nan'"),
        ("-x", "expected an option that begins with --, got '-x'"),
        ("plai", "unknown recipe 'plai'; did you mean play. Known: play."),
    ],
)
def test_what_cannot_be_read_gets_one_sentence(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}") as refused:
        asked(options)
    assert "\n" not in str(refused.value)


def test_a_shared_value_for_one_student_is_refused() -> None:
    whole = asked("--vits.masks.ratio-max 0.3").distill
    with pytest.raises(
        ConfigError, match=r"^student vits: masks.ratio_max is 0.3, but 0.5 for all"
    ):
        whole.students_for(1)


def test_an_unknown_field_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        asked("--optim.clop 1")
    assert left.value.code not in (0, None)
    assert "--optim.clop" in capsys.readouterr().err


# --- plan and help


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ("--plan", PlanOptions({})),
        ("--plan --plan-ranks 296", PlanOptions({}, 296)),
        ("--plan teacher=1e-3,vit_b=2", PlanOptions({"teacher": 1e-3, "vit_b": 2.0})),
        ("--plan teacher=1 large=2 --global-batch 24", PlanOptions({"teacher": 1, "large": 2})),
    ],
)
def test_a_plan_is_asked_for(options: str, plan: PlanOptions) -> None:
    assert asked(options).plan == plan


def test_help_has_the_whole_and_the_students(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        asked("play --help")
    assert left.value.code == 0
    page = capsys.readouterr().out
    for line in (
        "A teacher and three students",
        "--global-batch INT",
        "--teacher.run STR",
        "  --teacher heads: The teacher is the EMA teacher of a run of this project",
        "  --teacher features: Teachers without heads",
        "--students NAME,NAME",
        "--plan NAME=SECONDS,...",
        "student vits, trained by all processes:",
        "student vit_b, trained by all processes:",
        "  backbone.patch_size = 32 (recipe: 8)",
        "--vits.OPTION for vits alone",
        "--optim.clip FLOAT",
        "--start {random,first,spaced}",
        "--ranks {None}|{INT INT}",
    ):
        assert line in page, line
    assert "--base" not in page


def test_the_overview_lists_the_recipes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        asked("--help")
    page = capsys.readouterr().out
    assert "Distil: " in page and "play           A teacher and three students" in page
