"""The health of dense features without labels: rank, smoothness, outliers, drift.

In long training runs the patch features of large models decay while image-level scores still rise:
similarity maps get noisy and lose their place (Simeoni et al. 2025, "DINOv3", section 4).
Smoothness and drift show it. Outlier tokens, a few patches of very large norm that store global
information, spoil the same maps (Darcet et al. 2024, "Vision transformers need registers");
registers should keep their share near zero.

Shapes: P patches, D width, h x w patches.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.evals.collapse import patch_similarity_drift, rankme
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import AnyData, Images
from dinov3core.evals.views import square
from dinov3core.evals.windows import resolve_side
from dinov3core.ops import gram_loss

PROTOCOL = "Frozen patches of the last layer after the final norm, of central squares."

RANK_ROWS = 8192  # patches the rank is taken of at most
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


def dense(
    backbone: nn.Module,
    data: AnyData,
    *,
    reference: nn.Module | None = None,
    side: int | None = None,
    images: int | None = 100,
    outlier: float = 3.0,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Measure the patch features of images, and how far they moved from those of a reference.

    Args:
        data: images of any kind; of two splits the test split.
        reference: an earlier checkpoint, say; of the same patch size, the width may differ.
        side: of the square images; None: the shorter side of the first one, on the patch grid, at
            most 512.
        images: at most so many, evenly spread; None: all.
        outlier: a patch counts as an outlier above this multiple of the median norm.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        `local_similarity` (mean cosine of patches side by side), `global_similarity` (of all pairs
        within an image) and `smoothness`, their difference; `rankme` of the patches; `norms` at the
        quantiles of the protocol in units of their median, and `outlier_share` in percent; with a
        reference `gram_drift` (mean absolute difference of the patch-similarity matrices, 0 to 2)
        and `gram_error` (mean squared); `unreadable` images, and the `protocol`.

    Raises:
        DataError: no image.
        ValueError: settings out of range, grids that differ, or features that are not finite.
    """
    if outlier <= 1:
        raise ValueError(f"outlier: expected a multiple above 1 of the median norm, got {outlier}")
    running = {"device": device, "autocast_dtype": autocast_dtype}
    encoder = FrozenEncoder(backbone, **running)
    other = None if reference is None else FrozenEncoder(reference, **running)
    source = Images(data, images, "dense")
    side = resolve_side(side, source.first(), encoder.patch_size)
    before_norm = "norm" in inspect.signature(backbone.features).parameters
    rows: list[Tensor] = []
    norms: list[Tensor] = []
    similarities: list[tuple[float, float]] = []
    drifts: list[tuple[float, float]] = []
    of_each = max(1, RANK_ROWS // len(source.indices))  # patches of an image the rank is taken of
    for _, pixels in source:
        pixels = square(pixels, side)[None]
        patches = encoder.finite(pixels).patches
        raw = encoder.finite(pixels, norm=False).patches if before_norm else patches
        norms.append(raw.norm(dim=1).flatten().cpu())
        tokens = patches[0].flatten(1).T.cpu()
        sample = torch.linspace(0, len(tokens) - 1, min(of_each, len(tokens))).long()
        rows.append(tokens[sample])
        similarities.append(local_and_global(patches[0].cpu()))
        if other is not None:
            drifts.append(_drift(patches, other.finite(pixels).patches))

    local, across = torch.tensor(similarities).mean(0).tolist()
    relative, share = outliers(torch.cat(norms), outlier)
    result: dict[str, Any] = {
        "local_similarity": local,
        "global_similarity": across,
        "smoothness": local - across,
        "rankme": rankme(torch.cat(rows)),
        "norms": relative,
        "outlier_share": share,
        "unreadable": len(source.unreadable),
        "protocol": {
            "text": PROTOCOL,
            "norms": "before the final norm" if before_norm else "of the features as given",
            "quantiles": list(QUANTILES),
            "outlier": outlier,
            "side": side,
            "images": len(source.indices),
        },
    }
    if drifts:
        result["gram_drift"], result["gram_error"] = torch.tensor(drifts).mean(0).tolist()
    return result


def local_and_global(patches_Dhw: Tensor) -> tuple[float, float]:
    """Mean cosine of patches that touch at a side, and of all pairs of different patches.

    Raises:
        ValueError: a grid without neighbours.
    """
    count = patches_Dhw[0].numel()
    if count < 2:
        raise ValueError(
            f"patches: expected at least two in an image, got {count}; use a larger side"
        )
    unit = F.normalize(patches_Dhw.double(), dim=0)
    across = (unit[:, :, 1:] * unit[:, :, :-1]).sum(0)
    down = (unit[:, 1:] * unit[:, :-1]).sum(0)
    local = torch.cat([across.flatten(), down.flatten()]).mean()
    # Sum of all cosines = |sum of the unit vectors|^2, of which the diagonal is `count`: no P x P
    # matrix.
    total = unit.sum((1, 2)).square().sum()
    of_all = (total - count) / (count * (count - 1))
    return local.item(), of_all.item()


def outliers(norms: Tensor, factor: float) -> tuple[list[float], float]:
    """Norms of patches against their median.

    Returns:
        Norms at `QUANTILES` over the median, and the percentage of patches above `factor` medians.
    """
    ordered = norms.double().sort().values
    # quantile() takes 2**24 values at most.
    few = len(ordered) <= 2**24
    median = ordered.quantile(0.5) if few else ordered[len(ordered) // 2]
    places = [min(len(ordered) - 1, round(q * (len(ordered) - 1))) for q in QUANTILES]
    relative = ordered[places] / median.clamp_min(1e-12)
    share = 100 * (ordered > factor * median.clamp_min(1e-12)).double().mean()
    return relative.tolist(), share.item()


def _drift(now: Tensor, reference: Tensor) -> tuple[float, float]:
    drift = patch_similarity_drift(now, reference)  # refuses grids that differ
    return drift, gram_loss(now.flatten(2).mT, reference.flatten(2).mT).item()
