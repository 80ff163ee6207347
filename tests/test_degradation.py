"""The patches have degraded, or not: said only when the numbers say so."""

import math

import pytest

from dinov3core.evals.degradation import degradation

STEPS = (0, 100, 200, 300, 400)
RISING = (20.0, 40.0, 50.0, 55.0, 60.0)
ERRORS = (0.5,) * 5


def log(agreement: tuple = (), knn: tuple = RISING, errors: tuple = ERRORS, **more) -> list[dict]:
    """Evaluations at `STEPS`, with rows of training between them."""
    columns = {"knn": knn, "knn_error": errors, **more}
    if agreement:
        columns |= {"dense_agreement": agreement, "dense_agreement_error": errors}
    rows: list[dict] = []
    count = min(len(values) for values in columns.values())
    for place, step in enumerate(STEPS[:count]):
        if step:
            rows.append({"step": step, "loss": 4.0, "patch_loss": None})
        scores = {name: values[place] for name, values in columns.items()}
        rows.append({"step": step, "event": "eval", **scores})
    return rows


def test_patches_fall_while_images_rise() -> None:
    verdict = degradation(log((55.0, 62.0, 60.0, 59.0, 58.0)))
    assert verdict.kind == "degraded" and verdict.since == 100
    assert verdict.sentence == (
        "The patches have degraded since step 100: patch agreement fell from 62.0 to 58.0 % (5.7 "
        "standard errors) while k-NN rose from 40.0 to 60.0 %"
    )


def test_the_quick_start_is_judged_as_its_trial_says() -> None:
    """Figures of the online evaluation, seed 0, with linear segmentation, which only rises."""
    rows = log(
        (59.33, 59.57, 58.85, 57.94),
        knn=(18.9, 42.3, 49.8, 54.9),
        dense_miou=(8.06, 16.65, 20.65, 23.05),
        dense_miou_error=(0.39, 0.65, 0.74, 0.79),
    )
    verdict = degradation(rows, first_step=1)
    assert verdict.kind == "degraded" and verdict.since == 100
    assert "patch agreement fell from 59.6 to 57.9 % (2.3 standard errors)" in verdict.sentence
    assert "segmentation" not in verdict.sentence


def test_a_fall_within_two_standard_errors_is_none() -> None:
    """Two errors of 0.5 make 0.71 of a difference: 1.5 above 1.41 counts, 1.4 does not."""
    for fall, kind in ((1.5, "degraded"), (1.4, "none")):
        rows = log((55.0, 60.0, 59.9, 59.8, 60.0 - fall))
        assert degradation(rows).kind == kind
    assert degradation(log((58.0, 60.0, 59.9, 59.8, 58.6))).sentence == (
        "The patches have not degraded: patch agreement went from 58.0 to 58.6 % (within two "
        "standard errors), at most 60.0"
    )


def test_patches_that_rise_have_not_degraded() -> None:
    rows = log((55.0, 57.0, 58.0, 60.0, 62.0), dense_miou=(8.0,) * 5, dense_miou_error=ERRORS)
    verdict = degradation(rows)
    assert verdict.kind == "none" and verdict.since is None
    assert verdict.sentence == (
        "The patches have not degraded: patch agreement rose from 55.0 to 62.0 % (9.9 standard "
        "errors), linear segmentation went from 8.0 to 8.0 %"
    )


def test_either_score_may_show_it() -> None:
    falling = {"dense_miou": (5.0, 20.0, 25.0, 17.0, 16.0), "dense_miou_error": ERRORS}
    verdict = degradation(log((55.0, 57.0, 58.0, 60.0, 62.0), **falling))
    assert verdict.kind == "degraded" and verdict.since == 200
    assert "since step 200: linear segmentation fell from 25.0 to 16.0 %" in verdict.sentence

    both = degradation(log((55.0, 62.0, 60.0, 59.0, 58.0), **falling))
    assert both.since == 100
    assert (
        "since step 100: patch agreement fell from 62.0 to 58.0 % (5.7 standard errors) and linear "
        "segmentation fell from 25.0 to 16.0 % (12.7 standard errors) while k-NN rose from 40.0"
    ) in both.sentence


