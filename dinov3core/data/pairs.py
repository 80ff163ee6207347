"""Images with a mask or a depth map: built-in scenes, or files of a folder or shards.

Layouts: `train/a.jpg` with `train/a.png`; `images/train/a.jpg` with `masks/train/a.png` (also
`annotations`, `labels`, for depth `depth`, `depths`); `train/images/a.jpg` with
`train/masks/a.png`; or any of these without the split. A mask is a single-channel or palette PNG of
class numbers, 255 for none, with optional names in `classes.json` at the root ({"classes": [...]}).
Depth is a 16-bit PNG or a .npy array.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3core.data.decode import ARRAY_BYTES, check_size, opened_image, read_npy, to_rgb
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.files import suffix_of
from dinov3core.data.labelled import IGNORE, Pair
from dinov3core.data.progress import progress
from dinov3core.data.scenes import Scenes
from dinov3core.data.trees import Tree, is_image, stem

Kind = Literal["masks", "depths"]
MAX_NUMBER = 65_535  # in a mask
IMAGE_FOLDERS = ("images", "image", "jpegimages")
TARGET_FOLDERS = {
    "masks": ("masks", "mask", "annotations", "labels"),
    "depths": ("depths", "depth"),
}
TARGET_SUFFIXES = (".png", ".npy")  # of a target beside its image
_EXPECTED = {
    "masks": "images/ and masks/, or a .png mask beside every .jpg",
    "depths": "images/ and depth/, or a .png or .npy depth beside every .jpg",
}


class PairNames(NamedTuple):
    """An image and its target in a tree; `key` is what both have in common."""

    key: str
    image: str
    target: str


class ScenePairs:
    """Built-in scenes with the class of every pixel (0 background), or its depth."""

    def __init__(self, scenes: Scenes, kind: Kind):
        self._scenes = scenes
        self._kind = kind

    def __len__(self) -> int:
        return len(self._scenes)

    def load(self, index: int) -> Pair:
        drawn = self._scenes.render([index])
        target = drawn.masks[0].astype(np.int64) if self._kind == "masks" else drawn.depths[0]
        return Pair(Image.fromarray(drawn.images[0]), torch.from_numpy(target))

    def name(self, index: int) -> str:
        return self._scenes.name(index)


@dataclass(frozen=True)
class TargetFormat:
    """How the files of targets become numbers."""

    kind: Kind
    first_class: int = 0
    """mask values below this are ignored and the others count from it"""
    depth_scale: float = 1000.0
    """what integer depths are divided by to be metres"""
    classes: int | None = None
    """of masks, above which they are refused; None: any number"""


class TreePairs:
    """Pairs of a tree as a source."""

    def __init__(self, tree: Tree, names: Sequence[PairNames], targets: TargetFormat):
        self._tree = tree
        self._names = list(names)
        self._targets = targets

    @property
    def files(self) -> Sequence[str]:
        return self._tree.files

    def with_classes(self, count: int) -> "TreePairs":
        """The same pairs; masks with higher numbers are refused when they are loaded."""
        return TreePairs(self._tree, self._names, replace(self._targets, classes=count))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._tree.full(self._names[index].image)

    def load(self, index: int) -> Pair:
        pair = self._names[index]
        image = read_image(self._tree, pair.image)
        target = self.target(index)
        if (image.height, image.width) != tuple(target.shape):
            raise DataError(
                f"{self._tree.full(pair.target)}: expected the size of its image, {image.height} x "
                f"{image.width}, got {target.shape[0]} x {target.shape[1]}; store both at one size"
            )
        return Pair(image, target)

    def target(self, index: int) -> Tensor:
        """The mask or depth alone, [H, W]."""
        name = self._names[index].target
        targets = self._targets
        if targets.kind == "depths":
            return read_depth(self._tree, name, targets.depth_scale)

        mask = read_mask(self._tree, name)
        if targets.first_class:
            ignored = (mask < targets.first_class) | (mask == IGNORE)
            mask = torch.where(ignored, IGNORE, mask - targets.first_class)
        highest = _highest_class(mask)
        if targets.classes is not None and highest >= targets.classes:
            raise DataError(
                f"{self._tree.full(name)}: the labels do not match: expected classes 0 to "
                f"{targets.classes - 1} and {IGNORE} for none, got {highest}"
            )
        return mask


def pair_names(tree: Tree, kind: Kind) -> list[PairNames]:
    """Every image of a tree with its target, by key.

    Raises:
        DataError: no targets, or images and targets that do not belong together.
    """
    images, targets = sides(tree, TARGET_FOLDERS[kind])
    if not images or not targets:
        raise DataError(
            f"{tree.root}: found {len(images)} images and {len(targets)} {kind}; expected "
            f"{_EXPECTED[kind]}"
        )
    alone = sorted(images.keys() ^ targets.keys())
    if alone:
        side = f"image without {kind[:-1]}" if alone[0] in images else f"{kind[:-1]} without image"
        raise DataError(
            f"{tree.root}: {len(alone)} files have no partner, such as {alone[0]} ({side}); "
            "expected the same names on both sides"
        )
    return [PairNames(key, images[key], targets[key]) for key in sorted(images)]


def sides(tree: Tree, target_folders: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names of images and of targets by key.

    A key is the name without its suffix and without the folder that tells the side.
    """
    files = [name for name in tree.names if is_image(name)]
    stems_of_pairs = _shared_stems(files)
    telling = {*IMAGE_FOLDERS, *target_folders}
    images: dict[str, str] = {}
    targets: dict[str, str] = {}
    for name in files:
        *folders, last = stem(name).split("/")
        depth = next((i for i, folder in enumerate(folders) if folder.lower() in telling), None)
        if depth is not None:
            side = images if folders[depth].lower() in IMAGE_FOLDERS else targets
            side["/".join([*folders[:depth], *folders[depth + 1 :], last])] = name
        elif stem(name) in stems_of_pairs:
            side = targets if suffix_of(name) in TARGET_SUFFIXES else images
            side[stem(name)] = name
    return images, targets


