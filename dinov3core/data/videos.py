"""Videos with a mask for every frame: files, or built-in objects that move over built-in scenes.

Layouts: `<sequence>/00000.jpg` with `<sequence>/00000.png`, or
`JPEGImages/[size/]<sequence>/00000.jpg` with `Annotations/[size/]<sequence>/00000.png` (DAVIS;
Perazzi et al. 2016), of which `ImageSets/*/val.txt` may name the sequences to use.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import IGNORE, Video
from dinov3core.data.pairs import read_image, read_mask, sides
from dinov3core.data.scenes import CLASS_NAMES, render, uniforms
from dinov3core.data.trees import TEST, TRAIN, Tree

FRAMES = 16  # of a built-in video
MAX_OBJECTS = 254  # of a video
FIRST_SCENE = 30_000_000  # built-in videos are made of scenes that nothing else draws


class TreeVideos:
    """Sequences of a tree.

    Raises:
        DataError: no frames with masks, or a sequence with both but not for all frames.
    """

    def __init__(self, tree: Tree):
        images, masks = sides(tree, ("annotations", "masks"))
        wanted = _listed(tree)
        self._tree = tree
        self._frames: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(images.keys() & masks.keys()):
            sequence = key.rsplit("/", 1)[0] if "/" in key else "video"
            if not wanted or sequence.rsplit("/", 1)[-1] in wanted:
                self._frames.setdefault(sequence, []).append((images[key], masks[key]))
        split = {name.rsplit("/", 1)[-1].lower() for name in self._frames} & {*TRAIN, *TEST}
        if not self._frames or split:
            splits = f"splits of images ({', '.join(sorted(split))})"
            raise DataError(
                f"{tree.root}: found {splits if split else 'no frames with masks'}; tracking "
                "expects <sequence>/00000.jpg with <sequence>/00000.png, or JPEGImages/ and "
                "Annotations/"
            )
        self._names = list(self._frames)
        for key in sorted(images.keys() - masks.keys()):
            if key.rsplit("/", 1)[0] in self._frames:
                raise DataError(
                    f"{tree.root}: the frame {key} has no mask; expected one for every frame of a "
                    "sequence"
                )

    @property
    def files(self) -> Sequence[str]:
        return self._tree.files

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def load(self, index: int) -> Video:
        """A whole sequence.

        Raises:
            UnreadableImage: a frame or mask is broken; DataError: sizes that differ.
        """
        sequence = self._names[index]
        frames = [read_image(self._tree, image) for image, _ in self._frames[sequence]]
        masks = [read_mask(self._tree, mask) for _, mask in self._frames[sequence]]
        masks = _numbered(masks, sequence)
        shapes = {(frame.height, frame.width) for frame in frames}
        shapes |= {tuple(mask.shape) for mask in masks}
        if len(shapes) > 1:
            raise DataError(
                f"{sequence}: expected frames and masks of one size, got {sorted(shapes)}"
            )
        return Video(sequence, frames, masks)


class SceneVideos:
    """Two textured objects, 1 behind 2, that move, turn and grow over a background that slides.

    Args:
        length: number of videos.
        size: side of the frames in pixels.
        frames: of every video.
    """

    def __init__(self, length: int, *, seed: int = 0, size: int = 128, frames: int = FRAMES):
        if length < 1 or size < 16 or frames < 2:
            raise ValueError(
                f"expected at least 1 video, 16 pixels and 2 frames, got {length}, {size} and "
                f"{frames}"
            )
        self.length = length
        self.seed = seed
        self.size = size
        self.frames = frames

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"moving scene {index} of seed {self.seed}"

    def load(self, index: int) -> Video:
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index from 0 to {self.length - 1}, got {index}")
        first = FIRST_SCENE + len(CLASS_NAMES) * index
        back = render([first + index % 12], seed=self.seed, size=2 * self.size)
        u = uniforms(self.seed + 1, np.asarray([first]), 24)[0]
        # Objects of two classes that the background does not have.
        objects = [_cut_out(first + (index + k) % 12, self.seed, self.size) for k in (3, 8)]
        frames = []
        masks = []
        for time in np.linspace(0, 1, self.frames):
            left, top = (
                int(self.size * (0.25 + 0.5 * (a + (b - a) * time))) for a, b in u[:4].reshape(2, 2)
            )
            box = (left, top, left + self.size, top + self.size)
            frame = Image.fromarray(back.images[0]).crop(box)
            mask = Image.new("L", frame.size)
            for number, (cut, numbers) in enumerate(zip(objects, u[4:].reshape(2, 10)), start=1):
                _paste(frame, mask, cut, number, numbers, float(time))
            frames.append(frame)
            masks.append(torch.from_numpy(np.array(mask).astype(np.int64)))
        return Video(self.name(index), frames, masks)


def _cut_out(index: int, seed: int, size: int) -> Image.Image:
    """The main object of a scene with its mask as alpha."""
    drawn = render([index], seed=seed, size=size)
    alpha = (drawn.masks[0] == drawn.labels[0] + 1).astype(np.uint8) * 255
    cut = Image.fromarray(drawn.images[0]).convert("RGBA")
    cut.putalpha(Image.fromarray(alpha))
    return cut


def _paste(
    frame: Image.Image, mask: Image.Image, cut: Image.Image, number: int, u: np.ndarray, time: float
) -> None:
    """Draw an object into a frame and its mask at `time` of its way.

    Args:
        u: numbers in [0, 1) for two ends of the way, a swerve, two sizes and an angle.
    """
    size = frame.width
    x, y = (0.25 + 0.5 * (a + (b - a) * time) for a, b in u[:4].reshape(2, 2))
    y += 0.08 * (u[4] - 0.5) * np.sin(2 * np.pi * time)
    side = max(8, round(size * (0.38 + 0.14 * (u[5] + (u[6] - u[5]) * time))))
    angle = 60 * (u[7] - 0.5) * time
    turned = cut.resize((side, side), Image.Resampling.BILINEAR).rotate(
        float(angle), Image.Resampling.BILINEAR
    )
    corner = round(float(x) * size - side / 2), round(float(y) * size - side / 2)
    frame.paste(turned.convert("RGB"), corner, turned.getchannel("A"))
    mask.paste(number, corner, turned.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))


def _numbered(masks: Sequence[Tensor], sequence: str) -> list[Tensor]:
    """Masks of one object are often 0 and 255; where there are other numbers, 255 means no object.

    Raises:
        DataError: more than `MAX_OBJECTS`.
    """
    numbers = {number for mask in masks for number in mask.unique().tolist()}
    objects = len(numbers - {0, IGNORE})
    if objects > MAX_OBJECTS:
        raise DataError(f"{sequence}: expected masks of up to {MAX_OBJECTS} objects, got {objects}")
    return [(mask > 0).long() for mask in masks] if numbers <= {0, IGNORE} else list(masks)


def _listed(tree: Tree) -> set[str]:
    """Sequences named by a val.txt of DAVIS; empty: all."""
    lists = sorted(
        name for name in tree.names if name.endswith("/val.txt") and name.startswith("ImageSets/")
    )
    return set((tree.text(lists[-1]) or "").split()) if lists else set()
