"""Features of a folder of images: `python -m dinov3core.extract FOLDER --model WEIGHTS --out FILE`.

The file holds `cls` [N, D] and `patch_mean` [N, D] (and `patches` if asked for), `readable` [N] (0:
the image could not be read, its rows are zero), and the image names in its metadata. The same
command continues where it was stopped.

Shapes: N images, B a batch of them, C channels, D width, h x w patches.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import torch
import tyro
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dinov3core.checkpoints import load_model, load_weights
from dinov3core.checkpoints.files import digest
from dinov3core.data.decode import PixelFormat, decode_rgb
from dinov3core.data.errors import UnreadableImage
from dinov3core.data.images import FileSource, ImageSource, open_source
from dinov3core.data.pixels import checked_pixels, to_planes
from dinov3core.data.progress import progress
from dinov3core.data.stored import PathFiles
from dinov3core.evals.encoder import ImageEncoder, open_device, stretched
from dinov3core.evals.feature_file import FeatureFile
from dinov3core.evals.reading import read_ahead
from dinov3core.models import NAMED_STATISTICS, build, list_models
from dinov3core.models.outputs import fit_to_patches
from dinov3core.models.presets import Backbone

# Seconds per patch of a ViT-S/16 on one CPU core, over those of an image of 256 patches: 2.4 times
# with 4,096 patches, 5.0 with 9,216, 8.0 with 16,384. Published training saw 2,304 (768 px).
MANY_PATCHES = 4096


@dataclass(frozen=True)
class Extraction:
    """What to extract, from what, with what."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """a folder of images, one image, a .txt or .csv list, .tar shards, or `scenes`"""
    model: str
    """a file or folder of weights; or a model name, with --weights"""
    out: Path
    """the file to write"""
    weights: str = ""
    """weights for a model given by name"""
    size: int = 256
    """images are resized to a square of this side (bilinear, antialiased, as floats)"""
    tile: int = 0
    """instead: cut images at full resolution into tiles of this side, each seen as an image of its
    own; 0: off
    """
    overlap: int = 0
    """pixels that neighbouring tiles share; their patches are averaged"""
    patches: bool = False
    """store patch maps too: `patches` [N, D, h, w], or with --tile one `patches.I` [D, h, w] per
    image
    """
    batch_size: int = 32
    """images, or tiles of one image, that go through the model at once"""
    workers: int = 4
    """threads that read images"""
    statistics: Literal["stored", "imagenet", "satellite"] = "stored"
    """image normalisation; stored: what the weights state"""
    channel_scale: float = 0.0
    """what images of other than 3 channels are divided by to reach [0, 1]; 0: the range of their
    number type
    """
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU where there is one"""
    autocast: bool = False
    """run the model in bfloat16"""
    store: Literal["float32", "float16"] = "float32"
    """number type of what is written"""


def extract(settings: Extraction) -> str:
    """Write the features and return a report.

    Raises:
        ValueError: no weights, no image statistics, sizes off the patch grid, or an output file of
            other work.
    """
    extractor = Extractor(settings)
    source = _open(settings, extractor.model.in_channels)
    total = len(source)
    width = extractor.model.width
    fixed = _fixed_tensors(extractor, total)
    appended = total if settings.patches and settings.tile else 0
    unreadable: list[UnreadableImage] = []
    bar_settings = {"desc": "extract", "unit": "image", "leave": True}
    with (
        FeatureFile(settings.out, fixed, extractor.metadata(source), appended) as file,
        progress(total=total, initial=file.done, **bar_settings) as bar,
        _pixel_limit_off() if settings.tile else nullcontext(),
    ):
        # A batch of tiles comes from one image, which may be huge.
        at_once = 1 if settings.tile else settings.batch_size
        batches = read_ahead(
            lambda index: _planes(source, index, settings),
            range(file.done, total),
            batch_size=at_once,
            workers=settings.workers,
        )
        for batch in batches:
            images = {index: item for index, item in batch.items() if isinstance(item, Tensor)}
            unreadable += [item for item in batch.values() if isinstance(item, UnreadableImage)]
            for index in images:
                file.write("readable", index, torch.ones(1))
            if images:
                extractor.write(file, images)
            file.commit(max(batch) + 1)
            bar.update(len(batch))
        file.finish()

    with safe_open(settings.out, "pt") as written:
        count = int(written.get_tensor("readable").sum())
    summary = f"{settings.out}: features of {count} of {total} images, width {width}"
    return "\n".join([summary] + [f"  not read: {image}" for image in unreadable])


