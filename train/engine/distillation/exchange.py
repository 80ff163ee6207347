"""Who loads and who trains on which image of a step, and the way of its rows between them.

Images of a step have numbers from 0, rank-major as published. Every process loads a contiguous part
of them, and every student sees all of them: its process k trains on the k-th part of as many equal
ones as it has processes. Only what a process needs and did not load itself comes to it, in one
all-to-all for each kind of rows. Where nobody needs anything of another process, as with one
student on all of them, nothing is sent and nothing is copied.

Masked patches are a few of all patches, so they are asked for: the process that trains on an image
drew its masks and sends them to the one that loaded it, which answers with these patches alone.

Shapes: b images that this process loaded and B that it trains on, n views of an image, P patches of
a view, M masked patches of its views of B images, R patches that anybody asks of those it loaded, E
width of a row. Rows are crop-major: view c of image i is row c * B + i.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3core.data.crops import CropSettings
from dinov3core.data.loader import shares
from dinov3core.data.masks import MaskSettings, masked_total
from dinov3core.data.sizes import pair
from dinov3core.train.engine.parallel import World

Kind = Literal["global crops", "local crops", "class rows", "patch rows", "row requests"]
Ranks = tuple[int, int]  # of processes: the first, and the one past the last


@dataclass(frozen=True)
class Plan:
    """Who loads which images of a step, and who trains on which.

    Args:
        loaded: how many images each process loads.
        ranges: of processes, each with students of its own; none is in two, none in none.

    Raises:
        ValueError: for ranges or numbers of which that cannot be said.
    """

    loaded: tuple[int, ...]
    ranges: tuple[Ranks, ...]

    def __post_init__(self) -> None:
        members = sorted(rank for first, past in self.ranges for rank in range(first, past))
        if members != list(range(len(self.loaded))):
            raise ValueError(
                f"expected every one of {len(self.loaded)} processes in one range, got "
                f"{list(self.ranges)}"
            )
        if any(self.images % _length(ranks) for ranks in self.ranges):
            raise ValueError(
                f"expected images that divide among the processes of each range, got {self.images} "
                f"for {list(self.ranges)}"
            )

    @classmethod
    def even(cls, processes: int, ranges: Sequence[Ranks], images: int) -> Self:
        """The plan in which loads differ by one image at most, the larger ones first.

        Args:
            ranges: of the students; those of several students may be the same.
            images: of a step.
        """
        loaded = tuple(len(share) for share in shares(images, processes))
        return cls(loaded, tuple(dict.fromkeys(ranges)))

    @property
    def processes(self) -> int:
        return len(self.loaded)

    @property
    def images(self) -> int:
        """Of a step: each is loaded once and trained on in every range."""
        return sum(self.loaded)

    def loads(self, rank: int) -> range:
        """The numbers of the images that a process loads."""
        first = sum(self.loaded[:rank])
        return range(first, first + self.loaded[rank])

    def range_of(self, rank: int) -> Ranks:
        """The range that a process is in."""
        return next(ranks for ranks in self.ranges if rank in range(*ranks))

    def trains_on(self, rank: int) -> range:
        """The numbers of the images that a process trains on."""
        ranks = self.range_of(rank)
        share = self.images // _length(ranks)
        first = (rank - ranks[0]) * share
        return range(first, first + share)

    def moved(self, source: int, destination: int) -> range:
        """The numbers of the images that one process loads and another, or itself, trains on."""
        loads = self.loads(source)
        needs = self.trains_on(destination)
        first = max(loads.start, needs.start)
        return range(first, max(first, min(loads.stop, needs.stop)))

    def sends(self, rank: int) -> list[int]:
        """How many images of those a process loads each process trains on."""
        return [len(self.moved(rank, other)) for other in range(self.processes)]

    def receives(self, rank: int) -> list[int]:
        """How many images of those a process trains on each process loads."""
        return [len(self.moved(other, rank)) for other in range(self.processes)]

    @property
    def moves(self) -> bool:
        """Whether any process trains on another's images."""
        return any(self.loads(rank) != self.trains_on(rank) for rank in range(self.processes))

    def in_words(self) -> str:
        """Who loads how many images, for people."""
        loads = Counter(self.loaded).items()
        shares = ", ".join(f"{count} by each of {ranks}" for count, ranks in loads)
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        return f"{self.images} images a step, loaded by {processes}: {shares}; none is dropped"


