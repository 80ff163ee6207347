"""Images that a run could not use as they are: skipped as unreadable, or enlarged to a crop."""

from typing import NamedTuple

import torch

from dinov3core.data.batch import Batch
from dinov3core.train.engine.parallel import World

FIRST_BATCHES = 10  # after so many a run says whether its images are large enough
MAX_NAMES = 1000  # of images that could not be read


class ImageTotals(NamedTuple):
    """Over all processes, since the run began."""

    skipped: int
    enlarged: int
    names: list[str]  # "name: reason" of the skipped ones, in order, MAX_NAMES at most


class ImageTally:
    """Counts images of this process's batches."""

    def __init__(self, world: World):
        self.world = world
        self.skipped = 0
        self.enlarged = 0
        self.names: list[str] = []
        self.batches = 0  # since this process began
        self.images = 0  # in them
        self.small = 0  # of these, smaller than a crop
        self.largest = (0, 0, "")  # height and width of the largest crop, and for whom it is

    def count(self, batch: Batch) -> None:
        """Add those of a batch."""
        self.batches += 1
        self.images += batch.images
        self.small += batch.upsampled
        self.largest = max(self.largest, (*batch.global_crops.shape[-2:], ""))
        if batch.gram_crops is not None:
            gram = (*batch.gram_crops.shape[-2:], " for the Gram teacher")
            self.largest = max(self.largest, gram)
        self.skipped += len(batch.skipped)
        self.enlarged += batch.upsampled
        for name in batch.skipped:
            if name not in self.names and len(self.names) < MAX_NAMES:
                self.names.append(name)

    def small_images(self) -> str:
        """After FIRST_BATCHES batches, how many images are too small for their crops.

        Empty when none is, and at any other time.
        """
        if self.batches != FIRST_BATCHES or not self.small:
            return ""
        height, width, whose = self.largest
        return (
            f"{self.small} of the first {self.images} images are smaller than the crops cut from "
            f"them, of up to {height} x {width} px{whose}: they are enlarged, which adds no "
            "detail; give larger images, or make --crops.global-size or --gram.crop-size smaller"
        )

    def resume(self, earlier: ImageTotals) -> None:
        """Go on from a checkpoint: the main process carries what all of them had counted."""
        if self.world.is_main:
            self.skipped, self.enlarged, self.names = earlier

    def totals(self) -> ImageTotals:
        """Of all processes, each of which has to call this."""
        mine = torch.tensor([self.skipped, self.enlarged], device=self.world.device)
        skipped, enlarged = self.world.total(mine).tolist()
        names = sorted(set(self.world.gather_texts(self.names)))
        return ImageTotals(skipped, enlarged, names[:MAX_NAMES])
