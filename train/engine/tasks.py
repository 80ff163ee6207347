"""Judge a frozen backbone by tasks of `dinov3core.evals`, in a training run or after it.

Under several processes the features of whole images are computed by all; the rest is the first
one's work.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dinov3core import evals
from dinov3core.data.datasets import (
    DataOptions,
    open_any,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.errors import DataError
from dinov3core.data.identity import data_identity
from dinov3core.data.images import ImageSource
from dinov3core.evals.backbones import FeatureExtractor, fingerprint
from dinov3core.evals.cache import Embedder, joined, read_embedded, write_embedded
from dinov3core.evals.dense_head import DenseSettings
from dinov3core.evals.reading import measured_statistics
from dinov3core.train.engine.parallel import World

OPENERS: dict[str, Callable[..., Any]] = {
    "knn": open_labelled,
    "linear": open_labelled,
    "logreg": open_labelled,
    "segmentation": open_segmented,
    "depth": open_ranged,
    "tracking": open_videos,
    "correspondence": open_any,
    "resolution": open_any,
    "dense": open_any,
}
ON_IMAGES = ("knn", "linear", "logreg")  # one vector per image: the features are cached
# The fields of `Settings` that every task uses. It is given no others.
USES: dict[str, tuple[str, ...]] = {
    "knn": ("size", "autocast"),
    "linear": ("size", "autocast", "iterations", "seed"),
    "logreg": ("size", "autocast", "penalties", "seed"),
    "segmentation": ("side", "autocast", "iterations", "train_images", "test_images", "seed"),
    "depth": ("side", "autocast", "iterations", "train_images", "test_images", "seed"),
    "tracking": ("side", "autocast", "test_images"),
    "correspondence": ("side", "autocast", "test_images", "seed"),
    "resolution": ("side", "autocast", "train_images", "test_images"),
    "dense": ("side", "autocast", "test_images"),
}
# The fields of `DataOptions` that every reader uses: for the built-in scenes, for files.
_SCENES = ("scenes_train", "scenes_test", "scene_size", "seed")
_IMAGES = ("channels", "channel_scale", "seed")
READS: dict[Callable[..., Any], tuple[tuple[str, ...], tuple[str, ...]]] = {
    open_labelled: (_SCENES, _IMAGES),
    open_segmented: (_SCENES, ("first_class", "seed")),
    open_ranged: (_SCENES, ("depth_scale", "seed")),
    open_videos: (("scene_videos", "scene_size", "seed"), ()),
    open_any: (_SCENES, (*_IMAGES, "first_class", "depth_scale")),
}
# Tasks whose arguments are fields of one value, with its defaults.
_HEADS: dict[str, DenseSettings] = {"segmentation": evals.SEGMENTATION, "depth": evals.DEPTH}
# What the limit of test images is called in tasks without a test split.
_LIMITS = {"tracking": "count", "correspondence": "images", "dense": "images"}
AS_IT_IS = DataOptions()


@dataclass(frozen=True)
class Settings:
    """How a backbone is judged; the protocols are the tasks' own."""

    size: int = 0
    """pixels of the square that knn, linear and logreg see; 0: the crops of the run the model comes
    from, else 64 for scenes and 224 for photos, on the patch grid"""
    side: int = 0
    """shorter side of images in dense tasks; 0: as stored, at most 512"""
    iterations: int = 0
    """of linear (12,500), segmentation and depth (2,000) heads; 0: these"""
    penalties: int = 45
    """values of C that logreg tries"""
    train_images: int = 0
    """of segmentation, depth and resolution at most; 0: all, or the task's own limit"""
    test_images: int = 0
    """of segmentation, depth, resolution, correspondence and dense at most, of tracking the number
    of videos; 0: all, or the task's own limit"""
    batch_size: int = 64
    """images at once through the backbone, for knn, linear and logreg"""
    workers: int = 4
    """threads that read images"""
    autocast: bool = False
    """run the backbone in bfloat16"""
    seed: int = 0
    """of heads and held-out parts"""


