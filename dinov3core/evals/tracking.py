"""Video object segmentation without training: are the same things alike in the next frame?

The masks of the first frame are carried from frame to frame by the similarity of frozen patches
(Jabri et al. 2020, "Space-time correspondence as a contrastive random walk"; Caron et al. 2021,
DINO), with the context of DINOv3: the first frame always, and a queue of the last ones. Scores are
those of Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for video object
segmentation": J, the overlap of regions, and F, the agreement of their boundaries. Published sides
are 480 to 960 pixels; scores of smaller frames are lower and no published number.

Shapes: T frames, H x W pixels, h x w patches, D width, O labels (background first), n frames of
context.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.labelled import IGNORE, Video, VideoSource
from dinov3core.data.progress import progress
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import evenly
from dinov3core.evals.views import float_planes, resized
from dinov3core.evals.windows import resolve_side

Enlarge = Literal["nearest", "bilinear"]

PROTOCOL = (
    "Frozen patches of the last layer after the final norm, unit norm, nothing trained. Labels of "
    "the first frame and of a queue of frames vote for the most similar patches within a circle; "
    "shares enlarged to pixels, each label stretched to 0..1, the largest taken. Scored: every "
    "frame after the first (DAVIS 2017 leaves out the last one too), without pixels of no object "
    "(255); means over objects."
)

TILE = 8  # target patches a side that share one product with their neighbourhood
BOUND = 0.008  # boundary pixels match within this share of the diagonal (Perazzi et al. 2016)
RECALLED = 0.5  # recall: share of frames that score above


class VideoScores(NamedTuple):
    """Scores of every object of a video in percent: means over the frames after the first."""

    j: list[float]
    j_recall: list[float]
    f: list[float]
    f_recall: list[float]


@dataclass(frozen=True)
class Propagation:
    """How labels travel from patch to patch and become pixels.

    Args:
        queue: frames of context beside the first.
        radius: how far a patch looks around its own place, in patches.
        neighbours: most similar patches of the whole context that vote, by softmax(cosine /
            temperature).
        enlarge: from patches to pixels; nearest as published, bilinear for smoother boundaries.

    Raises:
        ValueError: values out of range.
    """

    queue: int = 7
    radius: float = 12.0
    neighbours: int = 5
    temperature: float = 0.2
    enlarge: Enlarge = "nearest"

    def __post_init__(self):
        if (
            self.queue < 0
            or self.radius < 0
            or self.neighbours < 1
            or self.temperature <= 0
            or self.enlarge not in get_args(Enlarge)
        ):
            raise ValueError(
                "tracking: expected queue and radius of at least 0, neighbours of at least 1, a "
                f"positive temperature and enlarge of {get_args(Enlarge)}, got {self}"
            )


def tracking(
    backbone: nn.Module,
    videos: VideoSource,
    *,
    propagation: Propagation = Propagation(),
    side: int | None = None,
    frames: int | None = None,
    count: int | None = None,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Propagate the first masks of every video and report J and F.

    Args:
        propagation: of the labels.
        side: the shorter side of resized frames; None: that of the first video, on the patch grid,
            at most 512. The longer one is rounded up to the patch grid.
        frames, count: at most so many first frames of a video, and so many videos, evenly spread;
            None: all.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        `j_and_f`, `j`, `f`, `j_recall`, `f_recall` in percent, means over all objects of all
        videos; `videos` by name with their mean `j` and `f`; `unreadable` videos, and the
        `protocol`.

    Raises:
        DataError: a video of one frame, without an object in the first, or with masks of another
            number or size.
        ValueError: settings out of range, or features that are not finite.
    """
    if frames is not None and frames < 2:
        raise ValueError(f"frames: expected at least 2, the first being given, got {frames}")
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast_dtype)
    scores: dict[str, VideoScores] = {}
    indices = evenly(len(videos), count)
    unreadable = 0
    for index in progress(indices, desc="tracking", unit="video"):
        try:
            video = _checked(videos.load(index), frames)
        except UnreadableImage:
            unreadable += 1
            continue
        side = resolve_side(side, video.frames[0], encoder.patch_size)
        scores[video.name] = _track(encoder, video, side, propagation)
    if not scores:
        raise DataError(
            f"tracking: expected at least one readable video, got {len(indices)} of which none can "
            "be read"
        )

    means = {
        key: _mean([value for video in scores.values() for value in getattr(video, key)])
        for key in VideoScores._fields
    }
    return {
        "j_and_f": (means["j"] + means["f"]) / 2,
        **means,
        "objects": sum(len(video.j) for video in scores.values()),
        "videos": {
            name: {"j": _mean(video.j), "f": _mean(video.f)} for name, video in scores.items()
        },
        "unreadable": unreadable,
        "protocol": {
            "text": PROTOCOL,
            "side": side,
            **asdict(propagation),
            "frames": frames,
            "count": len(scores),
        },
    }


