"""Mean and deviation of the pixels that weights were trained on, and the one way to apply them.

Any room may import this file: crops are cut with these numbers, models carry them, evaluations
apply them. It imports none of the rooms.
"""

from typing import NamedTuple

from torch import Tensor


class ImageStatistics(NamedTuple):
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels [..., C, H, W] in [0, 1] to model inputs.

        Raises:
            ValueError: when the channel counts differ.
        """
        if pixels.shape[-3] != len(self.mean):
            raise ValueError(
                f"pixels: expected {len(self.mean)} channels as in the statistics, got "
                f"{pixels.shape[-3]}; set model.statistics to those of your data"
            )
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in self)
        return (pixels - mean) / std


# DINOv3 model card: web images (LVD-1689M) and satellite tiles (SAT-493M).
IMAGENET = ImageStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SATELLITE = ImageStatistics((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
NAMED_STATISTICS = {"imagenet": IMAGENET, "satellite": SATELLITE}