def _fixed_tensors(extractor: "Extractor", total: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """The tensors of the file whose shapes are known beforehand; see `FeatureFile`."""
    settings = extractor.settings
    width = extractor.model.width
    # The widest type first keeps all others aligned.
    fixed = {"readable": (torch.int64, [total])}
    fixed |= {name: (extractor.store, [total, width]) for name in ("cls", "patch_mean")}
    if settings.patches and not settings.tile:
        side = settings.size // extractor.model.patch_size
        fixed["patches"] = (extractor.store, [total, width, side, side])
    return fixed


class Extractor:
    """A model and the way images go through it."""

    def __init__(self, settings: Extraction):
        least = {"size": 1, "tile": 0, "overlap": 0, "batch_size": 1, "workers": 1}
        for name, lowest in least.items():
            value = getattr(settings, name)
            if value < lowest:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected at least {lowest}, got {value}")
        self.settings = settings
        device = open_device(settings.device, "--device")
        self.encoder = ImageEncoder(_model(settings), device=device, autocast=settings.autocast)
        self.model = self.encoder.model
        self.store = getattr(torch, settings.store)
        patch = self.model.patch_size
        for name in ("size", "tile", "overlap"):
            value = getattr(settings, name)
            if value % patch:
                raise ValueError(
                    f"--{name}: expected a multiple of the patch size {patch}, got {value}"
                )
        if settings.tile and settings.overlap >= settings.tile:
            raise ValueError(
                f"--overlap: expected less than --tile {settings.tile}, got {settings.overlap}"
            )
        _warn_of_many_patches(settings, patch)

    def metadata(self, source: ImageSource) -> dict[str, str]:
        """Names and all that the numbers depend on, which must be the same on resuming."""
        only_speed = ("out", "batch_size", "workers", "device")
        settings = asdict(self.settings).items()
        names = [source.name(index) for index in range(len(source))]
        return {
            **{name: str(value) for name, value in settings if name not in only_speed},
            "weights_digest": digest(self.model.state_dict()),
            "image_statistics": json.dumps(self.model.statistics),
            "names": json.dumps(names),
        }

    def write(self, file: FeatureFile, images: dict[int, Tensor]) -> None:
        """The features of images [C, H, W], uint8 or float in [0, 1], by index."""
        if self.settings.tile:
            for index, image in images.items():
                cls, patches = self.tiled(image)
                file.write("cls", index, cls[None])
                file.write("patch_mean", index, patches.mean((1, 2))[None])
                if self.settings.patches:
                    file.append(f"patches.{index}", patches.to(self.store))
            return
        size = (self.settings.size, self.settings.size)
        pixels = [stretched(checked_pixels(image)[None], size) for image in images.values()]
        features = self.encoder.encode(torch.cat(pixels))
        for row, index in enumerate(images):
            file.write("cls", index, features.cls[row : row + 1])
            file.write("patch_mean", index, features.patches[row].mean((1, 2))[None])
            if self.settings.patches:
                file.write("patches", index, features.patches[row : row + 1])

    def tiled(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean CLS [D] and stitched patches [D, h, w] of an image, padded to whole patches."""
        patch = self.model.patch_size
        tile = self.settings.tile
        pixels = fit_to_patches(image[None], patch, "pad")[0]
        height, width = pixels.shape[1:]
        tops, lefts = (_starts(side, tile, self.settings.overlap) for side in (height, width))
        corners = [(top, left) for top in tops for left in lefts]
        cls = torch.zeros(self.model.width)
        total = torch.zeros(self.model.width, height // patch, width // patch)
        coverage = torch.zeros(total.shape[1:])  # tiles that show a patch
        size = self.settings.batch_size
        with progress(total=len(corners), desc="tiles of an image", unit="tile", delay=2.0) as bar:
            for chunk in (corners[first : first + size] for first in range(0, len(corners), size)):
                tiles = [pixels[:, y : y + tile, x : x + tile] for y, x in chunk]
                features = self.encoder.encode(torch.stack(tiles))
                cls += features.cls.sum(0)
                for (top, left), patches in zip(chunk, features.patches, strict=True):
                    rows = slice(top // patch, top // patch + patches.shape[1])
                    columns = slice(left // patch, left // patch + patches.shape[2])
                    total[:, rows, columns] += patches
                    coverage[rows, columns] += 1
                bar.update(len(chunk))
        return cls / len(corners), total / coverage


def _model(settings: Extraction) -> Backbone:
    if settings.model in list_models():
        if not settings.weights:
            raise ValueError(
                f"--model {settings.model}: expected --weights beside a name, got none; give a file"
            )
        model = build(settings.model)
        model.statistics = None
        print(load_weights(model, settings.weights), file=sys.stderr)
    elif not Path(settings.model).exists():
        raise ValueError(
            "--model: expected a file or folder of weights, or with --weights one of "
            f"{', '.join(list_models())}; got {settings.model!r}, which is neither (nothing is "
            "downloaded)"
        )
    else:
        model, report = load_model(settings.model)
        print(report, file=sys.stderr)
    if settings.statistics != "stored":
        model.statistics = NAMED_STATISTICS[settings.statistics]
    if model.statistics is None:
        raise ValueError(
            "image statistics: expected them with the weights, found none; pass --statistics "
            "imagenet or satellite"
        )
    return model


def _warn_of_many_patches(settings: Extraction, patch_size: int) -> None:
    """A sentence on stderr when the model is to see more than `MANY_PATCHES` at once."""
    name, side = ("tile", settings.tile) if settings.tile else ("size", settings.size)
    patches = (side // patch_size) ** 2
    if patches > MANY_PATCHES:
        smaller = math.isqrt(MANY_PATCHES) * patch_size
        print(
            f"warning: --{name} {side} shows the model {patches:,} patches at once, more than "
            f"{MANY_PATCHES:,}: the time of attention grows with their square, and models are "
            f"rarely trained with so many; --tile {smaller} or less covers the same pixels",
            file=sys.stderr,
        )


def _open(settings: Extraction, channels: int) -> ImageSource:
    """The images, or the one image, that the command names."""
    pixels = PixelFormat(channels, settings.channel_scale or None)
    path = Path(settings.folder)
    if path.is_file() and path.suffix not in (".txt", ".csv", ".tar"):
        return FileSource(PathFiles([path]), pixels)
    return open_source(settings.folder, pixels)


@contextmanager
def _pixel_limit_off() -> Iterator[None]:
    """Pillow takes very large images, which tiles are for, for an attack."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _planes(source: ImageSource, index: int, settings: Extraction) -> Tensor:
    """[C, H, W], uint8 or float in [0, 1].

    Threads read: arithmetic on the pixels is left to the thread that owns the cores.
    """
    if settings.tile and isinstance(source, FileSource) and source.pixels.channels == 3:
        file = source.open(index)
        image: Image.Image | Tensor = decode_rgb(
            file, source.name(index), draft=False, limited=False
        )
    else:
        image = source.load(index)
    return to_planes(image)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of tiles along one side; the last tile ends with the image."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def main(arguments: list[str] | None = None) -> None:
    """The command line; what cannot be read or written becomes one sentence and exit status 1."""
    settings = tyro.cli(
        Extraction, prog="python -m dinov3core.extract", description=__doc__, args=arguments
    )
    try:
        print(extract(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
