"""What is said of a run from its log: healthy, collapsed, too early, undecided."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from dinov3core.evals.collapse import Verdict, collapse_verdict
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.report import write_report
from dinov3core.train.recipes.quickstart import quickstart

LOG_K = math.log(256)
WIDTH = 96


class Log(NamedTuple):
    """A made-up run: its first and last rows, a straight line between them; None: not logged."""

    steps: int = 600
    entropy: tuple[float, float] | None = (1.0, 0.7)  # shares of ln K
    rank: tuple[float, float] | None = (50.0, 62.0)
    knn: tuple[float, float] | None = (21.0, 57.2)
    error: float = 1.4
    loss: float = 0.9  # share of ln K
    usage: tuple[float, float] = (1.0, 0.9)
    eval_every: int = 200

    def rows(self) -> list[dict]:
        rows = []
        for step in range(5, self.steps + 1, 5):
            row = {"step": step, "dino_global": self.loss * LOG_K}
            if self.entropy is not None:
                row |= {"target_entropy": self._at(self.entropy, step) * LOG_K, "log_k": LOG_K}
            rows.append(row)
        for step in sorted({*range(0, self.steps, self.eval_every), self.steps}):
            row = {"step": step, "event": "eval", "feature_spread": 0.5}
            if step:
                row["prototype_usage"] = self._at(self.usage, step)
            if self.rank is not None:
                row["rankme"] = self._at(self.rank, step)
            if self.knn is not None:
                row |= {"knn": self._at(self.knn, step), "knn_error": self.error}
            rows.append(row)
        return sorted(rows, key=lambda row: row["step"])

    def _at(self, ends: tuple[float, float], step: int) -> float:
        share = step / max(self.steps, 1)
        return ends[0] * (1 - share) + ends[1] * share


DEAD = ((1.0, 1.0), (1.0, 1.0), (21.0, 15.0))  # entropy at ln K, rank 1, k-NN below untrained
EARLY = ("unknown", "Too early to tell")
WORSE = ("unknown", "k-NN below its start")
DIMENSIONAL = ("dimensional", "Dimensional collapse")

# what the run did -> (kind in summary.json, badge)
TABLE = [
    ("the quick start", Log(), ("none", "Healthy run")),
    ("the quick start without labels", Log(knn=None), ("none", "Healthy run")),
    ("a little worse within the error", Log(knn=(44.0, 43.0)), ("none", "Healthy run")),
    ("lower within two standard errors", Log(knn=(55.9, 53.6), error=1.4), ("none", "Healthy run")),
    ("lower beyond them", Log(knn=(55.9, 51.8), error=1.4), WORSE),
    ("the dead run of 60 steps", Log(60, *DEAD), EARLY),
    ("60 steps that look fine", Log(60), EARLY),
    ("no step at all", Log(0), EARLY),
    ("dead for 600 steps", Log(600, *DEAD), ("uniform", "Uniform collapse")),
    ("fell back to ln K", Log(entropy=(0.9, 1.2)), ("uniform", "Uniform collapse")),
    ("lost its rank", Log(rank=(50.0, 1.0)), DIMENSIONAL),
    ("never left rank one", Log(rank=(1.0, 1.0)), DIMENSIONAL),
    ("ever fewer prototypes", Log(loss=0.001, usage=(0.9, 0.1)), DIMENSIONAL),
    ("a loss of nothing", Log(loss=0.001), ("unknown", "Undecided")),
    ("fell below untrained", Log(knn=(21.0, 15.0)), WORSE),
    ("fell below untrained, no error logged", Log(knn=(21.0, 20.9), error=0.0), WORSE),
    ("nearly uniform", Log(entropy=(0.96, 0.96)), ("unknown", "Undecided")),
    ("rank barely above one", Log(rank=(1.0, 2.1)), ("unknown", "Undecided")),
    ("no entropy in the log", Log(entropy=None), ("not_judged", "Not judged")),
    ("no rank in the log", Log(rank=None), ("not_judged", "Not judged")),
    ("NaN throughout", Log(entropy=(math.nan, math.nan)), ("not_judged", "Not judged")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("log", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_verdict_of_a_log(log: Log, expected: tuple[str, str]) -> None:
    verdict = collapse_verdict(log.rows(), width=WIDTH)
    assert (verdict.kind, verdict.title) == expected, verdict.sentence
    assert verdict.sentence.startswith(f"{verdict.title}: ") and verdict.sentence.endswith(".")
    assert "\n" not in verdict.sentence


def test_a_log_of_warm_up_is_too_early() -> None:
    rows = Log(600).rows()
    assert collapse_verdict(rows, width=WIDTH, patience=600).kind == "none"
    early = collapse_verdict(rows, width=WIDTH, patience=601)
    assert (
        early.kind == "unknown"
        and "ends at step 600" in early.reason
        and "from step 601 on" in early.reason
    )


def test_few_images_bound_the_rank() -> None:
    """24 images span 24 directions at most, however wide the network is."""
    log = Log(rank=(20.0, 18.0))
    assert collapse_verdict(log.rows(), width=24).kind == "none"
    assert collapse_verdict(log.rows(), width=1024).kind == "dimensional"


@pytest.mark.parametrize("name", [row[0] for row in TABLE])
def test_the_page_is_green_for_healthy_runs_alone(name: str, tmp_path: Path) -> None:
    log = next(row[1] for row in TABLE if row[0] == name)
    verdict = collapse_verdict(log.rows(), width=WIDTH)
    page = write_report(tmp_path, None, None, log.rows(), _summary(verdict), "").read_text()
    tone = {"none": "good", "uniform": "bad", "dimensional": "bad"}.get(verdict.kind, "neutral")
    assert f'<span class="pill {tone}">{verdict.title}</span>' in page
    assert ("Healthy" in page) == (verdict.kind == "none")


def _summary(verdict: Verdict) -> dict:
    return {
        "collapse": verdict.kind,
        "verdict": verdict.title,
        "collapse_sentence": verdict.sentence,
    }


def test_a_real_run_of_a_few_steps_is_not_called_healthy(tmp_path: Path) -> None:
    """Ten steps of a small quick start, with its schedule: it is too early, say files and page."""
    recipe = quickstart()
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, width=24, depth=1, heads=1),
        data=replace(recipe.data, scenes=64, probe_bank=48, probe_queries=24, dense_images=24),
        run=replace(
            recipe.run,
            epochs=1,
            epoch_steps=10,
            batch_size=8,
            device="cpu",
            out=str(tmp_path / "run"),
        ),
    )
    summary = pretrain(recipe)
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    page = (tmp_path / "run" / "report.html").read_text()
    assert saved["collapse"] == summary["collapse"] == "unknown"
    assert saved["verdict"] == "Too early to tell" and saved["collapse_sentence"].startswith(
        "Too early to tell: "
    )
    assert '<span class="pill neutral">Too early to tell</span>' in page and "Healthy" not in page
