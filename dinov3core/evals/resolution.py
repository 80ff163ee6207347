"""Do features mean the same at every image size?

Maps, CLS and neighbours of the same images, enlarged.

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
from dinov3core.evals.knn import knn_accuracy
from dinov3core.evals.windows import AnyData, Frozen, Images, PatchFeatures, resolve_side, square

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
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Compare the features of the same images at several sizes, and k-NN accuracy where there are
    labels.

    Args:
        data: images of any kind; of two splits the test split. k-NN needs `Labelled`.
        side: of the square images at scale 1; None: the shorter side of the first one, on the patch
            grid, at most 512.
        scales: factors of `side`, the first one 1; sides are rounded to the patch grid.
        k: neighbours; at most the number of training images.
        train_images, test_images: at most so many, evenly spread; None: all.

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
    read = Frozen(backbone, device=device, autocast=autocast)
    source = Images(data, test_images, "resolution: test images")
    side = resolve_side(side, source.first(), read.patch_size)
    sides = [round(side * scale / read.patch_size) * read.patch_size for scale in scales]
    cosines, others, queries, seen = [], [], [], []
    previous: Tensor | None = None
    for index, pixels in source:
        found = _at_sides(read, pixels, sides)
        base = found[0]
        maps = [F.adaptive_avg_pool2d(one.patches, base.patches.shape[2:]) for one in found]
        cosines.append(
            [[_cosine(f.cls, base.cls), _cosine(m, base.patches)] for f, m in zip(found, maps)]
        )
        if previous is not None:
            others.append([_cosine(one, previous) for one in maps])
        previous = base.patches
        queries.append(_class_tokens(found))
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
        bank = [(index, _class_tokens(_at_sides(read, pixels, sides))) for index, pixels in train]
        banks = torch.stack([tokens for _, tokens in bank], 1)
        labels = _labels(data.train, [index for index, _ in bank]), _labels(data.test, seen)
        k = min(k, len(bank))
        at_side = list(torch.stack(queries, 1))
        result["knn"] = [_knn(rows, query, labels, k) for rows, query in zip(banks, at_side)]
        result["knn_across"] = [_knn(banks[0], query, labels, k) for query in at_side]
        result["unreadable"] += len(train.unreadable)
        result["protocol"] |= {"k": k, "train_images": len(train.indices)}
    return result


def _at_sides(read: Frozen, pixels: Tensor, sides: Sequence[int]) -> list[PatchFeatures]:
    """Features of one image at every side."""
    return [read(square(pixels, side)[None]) for side in sides]


def _class_tokens(found: Sequence[PatchFeatures]) -> Tensor:
    """[sides, D]."""
    return torch.cat([one.cls.cpu() for one in found])


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
