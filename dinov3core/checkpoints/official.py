"""The official layout: flat state dicts, and teachers of training runs without their prefixes.

Our own files use the same names. A training run's `teacher_checkpoint.pth` is {"teacher":
{"backbone.*", "dino_head.*", "ibot_head.*"}}; a consolidated checkpoint is {"model":
{"teacher.backbone.*", "student.backbone.*", ...}}.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov3core.checkpoints.errors import WeightsError
from dinov3core.models import IMAGENET, SATELLITE, ImageStatistics

# Where a backbone may sit, the one people mean first: the EMA teacher is the model of a
# self-distillation run.
_ENTRIES = ("teacher", "model_ema", "model", "state_dict")
_PREFIXES = (
    "",
    "teacher.backbone.",
    "model_ema.backbone.",
    "backbone.",
    "module.",
    "module.backbone.",
    "model.",
)
_PREFIXES += ("student.backbone.",)

COMPILED = "_orig_mod."

# One name per layout that no other layout has, at the end of the prefix.
_ANCHORS = {
    "official": ("patch_embed.proj.weight", "downsample_layers.0.0.weight"),
    "huggingface": (
        "embeddings.patch_embeddings.weight",
        "stages.0.downsample_layers.0.weight",
        "model.stages.0.downsample_layers.0.weight",
    ),
    "timm": ("stem.0.weight",),
}
# Telling names of models that look alike and are not: (name, what it means).
_STRANGERS = (
    (
        "pos_embed",
        "a learned position embedding, so the weights are not DINOv3's (DINOv2 or an older ViT)",
    ),
    (
        "embeddings.position_embeddings",
        "a learned position embedding, so the weights are not DINOv3's",
    ),
    ("rope.freqs", "a stored rotation table, as in EVA-02, which rotates neighbouring channels"),
)


def unwrap(
    content: Mapping[Any, Any],
    path: str | os.PathLike,
) -> tuple[str, dict[str, Tensor], list[str]]:
    """Find the backbone in what a file holds.

    Returns:
        the layout ("official", "huggingface" or "timm"), its tensors without prefix, and the names
        left aside.

    Raises:
        WeightsError: when no known backbone is inside.
    """
    tensors = _named_tensors(content)
    for entry in _ENTRIES:
        if not tensors and isinstance(content.get(entry), Mapping):
            tensors = _named_tensors(content[entry])
    for prefix in _PREFIXES:
        for layout, anchors in _ANCHORS.items():
            if any(prefix + anchor in tensors for anchor in anchors):
                inside = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
                aside = [k for k in tensors if not k.startswith(prefix)]
                _refuse_strangers(inside, path)
                return ("timm" if _is_timm_vit(inside) else layout), inside, aside
    shown = ", ".join(list(tensors)[:4]) or "no tensor"
    raise WeightsError(
        path,
        f"expected a DINOv3 ViT or ConvNeXt, got names like {shown}; give its backbone's weights",
    )


def _named_tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict; what else a checkpoint keeps beside them is nobody's weight.

    torch.compile puts its own word into the names of what it wraps.
    """
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    named = {key: value for key, value in tensors.items() if isinstance(key, str)}
    return {key.replace(COMPILED, ""): value for key, value in named.items()}


def _is_timm_vit(tensors: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in tensors and (
        "blocks.0.gamma_1" in tensors or "reg_token" in tensors
    )


def _refuse_strangers(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    for name, meaning in _STRANGERS:
        if name in tensors:
            raise WeightsError(path, f"found {name!r}: {meaning}; give DINOv3 weights")


def statistics_of_name(name: str) -> ImageStatistics | None:
    """The image statistics of a released file, which names its data set (DINOv3 model card)."""
    if "sat493m" in name:
        return SATELLITE
    return IMAGENET if "lvd1689m" in name else None
