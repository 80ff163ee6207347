"""The guard of a run that starts from weights: it stops when their features get worse.

It reads the scores of the online evaluations and compares them with those before the first step.

Without labels nobody knows whether features are worse; the bounds on RankMe and on patch drift say
that they are others. In the trial of 2026-11-24 (LOG.md) naive runs, which lost 3 to 7 points of
k-NN, had drifted by 0.09 to 0.11, and runs of the recipe `adapt`, which lost less than a standard
error, by 0.01.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from dinov3core.bounds import Bounds, Share
from dinov3core.evals.differences import ERRORS


@dataclass(frozen=True)
class Guard:
    """When to stop a run whose features get worse than those it started from."""

    margin: Annotated[float, Bounds(0, 100)] = 0.0
    """Stop when k-NN falls more than so many points below its start, and more than two standard
    errors; 0: never stop.
    """
    rank_share: Share = 0.8
    """Without labels: stop when RankMe falls below this share of its start."""
    drift: Annotated[float, Bounds(0, 2)] = 0.1
    """Without labels: stop when similarities between patches have moved by more than this."""

    def in_words(self, labelled: bool, every: int) -> str:
        """What is watched, for the opening of a run; "" for a guard that is off.

        Args:
            labelled: whether the run measures k-NN.
            every: steps between evaluations.
        """
        if not self.margin:
            return ""
        watched = (
            f"RankMe is below {self.rank_share:.0%} of its start, or patch drift above "
            f"{self.drift:g} (no labelled images were named, so k-NN cannot be watched)"
        )
        if labelled:
            watched = (
                f"k-NN is more than {self.margin:g} points, and two standard errors, below its "
                "start"
            )
        return f"guard: stops the run when {watched}; it looks every {every:,} steps"

    def complaint(self, start: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
        """Why to stop, with the figures; "" when there is no reason.

        Args:
            start: `knn` and `rankme` before the first step, None where not measured.
            scores: the row of an evaluation: `knn`, `knn_error`, `rankme`, `patch_drift`.
        """
        if not self.margin:
            return ""
        if start["knn"] is not None and scores.get("knn") is not None:
            return self._fall(start["knn"], scores["knn"], scores["knn_error"])
        return self._lower_rank(start["rankme"], scores["rankme"]) or self._drifted(
            scores["patch_drift"]
        )

    def _fall(self, before: float, now: float, error: float) -> str:
        allowed = max(self.margin, ERRORS * error)
        if before - now <= allowed:
            return ""
        return (
            f"k-NN fell from {before:.1f} to {now:.1f} %, by more than the {allowed:.1f} points "
            f"allowed (margin {self.margin:g}, standard error {error:.1f})"
        )

    def _lower_rank(self, before: float | None, now: float) -> str:
        if before is None or now >= self.rank_share * before:
            return ""
        return (
            f"RankMe fell from {before:.1f} to {now:.1f}, below {self.rank_share:.0%} of its start"
        )

    def _drifted(self, drift: float) -> str:
        if drift <= self.drift:
            return ""
        return (
            f"similarities between patches have moved by {drift:.2f} since the start, more than "
            f"the {self.drift:g} allowed"
        )
