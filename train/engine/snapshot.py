"""Taking a snapshot of a run: "before" survives restarts, and a report needs no model."""

import numpy as np
import torch
from torch import Tensor, nn

from dinov3core.data.pixels import as_float
from dinov3core.evals.collapse import rankme
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import knn_accuracy, nearest
from dinov3core.evals.views import resized, whole_patches
from dinov3core.pictures import paint
from dinov3core.pictures.sight import cell_at
from dinov3core.pictures.states import Snapshot
from dinov3core.train.engine.probe import Probe

PICTURES = 8
QUERIES = 6
NEIGHBOURS = 5
# small images are enlarged to at least this many patches a side: 6 x 6 patches make no picture
GRID = 16
ENLARGE = 3  # but never more: beyond, objects are larger than anything seen in training
SIDE = 224  # pixels of a feature picture's shorter side


def take_snapshot(model: nn.Module, probe: Probe, device: torch.device | str = "cpu") -> Snapshot:
    """Look at the images of a run with a frozen model.

    Pictures of its patch features, neighbours of some queries, k-NN and rank. Which images and
    patches are shown depends on the probe alone, so that two snapshots can be laid side by side.
    """
    encoder = FrozenEncoder(model, device=device, statistics=probe.statistics)
    tokens = encoder.embed(probe.views).cls
    shown = probe.views[_spread_over_classes(probe.view_labels, len(probe.views), PICTURES)]
    maps = encoder.patches(_enlarged(shown, model.patch_size))
    grid = tuple(maps.shape[-2:])
    points = [cell_at(paint.contrast_peak(image, grid), grid) for image in shown]
    cosines = [paint.cosine_map(maps[i : i + 1], point)[0] for i, point in enumerate(points)]
    known, neighbours = _neighbours(encoder, probe)
    return Snapshot(
        photos=paint.as_rgb(shown),
        pca=paint.pca_rgb(maps, size=_picture_size(shown)),
        cosines=torch.stack(cosines).numpy(),
        points=np.array(points),
        scalars={"rankme": rankme(tokens), **known},
        **neighbours,
    )


def _neighbours(
    encoder: FrozenEncoder, probe: Probe
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """k-NN by its name where there are labels, and the arrays of a `Snapshot` for neighbours."""
    asked = _spread_over_classes(probe.query_labels, len(probe.queries), QUERIES)
    shown = paint.as_rgb(probe.queries[asked])
    if not len(probe.bank):
        none = {"neighbours": shown[:, None][:, :0], "agreement": np.zeros((len(asked), 0), int)}
        return {}, {"queries": shown, **none}

    bank = encoder.embed(probe.bank).cls
    labels = probe.bank_labels
    scalars: dict[str, float] = {}
    if labels is None:
        queries = encoder.embed(probe.queries[asked]).cls
    else:
        k = min(20, len(bank))
        queries = encoder.embed(probe.queries).cls
        scalars["knn"] = knn_accuracy(bank, labels, queries, probe.query_labels, k=(k,)).top1[k]
        queries = queries[asked]
    rows = nearest(bank, queries, min(NEIGHBOURS, len(bank))).indices
    agreement = np.full(tuple(rows.shape), -1)
    if labels is not None:
        agreement = (labels[rows] == probe.query_labels[asked][:, None]).long().numpy()
    neighbours = np.stack([paint.as_rgb(probe.bank[row]) for row in rows])
    return scalars, {"queries": shown, "neighbours": neighbours, "agreement": agreement}


def _spread_over_classes(labels: Tensor | None, count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices: the first of every class, then the second ones, and so on.

    Without labels the first images.
    """
    if labels is None:
        return list(range(min(count, wanted)))
    seen: dict[int, int] = {}
    turns = []
    for index, name in enumerate(labels.tolist()):
        seen[name] = seen.get(name, 0) + 1
        turns.append((seen[name], index))
    return [index for _, index in sorted(turns)[:wanted]]


def _enlarged(images: Tensor, patch: int) -> Tensor:
    """Float pixels in [0, 1]; small images are enlarged to GRID patches, by ENLARGE at most."""
    factor = min(ENLARGE, max(1.0, GRID * patch / min(images.shape[-2:])))
    height, width = (whole_patches(side * factor, patch) for side in images.shape[-2:])
    return resized(as_float(images), (height, width))


def _picture_size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    scale = SIDE / min(height, width)
    return round(height * scale), round(width * scale)
