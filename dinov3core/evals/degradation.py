"""Have the patches got worse while the images got better? A verdict in words, from a run's log.

In long training, similarities between patches decay while image-level scores still rise; Gram
anchoring is made for that (Simeoni et al. 2025, "DINOv3", section 4). Two scores on images with
masks can show it: patch agreement (`agreement`), which falls first, and linear segmentation
(`patch_classes`). Without masks there is only drift: how far similarities of patches have moved,
which may be for better or for worse.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from dinov3core.evals.differences import WITHIN, Measured, errors_between, fell, rose

Rows = Sequence[Mapping[str, object]]  # of a log

# What a log calls the scores of patches, and what a sentence calls them; the first one that fell is
# the reason that is given.
DENSE = {"dense_agreement": "patch agreement", "dense_miou": "linear segmentation"}
# Of mean absolute cosines. In the quick start they move by 0.16 in the first 200 steps and, once it
# merely gets better at what it does, by 0.01 in 200.
STILL = 0.03


class Look(NamedTuple):
    """One evaluation: its step, and a score in percent, or a drift without an error."""

    step: int
    score: Measured

    @property
    def value(self) -> float:
        """Without the error."""
        return self.score.value


class Degradation(NamedTuple):
    """What became of the patches, and the numbers behind it.

    "degraded": a score of patches fell while k-NN did not: for Gram anchoring. "worse": both fell.
    "none": no score of patches has fallen. "moving" and "still" speak of drift alone, where patches
    have no score. "not_judged": there are not two evaluations to compare.
    """

    kind: Literal["degraded", "worse", "none", "moving", "still", "not_judged"]
    since: int | None  # the step at which the score that fell was best, or from which drift counts
    sentence: str


def degradation(rows: Rows, first_step: int = 0) -> Degradation:
    """Judge the patches of a run by its log.

    They have degraded when a last score is below the best one by more than chance (`differences`).

    Args:
        rows: the run's log, evaluations and other rows; of several evaluations of a step the last
            counts. Read where present: `step`, the names in `DENSE`, `knn`, each of these with
            `_error` (all in percent), and `patch_drift`. What is not finite counts as not measured.
        first_step: evaluations of earlier steps do not count. An untrained network is no state to
            go back to, though its patches may agree well, as it sees little but colours.
    """
    scores = {name: _looks(rows, name, first_step) for name in DENSE}
    scores = {name: looks for name, looks in scores.items() if looks}
    knn = _looks(rows, "knn", first_step)
    if any(len(looks) > 1 for looks in scores.values()):
        return _by_scores(scores, knn)
    drift = _looks(rows, "patch_drift", first_step)
    if len(drift) > 1:
        return _by_drift(drift, knn)
    reason = "Patches are not judged: the log holds no two evaluations to compare"
    if first_step:
        reason += ", that of the untrained network apart"
    return Degradation("not_judged", None, reason)


def _by_scores(scores: Mapping[str, Sequence[Look]], knn: Sequence[Look]) -> Degradation:
    tops = {name: _best(looks) for name, looks in scores.items()}
    fallen = [name for name, looks in scores.items() if fell(tops[name].score, looks[-1].score)]
    if not fallen:
        changes = [_change(DENSE[name], looks) for name, looks in scores.items()]
        return Degradation("none", None, f"The patches have not degraded: {', '.join(changes)}")

    since = tops[fallen[0]].step
    last = scores[fallen[0]][-1].step
    when = f"since step {since}" if since else "since the start of the run"
    falls = " and ".join(_fall(DENSE[name], tops[name], scores[name][-1]) for name in fallen)
    then, now = _at(knn, since), _at(knn, last)
    if then is None or now is None:
        words = f"The patches have degraded {when}: {falls}"
        return Degradation("degraded", since, f"{words}; k-NN was not measured")
    if fell(then, now):
        return Degradation(
            "worse",
            since,
            f"Images and patches have got worse {when}: {falls}, k-NN from "
            f"{then.value:.1f} to {now.value:.1f} %; that is no matter of patches alone: look at "
            "the learning rate and at the losses first",
        )
    moved = "rose" if rose(then, now) else "went"
    return Degradation(
        "degraded",
        since,
        f"The patches have degraded {when}: {falls} while k-NN {moved} from "
        f"{then.value:.1f} to {now.value:.1f} %",
    )


def _best(looks: Sequence[Look]) -> Look:
    """The highest; of equal ones the later."""
    return max(looks, key=lambda look: (look.value, look.step))


def _fall(name: str, top: Look, last: Look) -> str:
    return f"{name} fell from {top.value:.1f} to {last.value:.1f} %{_sureness(top, last)}"


def _change(name: str, looks: Sequence[Look]) -> str:
    """What became of a score that has not fallen."""
    first, last, top = looks[0], looks[-1], _best(looks)
    moved = f"from {first.value:.1f} to {last.value:.1f} %"
    if rose(first.score, last.score):
        return f"{name} rose {moved}{_sureness(first, last)}"
    at_most = f", at most {top.value:.1f}" if top.value > max(first.value, last.value) else ""
    level = "" if first.value == last.value else f" ({WITHIN})"
    return f"{name} went {moved}{level}{at_most}"


def _sureness(a: Look, b: Look) -> str:
    """How far two scores are apart, where that is known."""
    count = errors_between(a.score, b.score)
    return f" ({count:.1f} standard errors)" if math.isfinite(count) else ""


def _by_drift(drift: Sequence[Look], knn: Sequence[Look]) -> Degradation:
    """The second half of the log: a run from random weights moves all similarities at first."""
    last = drift[-1]
    middle = next(look for look in drift if look.step >= (drift[0].step + last.step) / 2)
    begin = middle if middle.step < last.step else drift[-2]
    moved = f"drift {begin.value:.2f} at step {begin.step}, {last.value:.2f} at step {last.step}"
    unknown = "whether for better or for worse takes images with masks"
    if abs(last.value - begin.value) < STILL:
        return Degradation(
            "still",
            begin.step,
            f"No sign that the patches have degraded: their similarities have hardly moved of late "
            f"({moved}); a score on images with masks would be surer",
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


def _looks(rows: Rows, key: str, first_step: int) -> list[Look]:
    """What was measured under `key`, in order of the steps."""
    looks: dict[int, Look] = {}
    for row in rows:
        step = _number(row.get("step"))
        value = _number(row.get(key))
        if step is not None and value is not None and step >= first_step:
            score = Measured(value, _number(row.get(f"{key}_error")))
            looks[int(step)] = Look(int(step), score)
    return [looks[step] for step in sorted(looks)]


def _at(looks: Sequence[Look], step: int) -> Measured | None:
    return next((look.score for look in looks if look.step == step), None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