def test_an_untrained_network_is_no_state_to_go_back_to() -> None:
    rows = log((63.0, 60.0, 60.1, 60.0, 59.9))
    assert degradation(rows).since == 0
    assert degradation(rows, first_step=1).kind == "none"
    short = degradation(log((63.0, 60.0), patch_drift=(0.0, 0.2)), first_step=1)
    assert short.kind == "not_judged" and short.sentence.endswith(
        "no two evaluations to compare, that of the untrained network apart"
    )


def test_images_that_fall_as_well_are_no_case_for_gram() -> None:
    verdict = degradation(log((55.0, 62.0, 60.0, 59.0, 58.0), knn=(20.0, 50.0, 45.0, 42.0, 40.0)))
    assert verdict.kind == "worse" and verdict.since == 100
    assert verdict.sentence.startswith("Images and patches have got worse since step 100")
    assert "k-NN from 50.0 to 40.0 %" in verdict.sentence and "Gram" not in verdict.sentence


def test_images_that_stay_are_not_said_to_rise() -> None:
    rows = log((55.0, 62.0, 60.0, 59.0, 58.0), knn=(20.0, 50.0, 50.0, 50.0, 50.4))
    assert degradation(rows).sentence.endswith("while k-NN went from 50.0 to 50.4 %")


def test_without_labels_patches_judge_alone() -> None:
    verdict = degradation(log((55.0, 62.0, 58.0), knn=(None,) * 3))
    assert verdict.kind == "degraded" and verdict.sentence.endswith("k-NN was not measured")


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, "12", True])
def test_what_was_not_measured_is_passed_over(hole: object) -> None:
    rows = log((55.0, 62.0, hole, 58.0, hole), errors=(hole, 0.5, hole, 0.5, hole))
    verdict = degradation(rows)
    assert verdict.kind == "degraded" and "fell from 62.0 to 58.0 % (5.7" in verdict.sentence
    assert "k-NN rose from 40.0 to 55.0 %" in verdict.sentence


def test_without_an_error_nothing_is_said_of_it() -> None:
    verdict = degradation(log((55.0, 62.0, 60.0, 59.0, 58.0), errors=(None,) * 5))
    assert "fell from 62.0 to 58.0 % while k-NN rose" in verdict.sentence


def test_of_equal_best_scores_the_later_counts() -> None:
    assert degradation(log((55.0, 62.0, 62.0, 59.0, 58.0))).since == 200


def test_a_resumed_log_may_repeat_steps() -> None:
    """The last evaluation of a step counts, wherever its row stands."""
    rows = log((55.0, 70.0, 62.0, 59.0, 58.0))
    again = {"step": 100, "dense_agreement": 58.0, "dense_agreement_error": 0.5, "knn": 40.0}
    assert degradation([*rows, again]).since == 200


@pytest.mark.parametrize("rows", [[], log((55.0,)), [{}]])
def test_a_short_log_is_not_judged(rows: list[dict]) -> None:
    verdict = degradation(rows)
    assert verdict.kind == "not_judged" and verdict.sentence.endswith(
        "no two evaluations to compare"
    )


def test_by_drift_alone_it_is_said_carefully() -> None:
    """All similarities move when a run begins from random weights: the first half says nothing."""
    learning = log(patch_drift=(0.0, 0.16, 0.165, 0.17, 0.17))
    verdict = degradation(learning)
    assert verdict.kind == "still" and verdict.since == 200
    assert verdict.sentence.startswith("No sign that the patches have degraded")
    assert "(drift 0.17 at step 200, 0.17 at step 400)" in verdict.sentence

    moving = degradation(log(patch_drift=(0.0, 0.1, 0.16, 0.24, 0.3)))
    assert moving.kind == "moving" and moving.since == 200
    assert moving.sentence == (
        "The patches may have degraded: their similarities still move (drift 0.16 at step 200, "
        "0.30 at step 400) while k-NN went from 50.0 to 60.0 %; whether for better or for worse "
        "takes images with masks"
    )
    alone = degradation(log(patch_drift=(0.0, 0.1), knn=(None, None)))
    assert alone.kind == "moving" and "k-NN" not in alone.sentence
