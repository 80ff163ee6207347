"""Images that a run could not use as they are: skipped as unreadable, or enlarged to a crop."""

from typing import NamedTuple

import torch

from dinov3core.data.batch import Batch
from dinov3core.train.engine.parallel import World

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

    def count(self, batch: Batch) -> None:
        """Add those of a batch."""
        self.skipped += len(batch.skipped)
        self.enlarged += batch.upsampled
        for name in batch.skipped:
            if name not in self.names and len(self.names) < MAX_NAMES:
                self.names.append(name)

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
