"""From the bytes of an image file to pixels: RGB by Pillow, a tensor for other channel counts."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import ROWSPERSTRIP, TILELENGTH, TILEWIDTH
from torch import Tensor

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import open_regular, reason
from dinov3core.data.npy import load_npy

MAX_PIXELS = 80_000_000  # below the size from which Pillow itself suspects a bomb
MAX_BYTES = 2**30  # at the peak of decoding one image
MAX_SCANS = 100  # of a progressive JPEG, each a pass over all pixels; encoders write about ten
DRAFT_SIDE = 1024  # a large JPEG is decoded at 1/2, 1/4 or 1/8 as long as its sides stay above this
RGB_BYTES = 8  # per pixel: an image and the one it becomes
ARRAY_BYTES = 12  # an image and the array it becomes, which Pillow joins from pieces
FLOAT_BYTES = 5  # per value: float32, and whether it is finite
BAND_PIXELS = 2**20  # converted to RGB at a time

Pixels = Image.Image | Tensor  # Pillow RGB, or float [C, H, W] in [0, 1] for other channel counts

# Formats by suffix: Pillow tries these and no other decoder, one of which starts Ghostscript.
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".jp2": "JPEG2000",
}
FORMATS = list(dict.fromkeys(_FORMATS.values()))
RGB_SUFFIXES = frozenset(_FORMATS)
ARRAY_SUFFIXES = frozenset({".npy", ".tif", ".tiff", ".png"})

# Bytes per pixel that a decoder holds besides the image, measured with Pillow 13 and its libraries.
_DECODER_BYTES = {"WEBP": 12, "JPEG2000": 16}
TIFF_PIXEL = 8  # bytes; of four 16-bit samples

# What Pillow's decoders raise on broken files, besides the OSError that most of them use.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, ArithmeticError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class PixelFormat:
    """How image files become pixels.

    Raises:
        ValueError: no channels, or a scale that is not positive.
    """

    channels: int = 3
    """3 reads RGB through Pillow, any other number .npy, .tif and .png arrays"""
    scale: float | None = None
    """array value that becomes 1; None: the largest of an integer type, 1 for floats"""

    def __post_init__(self) -> None:
        if self.channels < 1 or (self.scale is not None and self.scale <= 0):
            raise ValueError(
                "expected at least 1 channel and a positive scale, got "
                f"{self.channels} and {self.scale}"
            )

    @property
    def suffixes(self) -> frozenset[str]:
        """Of the files that may hold such images."""
        return RGB_SUFFIXES if self.channels == 3 else ARRAY_SUFFIXES

    def decode(self, file: BinaryIO | str, name: str) -> Pixels:
        """An RGB image, or a float tensor [C, H, W] in [0, 1] for other channel counts.

        Args:
            file: a path or the bytes.
            name: to show to people.

        Raises:
            UnreadableImage: broken, empty, not an image, too large, other channels.
        """
        if self.channels == 3:
            return decode_rgb(file, name)
        return decode_channels(file, name, self)


RGB = PixelFormat()


@contextmanager
def opened_image(
    file: BinaryIO | str,
    name: str,
    bytes_per_pixel: int = RGB_BYTES,
    *,
    draft: bool = False,
    limited: bool = True,
) -> Iterator[ImageFile.ImageFile]:
    """An image file whose header was read and which may be decoded.

    Args:
        file: a path or the bytes.
        bytes_per_pixel: held at the peak of what becomes of the image, without the decoder's own.
        draft: decode a large JPEG at a fraction.
        limited: refuse what is too large; without it only Pillow's own limit holds.

    Raises:
        UnreadableImage: broken, empty, not an image, too large, also while it is decoded inside.
    """
    try:
        with (
            _content(file, name, limited) as content,
            Image.open(content, formats=FORMATS) as image,
        ):
            coded_pixels = image.width * image.height
            if draft:
                image.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))  # JPEG only; elsewhere nothing happens
            if limited:
                decoder_bytes = _decoder_bytes(image, coded_pixels)
                check_size(*image.size, name, bytes_per_pixel, decoder_bytes)
                _refuse_endless_scans(image, name)
            yield image
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error


@contextmanager
def _content(file: BinaryIO | str, name: str, limited: bool = True) -> Iterator[BinaryIO]:
    """A path opened, if it is a regular file, when limited of up to `MAX_BYTES`."""
    if not isinstance(file, str):
        yield file
        return
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if limited and size > MAX_BYTES:
            raise UnreadableImage(name, f"{size:,} bytes, more than the limit of {MAX_BYTES:,}")
        yield opened


def decode_rgb(
    file: BinaryIO | str,
    name: str,
    *,
    draft: bool = True,
    limited: bool = True,
) -> Image.Image:
    """An RGB image, upright.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits,
    CMYK, palettes and grey are converted, of an animation the first frame is taken.

    Args:
        draft, limited: see `opened_image`.

    Raises:
        UnreadableImage: broken, empty, not an image, above `MAX_PIXELS` or `MAX_BYTES`.
    """
    with opened_image(file, name, draft=draft, limited=limited) as image:
        image.load()
        _turn_upright(image)
        rgb = to_rgb(image, name)
        return image.copy() if rgb is image else rgb  # let go of the file and its decoder


def check_size(
    width: int,
    height: int,
    name: str,
    bytes_per_pixel: int = RGB_BYTES,
    decoder_bytes: int = 0,
) -> None:
    """Raises UnreadableImage without pixels, above `MAX_PIXELS` or above `MAX_BYTES`."""
    pixels = width * height
    if not pixels:
        raise UnreadableImage(name, f"{width} x {height} pixels, expected at least one")
    if pixels > MAX_PIXELS:
        text = f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}"
        raise UnreadableImage(name, text)
    size = pixels * bytes_per_pixel + decoder_bytes
    if size > MAX_BYTES:
        raise UnreadableImage(
            name,
            f"takes {size / 1e9:.2f} GB to decode, more than the limit of {MAX_BYTES / 1e9:.2f} "
            "GB; cut it into smaller images",
        )


def _decoder_bytes(image: ImageFile.ImageFile, coded_pixels: int) -> int:
    """What a decoder holds besides the image itself."""
    if image.format in ("JPEG", "MPO"):  # coefficients of all scans, 2 bytes each, also for a draft
        return 2 * len(image.getbands()) * coded_pixels
    if image.format == "TIFF":  # a strip or a tile, which may be larger than the image
        tags = (ROWSPERSTRIP, TILEWIDTH, TILELENGTH)
        rows, tile_width, tile_length = (_whole(image.tag_v2.get(tag)) for tag in tags)
        strip = image.width * min(rows or image.height, image.height)
        return TIFF_PIXEL * max(strip, tile_width * tile_length)
    return _DECODER_BYTES.get(image.format, 0) * coded_pixels


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _refuse_endless_scans(image: ImageFile.ImageFile, name: str) -> None:
    """A scan of a progressive JPEG takes 90 bytes and, at 180 million pixels, 6 ms."""
    if "progressive" not in image.info:
        return
    image.fp.seek(0)
    scans = image.fp.read().count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise UnreadableImage(name, f"a JPEG of {scans} scans, more than the limit of {MAX_SCANS}")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of any Pillow mode."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnreadableImage(
            name, "float pixels have no fixed range; read them as 1 channel with a scale"
        )
    # A 32-bit mode holds 16-bit data, or 8-bit data when nothing exceeds 255.
    top = 255 if image.mode == "I" and image.getextrema()[1] <= 255 else 65535
    rows = max(1, BAND_PIXELS // image.width)
    if image.height <= rows:
        return _band_to_rgb(image, top)
    rgb = Image.new("RGB", image.size)  # band by band, as conversions keep up to five copies
    for first in range(0, image.height, rows):
        band = image.crop((0, first, image.width, min(first + rows, image.height)))
        rgb.paste(_band_to_rgb(band, top), (0, first))
    return rgb


def _band_to_rgb(image: Image.Image, top: int) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image), top)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, top: int) -> np.ndarray:
    """Grey from 0 to `top`, 255 or 65535, as bytes, rounded to the nearest."""
    if top == 255:
        return pixels.clip(0).astype(np.uint8)
    return ((pixels.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF rotation in place; unreadable metadata beside sound pixels are left alone."""
    with suppress(*DECODE_ERRORS):
        ImageOps.exif_transpose(image, in_place=True)