def _length(ranks: Ranks) -> int:
    first, past = ranks
    return past - first


class Asked(NamedTuple):
    """Patches on demand: which a process has to give, and which it gets."""

    rows: Tensor  # int64 [R] among the n * b * P patches it loaded, ascending: asked by anybody
    outgoing: Tensor  # int64, places in `rows`, in the order they are sent
    sends: list[int]  # how many to each process
    receives: list[int]  # how many from each process
    incoming: Tensor  # int64 [M], at which place what it asked for comes in


class Exchange:
    """Rows of images on their way, on one process; every process calls the same in the same order.

    Attributes:
        sent, received: bytes to and from other processes so far, by kind.

    Args:
        plan: of all processes.
        world: all of them, with this one among them.
    """

    def __init__(self, plan: Plan, world: World):
        self.plan = plan
        self.world = world
        self.sent: Counter[Kind] = Counter()
        self.received: Counter[Kind] = Counter()
        self._sends = plan.sends(world.rank)
        self._receives = plan.receives(world.rank)
        self._loaded = len(plan.loads(world.rank))
        self._trained = len(plan.trains_on(world.rank))

    def views(self, kind: Kind, views: Tensor, count: int) -> Tensor:
        """What belongs to views, of the images that this process trains on.

        Args:
            views: [n * b, ...] of the images it loaded; a device of the process group's.
            count: n.

        Returns:
            [n * B, ...]; `views` itself where nothing moves.
        """
        if not self.plan.moves or not count:
            return views
        by_image = _by_image(views, count, self._loaded)
        outgoing = torch.cat([by_image[part] for part in self._parts()])
        return _by_view(self._all_to_all(kind, outgoing, self._sends, self._receives))

    def ask(self, masks: Tensor) -> Asked:
        """Tell those who loaded this process's images which patches it needs; hear the same.

        Args:
            masks: bool [n * B, P] of the images it trains on, True: needed; in host memory.
        """
        count = len(masks) // self._trained
        needed = _by_image(masks, count, self._trained)
        heard = needed
        if self.plan.moves:
            words = needed.contiguous().view(torch.uint8).to(self.world.device)
            heard = self._all_to_all("row requests", words, self._receives, self._sends)
            heard = heard.cpu().view(torch.bool)
        asked_by = heard.split(self._sends)

        # [b, n, P]: what anybody asks for, and at which place it stands among those rows.
        asked = masks.new_zeros(self._loaded, *needed.shape[1:])
        for part, of_one in zip(self._parts(), asked_by, strict=True):
            asked[part] |= of_one
        places = _numbered(asked.transpose(0, 1)).transpose(0, 1)
        outgoing = [places[part][one] for part, one in zip(self._parts(), asked_by, strict=True)]

        # Rows come in image after image, and are wanted view after view.
        by_view = needed.transpose(0, 1)
        incoming = _numbered(needed).transpose(0, 1)[by_view]
        device = self.world.device
        return Asked(
            asked.transpose(0, 1).flatten().nonzero()[:, 0].to(device),
            torch.cat(outgoing).to(device),
            [len(places) for places in outgoing],
            [int(part.sum()) for part in needed.split(self._receives)],
            incoming.to(device),
        )

    def answer(self, rows: Tensor, asked: Asked) -> Tensor:
        """The rows of the masked patches that this process trains on.

        Args:
            rows: [R, E] of the patches that are asked of it.

        Returns:
            [M, E], in the order of the masks; `rows` itself where nothing moves.
        """
        if not self.plan.moves:
            return rows
        outgoing = rows.index_select(0, asked.outgoing)
        incoming = self._all_to_all("patch rows", outgoing, asked.sends, asked.receives)
        return incoming.index_select(0, asked.incoming)

    def _parts(self) -> Iterator[slice]:
        """Which of the images it loaded each process trains on."""
        loads = self.plan.loads(self.world.rank)
        for other in range(self.plan.processes):
            moved = self.plan.moved(self.world.rank, other)
            yield slice(moved.start - loads.start, moved.stop - loads.start)

    def _all_to_all(
        self, kind: Kind, rows: Tensor, sends: Sequence[int], receives: Sequence[int]
    ) -> Tensor:
        """Send the next so many of `rows` to each process, and receive so many from each."""
        rows = rows.contiguous()
        incoming = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(incoming, rows, list(receives), list(sends))

        rank = self.world.rank
        row_bytes = rows[:1].numel() * rows.element_size() if len(rows) else 0
        self.sent[kind] += (sum(sends) - sends[rank]) * row_bytes
        row_bytes = incoming[:1].numel() * incoming.element_size() if len(incoming) else 0
        self.received[kind] += (sum(receives) - receives[rank]) * row_bytes
        return incoming


