"""The best teacher of a run, kept beside its newest checkpoints: later is not always better.

`runs/X/best` holds `teacher.safetensors`, as checkpoints do, and `best.json`: the step, the scores
of its evaluation, and by which of them it was chosen. Of equal scores the later one is kept, and an
untrained network never is.

Best for patches is patch agreement: in the quick start (LOG.md, 2026-11-24, three seeds) it is
highest at step 100 or 200 and falls from there, as tracking does, while linear segmentation rises
to the end, so that the best by it would be the newest.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dinov3core.checkpoints import save_weights
from dinov3core.evals.degradation import DENSE
from dinov3core.evals.differences import Measured, standing
from dinov3core.models.interface import FeatureModule
from dinov3core.train.engine.config import Pretrain
from dinov3core.writing import publish_folder, put_back, write_whole

By = Literal["knn", "dense"]
# The score in a row of metrics.jsonl; its standard error has the same name and `_error`.
FIELDS: dict[By, str] = {"knn": "knn", "dense": "dense_agreement"}
NAMES: dict[By, str] = {"knn": "k-NN", "dense": DENSE["dense_agreement"]}
NOTHING = (
    "no best teacher is kept, as this run measures neither k-NN nor patch agreement; name labelled "
    "images by --data.probe, or images whose masks show two classes or more by --data.dense"
)


def first_trained(recipe: Pretrain) -> int:
    """The first step whose network has learned something: 0 for a run that begins with weights."""
    return 0 if recipe.run.init or recipe.run.from_ else 1


class Best(NamedTuple):
    """The highest score of a run beside that of its last evaluation, in percent with errors."""

    step: int
    by: By
    score: float
    error: float | None
    last_step: int | None  # of that evaluation; None: there is none
    last: float | None
    last_error: float | None

    def sentence(self, folder: Path) -> str:
        """Which step was best, how much better than the last one, and where in the run's folder."""
        error = "" if self.error is None else f" +- {self.error:.1f}"
        score = f"{self.score:.1f}{error} %"
        place = folder / "best"
        if self.step == self.last_step:
            return f"Best by {NAMES[self.by]}: the last step, {self.step} ({score}), in {place}"
        beside = ""
        if self.last is not None:
            measured = Measured(self.score, self.error)
            beside = f", {standing(measured, Measured(self.last, self.last_error), 'the last one')}"
        return f"Best by {NAMES[self.by]}: step {self.step} ({score}){beside}, in {place}"


def best_summary(best: Best | None, folder: Path) -> dict[str, object]:
    """The part of summary.json, for a run in `folder`."""
    sentence = "" if best is None else best.sentence(folder)
    return {"best": None if best is None else best._asdict(), "best_sentence": sentence}


class BestTeacher:
    """Keeps the teacher of the evaluation with the highest score; one process of a run has it.

    Args:
        recipe: of the run; the best of an earlier part of it is read from its folder again.
            `run.keep_best` names the score that decides. Without k-NN it is patch agreement, where
            that is measured.
        say: told once when nothing can be kept, and whenever writing fails.
    """

    def __init__(self, recipe: Pretrain, say: Callable[[str], None]):
        self.folder = recipe.folder / "best"
        self.by: By = recipe.run.keep_best
        self.first_step = first_trained(recipe)
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
        score = scores[FIELDS[self.by]]
        if score is None and not self._told:
            self._told = True
            self._say(NOTHING)
        if score is None or not math.isfinite(score) or step < self.first_step:
            return
        earlier = self._record().get("scores", {}).get(FIELDS[self.by])
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
            last: the row of the last evaluation.
        """
        record = self._record()
        if not record:
            return None
        by: By = record["by"]
        name = FIELDS[by]
        error = f"{name}_error"
        scores = record["scores"]
        return Best(
            record["step"],
            by,
            scores[name],
            scores.get(error),
            last.get("step"),
            last.get(name),
            last.get(error),
        )

    def _record(self) -> dict[str, Any]:
        """best.json; empty when there is none that can be used."""
        try:
            record = json.loads((self.folder / "best.json").read_bytes())
            score = record["scores"][FIELDS[record["by"]]]
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
