"""Multi-crop augmentation: a few large views of an image and several small ones (DINO, DINOv3).

Every view is a random resized crop, maybe flipped, then colour jitter, grey, blur, solarisation,
normalisation. All randomness comes from the generator given, so an image's views are a pure
function of a seed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3core.bounds import Bounds, Share, complaints
from dinov3core.data import photometric
from dinov3core.data.decode import Pixels
from dinov3core.data.sizes import CropSizes, Side, in_text, pair, size_complaints
from dinov3core.image_statistics import IMAGENET

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
    """How views are cut and distorted; sizes are a side or (height, width) in pixels.

    With `other_sizes` the steps of a run have several sizes, and evaluations that of `global_size`:
    `of_each_size` gives the settings of every size, `shares` their shares of the steps.
    """

    global_size: Annotated[int | tuple[int, int], Side] = 224
    """Side of the large views, which both networks see."""
    local_size: Annotated[int | tuple[int, int], Side] = 96
    """Side of the small views, which the student alone sees."""
    other_sizes: tuple[CropSizes, ...] = ()
    """Further sizes with shares of the steps; the other steps, and evaluations, use those above."""
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
    """Turn views by up to so many degrees either way; beyond its border the image is mirrored."""
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
    """Probabilities of blur that released models were trained with, that their options say, or 0.
    """
    share_color_jitter: bool = False
    """Jitter the image once, before cutting, instead of every view."""
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

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of a run's steps that each of `of_each_size` has."""
        others = [sizes.share for sizes in self.other_sizes]
        return 1 - sum(others), *others

    @property
    def of_each_size(self) -> tuple["CropSettings", ...]:
        """These settings with one size each: their own, then the others."""
        others = [
            replace(
                self,
                global_size=sizes.global_size,
                local_size=sizes.local_size,
                other_sizes=(),
            )
            for sizes in self.other_sizes
        ]
        return replace(self, other_sizes=()), *others

    def _complaints(self, patch_size: int) -> Iterator[str]:
        yield from complaints(self, "crops.")
        yield from self._size_complaints(patch_size)
        for sizes, settings in zip(self.other_sizes, self.of_each_size[1:], strict=True):
            for complaint in settings._size_complaints(patch_size):
                yield f"crops.other_sizes {sizes}: {complaint}"
        if self.shares[0] < 1e-9:  # nothing is left, but for rounding
            written = " ".join(map(str, self.other_sizes))
            yield (
                "crops.other_sizes: expected shares that add up to less than 1, as the other steps "
                f"use crops.global_size, got {1 - self.shares[0]:g} in all from {written}"
            )
        for name in ("global_scale", "local_scale", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                yield f"crops.{name}: expected the lower end first, got {(low, high)}; swap them"
        if not self.mean or len(self.mean) != len(self.std):
            yield f"expected one mean and one std per channel, got {self.mean} and {self.std}"

    def _size_complaints(self, patch_size: int) -> Iterator[str]:
        yield from size_complaints("global", self.global_size, patch_size)
        yield from size_complaints("local", self.local_size, patch_size)
        room = np.subtract(pair(self.global_size), pair(self.local_size)) // INNER_STEP
        if self.local_inside_global and room.min() < 1:
            yield (
                f"local_inside_global cuts {self.local_size} out of {self.global_size} in steps of "
                f"{INNER_STEP} px; make global_size at least {INNER_STEP} larger than local_size"
            )


@dataclass(frozen=True)
class GramCrops:
    """What a Gram teacher sees instead of the global views: the same regions in another size."""

    size: Annotated[int | tuple[int, int], Side]
    """A side, or (height, width), in pixels."""
    distorted: bool = False
    """Take them from the distorted views instead of the clean ones."""


def sized_crops(
    settings: CropSettings, gram: GramCrops | None
) -> list[tuple[CropSettings, GramCrops | None]]:
    """What the steps of each size cut, in the order of `CropSettings.shares`."""
    others = [
        None if gram is None or sizes.gram_size is None else replace(gram, size=sizes.gram_size)
        for sizes in settings.other_sizes
    ]
    return list(zip(settings.of_each_size, [gram, *others], strict=True))


def validate_gram_crops(settings: CropSettings, gram: GramCrops | None, patch_size: int) -> None:
    """Check the crops of a Gram teacher: of every size or of none, and on the patch grid.

    Raises:
        ValueError: naming the first size that cannot work and what can.
    """
    for complaint in _gram_complaints(settings, gram, patch_size):
        raise ValueError(complaint)


def _gram_complaints(
    settings: CropSettings, gram: GramCrops | None, patch_size: int
) -> Iterator[str]:
    if gram is not None:
        yield from size_complaints("Gram", gram.size, patch_size)
    for sizes in settings.other_sizes:
        if gram is None and sizes.gram_size is not None:
            yield (
                f"crops.other_sizes {sizes}: there is no Gram teacher with crops of its own at "
                "the other steps; leave the third size out, or give gram.crop_size as well"
            )
        elif gram is not None and sizes.gram_size is None:
            yield (
                f"crops.other_sizes {sizes}: the Gram teacher has crops of its own at the other "
                f"steps ({in_text(gram.size)} px); expected a third size, SHARE:GLOBAL/LOCAL/GRAM"
            )
        elif sizes.gram_size is not None:
            for complaint in size_complaints("Gram", sizes.gram_size, patch_size):
                yield f"crops.other_sizes {sizes}: {complaint}"


class Views(NamedTuple):
    """The views of one image, normalised."""

    global_: list[Tensor]  # each [C, H, W]
    local: list[Tensor]  # each [C, h, w]
    gram: list[Tensor] | None  # each [C, H', W'], one per global view
    upsampled: bool  # the image is smaller than a global (or Gram) crop


class GlobalView(NamedTuple):
    """A global view in its forms."""

    crop: Tensor  # [C, H, W], distorted and normalised
    gram: Tensor | None  # [C, H', W']
    clean: Pixels  # undistorted


class MultiCrop:
    """Cut the views of an image.

    Args:
        settings: validated beforehand, and of one size; `len(settings.mean)` is the channel count.
        gram: crops for a Gram teacher, one per global view; None: no such crops.
    """

    def __init__(self, settings: CropSettings, gram: GramCrops | None = None):
        self.settings = settings
        self.gram = gram
        self.mean = np.float32(settings.mean)
        self.std = np.float32(settings.std)
        self.global_size = pair(settings.global_size)
        self.local_size = pair(settings.local_size)
        self.gram_size = None if gram is None else pair(gram.size)
        self.cut_size = tuple(np.maximum(self.global_size, self.gram_size or 0).tolist())

    def __call__(self, image: Pixels, rng: np.random.Generator | int) -> Views:
        """The views of an image, of which a tensor has brightness, contrast and blur varied only.

        Args:
            image: Pillow RGB, or float [C, H, W] in [0, 1] for other channel counts.
            rng: a generator, or a seed for one. Draws happen in the order of the published
                pipeline: shared jitter, then per global view its geometry and colours, then the
                local views.

        Raises:
            ValueError: the image's channels are not those of `settings.mean`.
        """
        rng = np.random.default_rng(rng)
        settings = self.settings
        self._refuse_other_channels(image)
        height, width = _size_of(image)
        upsampled = height < self.cut_size[0] or width < self.cut_size[1]
        if settings.share_color_jitter:
            image = self._jitter(image, rng)

        views = [self._global_view(image, number, rng) for number in range(settings.global_count)]
        if settings.local_inside_global:
            # Half of the local views come out of the first of two global ones, and so on.
            sources = np.arange(settings.local_count) * len(views) // settings.local_count
            local = [self._inner_view(views[source].clean, rng) for source in sources]
        else:
            local = [self._local_view(image, rng) for _ in range(settings.local_count)]

        gram = None if self.gram_size is None else [view.gram for view in views]
        return Views([view.crop for view in views], local, gram, upsampled)

    def _refuse_other_channels(self, image: Pixels) -> None:
        channels = len(image.getbands()) if isinstance(image, Image.Image) else len(image)
        if channels != len(self.mean):
            raise ValueError(
                f"expected an image of {len(self.mean)} channels (one per value of mean), got "
                f"{channels}; give the mean and std of your channels"
            )

    def _global_view(self, image: Pixels, number: int, rng: np.random.Generator) -> GlobalView:
        cut = self._geometry(image, self.cut_size, self.settings.global_scale, rng)
        clean = _resize(cut, self.global_size)
        if self.gram is not None and self.gram.distorted:
            distorted = self._distort(cut, number, rng)
            crop = _resize(distorted, self.global_size, limits=None)
            return GlobalView(crop, _resize(distorted, self.gram_size, limits=None), clean)
        gram = None if self.gram_size is None else self._normalise(_resize(cut, self.gram_size))
        return GlobalView(self._distort(clean, number, rng), gram, clean)

    def _local_view(self, image: Pixels, rng: np.random.Generator) -> Tensor:
        cut = self._geometry(image, self.local_size, self.settings.local_scale, rng)
        return self._distort(cut, None, rng)

    def _inner_view(self, clean: Pixels, rng: np.random.Generator) -> Tensor:
        """A local crop of a distorted global view, on the coarse grid.

        The last offset is never drawn, as published.
        """
        distorted = self._distort(clean, None, rng)
        height, width = self.local_size
        rows, columns = np.subtract(self.global_size, self.local_size) // INNER_STEP
        top = int(rng.integers(rows)) * INNER_STEP
        left = int(rng.integers(columns)) * INNER_STEP
        return distorted[:, top : top + height, left : left + width].contiguous()

    def _geometry(
        self,
        image: Pixels,
        size: tuple[int, int],
        scale: tuple[float, float],
        rng: np.random.Generator,
    ) -> Pixels:
        """Cut a region of the image to a size, maybe turned, maybe mirrored."""
        settings = self.settings
        box = draw_box(_size_of(image), scale, settings.aspect, rng)
        degrees = rng.uniform(-settings.rotation, settings.rotation) if settings.rotation else 0.0
        cut = _cut(image, box, size) if degrees == 0 else _cut_turned(image, box, size, degrees)
        return _mirror(cut) if settings.flip and rng.random() < 0.5 else cut

    def _distort(self, image: Pixels, number: int | None, rng: np.random.Generator) -> Tensor:
        """Colours, blur, solarisation, normalisation of a global view; None: of a local one."""
        settings = self.settings
        if not settings.share_color_jitter:
            image = self._jitter(image, rng)

        first, others, local = BLUR_PROBABILITIES[settings.blur]
        probability = local if number is None else others if number else first
        if rng.random() < probability:
            sigma = rng.uniform(0.1, 2.0)
            if isinstance(image, Tensor):
                image = photometric.blur_tensor(image, sigma)
            else:
                image = photometric.blur(image, sigma)

        if number and rng.random() < settings.solarize and not isinstance(image, Tensor):
            image = photometric.solarize(image)
        return self._normalise(image)

    def _jitter(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Brightness, contrast, saturation and hue in random order, then maybe grey."""
        settings = self.settings
        if rng.random() < settings.jitter_probability:
            strengths = (
                settings.brightness,
                settings.contrast,
                settings.saturation,
                settings.hue,
            )
            factors = rng.uniform(-1, 1, 4) * strengths
            order = rng.permutation(4)
            if isinstance(image, Tensor):
                image = _jitter_tensor(image, factors, order)
            else:
                image = _jitter_rgb(image, factors, order)
        if rng.random() < settings.grayscale and not isinstance(image, Tensor):
            image = photometric.to_grey(image)
        return image

    def _normalise(self, image: Pixels) -> Tensor:
        if isinstance(image, Image.Image):
            return photometric.normalise(image, self.mean, self.std)
        mean = torch.from_numpy(self.mean)[:, None, None]
        std = torch.from_numpy(self.std)[:, None, None]
        return (image - mean) / std


def _jitter_rgb(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    operations = (
        photometric.adjust_brightness,
        photometric.adjust_contrast,
        photometric.adjust_saturation,
        photometric.adjust_hue,
    )
    for which in order:
        factor = float(factors[which])
        if factor:  # 1 keeps brightness, contrast and saturation, 0 the hue
            image = operations[which](image, factor if which == 3 else 1 + factor)
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
    """The region of a random resized crop.

    Ten attempts at an area and an aspect ratio; if none fits, the largest central region.

    Args:
        size: (height, width) of the image.
        scale: range of the share of its area.
        aspect: range of width over height.
    """
    height, width = size
    log_low = math.log(aspect[0])
    log_high = math.log(aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(log_low, log_high))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w = min(width, round(height * ratio))
    h = min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def _size_of(image: Pixels) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[1:])


def _mirror(image: Pixels) -> Pixels:
    if isinstance(image, Tensor):
        return image.flip(-1)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _resize(
    image: Pixels,
    size: tuple[int, int],
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> Pixels:
    """Bicubic, antialiased; a tensor is cut off at `limits`, as 8 bits do with a Pillow image."""
    if _size_of(image) == size:
        return image
    if isinstance(image, Image.Image):
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    resized = F.interpolate(
        image[None], size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0] if limits is None else resized[0].clamp(*limits)


def _cut(image: Pixels, box: Box, size: tuple[int, int]) -> Pixels:
    """Crop first, so that nothing outside the box leaks in, then resize."""
    top, left, height, width = box
    if isinstance(image, Tensor):
        return _resize(image[:, top : top + height, left : left + width], size)
    return _resize(image.crop((left, top, left + width, top + height)), size)


def _cut_turned(image: Pixels, box: Box, size: tuple[int, int], degrees: float) -> Pixels:
    """The box turned about its centre.

    A larger box is brought to the scale of the view (antialiased), then turned; its middle is the
    view.
    """
    top, left, height, width = box
    view_height, view_width = size
    cos = abs(math.cos(math.radians(degrees)))
    sin = abs(math.sin(math.radians(degrees)))

    # The view's bounds once it is turned, with a margin for the filter; then in source pixels.
    outer_size = (
        math.ceil(view_height * cos + view_width * sin) + 2,
        math.ceil(view_width * cos + view_height * sin) + 2,
    )
    outer_height = round(outer_size[0] * height / view_height)
    outer_width = round(outer_size[1] * width / view_width)
    outer_top = top + (height - outer_height) // 2
    outer_left = left + (width - outer_width) // 2
    outer_box = (outer_top, outer_left, outer_height, outer_width)

    if isinstance(image, Tensor):
        region = torch.from_numpy(_mirrored_region(image.numpy(), outer_box))
        return _turn_tensor(_resize(region, outer_size), size, degrees)
    planes = _mirrored_region(np.asarray(image).transpose(2, 0, 1), outer_box)
    region = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    turned = _resize(region, outer_size).rotate(degrees, Image.Resampling.BICUBIC)
    y = (outer_size[0] - view_height) // 2
    x = (outer_size[1] - view_width) // 2
    return turned.crop((x, y, x + view_width, y + view_height))


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
    """The middle of [C, H, W], of that size, turned counter-clockwise as Pillow does."""
    height, width = region.shape[1:]
    angle = math.radians(degrees)
    y = torch.arange(size[0])[:, None] - (size[0] - 1) / 2
    x = torch.arange(size[1])[None] - (size[1] - 1) / 2
    source_x = math.cos(angle) * x - math.sin(angle) * y
    source_y = math.sin(angle) * x + math.cos(angle) * y
    grid = torch.stack([source_x * 2 / width, source_y * 2 / height], -1)[None]
    turned = F.grid_sample(
        region[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return turned[0].clamp(0, 1)
