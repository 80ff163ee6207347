"""The official layout: flat state dicts and the teacher files of a training run, unwrapped to bare backbone names.

Our own files use the same names. A training run's `teacher_checkpoint.pth` is {"teacher": {"backbone.*", "dino_head.*",
"ibot_head.*"}}; a consolidated checkpoint is {"model": {"teacher.backbone.*", "student.backbone.*", ...}}.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov3core.models import IMAGENET, SATELLITE, ImageStatistics

# Where a backbone may sit, the one people mean first: the EMA teacher is the model of a self-distillation run.
_ENTRIES = ("teacher", "model_ema", "model", "state_dict")
_PREFIXES = ("", "teacher.backbone.", "model_ema.backbone.", "backbone.", "module.", "module.backbone.", "model.")
_PREFIXES += ("student.backbone.",)

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
    ("pos_embed", "a learned position embedding, so the weights are not DINOv3's (DINOv2 or an older ViT)"),
    ("embeddings.position_embeddings", "a learned position embedding, so the weights are not DINOv3's"),
    ("rope.freqs", "a stored rotation table, as in EVA-02, which rotates neighbouring channels"),
)


def unwrap(found: Mapping[str, Any], where: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """Find the backbone in what a file holds.

    Returns:
        the layout ("official", "huggingface" or "timm"), its tensors without prefix, and the names left aside.

    Raises:
        ValueError: when no known backbone is inside; the message begins with `where`.
    """
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    for entry in _ENTRIES:
        if not tensors and isinstance(found.get(entry), Mapping):
            tensors = {key: value for key, value in found[entry].items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        for layout, anchors in _ANCHORS.items():
            if any(prefix + anchor in tensors for anchor in anchors):
                inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                aside = [k for k in tensors if not k.startswith(prefix)]
                _refuse_strangers(inside, where)
                return ("timm" if _is_timm_vit(inside) else layout), inside, aside
    shown = ", ".join(list(tensors)[:4]) or "no tensor"
    raise ValueError(f"{where}: expected a DINOv3 ViT or ConvNeXt, got names like {shown}; give its backbone's weights")


def _is_timm_vit(tensors: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in tensors and ("blocks.0.gamma_1" in tensors or "reg_token" in tensors)


def _refuse_strangers(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, meaning in _STRANGERS:
        if name in tensors:
            raise ValueError(f"{where}: found {name!r}: {meaning}; give DINOv3 weights")


def statistics_of_name(name: str) -> ImageStatistics | None:
    """The image statistics of a released file, which names its data set (DINOv3 model card)."""
    if "sat493m" in name:
        return SATELLITE
    return IMAGENET if "lvd1689m" in name else None
