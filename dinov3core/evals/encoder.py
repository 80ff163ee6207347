"""Images of any kind, with the transform that weights expect, before a `FrozenEncoder`.

Shapes: B images, C channels, D width, R registers, h x w patches.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dinov3core.data.decode import DECODE_ERRORS, DRAFT_SIDE, PixelFormat, decode_rgb, to_rgb
from dinov3core.data.errors import UnreadableImage
from dinov3core.data.pixels import checked_pixels, to_planes
from dinov3core.evals.backbones import known_statistics
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.models import Features
from dinov3core.models.presets import Backbone

ImageLike = str | os.PathLike | Image.Image | Tensor
MOST_PATCHES = 2**16  # of one image; the time of attention grows with their square


class ImageEncoder:
    """A backbone that takes images as they are.

    Args:
        model: with its `statistics`; it is moved to `device`, in float32 and eval mode.
        device: cpu, cuda, cuda:1, ...; auto: the GPU where there is one.
        autocast: run the model in bfloat16.

    Raises:
        ValueError: a model without statistics, or no such device.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        device: str | torch.device = "auto",
        autocast: bool = False,
    ):
        self.statistics = known_statistics(model)
        self.device = open_device(device)
        self.model = model.float().to(self.device).eval()
        self.encoder = FrozenEncoder(
            self.model,
            device=self.device,
            autocast_dtype=torch.bfloat16 if autocast else None,
        )

    def features(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        size: int | tuple[int, int] = 256,
        batch_size: int = 32,
    ) -> Features:
        """cls [B, D], registers [B, R, D] and patches [B, D, h, w], float32 on the CPU.

        The whole image is seen: nothing is cropped. It is resized as floats (bilinear, antialiased)
        and normalised with the statistics of the weights.

        Args:
            images: paths, Pillow images, tensors [C, H, W] (uint8, or float in [0, 1]), or a tensor
                [B, C, H, W]. EXIF rotation is applied, transparency laid over white. A large JPEG
                is decoded at a fraction, both sides above 1024, unless more is asked for.
            size: pixels of the shorter side, the longer one keeps the proportions; or (height,
                width). Sides are rounded to whole patches, so proportions change by up to half a
                patch.
            batch_size: images that go through the model at once.

        Raises:
            UnreadableImage: a file that is missing or no image.
            ValueError: anything else than images, or several that differ in size after resizing.
        """
        several = _several(images)
        if not several or batch_size < 1:
            counts = f"{len(several)} and {batch_size}"
            raise ValueError(f"images, batch_size: expected at least one each, got {counts}")
        batches = [several[i : i + batch_size] for i in range(0, len(several), batch_size)]
        sizes: set[tuple[int, ...]] = set()
        parts = []
        for batch in batches:
            pixels = [self.pixels(image, size) for image in batch]
            sizes |= {tuple(image.shape[1:]) for image in pixels}
            if len(sizes) > 1:
                shown = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
                raise ValueError(
                    f"images: expected one size after resizing, got {shown}; pass size=(height, "
                    "width), or take them one by one"
                )
            parts.append(self.encode(torch.stack(pixels)))
        return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def pixels(self, image: ImageLike, size: int | tuple[int, int]) -> Tensor:
        """One image as the model is to see it before normalisation: float [C, H, W] in [0, 1]."""
        sides = _sides(size)
        planes = self._planes(image, sides)
        channels = self.model.in_channels
        if planes.ndim != 3 or len(planes) != channels or not planes.numel():
            raise ValueError(
                f"images: expected [{channels}, H, W] with at least one pixel, got "
                f"{list(planes.shape)}; this model has {channels} channels"
            )
        height, width = planes.shape[1:]
        fitted = _fitted(height, width, sides, self.model.patch_size)
        return stretched(checked_pixels(planes)[None], fitted)[0]

    def encode(self, pixels: Tensor) -> Features:
        """Features of pixels [B, C, H, W], sides whole patches, as float32 on the CPU."""
        return Features(*(tensor.cpu() for tensor in self.encoder(pixels)))

    def _planes(self, image: ImageLike, sides: tuple[int, ...]) -> Tensor:
        """[C, H, W], uint8 or float, with the pixels that these sides need."""
        if isinstance(image, Tensor):
            return image.cpu()
        if isinstance(image, Image.Image):
            return to_planes(_upright(image, getattr(image, "filename", "") or "image"))
        if not isinstance(image, str | os.PathLike):
            raise ValueError(
                "images: expected paths, Pillow images or tensors [C, H, W], got "
                f"{type(image).__name__}; torch.from_numpy makes a tensor of an array"
            )
        path = os.path.expanduser(image)
        if max(sides) > DRAFT_SIDE and self.model.in_channels == 3:
            return to_planes(decode_rgb(path, path, draft=False))
        return to_planes(PixelFormat(self.model.in_channels).decode(path, path))


def stretched(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Float pixels [B, C, H, W] at another size (height, width), bilinear and antialiased.

    This is the transform of the weights; evaluations have one of their own, `views.resized`.
    """
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def open_device(name: str | torch.device, option: str = "device") -> torch.device:
    """The device of that name, once it has answered; auto: the GPU where there is one.

    Raises:
        ValueError: no such device here; the message begins with `option`.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(
            f"{option}: expected one that is here (auto, cpu, cuda), got {str(name)!r}",
        ) from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """RGB, turned as EXIF says; it is decoded here if it was only opened before."""
    try:
        return to_rgb(ImageOps.exif_transpose(image), name)
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, f"{error}") from error


def _several(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images)
    if isinstance(images, Sequence) and not isinstance(images, str):
        return list(images)
    return [images]


def _sides(size: int | tuple[int, int]) -> tuple[int, ...]:
    """(shorter side,) or (height, width)."""
    if type(size) is int:
        sides: tuple[int, ...] = (size,)
    else:
        sides = tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else ()
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(
            f"size: expected pixels of the shorter side or (height, width), got {size!r}",
        )
    return sides


def _fitted(height: int, width: int, sides: tuple[int, ...], patch: int) -> tuple[int, int]:
    """The sides to resize an image to: whole patches, at least one each."""
    if len(sides) == 2:
        wanted: tuple[float, ...] = sides
    else:
        shorter = min(height, width)
        wanted = (sides[0] * height / shorter, sides[0] * width / shorter)
    # Half a patch counts as one: round() would take every second half down.
    rows, columns = (max(1, int(side / patch + 0.5)) for side in wanted)
    if rows * columns > MOST_PATCHES:
        raise ValueError(
            f"size: expected at most {MOST_PATCHES:,} patches of {patch} px, got {rows} x "
            f"{columns} for an image of {height} x {width}; pass a smaller size, or (height, width)"
        )
    return rows * patch, columns * patch
