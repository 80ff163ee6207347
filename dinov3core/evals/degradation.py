"""Have the patches got worse while the images got better? A verdict in words, from a run's log.

In long training, similarities between patches decay while image-level scores still rise; Gram
anchoring is made for that (Simeoni et al. 2025, "DINOv3", section 4). A dense score on images with
masks shows it. Without one there is only drift: how far similarities of patches have moved, which
may be for better or for worse.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Rows = Sequence[Mapping[str, object]]  # of a log

ERRORS = 2.0  # standard errors that a score must have moved by
# Of mean absolute cosines. In the quick start they move by 0.16 in the first 200 steps and, once it
# merely gets better at what it does, by 0.01 in 200.
STILL = 0.03


class Look(NamedTuple):
    """One evaluation: its step, a score in percent or a drift, and the standard error."""

    step: int
    value: float
    error: float = 0.0


class Degradation(NamedTuple):
    """What became of the patches, and the numbers behind it.

    "degraded": the dense score fell while k-NN did not: for Gram anchoring. "worse": both fell.
    "none": the dense score has not fallen. "moving" and "still" speak of drift alone, where no
    dense score was measured. "not_judged": there are not two evaluations to compare.
    """

    kind: Literal["degraded", "worse", "none", "moving", "still", "not_judged"]
    since: int | None  # the step of the best dense score, or from which drift is compared
    sentence: str


def degradation(rows: Rows) -> Degradation:
    """Judge the patches of a run by its log.

    They have degraded when the last dense score lies more than two standard errors of a difference
    below the best one. Both are of the same images, so that their difference is surer than that.

    Args:
        rows: the run's log, evaluations and other rows; of several evaluations of a step the last
            counts. Read where present: `step`, `dense_miou`, `dense_error`, `knn`, `knn_error` (all
            in percent), `patch_drift`. What is not finite counts as not measured.
    """
    dense = _looks(rows, "dense_miou", "dense_error")
    knn = _looks(rows, "knn", "knn_error")
    if len(dense) > 1:
        return _by_score(dense, knn)
    drift = _looks(rows, "patch_drift")
    if len(drift) > 1:
        return _by_drift(drift, knn)
    reason = "Patches are not judged: the log holds no two evaluations to compare"
    return Degradation("not_judged", None, reason)


def _by_score(dense: Sequence[Look], knn: Sequence[Look]) -> Degradation:
    last = dense[-1]
    best = max(dense, key=lambda look: (look.value, look.step))
    fell = f"the dense score fell from {best.value:.1f} to {last.value:.1f} %"
    if not _differs(best, last):
        since = f"{dense[0].value:.1f} to {last.value:.1f} %"
        top = "" if best == last else f", at most {best.value:.1f}"
        return Degradation(
            "none",
            None,
            f"The dense score of patches has not fallen ({since}{top}). A linear rule gives it: "
            "how well patches compare with one another is for the task tracking of "
            "train/evaluate.py to say",
        )
    fell += " (more than two standard errors)"
    then, now = _at(knn, best.step), _at(knn, last.step)
    if then is None or now is None:
        words = f"The patches have degraded since step {best.step}: {fell}"
        return Degradation("degraded", best.step, f"{words}; k-NN was not measured")
    if then.value > now.value and _differs(then, now):
        return Degradation(
            "worse",
            best.step,
            f"Images and patches have got worse since step {best.step}: {fell}, k-NN from "
            f"{then.value:.1f} to {now.value:.1f} %; that is no matter of patches alone: look at "
            "the learning rate and at the losses first",
        )
    moved = "rose" if now.value > then.value and _differs(then, now) else "went"
    return Degradation(
        "degraded",
        best.step,
        f"The patches have degraded since step {best.step}: {fell} while k-NN {moved} from "
        f"{then.value:.1f} to {now.value:.1f} %",
    )


def _by_drift(drift: Sequence[Look], knn: Sequence[Look]) -> Degradation:
    """The second half of the log: a run from random weights moves all similarities at first."""
    last = drift[-1]
    middle = next(look for look in drift if look.step >= (drift[0].step + last.step) / 2)
    begin = middle if middle.step < last.step else drift[-2]
    moved = f"drift {begin.value:.2f} at step {begin.step}, {last.value:.2f} at step {last.step}"
    unknown = "whether for better or for worse takes a dense score"
    if abs(last.value - begin.value) < STILL:
        return Degradation(
            "still",
            begin.step,
            f"No sign that the patches have degraded: their similarities have hardly moved of late "
            f"({moved}); a dense score would be surer",
        )
    then, now = _at(knn, begin.step), _at(knn, last.step)
    while_knn = ""
    if then is not None and now is not None:
        while_knn = f" while k-NN went from {then.value:.1f} to {now.value:.1f} %"
    return Degradation(
        "moving",
        begin.step,
        f"The patches may have degraded: their similarities still move ({moved}){while_knn}; "
        f"{unknown}",
    )


def _differs(a: Look, b: Look) -> bool:
    return abs(a.value - b.value) > ERRORS * math.hypot(a.error, b.error)


def _looks(rows: Rows, key: str, error: str = "") -> list[Look]:
    """What was measured under `key`, in order of the steps."""
    looks: dict[int, Look] = {}
    for row in rows:
        step = _number(row.get("step"))
        value = _number(row.get(key))
        if step is not None and value is not None:
            looks[int(step)] = Look(int(step), value, _number(row.get(error)) or 0.0)
    return [looks[step] for step in sorted(looks)]


def _at(looks: Sequence[Look], step: int) -> Look | None:
    return next((look for look in looks if look.step == step), None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
