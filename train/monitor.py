"""Online seeing: what the EMA teacher's features are worth now, judged on labelled images it never trained on."""

import io
from pathlib import Path

import torch
from torch import Tensor

from dinov3core.data.crops import pair
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource, open_source
from dinov3core.data.scenes import Scenes
from dinov3core.evals.collapse import Verdict, collapse_verdict, feature_spread, patch_similarity_drift, rankme
from dinov3core.evals.features import extract, extract_patches, pixel_features, to_pixels
from dinov3core.evals.knn import knn_accuracy
from dinov3core.models.vit import VisionTransformer
from dinov3core.train.config import Pretrain
from dinov3core.train.metrics import read_rows
from dinov3core.train.report import Snapshot, take_snapshot, write_report

HELD_OUT = 10_000_000  # index of the first held-out scene; training scenes start at 0
NEIGHBOURS = 20
DRIFT_IMAGES = 64


class Probe:
    """Images the run is judged on, a bank and queries, decoded once to the evaluation size.

    Built-in scenes, a folder with train/<class>/ and val/<class>/, or, with `data.probe` "none", training images
    without labels: then there is no k-NN, and the other measures remain.

    Args:
        recipe: the run.
        source: the training images.
    """

    def __init__(self, recipe: Pretrain, source: ImageSource):
        bank, queries = _probe_sources(recipe, source)
        self.bank, self.bank_labels = _stack(bank, recipe.data.probe_bank, recipe)
        self.queries, self.query_labels = _stack(queries, recipe.data.probe_queries, recipe)
        if recipe.data.probe == "none":
            self.bank_labels = self.query_labels = None
        self.mean, self.std = recipe.crops.mean, recipe.crops.std
        self.neighbours = min(NEIGHBOURS, len(self.bank))

    def knn(self, bank: Tensor, queries: Tensor) -> float | None:
        """Top-1 accuracy in percent of features of the bank and of the queries; None without labels."""
        if self.bank_labels is None:
            return None
        found = knn_accuracy(bank, self.bank_labels, queries, self.query_labels, k=(self.neighbours,))
        return found.top1[self.neighbours]

    def pixels(self) -> float | None:
        """k-NN on raw pixels: what no learning gives."""
        return self.knn(pixel_features(self.bank), pixel_features(self.queries))


class Monitor:
    """Evaluates the teacher, keeps the pictures of the first and the last look, and writes the report.

    Args:
        recipe: the run.
        source: the training images.
        folder: the run folder; the untrained network's snapshot lives there, so that a resumed run can compare.
        device: where the teacher is.
    """

    def __init__(self, recipe: Pretrain, source: ImageSource, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self.width = recipe.backbone.width
        self.warmup_steps = int(recipe.optim.lr.warmup_epochs * recipe.run.epoch_steps)
        self.probe = Probe(recipe, source)
        self.knn_pixels = self.probe.pixels()
        self.last: dict[str, float | None] = {}

    def evaluate(self, backbone: VisionTransformer, prototype_counts: Tensor, step: int) -> dict[str, float | None]:
        """k-NN, RankMe, spread, prototype usage since the last look, drift of patch similarities since the start."""
        settings = {"device": self.device, "batch_size": 256, "mean": self.probe.mean, "std": self.probe.std}
        bank = extract(backbone, self.probe.bank, **settings).cls
        queries = extract(backbone, self.probe.queries, **settings).cls
        patches = extract_patches(backbone, self.probe.queries[:DRIFT_IMAGES], **settings)
        reference = self._reference(patches, step)
        self.last = {
            "knn": self.probe.knn(bank, queries),
            "rankme": rankme(queries),
            "feature_spread": feature_spread(queries),
            "patch_drift": patch_similarity_drift(patches, reference),
        }
        if step:
            self.last["prototype_usage"] = (prototype_counts > 0).double().mean().item()
        return self.last

    def _reference(self, patches: Tensor, step: int) -> Tensor:
        """Patch features of the first look, kept in the run folder."""
        path = self.folder / "patches_before.pt"
        if step == 0 or not path.is_file():
            content = io.BytesIO()  # to a path, torch's writer makes a RuntimeError of a full disk
            torch.save(patches, content)
            path.write_bytes(content.getvalue())
        return torch.load(path, weights_only=True)

    def snapshot_before(self, backbone: VisionTransformer) -> None:
        """Keep the pictures of the untrained network."""
        take_snapshot(backbone, self.probe, self.device).save(self.folder / "before.npz")

    def verdict(self) -> Verdict:
        """Whether the run collapsed, from its log."""
        return collapse_verdict(
            read_rows(self.folder / "metrics.jsonl"), width=self.width, patience=max(100, self.warmup_steps)
        )

    def report(self, backbone: VisionTransformer, summary: dict, config_text: str) -> Path:
        """Write report.html: the trained network beside the untrained one."""
        path = self.folder / "before.npz"
        before = Snapshot.load(path) if path.is_file() else None
        after = take_snapshot(backbone, self.probe, self.device)
        rows = read_rows(self.folder / "metrics.jsonl")
        return write_report(self.folder, before, after, rows, summary, config_text)


def _probe_sources(recipe: Pretrain, source: ImageSource) -> tuple[ImageSource, ImageSource]:
    data = recipe.data
    if data.probe == "none":
        return source, source
    if data.probe == "scenes":
        size = max(data.scene_size, *pair(recipe.crops.global_size))
        bank = Scenes(data.probe_bank, size=size, seed=recipe.run.seed, offset=HELD_OUT)
        return bank, Scenes(data.probe_queries, size=size, seed=recipe.run.seed, offset=HELD_OUT + data.probe_bank)
    root = Path(data.probe)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(
                f"data.probe: expected a folder with train/<class>/ and val/<class>/, {root} has no {part}/"
            )
    settings = {"channels": recipe.backbone.in_channels, "scale": data.channel_scale or None}
    return open_source(root / "train", **settings), open_source(root / "val", **settings)


def _stack(source: ImageSource, limit: int, recipe: Pretrain) -> tuple[Tensor, Tensor]:
    """Up to `limit` images spread evenly over the source (folders are ordered by class), and their labels."""
    crop = min(pair(recipe.crops.global_size))
    resize = crop if isinstance(source, Scenes) else round(crop * 256 / 224)
    labelled = recipe.data.probe != "none"
    images, labels = [], []
    for index in torch.linspace(0, len(source) - 1, min(limit, len(source))).long().tolist():
        label = source.label(index)
        if labelled and label is None:
            raise DataError(f"data.probe: {source.name(index)} has no label; expected one folder per class")
        try:
            images.append(to_pixels(source.load(index), resize=resize, crop=crop))
        except UnreadableImage:
            continue
        labels.append(-1 if label is None else label)
    if not images:
        raise DataError("data.probe: none of its images can be read; name another folder, or none")
    return torch.stack(images), torch.tensor(labels)
