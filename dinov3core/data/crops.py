"""Multi-crop augmentation: two large views and several small ones of an image (DINOv3 training,
DINO lineage).

Every view is a random resized crop, maybe flipped, then colour jitter, grey, blur, solarisation,
normalisation. All randomness comes from the generator given, so an image's views are a pure
function of a seed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3core.data import photometric
from dinov3core.data.bounds import Bounds, complaints
from dinov3core.image_statistics import IMAGENET

Size = int | tuple[int, int]
Side = Bounds(1, 16384)  # pixels
Share = Annotated[float, Bounds(0, 1)]
Box = tuple[int, int, int, int]  # top, left, height, width in source pixels

INNER_STEP = 16  # offsets of local crops inside a global crop are multiples of this, as published

BLUR_PROBABILITIES = {
    # first global view, other global views, local views. The published options read 1, .1, .5; the
    # wrapper that applied them inverted each, so that released models were trained with 0, .9, .5
    # (facebookresearch/dinov3 issue 286).
    "executed": (0.0, 0.9, 0.5),
    "intended": (1.0, 0.1, 0.5),
    "off": (0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class CropSettings:
    """How views are cut and distorted; sizes are a side or (height, width) in pixels."""

    global_size: Annotated[int | tuple[int, int], Side] = 224
    """Side of the large views, which both networks see."""
    local_size: Annotated[int | tuple[int, int], Side] = 96
    """Side of the small views, which the student alone sees."""
    global_count: Annotated[int, Bounds(1, 64)] = 2
    """Large views of an image."""
    local_count: Annotated[int, Bounds(0, 256)] = 8
    """Small views of an image."""
    global_scale: Annotated[tuple[float, float], Bounds(0, 1, open_low=True)] = (0.32, 1.0)
    """Share of the image's area a global view covers."""
    local_scale: Annotated[tuple[float, float], Bounds(0, 1, open_low=True)] = (0.05, 0.32)
    """Share of the image's area a local view covers."""
    aspect: Annotated[tuple[float, float], Bounds(1e-3, 1e3)] = (3 / 4, 4 / 3)
    """Width over height of the region cut, drawn log-uniformly."""
    flip: bool = True
    """Mirror half of the views; the published 7B and distilled models were trained without."""
    rotation: Annotated[float, Bounds(0, 180)] = 0.0
    """Turn views by up to so many degrees either way, mirroring the image beyond its border; 0:
    never.
    """
    jitter_probability: Share = 0.8
    """Probability of a view whose colours are jittered."""
    brightness: Share = 0.4
    """Brightness is multiplied by up to 1 plus or minus this."""
    contrast: Share = 0.4
    """Contrast is multiplied by up to 1 plus or minus this."""
    saturation: Share = 0.2
    """Saturation is multiplied by up to 1 plus or minus this."""
    hue: Annotated[float, Bounds(0, 0.5)] = 0.1
    """Hue is turned by up to so much either way; 0.5 is half the colour circle."""
    grayscale: Share = 0.2
    """Probability of a view without colour."""
    solarize: Share = 0.2
    """Probability of solarisation, in all global views but the first."""
    blur: Literal["executed", "intended", "off"] = "executed"
    """Blur probabilities of the released models, those their options asked for (the wrapper
    inverted them), or none.
    """
    share_color_jitter: bool = False
    """Jitter the image once, before cutting, instead of every view."""
    gram_size: Annotated[int | tuple[int, int] | None, Side] = None
    """Side of the crops of a Gram teacher of its own; None: it reads the global views."""
    gram_distorted: bool = False
    """Cut Gram crops from the distorted views instead of the clean ones."""
    local_inside_global: bool = False
    """Cut local views out of the global ones, half from the first, on a grid of 16 pixels."""
    mean: Annotated[tuple[float, ...], Bounds(-1e6, 1e6)] = IMAGENET.mean
    """What is subtracted from each channel of an image in [0, 1]."""
    std: Annotated[tuple[float, ...], Bounds(1e-6, 1e6)] = IMAGENET.std
    """What each channel is divided by then."""

    def validate(self, patch_size: int) -> None:
        """Check every field, and sizes against the patch grid.

        Raises:
            ValueError: naming the first value that cannot work and one that can.
        """
        for complaint in self._complaints(patch_size):
            raise ValueError(complaint)

    def _complaints(self, patch_size: int) -> Iterator[str]:
        yield from complaints(self, "crops.")
        yield from _size_complaints("global", self.global_size, patch_size)
        yield from _size_complaints("local", self.local_size, patch_size)
        if self.gram_size is not None:
            yield from _size_complaints("Gram", self.gram_size, patch_size)
        for name in ("global_scale", "local_scale", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                yield f"crops.{name}: expected the lower end first, got {(low, high)}; swap them"
        if not self.mean or len(self.mean) != len(self.std):
            yield f"expected one mean and one std per channel, got {self.mean} and {self.std}"
        room = np.subtract(pair(self.global_size), pair(self.local_size)) // INNER_STEP
        if self.local_inside_global and room.min() < 1:
            yield (
                f"local_inside_global cuts {self.local_size} out of {self.global_size} in steps of "
                f"{INNER_STEP} px; make global_size at least {INNER_STEP} larger than local_size"
            )


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as a side or as both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _size_complaints(name: str, size: Size, patch: int) -> Iterator[str]:
    for side in pair(size):
        if side < patch:
            yield f"{name} crop {side} is smaller than the patch {patch}; use {patch} or a multiple of it"
        elif side % patch:
            lower = side // patch * patch
            yield f"{name} crop {side} is not a multiple of the patch {patch}; use {lower} or {lower + patch}"


class Crops(NamedTuple):
    """The views of one image, normalised."""

    global_: list[Tensor]  # each [C, H, W]
    local: list[Tensor]  # each [C, h, w]
    gram: list[Tensor] | None  # each [C, H', W'], one per global view
    upsampled: bool  # the image is smaller than a global (or Gram) crop


class MultiCrop:
    """Cut the views of an image.

    Args:
        settings: validated beforehand; `len(settings.mean)` is the channel count.
    """

    def __init__(self, settings: CropSettings):
        self.settings = settings
        self.mean, self.std = np.float32(settings.mean), np.float32(settings.std)
        self.global_size, self.local_size = pair(settings.global_size), pair(settings.local_size)
        self.gram_size = None if settings.gram_size is None else pair(settings.gram_size)
        self.cut_size = tuple(np.maximum(self.global_size, self.gram_size or 0).tolist())

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator | int) -> Crops:
        """Views of an RGB Pillow image, or of a float tensor [C, H, W] in [0, 1] for other channel
        counts.

        Args:
            image: of which only brightness, contrast and blur are varied when it is a tensor.
            rng: a generator, or a seed for one. Draws happen in the order of the published
                pipeline: shared jitter, then per global view its geometry and colours, then the
                local views.

        Raises:
            ValueError: the image's channels are not those of `settings.mean`.
        """
        rng = np.random.default_rng(rng)
        channels = len(image.getbands()) if isinstance(image, Image.Image) else len(image)
        if channels != len(self.mean):
            raise ValueError(
                f"expected an image of {len(self.mean)} channels (one per value of mean), got "
                f"{channels}; give the mean and std of your channels"
            )
        settings, size = self.settings, _size_of(image)
        upsampled = size[0] < self.cut_size[0] or size[1] < self.cut_size[1]
        if settings.share_color_jitter:
            image = self._jitter(image, rng)
        global_views, gram_views, clean_views = [], [], []
        for view in range(settings.global_count):
            cut = self._geometry(image, self.cut_size, settings.global_scale, rng)
            crop, gram, clean = self._global_view(cut, view, rng)
            global_views.append(crop)
            gram_views.append(gram)
            clean_views.append(clean)
        local_views = [
            self._inner_view(clean_views[view * len(clean_views) // settings.local_count], rng)
            if settings.local_inside_global
            else self._local_view(image, rng)
            for view in range(settings.local_count)
        ]
        return Crops(
            global_views, local_views, None if self.gram_size is None else gram_views, upsampled
        )

    def _global_view(
        self, cut: Image.Image | Tensor, view: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None, Image.Image | Tensor]:
        """A global crop, its Gram crop if asked for, and the undistorted global view."""
        clean = _resize(cut, self.global_size)
        if self.gram_size is not None and self.settings.gram_distorted:
            distorted = self._distort(cut, view, rng)
            return (
                _resize(distorted, self.global_size, limits=None),
                _resize(distorted, self.gram_size, None),
                clean,
            )
        gram = None if self.gram_size is None else self._normalise(_resize(cut, self.gram_size))
        return self._distort(clean, view, rng), gram, clean

    def _local_view(self, image: Image.Image | Tensor, rng: np.random.Generator) -> Tensor:
        return self._distort(
            self._geometry(image, self.local_size, self.settings.local_scale, rng), None, rng
        )

    def _inner_view(self, clean: Image.Image | Tensor, rng: np.random.Generator) -> Tensor:
        """A local crop of a distorted global view, on the coarse grid; the last offset is never
        drawn, as published.
        """
        distorted = self._distort(clean, None, rng)
        (height, width), (rows, columns) = (
            self.local_size,
            np.subtract(self.global_size, self.local_size) // INNER_STEP,
        )
        top, left = int(rng.integers(rows)) * INNER_STEP, int(rng.integers(columns)) * INNER_STEP
        return distorted[:, top : top + height, left : left + width].contiguous()

    def _geometry(
        self,
        image: Image.Image | Tensor,
        size: tuple[int, int],
        scale: tuple[float, float],
        rng: np.random.Generator,
    ) -> Image.Image | Tensor:
        settings = self.settings
        box = draw_box(_size_of(image), scale, settings.aspect, rng)
        degrees = rng.uniform(-settings.rotation, settings.rotation) if settings.rotation else 0.0
        cut = _cut(image, box, size) if degrees == 0 else _cut_turned(image, box, size, degrees)
        return _mirror(cut) if settings.flip and rng.random() < 0.5 else cut

    def _distort(
        self, image: Image.Image | Tensor, view: int | None, rng: np.random.Generator
    ) -> Tensor:
        """Colours, blur, solarisation, normalisation; `view` is None for a local view."""
        settings = self.settings
        if not settings.share_color_jitter:
            image = self._jitter(image, rng)
        first, others, local = BLUR_PROBABILITIES[settings.blur]
        if rng.random() < (local if view is None else others if view else first):
            sigma = rng.uniform(0.1, 2.0)
            is_tensor = isinstance(image, Tensor)
            image = (
                photometric.blur_tensor(image, sigma)
                if is_tensor
                else photometric.blur(image, sigma)
            )
        if view and rng.random() < settings.solarize and not isinstance(image, Tensor):
            image = photometric.solarize(image)
        return self._normalise(image)

    def _jitter(
        self, image: Image.Image | Tensor, rng: np.random.Generator
    ) -> Image.Image | Tensor:
        """Brightness, contrast, saturation and hue in random order, then maybe grey."""
        settings = self.settings
        if rng.random() < settings.jitter_probability:
            factors = rng.uniform(-1, 1, 4) * (
                settings.brightness,
                settings.contrast,
                settings.saturation,
                settings.hue,
            )
            order = rng.permutation(4)
            image = (_jitter_tensor if isinstance(image, Tensor) else _jitter_rgb)(
                image, factors, order
            )
        if rng.random() < settings.grayscale and not isinstance(image, Tensor):
            image = photometric.to_grey(image)
        return image

    def _normalise(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return (image - torch.from_numpy(self.mean)[:, None, None]) / torch.from_numpy(
                self.std
            )[:, None, None]
        return photometric.normalise(image, self.mean, self.std)


def _jitter_rgb(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    operations = (
        photometric.adjust_brightness,
        photometric.adjust_contrast,
        photometric.adjust_saturation,
        photometric.adjust_hue,
    )
    for which in order:
        if factors[which]:
            image = operations[which](image, float(factors[which]) + (0.0 if which == 3 else 1.0))
    return image


def _jitter_tensor(image: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
    for which in order:
        if which == 0:
            image = (image * (1 + factors[0])).clamp(0, 1)
        elif which == 1:
            image = photometric.adjust_tensor_contrast(image, 1 + factors[1])
    return image


def draw_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """The region of a random resized crop: ten attempts at an area and an aspect ratio, then the
    largest central one.

    Args:
        size: (height, width) of the image.
        scale: range of the share of its area.
        aspect: range of width over height.
    """
    height, width = size
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def _size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[1:])


def _mirror(image: Image.Image | Tensor) -> Image.Image | Tensor:
    return (
        image.flip(-1)
        if isinstance(image, Tensor)
        else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    )


def _resize(
    image: Image.Image | Tensor,
    size: tuple[int, int],
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> Image.Image | Tensor:
    """Bicubic, antialiased; a tensor's overshoot is cut off at `limits`, as 8 bits do for a Pillow
    image.
    """
    if _size_of(image) == size:
        return image
    if isinstance(image, Image.Image):
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    resized = F.interpolate(
        image[None], size=size, mode="bicubic", antialias=True, align_corners=False
    )[0]
    return resized if limits is None else resized.clamp(*limits)


def _cut(image: Image.Image | Tensor, box: Box, size: tuple[int, int]) -> Image.Image | Tensor:
    """Crop first, so that nothing outside the box leaks in, then resize."""
    top, left, height, width = box
    if isinstance(image, Tensor):
        return _resize(image[:, top : top + height, left : left + width], size)
    return _resize(image.crop((left, top, left + width, top + height)), size)


def _cut_turned(
    image: Image.Image | Tensor, box: Box, size: tuple[int, int], degrees: float
) -> Image.Image | Tensor:
    """The box turned about its centre: a larger box at the scale of the view (antialiased), turned,
    its middle kept.
    """
    (top, left, height, width), (out_height, out_width) = box, size
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    outer = (
        math.ceil(out_height * cos + out_width * sin) + 2,
        math.ceil(out_width * cos + out_height * sin) + 2,
    )
    outer_height, outer_width = (
        round(outer[0] * height / out_height),
        round(outer[1] * width / out_width),
    )
    outer_box = (
        top + (height - outer_height) // 2,
        left + (width - outer_width) // 2,
        outer_height,
        outer_width,
    )
    if isinstance(image, Tensor):
        region = _resize(torch.from_numpy(_mirrored_region(image.numpy(), outer_box)), outer)
        return _turn_tensor(region, size, degrees)
    planes = _mirrored_region(np.asarray(image).transpose(2, 0, 1), outer_box)
    region = _resize(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))), outer)
    turned = region.rotate(degrees, Image.Resampling.BICUBIC)
    y, x = (outer[0] - out_height) // 2, (outer[1] - out_width) // 2
    return turned.crop((x, y, x + out_width, y + out_height))


def _mirrored_region(planes: np.ndarray, box: Box) -> np.ndarray:
    """A region of [C, H, W] that may reach beyond the border, where the image is mirrored."""
    top, left, height, width = box
    rows = _fold(np.arange(top, top + height), planes.shape[1])
    columns = _fold(np.arange(left, left + width), planes.shape[2])
    return planes[:, rows[:, None], columns]


def _fold(index: np.ndarray, side: int) -> np.ndarray:
    """Indices on a line mirrored at both ends of [0, side)."""
    index = index % (2 * side)
    return np.minimum(index, 2 * side - 1 - index)


def _turn_tensor(region: Tensor, size: tuple[int, int], degrees: float) -> Tensor:
    """The middle of [C, H, W] of the size asked, counter-clockwise by `degrees`, as Pillow turns."""
    height, width = region.shape[1:]
    angle = math.radians(degrees)
    y = torch.arange(size[0])[:, None] - (size[0] - 1) / 2
    x = torch.arange(size[1])[None] - (size[1] - 1) / 2
    source_x = math.cos(angle) * x - math.sin(angle) * y
    source_y = math.sin(angle) * x + math.cos(angle) * y
    grid = torch.stack([source_x * 2 / width, source_y * 2 / height], -1)[None]
    turned = F.grid_sample(
        region[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[0]
    return turned.clamp(0, 1)
