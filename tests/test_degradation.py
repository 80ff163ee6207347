"""The patches have degraded, or not: said only when the numbers say so."""

import math

import pytest

from dinov3core.evals.degradation import degradation

STEPS = (0, 100, 200, 300, 400)


def log(**columns: tuple) -> list[dict]:
    """Evaluations at `STEPS`, with rows of training between them."""
    rows: list[dict] = []
    for place, step in enumerate(STEPS[: len(next(iter(columns.values())))]):
        if step:
            rows.append({"step": step, "loss": 4.0, "patch_loss": None})
        scores = {name: values[place] for name, values in columns.items()}
        rows.append({"step": step, "event": "eval", **scores})
    return rows


RISING = (20.0, 40.0, 50.0, 55.0, 60.0)
ERRORS = (0.5,) * 5


def test_patches_fall_while_images_rise() -> None:
    rows = log(
        dense_miou=(5.0, 20.0, 18.0, 17.0, 16.0), dense_error=ERRORS, knn=RISING, knn_error=ERRORS
    )
    verdict = degradation(rows)
    assert verdict.kind == "degraded" and verdict.since == 100
    assert verdict.sentence == (
        "The patches have degraded since step 100: the dense score fell from 20.0 to 16.0 % (more "
        "than two standard errors) while k-NN rose from 40.0 to 60.0 %"
    )


def test_a_fall_within_two_standard_errors_is_none() -> None:
    """Two errors of 0.5 make 0.71 of a difference: 1.5 above 1.41 counts, 1.4 does not."""
    for fall, kind in ((1.5, "degraded"), (1.4, "none")):
        dense = (5.0, 20.0, 19.9, 19.8, 20.0 - fall)
        rows = log(dense_miou=dense, dense_error=ERRORS, knn=RISING, knn_error=ERRORS)
        assert degradation(rows).kind == kind
    assert degradation(rows).sentence == (
        "The dense score of patches has not fallen (5.0 to 18.6 %, at most 20.0). A linear rule "
        "gives it: how well patches compare with one another is for the task tracking of "
        "train/evaluate.py to say"
    )


def test_patches_that_rise_have_not_degraded() -> None:
    rows = log(dense_miou=(5.0, 14.0, 18.0, 20.0, 22.0), dense_error=ERRORS, knn=RISING)
    verdict = degradation(rows)
    assert verdict.kind == "none" and verdict.since is None
    assert "has not fallen (5.0 to 22.0 %)" in verdict.sentence


def test_images_that_fall_as_well_are_no_case_for_gram() -> None:
    falling = (20.0, 50.0, 45.0, 42.0, 40.0)
    rows = log(
        dense_miou=(5.0, 20.0, 18.0, 17.0, 12.0), dense_error=ERRORS, knn=falling, knn_error=ERRORS
    )
    verdict = degradation(rows)
    assert verdict.kind == "worse" and verdict.since == 100
    assert verdict.sentence.startswith("Images and patches have got worse since step 100")
    assert "k-NN from 50.0 to 40.0 %" in verdict.sentence and "Gram" not in verdict.sentence


def test_images_that_stay_are_not_said_to_rise() -> None:
    level = (20.0, 50.0, 50.0, 50.0, 50.4)
    rows = log(
        dense_miou=(5.0, 20.0, 18.0, 17.0, 12.0), dense_error=ERRORS, knn=level, knn_error=ERRORS
    )
    assert degradation(rows).sentence.endswith("while k-NN went from 50.0 to 50.4 %")


def test_without_labels_the_dense_score_judges_alone() -> None:
    rows = log(dense_miou=(5.0, 20.0, 12.0), dense_error=ERRORS[:3], knn=(None,) * 3)
    verdict = degradation(rows)
    assert verdict.kind == "degraded" and verdict.sentence.endswith("k-NN was not measured")


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, "12", True])
def test_what_was_not_measured_is_passed_over(hole: object) -> None:
    dense = (5.0, 20.0, hole, 17.0, hole)
    rows = log(dense_miou=dense, dense_error=(hole, 0.5, hole, 0.5, hole), knn=RISING)
    verdict = degradation(rows)
    assert verdict.kind == "degraded" and "fell from 20.0 to 17.0 %" in verdict.sentence
    assert "k-NN rose from 40.0 to 55.0 %" in verdict.sentence


def test_of_equal_best_scores_the_later_counts() -> None:
    rows = log(dense_miou=(5.0, 20.0, 20.0, 17.0, 16.0), dense_error=ERRORS, knn=RISING)
    assert degradation(rows).since == 200


def test_a_resumed_log_may_repeat_steps() -> None:
    """The last evaluation of a step counts, wherever its row stands."""
    rows = log(dense_miou=(5.0, 30.0, 18.0, 17.0, 16.0), dense_error=ERRORS, knn=RISING)
    again = {"step": 100, "dense_miou": 12.0, "dense_error": 0.5, "knn": 40.0}
    assert degradation([*rows, again]).since == 200


@pytest.mark.parametrize("rows", [[], [{"step": 0, "event": "eval", "dense_miou": 5.0}], [{}]])
def test_a_short_log_is_not_judged(rows: list[dict]) -> None:
    verdict = degradation(rows)
    assert verdict.kind == "not_judged" and "no two evaluations" in verdict.sentence


def test_by_drift_alone_it_is_said_carefully() -> None:
    """All similarities move when a run begins from random weights: the first half says nothing."""
    learning = log(patch_drift=(0.0, 0.16, 0.165, 0.17, 0.17), knn=RISING)
    verdict = degradation(learning)
    assert verdict.kind == "still" and verdict.since == 200
    assert verdict.sentence.startswith("No sign that the patches have degraded")
    assert "(drift 0.17 at step 200, 0.17 at step 400)" in verdict.sentence

    moving = degradation(log(patch_drift=(0.0, 0.1, 0.16, 0.24, 0.3), knn=RISING))
    assert moving.kind == "moving" and moving.since == 200
    assert moving.sentence == (
        "The patches may have degraded: their similarities still move (drift 0.16 at step 200, "
        "0.30 at step 400) while k-NN went from 50.0 to 60.0 %; whether for better or for worse "
        "takes a dense score"
    )
    alone = degradation(log(patch_drift=(0.0, 0.1), knn=(None, None)))
    assert alone.kind == "moving" and "k-NN" not in alone.sentence
