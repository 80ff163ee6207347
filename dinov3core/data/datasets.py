"""Labelled data for the evaluations: `scenes`, a folder, tar shards, or an .npz file.

Folders and shards may hold, for classification, `train/<class>/image` and `val|test/<class>/image`,
or `<class>/image`, which is split by a seed; for the other tasks see `pairs` and `videos`.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov3core.data.arrays import open_arrays
from dinov3core.data.decode import PixelFormat
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import suffix_of
from dinov3core.data.images import LISTS, FileSource, ImageSource, open_source
from dinov3core.data.labelled import (
    IGNORE,
    Labelled,
    Ranged,
    Segmented,
    VideoSource,
    check_labelled,
    numbered_classes,
    split_by_class,
)
from dinov3core.data.pairs import (
    IMAGE_FOLDERS,
    TARGET_FOLDERS,
    Kind,
    PairNames,
    ScenePairs,
    TargetFormat,
    TreePairs,
    class_names_of,
    pair_names,
    sides,
)
from dinov3core.data.scenes import CLASS_NAMES, Scenes
from dinov3core.data.trees import Tree, TreeFiles, by_split, stem
from dinov3core.data.videos import SceneVideos, TreeVideos

HELD_OUT = 20_000_000  # index of the first scene; training never comes this far
SCENE_SIZE = 64
TEST_SHARE = 0.2  # of data that come in one part


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read, beyond where it is."""

    channels: int = 3
    """of the images; 3 reads RGB, another number .npy, .tif and .png arrays"""
    channel_scale: float = 0.0
    """array value that becomes 1; 0: the largest of the number type"""
    scenes_train: int = 3600
    """number of built-in images to learn from"""
    scenes_test: int = 1200
    """number of built-in images to report on"""
    scene_size: int = 0
    """their side in pixels; 0: 64, or in train/evaluate.py what the backbone sees"""
    scene_videos: int = 8
    """number of built-in videos"""
    first_class: int = 0
    """mask values below this are ignored and the others count from it: 1 for ADE20K, where 0 is no
    class
    """
    depth_scale: float = 1000.0
    """what integer depths are divided by to be metres"""
    seed: int = 0
    """of the built-in images, and of the split of data that come in one part"""

    @property
    def pixels(self) -> PixelFormat:
        """How its files become pixels."""
        return PixelFormat(self.channels, self.channel_scale or None)


def open_labelled(spec: str | Path, options: DataOptions = DataOptions()) -> Labelled:
    """Images with classes, to learn from and to report on.

    Raises:
        DataError: nothing there, another layout, an empty split, one class only, labels that do not
            match.
    """
    data = _labelled(spec, options)
    check_labelled(data)
    return data


def open_segmented(spec: str | Path, options: DataOptions = DataOptions()) -> Segmented:
    """Images with a class per pixel; raises DataError like `open_labelled`."""
    if str(spec) == "scenes":
        train, test = (ScenePairs(scenes, "masks") for scenes in _scenes(options))
        return Segmented(train, test, ("background", *CLASS_NAMES))
    tree = _tree(spec, "segmentation")
    train, test = _pairs(tree, "masks", options)
    names = class_names_of(tree, train, options.first_class)
    if len(names) > IGNORE:
        raise DataError(
            f"{spec}: expected at most {IGNORE} classes, as {IGNORE} means none, got {len(names)}"
        )
    return Segmented(train.with_classes(len(names)), test.with_classes(len(names)), names)


def open_ranged(spec: str | Path, options: DataOptions = DataOptions()) -> Ranged:
    """Images with metres per pixel; raises DataError like `open_labelled`."""
    if str(spec) == "scenes":
        return Ranged(*(ScenePairs(scenes, "depths") for scenes in _scenes(options)))
    data = Ranged(*_pairs(_tree(spec, "depth"), "depths", options))
    with contextlib.suppress(UnreadableImage):
        data.train.load(0)  # masks are refused now and not in the middle
    return data


def open_videos(spec: str | Path, options: DataOptions = DataOptions()) -> VideoSource:
    """Videos with masks; raises DataError like `open_labelled`."""
    if str(spec) == "scenes":
        return SceneVideos(
            options.scene_videos, seed=options.seed, size=2 * (options.scene_size or SCENE_SIZE)
        )
    return TreeVideos(_tree(spec, "tracking"))


def open_any(
    spec: str | Path, options: DataOptions = DataOptions()
) -> Labelled | Segmented | Ranged | ImageSource:
    """Whatever images are there, for tasks that use labels where there are some.

    Images in none of the layouts are a plain source; a .txt or .csv list of paths will do as well.

    Raises:
        DataError: no images.
    """
    if str(spec).endswith(LISTS):
        return open_source(spec, options.pixels)
    for opener in (open_labelled, open_segmented, open_ranged):
        with contextlib.suppress(DataError):
            return opener(spec, options)
    if str(spec).endswith(".npz"):
        return open_labelled(spec, options)  # for its sentence
    tree = Tree(spec)
    targets = {
        name for folders in TARGET_FOLDERS.values() for name in sides(tree, folders)[1].values()
    }
    names = [name for name in _images_of(tree, options) if name not in targets]
    if not names:
        raise DataError(f"{spec}: expected images of {options.channels} channels, found none")
    return FileSource(TreeFiles(tree, names), options.pixels)