def propagate(
    features: Iterator[Tensor], first: Tensor, propagation: Propagation
) -> Iterator[Tensor]:
    """Label shares [h, w, O] of every frame after the first.

    Args:
        features: unit-norm patches [h, w, D] of each frame, taken as they are needed.
        first: label shares [h, w, O] of the first frame.
    """
    anchor = (next(features), first)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=propagation.queue)
    for patches in features:
        keys, labels = (torch.stack(column) for column in zip(anchor, *recent))
        shares = vote(patches, keys, labels, propagation)
        recent.append((patches, shares))
        yield shares


def vote(target: Tensor, keys: Tensor, labels: Tensor, propagation: Propagation) -> Tensor:
    """Label shares [h, w, O] of target patches [h, w, D] by their most similar keys.

    The similarity of all patches with all of the context is never held: a tile of `TILE` x `TILE`
    targets meets the rectangle around it, cut to circles.

    Args:
        keys: patches of the context, [n, h, w, D].
        labels: their label shares, [n, h, w, O].
    """
    height, width = target.shape[:2]
    shares = labels.new_zeros(height, width, labels.shape[3])
    reach = int(propagation.radius)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            # The tile, and the rectangle within whose rows and columns its circles lie.
            tile = slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))
            rows = torch.arange(max(0, top - reach), min(height, tile[0].stop + reach))
            columns = torch.arange(max(0, left - reach), min(width, tile[1].stop + reach))
            around = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

            # Which of its places each target of the tile can see: [targets, places].
            down = torch.arange(tile[0].start, tile[0].stop)[:, None] - rows
            across = torch.arange(tile[1].start, tile[1].stop)[:, None] - columns
            squared = down[:, None, :, None] ** 2 + across[None, :, None, :] ** 2
            near = (squared <= propagation.radius**2).flatten(2).flatten(0, 1).to(target.device)

            queries = target[tile].flatten(0, 1)
            candidates = keys[:, around[0], around[1]].flatten(1, 2)
            cosines = torch.einsum("qd,npd->qnp", queries, candidates)
            cosines = cosines.masked_fill(~near[:, None], -torch.inf).flatten(1)
            count = min(propagation.neighbours, cosines.shape[1])
            best, places = cosines.topk(count, dim=1)
            weights = (best / propagation.temperature).softmax(1)
            votes = labels[:, around[0], around[1]].flatten(0, 2)[places]
            shares[tile] = torch.einsum("qk,qko->qo", weights, votes).view(*shares[tile].shape)
    return shares


def region_similarity(predicted: Tensor, truth: Tensor) -> float:
    """J: intersection over union of two boolean masks [H, W]; two empty masks agree."""
    union = (predicted | truth).sum().item()
    return (predicted & truth).sum().item() / union if union else 1.0


def boundary_accuracy(predicted: Tensor, truth: Tensor) -> float:
    """F: harmonic mean of precision and recall of the boundary pixels of two boolean masks [H, W].

    A boundary pixel counts as right when the other boundary passes within `BOUND` of the diagonal,
    at least 1 pixel.
    """
    height, width = truth.shape
    reach = math.ceil(BOUND * math.hypot(height, width))
    lines = boundary(predicted), boundary(truth)
    guessed, true = (line.sum().item() for line in lines)
    if not guessed or not true:
        return float(guessed == true)
    near_guessed, near_true = (_thickened(line, reach) for line in lines)
    precision = (lines[0] & near_true).sum().item() / guessed
    recall = (lines[1] & near_guessed).sum().item() / true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Tensor) -> Tensor:
    """Pixels of a boolean mask [H, W] that differ from one to the right, below or diagonally."""
    padded = F.pad(mask[None].float(), (0, 1, 0, 1), mode="replicate")[0].bool()
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def _thickened(line: Tensor, reach: int) -> Tensor:
    """All pixels within `reach` of a set one, Euclidean; cost grows with the few set pixels."""
    offsets = torch.arange(-reach, reach + 1, device=line.device)
    disk = (offsets[:, None] ** 2 + offsets**2 <= reach**2).nonzero()
    # Places in the disk run from 0 to 2 reach: the shift that the padding of `thick` makes.
    places = (line.nonzero()[:, None] + disk).flatten(0, 1)
    thick = line.new_zeros(line.shape[0] + 2 * reach, line.shape[1] + 2 * reach)
    thick[places[:, 0], places[:, 1]] = True
    return thick[reach : reach + line.shape[0], reach : reach + line.shape[1]]