def decode_channels(file: BinaryIO | str, name: str, pixels: PixelFormat) -> Tensor:
    """A float tensor [C, H, W] in [0, 1] from a .npy array or an image file that Pillow can read.

    Bands of an image file, and failing that its frames, are the channels. A .npy array is [C, H,
    W], [H, W, C] or, with one channel, [H, W].

    Raises:
        UnreadableImage: broken, too large, or with another number of channels.
    """
    channels = pixels.channels
    array = read_npy(file, name) if name.lower().endswith(".npy") else _bands(file, name, channels)
    planes = _channels_first(array, channels)
    if planes is None:
        raise UnreadableImage(
            name, f"expected {channels} channels, got an array of shape {list(array.shape)}"
        )
    check_size(planes.shape[2], planes.shape[1], name, channels * (array.itemsize + FLOAT_BYTES))
    return to_unit_range(planes, name, pixels.scale)


def to_unit_range(planes: np.ndarray, name: str, scale: float | None) -> Tensor:
    """Numbers of any type as floats in [0, 1].

    Args:
        scale: see `PixelFormat`.

    Raises:
        UnreadableImage: NaN or infinity among them.
    """
    integers = np.issubdtype(planes.dtype, np.integer)
    top = scale or (np.iinfo(planes.dtype).max if integers else 1.0)
    with np.errstate(over="ignore"):
        scaled = np.array(planes, np.float32, order="C")
    scaled /= np.float32(top)
    if not np.isfinite(scaled).all():
        raise UnreadableImage(name, "the array holds NaN or Inf")
    return torch.from_numpy(scaled).clamp_(0, 1)


