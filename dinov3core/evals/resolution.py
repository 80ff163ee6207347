"""Do features mean the same at every image size? Maps, CLS and neighbours of enlarged images.

DINOv3 is used at many sizes beyond that of its training (Simeoni et al. 2025, section 5.1); a
backbone whose features change with the size needs a new probe for each.

Shapes: N images, C channels, D width, h x w patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.knn import knn_accuracy
from dinov3core.evals.reading import AnyData, Images
from dinov3core.evals.views import square, whole_patches
from dinov3core.evals.windows import resolve_side
from dinov3core.models import Features

PROTOCOL = (
    "Frozen CLS and patches of the last layer after the final norm, of central squares at several "
    "sides, each resized from the image as it is; larger ones show no more detail than it holds."
)


def resolution(
    backbone: nn.Module,
    data: AnyData,
    *,
    side: int | None = None,
    scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    k: int = 20,
    train_images: int | None = 500,
    test_images: int | None = 200,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Compare the features of the same images at several sizes, with labels also their k-NN.

    Args:
        data: images of any kind; of two splits the test split. k-NN needs `Labelled`.
        side: of the square images at scale 1; None: the shorter side of the first one, on the patch
            grid, at most 512.
        scales: factors of `side`, the first one 1; sides are rounded to the patch grid.
        k: neighbours; at most the number of training images.
        train_images, test_images: at most so many, evenly spread; None: all.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        Lists with one value per scale: `patch_cosine` of each patch map, averaged to the grid of
        scale 1, with the map there; `patch_cosine_other`, the same with the map of another image
        (what the cosine is worth); `cls_cosine`; with labels `knn` in percent, bank and queries at
        that scale, and `knn_across`, the bank at scale 1. Then `sides`, `unreadable` images, and
        the `protocol`.

    Raises:
        DataError: no image, or one alone.
        ValueError: settings out of range, or features that are not finite.
    """
    if not scales or scales[0] != 1 or min(scales) < 1:
        raise ValueError(f"scales: expected 1 and then factors of at least 1, got {list(scales)}")
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast_dtype)
    source = Images(data, test_images, "resolution: test images")
    side = resolve_side(side, source.first(), encoder.patch_size)
    sides = [whole_patches(side * scale, encoder.patch_size) for scale in scales]
    cosines: list[list[list[float]]] = []  # [images, sides, 2]: of CLS and of the patch map
    others: list[list[float]] = []
    queries: list[Tensor] = []
    seen: list[int] = []
    previous: Tensor | None = None
    for index, pixels in source:
        at_sides = _at_sides(encoder, pixels, sides)
        base = at_sides[0]
        grid = base.patches.shape[2:]
        maps = [F.adaptive_avg_pool2d(features.patches, grid) for features in at_sides]
        cosines.append(
            [
                [_cosine(features.cls, base.cls), _cosine(patches, base.patches)]
                for features, patches in zip(at_sides, maps)
            ]
        )
        if previous is not None:
            others.append([_cosine(patches, previous) for patches in maps])
        previous = base.patches
        queries.append(_class_tokens(at_sides))
        seen.append(index)

    if not others:
        raise DataError(f"resolution: expected at least 2 readable images, got {len(seen)}")
    cls_cosine, patch_cosine = torch.tensor(cosines).mean(0).T.tolist()
    result: dict[str, Any] = {
        "patch_cosine": patch_cosine,
        "patch_cosine_other": torch.tensor(others).mean(0).tolist(),
        "cls_cosine": cls_cosine,
        "sides": sides,
        "unreadable": len(source.unreadable),
        "protocol": {
            "text": PROTOCOL,
            "side": side,
            "scales": list(scales),
            "test_images": len(source.indices),
        },
    }
    if isinstance(data, Labelled):
        train = Images(data.train, train_images, "resolution: training images")
        rows: list[int] = []
        tokens: list[Tensor] = []
        for index, pixels in train:
            rows.append(index)
            tokens.append(_class_tokens(_at_sides(encoder, pixels, sides)))
        banks = torch.stack(tokens, 1)
        asked = torch.stack(queries, 1)
        labels = _labels(data.train, rows), _labels(data.test, seen)
        k = min(k, len(rows))
        result["knn"] = [_knn(*pair, labels, k) for pair in zip(banks, asked)]
        result["knn_across"] = [_knn(banks[0], query, labels, k) for query in asked]
        result["unreadable"] += len(train.unreadable)
        result["protocol"] |= {"k": k, "train_images": len(train.indices)}
    return result


def _at_sides(encoder: FrozenEncoder, pixels: Tensor, sides: Sequence[int]) -> list[Features]:
    """Features of one image at every side."""
    return [encoder.finite(square(pixels, side)[None]) for side in sides]


def _class_tokens(at_sides: Sequence[Features]) -> Tensor:
    """[sides, D], on the CPU."""
    return torch.cat([features.cls.cpu() for features in at_sides])


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine along dimension 1."""
    return F.cosine_similarity(a, b, dim=1).mean().item()


def _labels(source: ImageSource, indices: Sequence[int]) -> Tensor:
    labels = [source.label(index) for index in indices]
    if None in labels:
        raise DataError(
            f"{source.name(indices[labels.index(None)])}: expected a label for k-NN, got none"
        )
    return torch.tensor(labels)


def _knn(bank: Tensor, queries: Tensor, labels: tuple[Tensor, Tensor], k: int) -> float:
    return knn_accuracy(bank, labels[0], queries, labels[1], k=(k,)).top1[k]
