"""Frozen features of a model for the evaluations: pixels in, fp32 embeddings on the CPU out.

Shapes: N images, C channels, D width, h x w patches. Anything with `.features(images)` returning
`cls` [B, D] and `patches` [B, D, h, w] is a model here.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Embeddings(NamedTuple):
    """One vector per image, two ways: the CLS token and the mean of the patches, both [N, D] fp32
    on the CPU.
    """

    cls: Tensor
    patch_mean: Tensor


def extract(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    autocast: torch.dtype | None = None,
) -> Embeddings:
    """Embed images with a frozen model, in eval mode and without gradients; its training flags are
    restored.

    Args:
        images: pixels [N, C, H, W], or an iterable of [C, H, W]: uint8, or float in [0, 1].
        mean, std: per-channel statistics the model was trained with; None: `images` are model
            inputs already.
        autocast: dtype of `torch.autocast` on `device`; None runs the model in its own dtype.
    """
    settings = {
        "batch_size": batch_size,
        "device": device,
        "mean": mean,
        "std": std,
        "autocast": autocast,
    }
    found = [
        (f.cls.float().cpu(), f.patches.float().mean((2, 3)).cpu())
        for f in _batches(model, images, **settings)
    ]
    cls, patch_mean = zip(*found)
    return Embeddings(torch.cat(cls), torch.cat(patch_mean))


def extract_patches(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Patch maps [N, D, h, w], fp32 on the CPU, of images of one size; arguments as for `extract`."""
    settings = {
        "batch_size": batch_size,
        "device": device,
        "mean": mean,
        "std": std,
        "autocast": autocast,
    }
    return torch.cat([f.patches.float().cpu() for f in _batches(model, images, **settings)])


def pixel_features(images: Tensor | Iterable[Tensor], side: int = 32) -> Tensor:
    """Raw pixels as features, the baseline a trained model has to beat: area-averaged to side x
    side, [N, C*side*side].

    Each image is centred by its own mean, so that cosine similarity compares patterns and not
    brightness; without it nearly all cosines of natural images lie above 0.8.
    """
    found = [
        F.adaptive_avg_pool2d(as_float(batch), side).flatten(
            1,
        )
        for batch in _stacks(images, 256)
    ]
    features = torch.cat(found)
    return features - features.mean(1, keepdim=True)


def to_pixels(image: Image.Image | Tensor, *, resize: int = 256, crop: int = 224) -> Tensor:
    """The evaluation view of one image: shorter side to `resize` (bicubic, antialiased), then the
    central crop.

    Args:
        image: a PIL image, or float [C, H, W] in [0, 1] for other channel counts.

    Returns:
        [C, crop, crop]: uint8 for a PIL image, float in [0, 1] for a tensor.
    """
    if crop > resize:
        raise ValueError(
            f"crop: expected at most resize={resize}, got {crop}; a centre crop cannot exceed the "
            "image"
        )
    if isinstance(image, Tensor):
        height, width = image.shape[-2:]
        size = _shorter_side_to(resize, height, width)
        resized = F.interpolate(image[None].float(), size=size, mode="bicubic", antialias=True)[
            0
        ].clamp(0, 1)
    else:
        size = _shorter_side_to(resize, image.height, image.width)
        rgb = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        resized = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    top, left = (size[0] - crop + 1) // 2, (size[1] - crop + 1) // 2
    return resized[:, top : top + crop, left : left + crop].contiguous()


def normalise(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Pixels [B, C, H, W], uint8 or float in [0, 1], to model inputs; without statistics only the
    dtype changes.

    Raises:
        ValueError: float values outside [0, 1], or not one mean and std per channel.
    """
    if mean is None or std is None:
        return images.float()
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"mean, std: expected {channels} values each for images of {channels} channels, "
            f"got {len(mean)} and {len(std)}; pass the statistics the model was trained with"
        )
    pixels = as_float(images)
    shift, scale = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return (pixels - shift) / scale


def moved(device: torch.device | str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on `device`."""
    return tuple(tensor.to(device) for tensor in tensors)


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode without gradients; every submodule gets its own training flag back, so frozen parts
    stay frozen.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in flags:
            module.training = training


def _batches(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int,
    device: torch.device | str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    autocast: torch.dtype | None,
) -> Iterator[Any]:
    kind = torch.device(device).type
    with frozen(model), torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
        for stack in _stacks(images, batch_size):
            yield model.features(normalise(stack.to(device, non_blocking=True), mean, std))


def _stacks(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stacks of at most `batch_size` images [B, C, H, W]."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images):
            raise ValueError(
                f"images: expected a stack [N, C, H, W] with N >= 1, got {list(images.shape)}"
            )
        yield from images.split(batch_size)
        return
    remaining, seen = iter(images), 0
    while batch := list(itertools.islice(remaining, batch_size)):
        shapes = {tuple(image.shape) for image in batch}
        if len(shapes) > 1:
            raise ValueError(
                f"images: expected one size, got {sorted(shapes)}; crop them alike, e.g. with "
                "to_pixels()"
            )
        seen += len(batch)
        yield torch.stack(batch)
    if not seen:
        raise ValueError(
            "images: expected at least one image, got none; check that the source is not empty"
        )


def as_float(images: Tensor) -> Tensor:
    """Pixels of any shape in [0, 1]: uint8 over 255, floats as they are.

    Raises:
        ValueError: floats beyond [0, 1] or NaN, which are no pixels.
    """
    if images.dtype == torch.uint8:
        return images.float() / 255
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(
            f"images: expected uint8 or float pixels in [0, 1], got values from {low:.4g} to "
            f"{high:.4g}; pass unnormalised pixels"
        )
    return images.float()


def _shorter_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to `side`; the longer one is rounded down."""
    if height <= width:
        return side, max(side, side * width // height)
    return max(side, side * height // width), side