def read_npy(file: BinaryIO | str, name: str) -> np.ndarray:
    """One array of numbers.

    Raises:
        UnreadableImage: broken, something else, or of more than half of `MAX_BYTES`.
    """
    try:
        with _content(file, name) as content:
            return load_npy(content, limit=MAX_BYTES // 2)
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error


def _bands(file: BinaryIO | str, name: str, channels: int) -> np.ndarray:
    """The bands [H, W, C] of an image file, or its frames [C, H, W]."""
    with opened_image(file, name, max(ARRAY_BYTES, channels * (1 + FLOAT_BYTES))) as image:
        if channels > 1 and len(image.getbands()) == 1:
            return _frames(image, name, channels)
        if channels == 1 and len(image.getbands()) == 3:
            return np.asarray(image.convert("L"))
        return np.asarray(image)


def _frames(image: ImageFile.ImageFile, name: str, channels: int) -> np.ndarray:
    """All frames [C, H, W], or the first [H, W] if there are not `channels`, all of one size."""
    size = image.size
    first = np.asarray(image)
    if not _has_frames(image, channels):
        return first
    check_size(*size, name, ARRAY_BYTES + channels * first.itemsize)
    frames = np.empty((channels, *first.shape), first.dtype)
    for number in range(channels):
        image.seek(number)
        if image.size != size:
            raise ValueError(f"frames of different sizes, {size} and {image.size}")
        check_size(*size, name, ARRAY_BYTES, _decoder_bytes(image, image.width * image.height))
        frames[number] = np.asarray(image)
    return frames


def _has_frames(image: ImageFile.ImageFile, count: int) -> bool:
    """Whether there are exactly `count`; `n_frames` would walk through all that a file claims."""
    with suppress(EOFError):
        image.seek(count - 1)
        with suppress(EOFError):
            image.seek(count)
            return False
        return True
    return False


def _channels_first(array: np.ndarray, channels: int) -> np.ndarray | None:
    if array.ndim == 2 and channels == 1:
        return array[None]
    if array.ndim != 3:
        return None
    if array.shape[0] == channels:
        return array
    return array.transpose(2, 0, 1) if array.shape[2] == channels else None


def _reason(error: BaseException) -> str:
    return "not an image file" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
