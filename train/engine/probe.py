"""What a run looks at while it trains: its own images, and labelled ones when they are named.

Patches, RankMe and drift are those of the training images; k-NN needs classes, the dense scores
masks, and both are measured on named images alone. Shapes: N images, C channels, H x W pixels.
"""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov3core.data.datasets import DataOptions, open_labelled, open_segmented
from dinov3core.data.errors import DataError
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import Labelled
from dinov3core.data.progress import progress
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import pair
from dinov3core.evals.backbones import pixel_features
from dinov3core.evals.differences import Measured
from dinov3core.evals.knn import knn_accuracy, standard_error
from dinov3core.evals.patch_classes import PatchClasses
from dinov3core.evals.reading import read_views
from dinov3core.image_statistics import ImageStatistics
from dinov3core.printable import printable
from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.config import FROM_PYTHON, Pretrain

NEIGHBOURS = 20
ASKED = 6  # training images whose neighbours are sought among the others


class ImageSets(NamedTuple):
    """In words for page, summary and terminal: which images, how many, from where."""

    trained: str
    shown: str  # patches, RankMe, drift
    neighbours: str  # whose neighbours are shown, and among which images
    knn: str  # what k-NN is measured on, or how to have it measured
    dense: str  # the same of the dense scores


class Probe:
    """Images decoded once to the evaluation size, [N, C, H, W].

    Attributes:
        statistics: that the run normalises its crops by.
        views, view_labels: for patches, RankMe and drift: a seeded even sample of the training
            images, or, when training on the built-in scenes, held-out ones.
        queries, query_labels, bank, bank_labels: whose neighbours are sought, and where. With a
            named probe its two splits; else a few views and the others (none for a single image),
            and the labels are None.
        classes: of the named probe; 0 without one.
        masked: images with masks for the dense scores; None without.
        sets: all of it in words.

    Args:
        recipe: the run.
        source: the training images.

    Raises:
        DataError: a probe that is not there or has no classes, images with masks that are not there
            or have none, or images none of which can be read.
    """

    def __init__(self, recipe: Pretrain, source: ImageSource):
        self.statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
        named = _named(recipe, source)
        held_out = (
            named is not None and isinstance(source, Scenes) and isinstance(named.test, Scenes)
        )
        self.bank_labels: Tensor | None = None
        self.query_labels: Tensor | None = None
        self.view_labels: Tensor | None = None
        if named is not None:
            self.bank, self.bank_labels = _labelled(named.train, recipe.data.probe_bank, recipe)
            self.queries, self.query_labels = _labelled(
                named.test, recipe.data.probe_queries, recipe
            )
        if held_out:
            self.views = self.queries
            self.view_labels = self.query_labels
        else:
            self.views = _training_views(source, recipe)
        if named is None:
            asked = min(ASKED, -(-len(self.views) // 2))
            self.queries = self.views[:asked]
            self.bank = self.views[asked:]
        self.classes = 0 if named is None else len(named.class_names)
        self.neighbours = min(NEIGHBOURS, len(self.bank))
        self.masked = _masked(recipe, source)
        self.sets = self._sets(recipe, source, held_out)

    @property
    def chance(self) -> float | None:
        """Percent of right answers when a class is named at random; None without classes."""
        return 100 / self.classes if self.classes else None

    def knn(self, bank: Tensor, queries: Tensor) -> Measured | None:
        """Top-1 accuracy in percent, from features of both; None without labels."""
        if self.bank_labels is None:
            return None
        accuracy = knn_accuracy(
            bank, self.bank_labels, queries, self.query_labels, k=(self.neighbours,)
        )
        percent = accuracy.top1[self.neighbours]
        return Measured(percent, standard_error(percent, len(queries)))

    def pixels(self) -> Measured | None:
        """k-NN on raw pixels: what no learning gives."""
        if self.bank_labels is None:
            return None
        return self.knn(pixel_features(self.bank), pixel_features(self.queries))

    def _sets(self, recipe: Pretrain, source: ImageSource, held_out: bool) -> ImageSets:
        origin = _origin(recipe, source)
        total = len(source)
        bank = f"{len(self.bank):,} others"
        trained = (
            f"{total:,} built-in scenes"
            if isinstance(source, Scenes)
            else f"{_images(total)} {origin}"
        )
        shown = f"{len(self.views):,} of the {total:,} training images {origin}, not held out"
        if held_out:
            shown = f"{len(self.views):,} held-out built-in scenes"
        if self.bank_labels is None:
            asked = (
                f"{_images(len(self.queries))} {origin}, not held out, each compared with {bank}"
            )
            knn = _measuring_command(recipe)
            return ImageSets(trained, shown, asked, knn, self._dense(recipe))
        neighbours = f"{_probe_words(recipe, len(self.queries))}, each compared with {bank}"
        classes = f"{self.classes} classes, chance {self.chance:.1f} %"
        knn = f"{self.neighbours}-NN, {neighbours}; {classes}"
        return ImageSets(trained, shown, neighbours, knn, self._dense(recipe))

    def _dense(self, recipe: Pretrain) -> str:
        """What the dense scores are and measured on, or how to have them measured."""
        if self.masked is None:
            return _measuring_dense(recipe)
        learned = len(self.masked.train.pixels)
        tested = len(self.masked.test.pixels)
        images = f"images with masks of {printable(recipe.data.dense)}"
        if recipe.data.dense in ("auto", "scenes"):
            images = "held-out built-in scenes"
        return (
            f"{learned + tested:,} {images}, {len(self.masked.class_names)} classes. Patch "
            "agreement: how often two patches of one class are more alike than two of different "
            "classes of the image, 50 % by chance. Linear segmentation: mean IoU on "
            f"{tested:,} of them, of a linear rule in closed form, learned from the masks of the "
            f"other {learned:,}"
        )


def _chosen(name: str, source: ImageSource) -> str:
    """What a field that names images stands for."""
    if name == "auto":
        return "scenes" if isinstance(source, Scenes) else "none"
    return name


def _named(recipe: Pretrain, source: ImageSource) -> Labelled | None:
    """The labelled images `data.probe` stands for, None for none."""
    data = recipe.data
    probe = _chosen(data.probe, source)
    if probe == "none":
        return None
    if probe == "scenes":
        # Those of train/evaluate.py, whatever the seed of the run: its k-NN is the same number.
        sizes = {"scenes_train": data.probe_bank, "scenes_test": data.probe_queries}
        side = min(pair(recipe.crops.global_size))
        return open_labelled("scenes", DataOptions(**sizes, scene_size=side))
    options = DataOptions(
        channels=recipe.backbone.in_channels, channel_scale=data.channel_scale, seed=recipe.run.seed
    )
    try:
        return open_labelled(probe, options)
    except DataError as error:
        raise DataError(f"data.probe: {error}; or leave it at auto, without k-NN") from error


def _masked(recipe: Pretrain, source: ImageSource) -> PatchClasses | None:
    """The images with masks that `data.dense` stands for, at the evaluation size; None for none."""
    name = _chosen(recipe.data.dense, source)
    if name == "none":
        return None
    side = min(pair(recipe.crops.global_size))
    images = recipe.data.dense_images
    options = DataOptions(scenes_train=images, scenes_test=images, scene_size=side)
    try:
        return PatchClasses(open_segmented(name, options), side, images)
    except DataError as error:
        raise DataError(f"data.dense: {error}; or set it to none") from error


def _labelled(source: ImageSource, limit: int, recipe: Pretrain) -> tuple[Tensor, Tensor]:
    """Up to `limit` images and their labels, evenly, as folders are ordered by class."""
    rows = torch.linspace(0, len(source) - 1, min(limit, len(source))).long().tolist()
    images, readable = _decoded(source, rows, recipe, "data.probe")
    return images, torch.tensor([source.label(row) for row in readable])


def _training_views(source: ImageSource, recipe: Pretrain) -> Tensor:
    """Up to `data.probe_queries` training images: one of every stretch of the source, shuffled."""
    count = min(recipe.data.probe_queries, len(source))
    rng = np.random.default_rng((recipe.run.seed, count))
    ends = [len(source) * place // count for place in range(count + 1)]
    rows = [int(rng.integers(low, high)) for low, high in itertools.pairwise(ends)]
    return _decoded(source, rng.permutation(rows).tolist(), recipe, "data.source")[0]


def _decoded(
    source: ImageSource, rows: Sequence[int], recipe: Pretrain, field: str
) -> tuple[Tensor, list[int]]:
    """The readable ones of `rows` at the evaluation size, and which they are."""
    crop = min(pair(recipe.crops.global_size))
    resize = crop if isinstance(source, Scenes) else round(crop * 256 / 224)
    bar = progress(rows, desc=f"reading {field}", unit="image")
    views = read_views(source, bar, resize=resize, crop=crop)
    if not views.pixels:
        reason = views.unreadable[-1] if views.unreadable else "it is empty"
        raise DataError(
            f"{field}: none of {len(rows)} images looked at can be read, such as {reason}; is this "
            "the right place?"
        )
    return torch.stack(views.pixels), views.indices


def _origin(recipe: Pretrain, source: ImageSource) -> str:
    if isinstance(source, Scenes):
        return "that are built in"
    given = recipe.data.source
    if given.startswith(FROM_PYTHON):
        return f"of a {printable(given.removeprefix(FROM_PYTHON))} given in Python"
    return f"in {printable(given)}"


def _probe_words(recipe: Pretrain, count: int) -> str:
    """The images k-NN classifies; "held out" is said where it is known."""
    probe = recipe.data.probe
    if probe in ("auto", "scenes"):
        return f"{count:,} held-out built-in scenes"
    words = f"{count:,} test images of {printable(probe)}"
    trained, asked = (Path(path).expanduser().resolve() for path in (recipe.data.source, probe))
    if asked == trained or trained in asked.parents:
        words += " (inside the training folder, so not held out)"
    return words


def _measuring_command(recipe: Pretrain) -> str:
    """What to say of k-NN that was not measured."""
    step = _naming_command(recipe, "data.probe")
    return (
        f"not measured, as no labelled images were named; to have it measured: {step}, "
        "with images in FOLDER/train/<class>/ and FOLDER/val/<class>/"
    )


def _measuring_dense(recipe: Pretrain) -> str:
    """What to say of dense scores that were not measured."""
    step = _naming_command(recipe, "data.dense")
    return (
        f"not measured, as no images with masks were named; to have it measured: {step}, "
        "with images in FOLDER/images/ and masks in FOLDER/masks/"
    )


def _naming_command(recipe: Pretrain, field: str) -> str:
    """How to give a field the name of a folder."""
    if recipe.data.source.startswith(FROM_PYTHON):
        return f'set {field} to "FOLDER" in the recipe'
    return f"{command_of(recipe)} --{field} FOLDER"


def command_of(recipe: Pretrain) -> str:
    """A command that trains this recipe on the same files; options may follow."""
    source = shlex.quote(printable(recipe.data.source))
    command = as_called("python train/pretrain.py")
    return f"{command} {recipe.name} --data.source {source}"


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
