"""From the bytes of an image file to pixels: RGB through Pillow, or a float tensor for other channel counts."""

import struct
import zlib
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinov3core.data.errors import UnreadableImage

MAX_PIXELS = 80_000_000  # decoded; 240 MB as RGB, below the size from which Pillow itself suspects a bomb
DRAFT_SIDE = 1024  # a large JPEG is decoded at 1/2, 1/4 or 1/8 as long as its sides stay above this
RGB_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
ARRAY_SUFFIXES = frozenset({".npy", ".tif", ".tiff", ".png"})

# What Pillow's decoders raise on broken files, besides the OSError most of them use.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode_rgb(file: BinaryIO | str, name: str) -> Image.Image:
    """An RGB image, upright.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, CMYK, palettes and grey
    are converted, of an animation the first frame is taken.

    Raises:
        UnreadableImage: broken, empty, not an image, or more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(file) as image:
            image.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))  # JPEG only; elsewhere nothing happens
            check_size(image.width, image.height, name)
            image.load()
            return to_rgb(_upright(image), name)
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of any Pillow mode."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnreadableImage(name, "float pixels have no fixed range; read them as 1 channel with a scale")
    if image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit grey over 257; a 32-bit mode holds 16-bit data, or 8-bit data when nothing exceeds 255."""
    if pixels.dtype.itemsize > 2 and pixels.max(initial=0) <= 255:
        return pixels.clip(0).astype(np.uint8)
    return (pixels.clip(0, 65535) / 257 + 0.5).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:  # unreadable metadata beside sound pixels
        return image


def decode_channels(file: BinaryIO | str, name: str, channels: int, scale: float | None) -> Tensor:
    """A float tensor [channels, H, W] in [0, 1] from a .npy array or an image file Pillow can read.

    Bands of an image file, and failing that its frames, are the channels. A .npy array is [C, H, W], [H, W, C] or,
    with one channel, [H, W].

    Args:
        scale: the value that becomes 1; None: the largest of an integer type, 1 for floats.

    Raises:
        UnreadableImage: broken, too large, or with another number of channels.
    """
    try:
        array = load_npy(file) if name.endswith(".npy") else _bands(file, name, channels)
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error
    planes = _channels_first(array, channels)
    if planes is None:
        raise UnreadableImage(name, f"expected {channels} channels, got an array of shape {list(array.shape)}")
    check_size(planes.shape[2], planes.shape[1], name)
    top = scale or (np.iinfo(array.dtype).max if np.issubdtype(array.dtype, np.integer) else 1.0)
    scaled = torch.from_numpy(np.ascontiguousarray(planes, np.float32) / np.float32(top))
    if not torch.isfinite(scaled).all():
        raise UnreadableImage(name, "the array holds NaN or Inf")
    return scaled.clamp_(0, 1)


def load_npy(file: BinaryIO | str) -> np.ndarray:
    """One array of numbers; raises ValueError for anything else numpy would read."""
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise ValueError(f"expected one array of real numbers, got {getattr(array, 'dtype', 'an archive')}")
    return array


def _bands(file: BinaryIO | str, name: str, channels: int) -> np.ndarray:
    with Image.open(file) as image:
        check_size(image.width, image.height, name)
        if len(image.getbands()) == 1 and getattr(image, "n_frames", 1) == channels > 1:
            frames = []
            for frame in range(channels):
                image.seek(frame)
                frames.append(np.asarray(image))
            return np.stack(frames)
        if channels == 1 and len(image.getbands()) == 3:
            return np.asarray(image.convert("L"))
        return np.asarray(image)


def check_size(width: int, height: int, name: str) -> None:
    """Raises UnreadableImage above `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name, f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")


def _channels_first(array: np.ndarray, channels: int) -> np.ndarray | None:
    if array.ndim == 2 and channels == 1:
        return array[None]
    if array.ndim != 3:
        return None
    if array.shape[0] == channels:
        return array
    return array.transpose(2, 0, 1) if array.shape[2] == channels else None


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{error}" or type(error).__name__