def _labelled(spec: str | Path, options: DataOptions) -> Labelled:
    if str(spec) == "scenes":
        return Labelled(*_scenes(options), CLASS_NAMES)
    if str(spec).endswith(".npz"):
        return Labelled(*open_arrays(Path(os.path.expanduser(spec)), options.pixels.scale))
    tree = Tree(spec)
    names = _images_of(tree, options)
    _refuse_pairs(names, tree)
    needs = "train/<class>/image and val/<class>/image, or <class>/image"
    train, test = by_split(
        names, tree.root, needs, lambda name: name.count("/") > 1 or tree.label(name) is not None
    )
    if train:
        classes, labels = _classes(tree, train + test, depth=1)
        _refuse_strangers(tree, labels, classes, len(train))
        parts = [(train, labels[: len(train)]), (test, labels[len(train) :])]
    else:
        classes, labels = _classes(tree, names, depth=0)
        rows_of_parts = split_by_class(labels, TEST_SHARE, options.seed)
        parts = [([names[row] for row in rows], labels[rows]) for rows in rows_of_parts]
    train_images, test_images = (
        FileSource(TreeFiles(tree, *part), options.pixels, classes) for part in parts
    )
    return Labelled(train_images, test_images, classes)


def _images_of(tree: Tree, options: DataOptions) -> list[str]:
    return [name for name in tree.names if suffix_of(name) in options.pixels.suffixes]


def _scenes(options: DataOptions) -> tuple[Scenes, Scenes]:
    settings = {"seed": options.seed, "size": options.scene_size or SCENE_SIZE}
    train = Scenes(options.scenes_train, offset=HELD_OUT, **settings)
    return train, Scenes(options.scenes_test, offset=HELD_OUT + options.scenes_train, **settings)


def _tree(spec: str | Path, task: str) -> Tree:
    if str(spec).endswith(".npz"):
        raise DataError(
            f"{spec}: an .npz holds classes of images only; {task} expects a folder or .tar of "
            "images and masks"
        )
    return Tree(spec)


def _pairs(tree: Tree, kind: Kind, options: DataOptions) -> tuple[TreePairs, TreePairs]:
    names = pair_names(tree, kind)
    train, test = by_split(
        [pair.key for pair in names], tree.root, "train and val|test folders, or neither"
    )
    if not train:
        parts = _split_pairs(names, tree.root, options.seed)
    else:
        parts = [[pair for pair in names if pair.key in keys] for keys in (set(train), set(test))]
    targets = TargetFormat(kind, options.first_class, options.depth_scale)
    train_pairs, test_pairs = (TreePairs(tree, part, targets) for part in parts)
    return train_pairs, test_pairs


def _split_pairs(names: Sequence[PairNames], root: str, seed: int) -> list[list[PairNames]]:
    """A part to learn from and a part to report on, by a seed.

    Whole folders go to either where there are several: they may be frames of a film.
    """
    folders = [pair.key.rpartition("/")[0] for pair in names]
    groups = folders if len(set(folders)) > 1 else [pair.key for pair in names]
    order = np.random.default_rng(seed).permutation(sorted(set(groups)))
    held_out = set(order[: max(1, round(TEST_SHARE * len(order)))].tolist())

    train = [pair for pair, group in zip(names, groups) if group not in held_out]
    test = [pair for pair, group in zip(names, groups) if group in held_out]
    if not train:
        raise DataError(
            f"{root}: expected at least two images with targets to split, got {len(names)}"
        )
    return [train, test]


def _refuse_pairs(names: Sequence[str], tree: Tree) -> None:
    """Masks beside images are a data set for another task, also where some have no partner."""
    stems = [stem(name) for name in names]
    folders = {part.lower() for name in names for part in name.split("/")[:-1]}
    paired = folders.intersection(IMAGE_FOLDERS) and any(
        map(folders.intersection, TARGET_FOLDERS.values())
    )
    if len(stems) - len(set(stems)) > len(stems) / 4 or paired:
        raise DataError(
            f"{tree.root}: holds images with masks; expected images in class folders for "
            "classification"
        )


def _classes(tree: Tree, names: Sequence[str], depth: int) -> tuple[list[str], np.ndarray]:
    """Class names and the number of every image.

    They come from .cls members of shards, else from the folder at `depth`.
    """
    numbers = [tree.label(name) for name in names]
    if names and all(number is not None for number in numbers):
        labels = np.asarray(numbers, np.int64)
        return numbered_classes(labels, tree.root), labels
    folders = [name.split("/")[depth] if name.count("/") > depth else None for name in names]
    if None in folders:
        raise DataError(
            f"{tree.root}: {names[folders.index(None)]} is in no class folder; expected "
            "train/<class>/image and val/<class>/image, or <class>/image"
        )
    classes, labels = np.unique(np.asarray(folders, str), return_inverse=True)
    return classes.tolist(), labels.astype(np.int64)


def _refuse_strangers(tree: Tree, labels: np.ndarray, classes: Sequence[str], train: int) -> None:
    strangers = np.setdiff1d(labels[train:], labels[:train])
    if len(strangers):
        raise DataError(
            f"{tree.root}: the labels do not match: class {classes[strangers[0]]} is in the test "
            f"split and not in train ({len(strangers)} such classes); use the same class folders "
            "in both"
        )
