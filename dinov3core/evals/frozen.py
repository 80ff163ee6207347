"""The one way a frozen backbone is run over images: pixels in, float32 features out.

Evaluations, the extract command, `dinov3core.load`, pictures and the looks of a training run all go
through `FrozenEncoder`: device, number types, normalisation, eval mode without gradients, and the
training flags afterwards are decided here.

Shapes: N images, B of them at once, C channels, D width, R registers, h x w patches.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.data.pixels import checked_pixels
from dinov3core.evals.backbones import known_statistics
from dinov3core.image_statistics import ImageStatistics
from dinov3core.models import Features


class Embeddings(NamedTuple):
    """One vector per image, in two ways: the CLS token and the mean patch; float32 on the CPU."""

    cls: Tensor  # [N, D]
    patch_mean: Tensor  # [N, D'], of another width where patches have one


class FrozenEncoder:
    """A backbone without gradients; between calls its training flags are as they were.

    Args:
        backbone: already on `device`; see `dinov3core.evals.backbones.FeatureExtractor`.
        device: where pixels go.
        autocast_dtype: of `torch.autocast`; None runs the backbone in its own number type.
        statistics: of the images it was trained on; None: those it states itself.

    Raises:
        ValueError: no image statistics.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
        statistics: ImageStatistics | None = None,
    ):
        self.backbone = backbone
        self.device = torch.device(device)
        self.autocast_dtype = autocast_dtype
        self.statistics = known_statistics(backbone) if statistics is None else statistics

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; both sides of every image are multiples of it."""
        return self.backbone.patch_size

    def __call__(self, pixels_BCHW: Tensor, **options: Any) -> Features:
        """Features of a stack of images, float32 on the backbone's device.

        Args:
            pixels_BCHW: uint8, or float in [0, 1].
            options: for `backbone.features`.

        Raises:
            ValueError: floats beyond [0, 1], or another number of channels than the statistics.
        """
        inputs = self.inputs(pixels_BCHW)
        with self.running():
            features = self.backbone.features(inputs, **options)
        return Features(*(tensor.float() for tensor in features))

    def finite(self, pixels_BCHW: Tensor, **options: Any) -> Features:
        """What a call gives, with a ValueError when it holds NaN or infinity."""
        features = self(pixels_BCHW, **options)
        if not (features.patches.isfinite().all() and features.cls.isfinite().all()):
            raise ValueError(
                "features: expected finite values, got NaN or infinity; the backbone has diverged"
            )
        return features

    def embed(self, images: Tensor | Iterable[Tensor], *, batch_size: int = 64) -> Embeddings:
        """Vectors of images [N, C, H, W], or of an iterable of [C, H, W], of one size."""
        batches = [self.vectors(batch) for batch in _batches(images, batch_size)]
        return Embeddings(*(torch.cat(column) for column in zip(*batches)))

    def vectors(self, pixels_BCHW: Tensor) -> Embeddings:
        """Vectors of images that go through the backbone at once."""
        features = self(pixels_BCHW)
        return Embeddings(features.cls.cpu(), features.patches.mean((2, 3)).cpu())

    def patches(self, images: Tensor | Iterable[Tensor], *, batch_size: int = 16) -> Tensor:
        """Patch maps [N, D, h, w], float32 on the CPU, of images of one size."""
        return torch.cat([self(batch).patches.cpu() for batch in _batches(images, batch_size)])

    def inputs(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels on the device: what the backbone is given.

        uint8 is moved before it becomes four times as large.
        """
        return self.statistics.normalise(checked_pixels(pixels_BCHW.to(self.device)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Eval mode, no gradients and this encoder's number type, for anything run on `inputs`."""
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )
        with frozen(self.backbone), autocast:
            yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode without gradients; every submodule gets its own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in flags:
            module.training = training


def check_rows(features: Tensor, name: str) -> None:
    """Refuse vectors [N, D] with NaN or infinity, with a ValueError that counts them."""
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"{name}: {broken} of {len(features)} rows hold NaN or infinity; the model that made "
            "them has diverged"
        )


def _batches(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stacks of at most `batch_size` images [B, C, H, W]."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images):
            raise ValueError(
                f"images: expected a stack [N, C, H, W] with N >= 1, got {list(images.shape)}"
            )
        yield from images.split(batch_size)
        return
    remaining = iter(images)
    count = 0
    while batch := list(itertools.islice(remaining, batch_size)):
        shapes = {tuple(image.shape) for image in batch}
        if len(shapes) > 1:
            raise ValueError(
                f"images: expected one size, got {sorted(shapes)}; crop them alike, e.g. with "
                "central_view()"
            )
        count += len(batch)
        yield torch.stack(batch)
    if not count:
        raise ValueError(
            "images: expected at least one image, got none; check that the source is not empty"
        )
