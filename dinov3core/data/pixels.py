"""An image as numbers: planes of a Pillow image, and pixels as floats from 0 to 1.

Shapes: C channels, H x W pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Resizing weighs pixels by shares that add up to 1 but for rounding, so white may come out above 1.
ROUNDING = 1e-4


def to_planes(image: Image.Image | Tensor) -> Tensor:
    """What an image source gives as [C, H, W]: uint8 RGB of a Pillow image, a tensor as it is."""
    if isinstance(image, Tensor):
        return image
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def as_float(pixels: Tensor) -> Tensor:
    """Pixels of any shape as float32 in [0, 1]: uint8 over 255, floats as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def checked_pixels(pixels: Tensor) -> Tensor:
    """`as_float` of pixels that are some.

    Raises:
        ValueError: floats beyond [0, 1] or NaN, which are no pixels.
    """
    if pixels.dtype == torch.uint8:
        return as_float(pixels)
    low, high = pixels.aminmax()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # written so that NaN fails too
        raise ValueError(
            f"images: expected uint8 or float pixels in [0, 1], got values from {low:.4g} to "
            f"{high:.4g}; pass unnormalised pixels"
        )
    return as_float(pixels)
