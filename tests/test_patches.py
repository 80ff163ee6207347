"""What a run says of its patches, with the command that mends them where it can be given."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
from tiny_runs import tiny_recipe, with_run

from dinov3core.train.engine.best import Best
from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.patches import patches_summary

DEGRADED = [
    {"step": step, "dense_miou": miou, "dense_error": 0.5, "knn": knn, "knn_error": 1.0}
    for step, miou, knn in ((0, 5.0, 20.0), (100, 22.0, 40.0), (200, 15.0, 60.0))
]
BEST_PATCHES = Best(100, "dense", 22.0, 0.5, 15.0)
BEST_IMAGES = Best(200, "knn", 60.0, 1.0, 60.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Pretrain:
    """A run in a folder whose name a shell would split, with its best teacher."""
    (tmp_path / "my run" / "best").mkdir(parents=True)
    return with_run(tiny_recipe(), out=str(tmp_path / "my run"))


def test_the_command_anchors_to_the_teacher_whose_patches_were_best(recipe: Pretrain) -> None:
    summary = patches_summary(DEGRADED, recipe, BEST_PATCHES)
    assert summary["patches"] == "degraded"
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


def test_patches_that_have_not_degraded_need_nothing(recipe: Pretrain) -> None:
    for rows, kind in ((DEGRADED[:2], "none"), (DEGRADED[:1], "not_judged")):
        summary = patches_summary(rows, recipe, BEST_PATCHES)
        assert summary["patches"] == kind and not summary["patches_command"]
        assert "--" not in summary["patches_sentence"]
