"""DINOv3 self-supervised pretraining, with kernels, models, losses, data and evaluations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dinov3core.evals.encoder import ImageEncoder

__version__ = "0.1.0"


def load(
    weights: str | os.PathLike[str],
    *,
    device: str = "auto",
    statistics: Literal["stored", "imagenet", "satellite"] = "stored",
    autocast: bool = False,
) -> ImageEncoder:
    """A model with its weights, ready for images: `load(weights).features("photo.jpg")`.

    Args:
        weights: a file or folder in any known layout, or the folder of a run (its newest EMA
            backbone). Nothing is downloaded.
        device: cpu, cuda, cuda:1, ...; auto: the GPU where there is one.
        statistics: image normalisation; stored: what the weights state.
        autocast: run the model in bfloat16.

    Raises:
        ValueError: no weights there, none that can be read, no image statistics, or no such device.
    """
    from dinov3core.checkpoints import load_model
    from dinov3core.evals.encoder import ImageEncoder
    from dinov3core.models import NAMED_STATISTICS

    if statistics != "stored" and statistics not in NAMED_STATISTICS:
        known = ", ".join(NAMED_STATISTICS)
        raise ValueError(f"statistics: expected stored, {known}, got {statistics!r}")
    model = load_model(os.path.expanduser(weights)).model
    if statistics != "stored":
        model.statistics = NAMED_STATISTICS[statistics]
    if model.statistics is None:
        raise ValueError(
            f"{weights}: expected image statistics with the weights, found none; "
            "pass statistics='imagenet' or 'satellite'"
        )
    return ImageEncoder(model, device=device, autocast=autocast)
