"""Colour, blur and normalisation of one view: 8-bit RGB through Pillow, other channel counts as float tensors.

RGB follows the definitions torchvision's v2 transforms use on Pillow images, rounding to 8 bits after every step.
Of a tensor [C, H, W] in [0, 1] only brightness, contrast and blur can be varied: hue, saturation, grey and
solarisation are defined for RGB alone.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

BLUR_TAPS = 9
SOLARIZE_ABOVE = 128


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black: 0 is black, 1 the image itself."""
    return Image.blend(_constant(image.size, 0), image, factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the mean grey of the image."""
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(_constant(image.size, mean), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image in grey."""
    return Image.blend(to_grey(image), image, factor)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue circle by `shift` (a whole turn is 1) in 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(shift * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def solarize(image: Image.Image) -> Image.Image:
    """Invert every value from 128 up."""
    return ImageOps.solarize(image, SOLARIZE_ABOVE)


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur, 9 x 9, mirrored at the border."""
    blurred = _blur_planes(np.asarray(image, np.float32).transpose(2, 0, 1), sigma)
    return Image.fromarray(np.rint(blurred).astype(np.uint8).transpose(1, 2, 0))


def normalise(image: Image.Image, mean: np.ndarray, std: np.ndarray) -> Tensor:
    """Float [3, H, W]: values in [0, 1] less the mean, over the deviation."""
    planes = np.asarray(image).transpose(2, 0, 1)
    scaled = np.multiply(planes, (1 / (255 * std))[:, None, None], dtype=np.float32, order="C")
    scaled -= (mean / std)[:, None, None]
    return torch.from_numpy(scaled)


def adjust_tensor_contrast(image: Tensor, factor: float) -> Tensor:
    """Blend every channel with its own mean, as channels need not share a range."""
    mean = image.mean((1, 2), keepdim=True)
    return (mean + factor * (image - mean)).clamp(0, 1)


def blur_tensor(image: Tensor, sigma: float) -> Tensor:
    """The blur of `blur`, on [C, H, W]."""
    return torch.from_numpy(_blur_planes(image.numpy(), sigma))


def gaussian_taps(sigma: float) -> np.ndarray:
    """The 9 weights exp(-x^2 / (2 sigma^2)) at x = -4 .. 4, summing to 1."""
    offsets = np.arange(BLUR_TAPS) - BLUR_TAPS // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _blur_planes(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Rows, then columns, as products with banded matrices: fewer calls than taps, which decides at these sizes."""
    height, width = planes.shape[1:]
    taps = gaussian_taps(sigma)
    return _band(taps, height) @ planes @ _band(taps, width).T


def _band(taps: np.ndarray, side: int) -> np.ndarray:
    """The [side, side] matrix that convolves a column of `side` values with the taps, mirrored without its ends."""
    matrix = np.zeros((side, side), np.float32)
    rows, columns = _mirrored(side)
    np.add.at(matrix, (rows, columns), taps.astype(np.float32))
    return matrix


@lru_cache(maxsize=32)
def _mirrored(side: int) -> tuple[np.ndarray, np.ndarray]:
    """For every output row the 9 input rows it reads, reflected at both ends (a row of one repeats itself)."""
    rows = np.arange(side)[:, None]
    period = max(2 * (side - 1), 1)
    columns = np.abs(rows + np.arange(BLUR_TAPS) - BLUR_TAPS // 2) % period
    return rows, np.minimum(columns, period - columns) if side > 1 else np.zeros_like(columns)


@lru_cache(maxsize=512)
def _constant(size: tuple[int, int], grey: int) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))