def _track(
    encoder: FrozenEncoder, video: Video, side: int, propagation: Propagation
) -> VideoScores:
    height, width = video.masks[0].shape
    size = _frame_size(height, width, side, encoder.patch_size)
    ids = _objects(video)
    first = video.masks[0]
    background = ~torch.isin(first, torch.tensor(ids))
    masks = torch.stack([background, *(first == number for number in ids)])

    def features() -> Iterator[Tensor]:
        for frame in progress(video.frames, desc=video.name, unit="frame"):
            patches = encoder.finite(resized(float_planes(frame), size)[None]).patches[0]
            yield F.normalize(patches, dim=0).permute(1, 2, 0)

    stream = features()
    start = next(stream)
    grid = tuple(start.shape[:2])
    shares = F.interpolate(masks[None].float(), size=grid, mode="area")[0].permute(1, 2, 0)
    followed = propagate(_chained(start, stream), shares.to(encoder.device), propagation)

    scores: list[list[tuple[float, float]]] = []
    for labels, mask in zip(followed, video.masks[1:], strict=True):
        predicted = pixel_labels(labels, (height, width), propagation.enlarge).cpu()
        known = mask != IGNORE
        pairs = [
            ((predicted == place) & known, mask == number)
            for place, number in enumerate(ids, start=1)
        ]
        scores.append([(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs])
    table = torch.tensor(scores, dtype=torch.float64)  # [frames, objects, 2]
    means = 100 * table.mean(0)
    recalled = 100 * (table > RECALLED).double().mean(0)
    columns = (means[:, 0], recalled[:, 0], means[:, 1], recalled[:, 1])
    return VideoScores(*(column.tolist() for column in columns))


def _frame_size(height: int, width: int, side: int, patch_size: int) -> tuple[int, int]:
    """(height, width) of resized frames: the shorter one `side`, the longer rounded up."""
    scale = side / min(height, width)
    tall, wide = (
        math.ceil(round(length * scale) / patch_size) * patch_size for length in (height, width)
    )
    return tall, wide


def pixel_labels(labels: Tensor, size: tuple[int, int], enlarge: Enlarge) -> Tensor:
    """The label of every pixel, int64 [H, W], from label shares [h, w, O] of patches.

    Shares are enlarged, each label's stretched to 0 .. 1, and the largest one is taken. A label
    that is nowhere stays at 0, so that a lost object does not come back as noise.
    """
    mode = "nearest-exact" if enlarge == "nearest" else enlarge
    maps = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode=mode)[0]
    low = maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    shares = (maps - low) / (high - low).clamp_min(1e-12)
    return torch.where(high > low, shares, (high > 0).to(maps)).argmax(0)


def _chained(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _objects(video: Video) -> list[int]:
    """Numbers of the objects in the first mask."""
    return [number for number in video.masks[0].unique().tolist() if number not in (0, IGNORE)]


def _checked(video: Video, frames: int | None) -> Video:
    """The first frames of a video whose masks belong to it."""
    if len(video.frames) != len(video.masks):
        raise DataError(
            f"{video.name}: expected a mask for each of {len(video.frames)} frames, got "
            f"{len(video.masks)} masks"
        )
    video = video._replace(frames=video.frames[:frames], masks=video.masks[:frames])
    if len(video.frames) < 2:
        raise DataError(
            f"{video.name}: expected at least 2 frames, got {len(video.frames)}; nothing can be "
            "followed"
        )
    sizes = [(frame.height, frame.width) for frame in video.frames]
    for number, (size, mask) in enumerate(zip(sizes, video.masks)):
        if tuple(mask.shape) != size or size != sizes[0]:
            raise DataError(
                f"{video.name}: expected frames and masks of one size {list(sizes[0])}, got frame "
                f"{number} of {list(size)} with a mask of {list(mask.shape)}"
            )
    if not _objects(video):
        raise DataError(f"{video.name}: expected an object in the first mask, got background alone")
    return video


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