def class_names_of(tree: Tree, train: TreePairs, first_class: int) -> list[str]:
    """Names from classes.json, or else numbers up to the highest in the masks of the train split.

    Without names, all of these masks are read.
    """
    text = tree.text("classes.json")
    if text is not None:
        return _named_classes(text, tree.root)
    highest = -1
    for index in progress(range(len(train)), desc="classes in masks", unit="mask"):
        try:
            mask = train.target(index)
        except UnreadableImage:  # counted where it is used
            continue
        highest = max(highest, _highest_class(mask))
        if highest >= IGNORE:
            break  # more classes than there can be
    if highest < 1:
        raise DataError(
            f"{tree.root}: the masks of the train split hold {highest + 1} classes; expected two "
            "or more"
        )
    return [f"class {number + first_class}" for number in range(highest + 1)]


def _highest_class(mask: Tensor) -> int:
    """-1 for a mask of no class at all."""
    return int(torch.where(mask == IGNORE, -1, mask).max())


def _named_classes(text: str, root: str) -> list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        expected = '{"classes": ["name", ...]}'
        raise DataError(f"{root}: classes.json: expected {expected}, got {text[:60]!r}")
    return [str(name) for name in names]


def read_image(tree: Tree, name: str) -> Image.Image:
    """RGB as stored, pixel for pixel.

    It is neither turned upright nor decoded at a fraction, as its mask is not.
    """
    with opened_image(tree.open(name), tree.full(name)) as image:
        image.load()
        return to_rgb(image, tree.full(name))


def read_mask(tree: Tree, name: str) -> Tensor:
    """Class numbers int64 [H, W] of a palette or single-channel image, from 0 to `MAX_NUMBER`.

    Raises:
        UnreadableImage: broken; DataError: colours or other values instead of numbers.
    """
    numbers = _mask_values(tree, name)
    lowest = int(numbers.min())
    highest = int(numbers.max())
    if lowest < 0 or highest > MAX_NUMBER:
        raise DataError(
            f"{tree.full(name)}: expected class numbers from 0 to {MAX_NUMBER}, got {lowest} to "
            f"{highest}; store masks as palette or grey PNG"
        )
    return torch.from_numpy(numbers.astype(np.int64))


def _mask_values(tree: Tree, name: str) -> np.ndarray:
    full = tree.full(name)
    with opened_image(tree.open(name), full, ARRAY_BYTES) as image:
        if len(image.getbands()) != 1 or image.mode == "F":
            raise DataError(
                f"{full}: expected one class number per pixel, got mode {image.mode}; store masks "
                "as palette or grey PNG"
            )
        return np.asarray(image)


def read_depth(tree: Tree, name: str, scale: float) -> Tensor:
    """Metres, fp32 [H, W]; integers are divided by `scale`.

    Raises:
        UnreadableImage: broken; DataError: an image that holds something else.
    """
    values = _depth_values(tree, name)
    if values.ndim != 2:
        shape = list(values.shape)
        raise UnreadableImage(tree.full(name), f"expected one depth per pixel, got shape {shape}")
    check_size(values.shape[1], values.shape[0], tree.full(name))
    divisor = scale if np.issubdtype(values.dtype, np.integer) else 1.0
    with np.errstate(over="ignore"):  # infinitely far counts as unknown
        return torch.from_numpy(values.astype(np.float32) / np.float32(divisor))


def _depth_values(tree: Tree, name: str) -> np.ndarray:
    full = tree.full(name)
    if suffix_of(name) == ".npy":
        return read_npy(tree.open(name), full)
    with opened_image(tree.open(name), full, ARRAY_BYTES) as image:
        if image.mode in ("1", "L", "P") or len(image.getbands()) > 1:
            got = f"got mode {image.mode}; this is no depth map"
            raise DataError(f"{full}: expected 16-bit depth, {got}")
        return np.asarray(image)


def _shared_stems(files: Sequence[str]) -> set[str]:
    """Names without suffix that a photo and a .png or .npy have in common."""
    targets = {stem(name) for name in files if suffix_of(name) in TARGET_SUFFIXES}
    return targets & {stem(name) for name in files if suffix_of(name) not in TARGET_SUFFIXES}
