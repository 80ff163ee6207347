"""What a run says of its patches, with the command that mends them where it can be given."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
from tiny_runs import tiny_recipe, with_run

from dinov3core.train.engine.best import Best
from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.config import File, GramAnchor, Pretrain
from dinov3core.train.engine.patches import patches_summary

DEGRADED = [
    {
        "step": step,
        "dense_agreement": agreement,
        "dense_agreement_error": 0.5,
        "knn": knn,
        "knn_error": 1.0,
    }
    for step, agreement, knn in ((0, 63.0, 20.0), (100, 62.0, 40.0), (200, 56.0, 60.0))
]
BEST_PATCHES = Best(100, "dense", 62.0, 0.5, 200, 56.0, 0.5)
BEST_IMAGES = Best(200, "knn", 60.0, 1.0, 200, 60.0, 1.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Pretrain:
    """A run without a Gram term in a folder whose name a shell would split, with its best."""
    (tmp_path / "my run" / "best").mkdir(parents=True)
    return replace(with_run(tiny_recipe(), out=str(tmp_path / "my run")), gram=None)


def test_the_command_anchors_to_the_teacher_whose_patches_were_best(recipe: Pretrain) -> None:
    summary = patches_summary(DEGRADED, recipe, BEST_PATCHES)
    assert summary["patches"] == "degraded" and summary["patches_since"] == 100
    said = summary["patches_sentence"]
    assert said.startswith("The patches have degraded since step 100: ")
    assert said.endswith(" %. Gram anchoring is for this:")
    program = as_called("python train/pretrain.py")
    assert summary["patches_command"] == (
        f"{program} tiny --data.source scenes --run.from '{recipe.folder}' "
        f"--gram.teacher file --gram.teacher.path '{recipe.folder / 'best'}' "
        f"--run.out '{recipe.folder}-gram'"
    )


def test_a_checkpoint_of_that_step_will_do(recipe: Pretrain) -> None:
    checkpoint = recipe.folder / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    command = patches_summary(DEGRADED, recipe, BEST_IMAGES)["patches_command"]
    assert f"--gram.teacher.path '{checkpoint}'" in command


def test_without_that_teacher_it_says_how_to_keep_one(recipe: Pretrain) -> None:
    for best in (BEST_IMAGES, None):
        summary = patches_summary(DEGRADED, recipe, best)
        advice = "the teacher of step 100 is not kept: train with --run.keep-best dense"
        assert advice in summary["patches_sentence"] and not summary["patches_command"]


def test_a_run_from_python_gets_no_command(recipe: Pretrain) -> None:
    data = replace(recipe.data, source="from Python: DatasetSource")
    given = replace(recipe, data=data)
    summary = patches_summary(DEGRADED, given, BEST_PATCHES)
    anchor = f'gram=GramAnchor(File("{recipe.folder / "best"}"))'
    assert anchor in summary["patches_sentence"] and not summary["patches_command"]


def test_a_stage_may_anchor_to_what_it_began_with(recipe: Pretrain) -> None:
    """Its step 0 is a trained network, which was best here."""
    stage = with_run(recipe, from_="the/run before")
    summary = patches_summary(DEGRADED, stage, BEST_IMAGES)
    assert summary["patches_since"] == 0
    assert "since the start of the run: " in summary["patches_sentence"]
    assert summary["patches_sentence"].endswith("for this, in this run made once more:")
    assert (
        "--run.from 'the/run before' --gram.teacher file --gram.teacher.path 'the/run before'"
    ) in summary["patches_command"]

    adapted = with_run(recipe, init="some weights.pth")
    command = patches_summary(DEGRADED, adapted, BEST_IMAGES)["patches_command"]
    assert (
        "--run.init 'some weights.pth' --gram.teacher file --gram.teacher.path 'some weights.pth'"
    ) in command


def test_a_run_with_a_gram_term_is_not_told_to_do_the_same_again(recipe: Pretrain) -> None:
    anchored = replace(recipe, gram=GramAnchor(File("early")))
    summary = patches_summary(DEGRADED, anchored, BEST_PATCHES)
    assert summary["patches"] == "degraded" and not summary["patches_command"]
    assert "This run has a Gram term, which did not hold them: a larger weight" in str(
        summary["patches_sentence"]
    )


def test_after_a_gram_stage_that_mended_them_nothing_is_advised(recipe: Pretrain) -> None:
    """The figures of the trial, seed 0: back to where they were best."""
    rows = [
        row | {"dense_agreement": agreement}
        for row, agreement in zip(DEGRADED, (58.1, 59.9, 60.6), strict=True)
    ]
    stage = replace(
        with_run(recipe, from_="quickstart"), gram=GramAnchor(File("runs/quickstart/best"))
    )
    summary = patches_summary(rows, stage, BEST_IMAGES)
    assert summary["patches"] == "none" and summary["patches_since"] is None
    assert summary["patches_sentence"] == (
        "The patches have not degraded: patch agreement rose from 58.1 to 60.6 % (3.5 standard "
        "errors)."
    )
    assert not summary["patches_command"]


def test_patches_that_have_not_degraded_need_nothing(recipe: Pretrain) -> None:
    risen = [*DEGRADED[:2], DEGRADED[2] | {"dense_agreement": 62.5}]
    for rows, kind in ((risen, "none"), (DEGRADED[:2], "not_judged"), (DEGRADED[:1], "not_judged")):
        summary = patches_summary(rows, recipe, BEST_PATCHES)
        assert summary["patches"] == kind and not summary["patches_command"]
        assert "--" not in str(summary["patches_sentence"])
