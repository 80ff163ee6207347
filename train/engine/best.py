"""The best teacher of a run, kept beside its newest checkpoints: later is not always better.

`runs/X/best` holds `teacher.safetensors`, as checkpoints do, and `best.json`: the step, the scores
of its evaluation, and by which of them it was chosen. Of equal scores the later one is kept.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dinov3core.checkpoints import save_weights
from dinov3core.models.interface import FeatureModule
from dinov3core.writing import publish_folder, put_back, write_whole

By = Literal["knn", "dense"]
# Of a row of metrics.jsonl: the score and its standard error.
FIELDS: dict[By, tuple[str, str]] = {
    "knn": ("knn", "knn_error"),
    "dense": ("dense_miou", "dense_error"),
}
NAMES: dict[By, str] = {"knn": "k-NN", "dense": "dense score"}
NOTHING = (
    "no best teacher is kept, as this run measures neither k-NN nor a dense score; name labelled "
    "images by --data.probe, or images with masks by --data.dense"
)


class Best(NamedTuple):
    """The highest score of a run beside that of its last evaluation, in percent."""

    step: int
    by: By
    score: float
    error: float | None
    last: float | None

    def sentence(self, folder: Path, steps: int) -> str:
        """Which step was best, how much better than the last one, and where it is.

        Args:
            folder: of the run, which has done so many `steps`.
        """
        error = "" if self.error is None else f" +- {self.error:.1f}"
        score = f"{self.score:.1f}{error} %"
        place = folder / "best"
        if self.step == steps:
            return f"Best by {NAMES[self.by]}: the last step, {self.step} ({score}), in {place}"
        above = ""
        if self.last is not None:
            above = f", {self.score - self.last:.1f} points above the last one"
        return f"Best by {NAMES[self.by]}: step {self.step} ({score}){above}, in {place}"


def best_summary(best: Best | None, folder: Path, steps: int) -> dict[str, object]:
    """The part of summary.json, for a run in `folder` that has done so many steps."""
    sentence = "" if best is None else best.sentence(folder, steps)
    return {"best": None if best is None else best._asdict(), "best_sentence": sentence}


class BestTeacher:
    """Keeps the teacher of the evaluation with the highest score; one process of a run has it.

    Args:
        folder: of the run; the best of an earlier part of the run is found there again.
        by: the score that decides. Without k-NN it is the dense score, where there is one.
        say: told once when nothing can be kept, and whenever writing fails.
    """

    def __init__(self, folder: Path, by: By, say: Callable[[str], None]):
        self.folder = folder / "best"
        self.by: By = by
        self._say = say
        self._told = False
        put_back(self.folder)

    def offer(self, backbone: FeatureModule, step: int, scores: Mapping[str, float | None]) -> None:
        """Keep this teacher unless an earlier one scored higher; a failure to write is only said.

        Args:
            scores: of its evaluation, by their names in metrics.jsonl.
        """
        if self.by == "knn" and scores["knn"] is None:
            self.by = "dense"
        score = scores[FIELDS[self.by][0]]
        if score is None and not self._told:
            self._told = True
            self._say(NOTHING)
        if score is None or not math.isfinite(score):
            return
        earlier = self._record().get("scores", {}).get(FIELDS[self.by][0])
        if _is_number(earlier) and score < earlier:
            return
        known = {name: value for name, value in scores.items() if _is_number(value)}
        try:
            self._write(backbone, {"step": step, "by": self.by, "scores": known})
        except OSError as error:
            reason = error.strerror or str(error)
            self._say(f"{self.folder} could not be written ({reason}); training goes on")

    def summary(self, last: Mapping[str, Any]) -> Best | None:
        """The best so far; None when none is kept.

        Args:
            last: the scores of the last evaluation.
        """
        record = self._record()
        if not record:
            return None
        by: By = record["by"]
        name, error = FIELDS[by]
        scores = record["scores"]
        return Best(record["step"], by, scores[name], scores.get(error), last.get(name))

    def _record(self) -> dict[str, Any]:
        """best.json; empty when there is none that can be used."""
        try:
            record = json.loads((self.folder / "best.json").read_bytes())
            score = record["scores"][FIELDS[record["by"]][0]]
            usable = isinstance(record["step"], int) and _is_number(score)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}
        return record if usable else {}

    def _write(self, backbone: FeatureModule, record: Mapping[str, Any]) -> None:
        """The folder, whole: weights and scores always belong together."""
        partial = self.folder.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            os.mkdir(partial)
            save_weights(backbone, partial / "teacher.safetensors")
            write_whole(partial / "best.json", json.dumps(record, indent=2) + "\n")
            publish_folder(partial, self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)