def evaluate(
    backbone: nn.Module,
    data: str | Path,
    tasks: Sequence[str] = ON_IMAGES,
    settings: Settings = Settings(),
    options: DataOptions = AS_IT_IS,
    *,
    crop_size: int = 0,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
    begun: Callable[[Callable[[str], dict]], None] = lambda _: None,
    done: Callable[[dict[str, dict]], None] = lambda _: None,
) -> dict[str, dict]:
    """Run tasks on a frozen backbone, whose training flags are as before afterwards.

    Args:
        backbone: see `dinov3core.evals.backbones.FeatureExtractor`; already on `device`. Without
            statistics it is given those of the training images.
        data: see `dinov3core.data.datasets`; `options` say how they are read.
        crop_size: what `settings.size` 0 stands for, when the backbone is known to be trained on
            such crops.
        cache: folder for features; None: they are forgotten in the end.
        world: processes that share the work of computing features; only the first one returns
            results.
        begun: called once the data are open, with a function that tells what a task is judged with.
        done: called with the result of each task as soon as it is there.

    Returns:
        By task what the function of that name in `dinov3core.evals` returns, with `seconds` and
        `judged`: digests of the weights and of the data, and the settings and reading options which
        that task uses. Where the data lack what the task needs, {"error": sentence} instead.

    Raises:
        ValueError: an unknown task, or a module that is no backbone.
    """
    check_tasks(tasks)
    if not isinstance(backbone, FeatureExtractor):
        raise ValueError(
            "backbone: expected a module with features(images), patch_size and statistics, got "
            f"{type(backbone).__name__}; wrap it in one that has them"
        )
    world = world or World(0, 1, torch.device(device))
    settings, options = resolved(settings, options, backbone, str(data), crop_size)
    outcomes: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = _Plan(backbone, data, settings, options, folder, world)
        for task in tasks:
            outcomes[task] = _timed(lambda task=task: plan.open(task))
        if world.is_main and tasks:
            begun(plan.judged)
        # What processes share comes first: nobody waits for a task that one of them runs.
        for task in tasks:
            _go_on(outcomes, task, plan.prepare)
        for task in tasks if world.is_main else ():
            _go_on(outcomes, task, plan.run)
            outcomes[task]["judged"] = plan.judged(task)
            done({task: outcomes[task]})
    return outcomes if world.is_main else {}


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse unknown tasks with a ValueError."""
    unknown = [task for task in tasks if task not in OPENERS]
    if unknown:
        raise ValueError(f"tasks: expected some of {', '.join(OPENERS)}, got {', '.join(unknown)}")


def resolved(
    settings: Settings, options: DataOptions, backbone: nn.Module, data: str, crop_size: int = 0
) -> tuple[Settings, DataOptions]:
    """Both with the sizes of images in place of 0."""
    size = settings.size or crop_size or (64 if data == "scenes" else 224)
    if not settings.size:
        size = max(1, size // backbone.patch_size) * backbone.patch_size
    scene_size = options.scene_size or size
    return replace(settings, size=size), replace(options, scene_size=scene_size)


class _Plan:
    """Tasks on one backbone and one data set, which is opened once for each kind of label."""

    def __init__(
        self,
        backbone: nn.Module,
        data: str | Path,
        settings: Settings,
        options: DataOptions,
        cache: Path,
        world: World,
    ):
        self.backbone = backbone
        self.data = data
        self.settings = settings
        self.options = options
        self.cache = cache
        self.world = world
        self.device = str(world.device)
        self.autocast_dtype = torch.bfloat16 if settings.autocast else None
        self._opened: dict[Callable[..., Any], Any] = {}

    @cached_property
    def digest(self) -> str:
        """Of the weights and all that features depend on, the image statistics among it."""
        return fingerprint(self.backbone)

    @cached_property
    def data_digest(self) -> str | None:
        """None where there are no data."""
        try:
            return data_identity(self.data)
        except DataError:
            return None

    def judged(self, task: str) -> dict:
        """All that the result of a task depends on, the code aside."""
        of_scenes, of_files = READS[OPENERS[task]]
        used = of_scenes if str(self.data) == "scenes" else of_files
        return {
            "weights": self.digest,
            "data": {"path": str(self.data), "digest": self.data_digest},
            "settings": {name: getattr(self.settings, name) for name in USES[task]},
            "read": {name: getattr(self.options, name) for name in used},
        }

    def open(self, task: str) -> dict:
        """Open the data of a task; a backbone without image statistics is given theirs."""
        opened = self._open(task)
        if self.backbone.statistics is None and OPENERS[task] is not open_videos:
            self.backbone.statistics = measured_statistics(getattr(opened, "train", opened))
        return {}

    def prepare(self, task: str) -> dict:
        """All processes together compute features for tasks that read one vector per image."""
        if task in ON_IMAGES:
            opened = self._open(task)
            for source in (opened.train, opened.test):
                fill(self.world, self._embedder(task), self.backbone, source)
        return {}

    def run(self, task: str) -> dict:
        """The result of a prepared task."""
        function = getattr(evals, task)
        opened = self._open(task)
        arguments = _arguments(task, self.judged(task)["settings"])
        if task in ON_IMAGES:
            return function(self.backbone, opened, embedder=self._embedder(task), **arguments)
        running = {"device": self.device, "autocast_dtype": self.autocast_dtype}
        return function(self.backbone, opened, **arguments, **running)

    def _open(self, task: str) -> Any:
        opener = OPENERS[task]
        if opener not in self._opened:
            self._opened[opener] = opener(self.data, self.options)
        return self._opened[opener]

    def _embedder(self, task: str) -> Embedder:
        """How a task sees images: the central 7/8 of the shorter side, or all of it.

        Logistic regression sees all of it, and so do all tasks of the built-in scenes.
        """
        size = self.settings.size
        whole = task == "logreg" or str(self.data) == "scenes"
        return Embedder(
            size=size,
            resize=size if whole else round(size * 256 / 224),
            device=self.device,
            batch_size=self.settings.batch_size,
            autocast_dtype=self.autocast_dtype,
            workers=self.settings.workers,
            cache=self.cache,
            digest=self.digest,
            shown=self.world.is_main,
        )


def _go_on(outcomes: dict[str, dict], task: str, work: Callable[[str], dict]) -> None:
    """The next step of a task that has not failed; its seconds add up."""
    if "error" in outcomes[task]:
        return
    seconds = outcomes[task]["seconds"]
    outcomes[task] = _timed(lambda: work(task))
    outcomes[task]["seconds"] = round(outcomes[task]["seconds"] + seconds, 2)


def _timed(work: Callable[[], dict]) -> dict:
    """What `work` returns, or the sentence it refuses with, and the seconds it took."""
    started = time.perf_counter()
    try:
        outcome = work()
    except (ValueError, ImportError) as error:  # DataError is a ValueError
        outcome = {"error": str(error)}
    return outcome | {"seconds": round(time.perf_counter() - started, 2)}


def fill(world: World, embedder: Embedder, backbone: nn.Module, source: ImageSource) -> None:
    """Have the features of `source` in the cache, each process computing its share of the images.

    Raises:
        what `Embedder` raises, on every process alike.
    """
    place = embedder.place(backbone, source)
    cached = read_embedded(place) is not None
    if bool(world.all_true(torch.tensor(cached, device=world.device))):
        return
    rows = range(world.rank, len(source), world.size)
    part = embedder.compute(backbone, source, rows)
    parts = [part]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, part)
    whole = joined(parts)  # on every process, so that all refuse broken features together
    if world.is_main:
        write_embedded(whole, place)
    world.barrier()


def _arguments(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The task's own arguments; a 0 leaves its default. Size and autocast go another way."""
    given = {name: value for name, value in settings.items() if value}
    given = {name: value for name, value in given.items() if name not in ("size", "autocast")}
    if task in _HEADS:
        return {"settings": replace(_HEADS[task], **given)}
    if "test_images" in given:
        given[_LIMITS.get(task, "test_images")] = given.pop("test_images")
    if task == "correspondence" and "seed" in given:
        given["warp"] = evals.Warp(seed=given.pop("seed"))
    if "penalties" in given:
        grid = torch.logspace(-6, 5, given["penalties"], dtype=torch.float64)
        given["penalties"] = grid.tolist()
    return given
