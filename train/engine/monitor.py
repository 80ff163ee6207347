"""Online seeing: what the EMA teacher's features are worth now, on the images of probe.py."""

import io
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinov3core.data.images import ImageSource
from dinov3core.evals.collapse import (
    PATIENCE,
    collapse_verdict,
    feature_spread,
    patch_similarity_drift,
    rankme,
)
from dinov3core.evals.degradation import DENSE
from dinov3core.evals.differences import Measured
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import standard_error
from dinov3core.models.interface import FeatureModule
from dinov3core.pictures.states import Snapshot
from dinov3core.printable import printable
from dinov3core.train.engine.best import Best, best_summary
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.patches import patches_summary
from dinov3core.train.engine.probe import Probe
from dinov3core.train.engine.report import write_report
from dinov3core.train.engine.snapshot import take_snapshot
from dinov3core.writing import write_whole

DRIFT_IMAGES = 64
AT_ONCE = 256  # images through the teacher


class Monitor:
    """Evaluates the teacher, stores the pictures of the first look, and writes the report.

    Args:
        recipe: the run.
        source: the training images.
        folder: the run folder; the snapshot of the start lives there, so that a resumed run can
            compare.
        device: where the teacher is.
    """

    def __init__(self, recipe: Pretrain, source: ImageSource, folder: Path, device: torch.device):
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.probe = Probe(recipe, source)
        self.largest_rank = min(recipe.backbone.width, len(self.probe.views))
        self.patience = max(
            PATIENCE, 2 * int(recipe.optim.lr.warmup_epochs * recipe.run.epoch_length)
        )
        self.pixels = self.probe.pixels()

    @torch.compiler.set_stance("force_eager")
    def evaluate(
        self, backbone: FeatureModule, prototype_counts: Tensor, step: int
    ) -> dict[str, float | None]:
        """Figures of metrics.jsonl: RankMe, spread, drift, usage; k-NN and dense scores in percent.

        Args:
            prototype_counts: how often each prototype was a target's largest since the last look;
                [0] where there are none.
        """
        probe = self.probe
        encoder = FrozenEncoder(backbone, device=self.device, statistics=probe.statistics)
        views = encoder.embed(probe.views, batch_size=AT_ONCE).cls
        patches = encoder.patches(probe.views[:DRIFT_IMAGES], batch_size=AT_ONCE)
        knn = None
        if probe.bank_labels is not None:
            same = probe.queries is probe.views
            queries = views if same else encoder.embed(probe.queries, batch_size=AT_ONCE).cls
            knn = probe.knn(encoder.embed(probe.bank, batch_size=AT_ONCE).cls, queries)
        dense = probe.masked and probe.masked.score(encoder, batch_size=AT_ONCE)
        scores = {
            **_measured("knn", knn),
            **_measured("dense_miou", dense and dense.miou),
            **_measured("dense_agreement", dense and dense.agreement),
            "rankme": rankme(views),
            "feature_spread": feature_spread(views),
            "patch_drift": patch_similarity_drift(patches, self._reference(patches, step)),
        }
        if step and len(prototype_counts):
            scores["prototype_usage"] = (prototype_counts > 0).double().mean().item()
        return scores

    def _reference(self, patches: Tensor, step: int) -> Tensor:
        """Patch features of the first look, stored in the run folder."""
        path = self.folder / "patches_before.pt"
        if step == 0 or not path.is_file():
            content = io.BytesIO()  # to a path, torch's writer makes a RuntimeError of a full disk
            torch.save(patches, content)
            write_whole(path, content.getvalue())
        return torch.load(path, weights_only=True)

    @torch.compiler.set_stance("force_eager")
    def snapshot_before(self, backbone: FeatureModule) -> None:
        """Store the pictures of the network as the run began."""
        take_snapshot(backbone, self.probe, self.device).save(self.folder / "before.npz")

    def summary(
        self, knn_before: float | None, last: Mapping[str, object], best: Best | None
    ) -> dict[str, object]:
        """What summary.json says of the features: k-NN in percent, images looked at, the verdict.

        Args:
            knn_before: k-NN of the network as the run began, which a resumed run no longer has.
            last: the row of the last evaluation, which a run resumed after it has not made itself.
            best: what is kept as the best teacher.
        """
        rows = read_rows(self.folder / "metrics.jsonl")
        first = next((row for row in rows if row.get("event") == "eval"), {})
        verdict = collapse_verdict(rows, width=self.largest_rank, patience=self.patience)
        before = None
        if knn_before is not None:
            before = Measured(knn_before, standard_error(knn_before, len(self.probe.queries)))
        dense = {}
        for name in DENSE:
            dense |= of_row(name, first, "before") | of_row(name, last, "after")
        return {
            **_measured("knn_pixels", self.pixels),
            **_measured("knn_before", before),
            **of_row("knn", last, "after"),
            "knn_chance": self.probe.chance,
            **dense,
            "images": self.probe.sets._asdict(),
            "collapse": verdict.kind,
            "verdict": verdict.title,
            "collapse_sentence": verdict.sentence,
            **best_summary(best, self.recipe.folder),
            **patches_summary(rows, self.recipe, best),
        }

    @torch.compiler.set_stance("force_eager")
    def report(self, backbone: FeatureModule, summary: dict, config_text: str) -> Path:
        """Write report.html: the network as the run ended beside that as it began."""
        before = self._before()
        after = take_snapshot(backbone, self.probe, self.device)
        rows = read_rows(self.folder / "metrics.jsonl")
        return write_report(self.folder, before, after, rows, summary, config_text)

    def _before(self) -> Snapshot | None:
        """The snapshot of the start; None, with a word, when it is gone or damaged."""
        path = self.folder / "before.npz"
        try:
            return Snapshot.load(path)
        except (OSError, ValueError) as error:
            print(printable(f"the report shows nothing of the start: {error}"), file=sys.stderr)
            return None


def _measured(name: str, score: Measured | None) -> dict[str, float | None]:
    """A score and its standard error under their names."""
    if score is None:
        return {name: None, f"{name}_error": None}
    return {name: score.value, f"{name}_error": score.error}


def of_row(name: str, row: Mapping[str, object], when: str) -> dict[str, object]:
    """A score of an evaluation and its standard error, as summary.json names them."""
    return {
        f"{name}_{when}": row.get(name),
        f"{name}_{when}_error": row.get(f"{name}_error"),
    }