def _by_image(views: Tensor, count: int, images: int) -> Tensor:
    """[n * images, ...] as [images, n, ...]."""
    return views.unflatten(0, (count, images)).transpose(0, 1)


def _by_view(images: Tensor) -> Tensor:
    """[images, n, ...] as [n * images, ...]."""
    return images.transpose(0, 1).flatten(0, 1)


def _numbered(flags: Tensor) -> Tensor:
    """For every True of a bool tensor, how many come before it; of the others nothing is said."""
    return (flags.flatten().cumsum(0) - 1).view(flags.shape)


# --- what travels, in figures


@dataclass(frozen=True)
class ImageBytes:
    """What there is to send of an image.

    Args:
        global_crops, local_crops, class_rows: bytes of all of them.
        patch_row: bytes of the row of one patch.
        global_count, patches: n and P of its global crops.
        masks: by which patches are chosen.
    """

    global_crops: int
    local_crops: int
    class_rows: int
    patch_row: int
    global_count: int
    patches: int
    masks: MaskSettings

    @classmethod
    def of(
        cls,
        crops: CropSettings,
        patch_size: int,
        masks: MaskSettings,
        widths: tuple[int, int],
        dtype: torch.dtype,
    ) -> Self:
        """By the settings of a run.

        Args:
            patch_size: of the global crops as they are sent.
            widths: of the bottlenecks of the teacher's two heads, DINO first.
            dtype: of what is sent.
        """
        height, width = pair(crops.global_size)
        of_cls, of_patches = (each * dtype.itemsize for each in widths)
        number_bytes = len(crops.mean) * dtype.itemsize
        return cls(
            global_crops=crops.global_count * height * width * number_bytes,
            local_crops=crops.local_count * math.prod(pair(crops.local_size)) * number_bytes,
            class_rows=crops.global_count * of_cls,
            patch_row=of_patches,
            global_count=crops.global_count,
            patches=(height // patch_size) * (width // patch_size),
            masks=masks,
        )


def received_bytes(plan: Plan, rank: int, image: ImageBytes) -> dict[Kind, float]:
    """What a process receives from others in a step, by kind.

    Exact but for patch rows: of these it is the mean over draws of masks, which put the more and
    the less masked crops on images that it loaded itself or did not.
    """
    share = len(plan.trains_on(rank))
    own = len(plan.moved(rank, rank))
    foreign = share - own
    masked = masked_total(image.global_count * share, image.patches, image.masks)
    asked = sum(plan.sends(rank)) - own
    return {
        "global crops": foreign * image.global_crops,
        "local crops": foreign * image.local_crops,
        "class rows": foreign * image.class_rows,
        "patch rows": masked * image.patch_row * foreign / share,
        "row requests": asked * image.global_count * image.patches,
    }


def published_bytes(plan: Plan, image: ImageBytes) -> dict[Kind, int]:
    """What every process receives by the published exchange: everything, by all-gathers.

    There, every process loads as many images as the one that loads most, and the surplus is dropped
    after it was sent; and all patches are sent, of which masks choose later.
    """
    loaded = plan.processes * math.ceil(plan.images / plan.processes)
    return {
        "global crops": loaded * image.global_crops,
        "local crops": loaded * image.local_crops,
        "class rows": loaded * image.class_rows,
        "patch rows": loaded * image.global_count * image.patches * image.patch_row,
    }
