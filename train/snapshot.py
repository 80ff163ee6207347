"""All that pictures need from one model state, so that "before" survives restarts and a report needs no model.

Shapes: n pictures, Q queries, k neighbours, h x w patches, S pixels of a feature picture.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.evals import pictures
from dinov3core.evals.collapse import rankme
from dinov3core.evals.features import extract, extract_patches
from dinov3core.evals.knn import knn_accuracy, nearest
from dinov3core.evals.sight import cell_at

PICTURES = 8
QUERIES, NEIGHBOURS = 6, 5
GRID = 16  # small images are enlarged to at least this many patches a side: 6 x 6 patches make no picture
ENLARGE = 3  # but never more: beyond, objects are larger than anything seen in training
SIDE = 224  # pixels of a feature picture's shorter side


class Probe(Protocol):
    """Images the run never trains on: pixels [N, C, H, W], labels [N] or None, and the model's pixel statistics."""

    bank: Tensor
    bank_labels: Tensor | None
    queries: Tensor
    query_labels: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Snapshot:
    """What one model state looks like: n pictures, Q queries with k neighbours each, and figures by name."""

    photos: np.ndarray  # uint8 [n, H, W, 3]
    pca: np.ndarray  # uint8 [n, S, S, 3]
    cosines: np.ndarray  # fp32 [n, h, w]: similarity to the patch at `points`
    points: np.ndarray  # int [n, 2]: row, column
    queries: np.ndarray  # uint8 [Q, H, W, 3]
    neighbours: np.ndarray  # uint8 [Q, k, H, W, 3]
    agreement: np.ndarray  # int [Q, k]: 1 same class, 0 another, -1 no labels
    scalars: Mapping[str, float]

    def save(self, path: Path | str) -> None:
        """Write an .npz without pickled objects; a kill in between leaves the old file."""
        path = Path(path)
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scalars"}
        partial = path.with_name(path.name + ".tmp")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays, scalars=np.array(json.dumps(dict(self.scalars))))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path | str) -> "Snapshot":
        """Read what `save` wrote; a file that is something else raises ValueError."""
        names = [f.name for f in fields(cls)]
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in names}
        except (BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: expected a snapshot of a run, got an unreadable file ({error}); delete it"
            ) from None
        return cls(**{**arrays, "scalars": json.loads(str(arrays["scalars"]))})


def take_snapshot(model: nn.Module, probe: Probe, device: torch.device | str = "cpu") -> Snapshot:
    """Look at `probe` with a frozen model: pictures of its patch features, neighbours of some queries, k-NN and rank.

    Which images and patches are shown depends on the probe alone, so that two snapshots can be laid side by side.
    """
    statistics = {"device": device, "mean": probe.mean, "std": probe.std}
    bank = extract(model, probe.bank, **statistics).cls
    queries = extract(model, probe.queries, **statistics).cls
    chosen = _spread_over_classes(probe.query_labels, len(probe.queries), max(PICTURES, QUERIES))
    shown, asked = probe.queries[chosen[:PICTURES]], chosen[:QUERIES]
    maps = extract_patches(model, _enlarged(shown, model.patch_size), **statistics)
    grid = tuple(maps.shape[-2:])
    points = [cell_at(pictures.contrast_peak(image, grid), grid) for image in shown]
    cosines = [pictures.cosine_map(maps[i : i + 1], point)[0] for i, point in enumerate(points)]
    found = nearest(bank, queries[asked], min(NEIGHBOURS, len(bank)))
    return Snapshot(
        photos=pictures.as_rgb(shown),
        pca=pictures.pca_rgb(maps, size=_picture_size(shown)),
        cosines=torch.stack(cosines).numpy(),
        points=np.array(points),
        queries=pictures.as_rgb(probe.queries[asked]),
        neighbours=np.stack([pictures.as_rgb(probe.bank[row]) for row in found.indices]),
        agreement=_agreement(probe, asked, found.indices),
        scalars=_scalars(probe, bank, queries),
    )


def _scalars(probe: Probe, bank: Tensor, queries: Tensor) -> dict[str, float]:
    found = {"rankme": rankme(queries)}
    if probe.bank_labels is not None and probe.query_labels is not None:
        k = min(20, len(bank))
        found["knn"] = knn_accuracy(bank, probe.bank_labels, queries, probe.query_labels, k=(k,)).top1[k]
    return found


def _agreement(probe: Probe, asked: list[int], indices: Tensor) -> np.ndarray:
    if probe.bank_labels is None or probe.query_labels is None:
        return np.full(tuple(indices.shape), -1)
    return (probe.bank_labels[indices] == probe.query_labels[asked][:, None]).long().numpy()


def _spread_over_classes(labels: Tensor | None, count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices: the first of every class, then the second ones; without labels the first images."""
    if labels is None:
        return list(range(min(count, wanted)))
    seen: dict[int, int] = {}
    turns = []
    for index, name in enumerate(labels.tolist()):
        seen[name] = seen.get(name, 0) + 1
        turns.append((seen[name], index))
    return [index for _, index in sorted(turns)[:wanted]]


def _enlarged(images: Tensor, patch: int) -> Tensor:
    """Float pixels in [0, 1], small images enlarged (bicubic) to a grid of GRID patches, by ENLARGE at most."""
    pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
    factor = min(ENLARGE, max(1.0, GRID * patch / min(images.shape[-2:])))
    size = [max(patch, round(side * factor / patch) * patch) for side in images.shape[-2:]]
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _picture_size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    scale = SIDE / min(height, width)
    return round(height * scale), round(width * scale)
