"""Colour, blur and normalisation of one view, as 8-bit RGB in Pillow or as a float tensor.

RGB follows the definitions torchvision's v2 transforms use on Pillow images, rounding to 8 bits
after every step. Of a tensor [C, H, W] in [0, 1] only brightness, contrast and blur can be varied:
hue, saturation, grey and solarisation are defined for RGB alone.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps
from torch import Tensor

BLUR_TAPS = 9
# Rows filtered by one product: 3.5 times the multiplications of nine taps, and yet faster.
BLUR_BLOCK = 24
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
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)
    return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")


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
    """Blur [C, H, W] along both axes."""
    band = _band(gaussian_taps(sigma))
    return _blur_rows(_blur_rows(planes, band).transpose(0, 2, 1), band).transpose(0, 2, 1)


def _blur_rows(planes: np.ndarray, band: np.ndarray) -> np.ndarray:
    """Filter along H by matrix products of overlapping blocks of rows.

    Nine shifted sums take five times as long.
    """
    channels, height, width = planes.shape
    blocks = -(-height // BLUR_BLOCK)
    rows = _reflected(blocks * BLUR_BLOCK, height)
    windows = sliding_window_view(np.take(planes, rows, axis=1), band.shape[1], axis=1)
    starts = windows[:, ::BLUR_BLOCK]  # [C, blocks, W, BLUR_BLOCK + 8]
    return (band @ starts.transpose(0, 1, 3, 2)).reshape(channels, -1, width)[:, :height]


def _band(taps: np.ndarray) -> np.ndarray:
    """The matrix [BLUR_BLOCK, BLUR_BLOCK + 8] that filters a block of rows with its margins."""
    band = np.zeros((BLUR_BLOCK, BLUR_BLOCK + BLUR_TAPS - 1), np.float32)
    for row in range(BLUR_BLOCK):
        band[row, row : row + BLUR_TAPS] = taps
    return band


@lru_cache(maxsize=32)
def _reflected(count: int, side: int) -> np.ndarray:
    """Rows -4 .. count + 3 of an image of `side` rows, reflected at its border rows.

    A single row repeats itself.
    """
    margin = BLUR_TAPS // 2
    period = max(2 * (side - 1), 1)
    rows = np.arange(-margin, count + margin) % period
    return np.minimum(rows, period - rows) if side > 1 else np.zeros_like(rows)


@lru_cache(maxsize=512)
def _constant(size: tuple[int, int], grey: int) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))
