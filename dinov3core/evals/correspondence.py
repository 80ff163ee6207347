"""Correspondence without labels: does a patch find itself in a warped copy of its image?

Each image meets a copy under a random homography whose geometry is known, so the true match of
every patch is known as well, as in the synthetic pairs of Rocco et al. 2017, "Convolutional neural
network architecture for geometric matching". PCK, the percentage of correct keypoints, follows Yang
and Ramanan 2013.

Shapes: B images, C channels, S side, P patches, M matches, D width.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.data.errors import DataError
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import AnyData, Images
from dinov3core.evals.views import square
from dinov3core.evals.windows import resolve_side

PROTOCOL = (
    "Frozen patches of the last layer after the final norm. Every image meets a copy under a "
    "random homography with other colours; each patch whose true place is in view is matched to "
    "the patch of largest cosine."
)

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601


@dataclass(frozen=True)
class Warp:
    """How far the copy may differ from its image.

    Args:
        rotation: largest angle in degrees.
        zoom: largest factor and, inverted, smallest.
        perspective: largest change of scale over half of the image.
        colour: largest relative change of brightness, contrast and saturation.
        seed: of all that is drawn.

    Raises:
        ValueError: values out of range.
    """

    rotation: float = 30.0
    zoom: float = 1.4
    perspective: float = 0.15
    colour: float = 0.4
    seed: int = 0

    def __post_init__(self):
        if not (
            0 <= self.rotation <= 180
            and 1 <= self.zoom <= 4
            and 0 <= self.perspective < 0.5
            and 0 <= self.colour <= 1
        ):
            raise ValueError(
                "correspondence: expected rotation 0 to 180, zoom 1 to 4, perspective 0 to below "
                f"0.5 and colour 0 to 1, got {self.rotation}, {self.zoom}, {self.perspective} and "
                f"{self.colour}"
            )


def correspondence(
    backbone: nn.Module,
    data: AnyData,
    *,
    warp: Warp = Warp(),
    side: int | None = None,
    images: int | None = 100,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Match every patch of an image to the most similar one of its warped copy.

    Compared is the place of the match with the true place. A match lies at the centre of a patch
    and so misses by up to 0.71 patches even when it is right: `pck_5` of a coarse grid stays below
    100.

    Args:
        data: images of any kind; of two splits the test split.
        warp: of the copies.
        side: of the square images; None: the shorter side of the first one, on the patch grid, at
            most 512.
        images: at most so many, evenly spread; None: all.
        device, autocast_dtype: see `FrozenEncoder`.

    Returns:
        `pck_5` and `pck_10`: percent of matches within 5 and 10 % of the side; `within_one_patch`,
        the percentage within one patch; `chance_pck_10` of blind guesses; `matches`, `unreadable`
        images, and the `protocol`.

    Raises:
        DataError: no image, or no patch that stays in view.
        ValueError: features that are not finite, a side off the patch grid.
    """
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast_dtype)
    source = Images(data, images, "correspondence")
    side = resolve_side(side, source.first(), encoder.patch_size)
    generator = torch.Generator().manual_seed(warp.seed)
    errors: list[Tensor] = []
    chances: list[Tensor] = []
    for _, pixels in source:
        error, chance = _errors_in_copy(encoder, square(pixels, side), generator, warp)
        errors.append(error)
        chances.append(chance)

    error = torch.cat(errors)
    if not len(error):
        raise DataError(
            "correspondence: expected patches that stay in view, got none; use a smaller zoom"
        )
    return {
        "pck_5": _percent(error <= 0.05),
        "pck_10": _percent(error <= 0.1),
        "within_one_patch": _percent(error <= encoder.patch_size / side + 1e-6),
        "chance_pck_10": _percent(torch.cat(chances)),
        "matches": len(error),
        "unreadable": len(source.unreadable),
        "protocol": {
            "text": PROTOCOL,
            "side": side,
            "images": len(source.indices),
            **asdict(warp),
        },
    }


def _errors_in_copy(
    encoder: FrozenEncoder, pixels_CSS: Tensor, generator: torch.Generator, warp: Warp
) -> tuple[Tensor, Tensor]:
    """Of the M patches in view: how far the match misses, in sides, and what a guess would hit."""
    matrix = random_homography(generator, warp.rotation, warp.zoom, warp.perspective)
    copy = recoloured(warped(pixels_CSS, matrix), generator, warp.colour)
    original, changed = encoder.finite(torch.stack([pixels_CSS, copy])).patches.cpu()
    places = centres(*original.shape[1:])
    # `matrix` leads from the copy to the image; patches of the image are sought in the copy.
    truth = apply(torch.linalg.inv(matrix), places)
    seen = truth.abs().amax(1) < 1
    matched = places[matches(original.flatten(1).T[seen], changed.flatten(1).T)]
    # Coordinates run from -1 to 1, so half of a distance is in sides.
    errors = (matched - truth[seen]).norm(dim=1) / 2
    chances = (torch.cdist(truth[seen], places) / 2 <= 0.1).double().mean(1)
    return errors, chances


def matches(queries_MD: Tensor, keys_PD: Tensor) -> Tensor:
    """The index of the most similar key of every query, by cosine."""
    return (F.normalize(queries_MD, dim=1) @ F.normalize(keys_PD, dim=1).T).argmax(1)


def random_homography(
    generator: torch.Generator, rotation: float, zoom: float, perspective: float
) -> Tensor:
    """A 3 x 3 matrix, float64, from places (x, y) of the copy to places of the image.

    Both run from -1 to 1.
    """
    drawn = 2 * torch.rand(6, generator=generator, dtype=torch.float64) - 1
    turn, power, right, down, tilt_x, tilt_y = drawn.tolist()
    angle = math.radians(turn * rotation)
    size = zoom**-power
    cos = size * math.cos(angle)
    sin = size * math.sin(angle)
    rows = [
        [cos, -sin, 0.2 * right],
        [sin, cos, 0.2 * down],
        [perspective * tilt_x, perspective * tilt_y, 1.0],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def apply(matrix: Tensor, places: Tensor) -> Tensor:
    """Places [P, 2] (x, y) under a homography; those behind the horizon are infinite."""
    mapped = torch.cat([places, torch.ones_like(places[:, :1])], 1) @ matrix.T
    depth = mapped[:, 2:]
    return torch.where(depth > 0, mapped[:, :2] / depth, torch.inf)


def centres(height: int, width: int) -> Tensor:
    """Centres (x, y), from -1 to 1, of the patches of a grid: float64 [height * width, 2]."""
    y, x = (
        2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1
        for count in (height, width)
    )
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], 2).flatten(0, 1)


def warped(pixels_CSS: Tensor, matrix: Tensor) -> Tensor:
    """The copy: each of its pixels is read at matrix @ place; black where the image ends."""
    height, width = pixels_CSS.shape[1:]
    places = apply(matrix, centres(height, width)).clamp(-1e6, 1e6)
    grid = places.view(1, height, width, 2).float()
    copies = F.grid_sample(
        pixels_CSS[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return copies[0]


def recoloured(pixels_CHW: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Brightness, contrast and, of RGB, saturation times factors within `strength` of 1."""
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    brightness, contrast, saturation = factors.tolist()
    pixels = (pixels_CHW * brightness).clamp(0, 1)
    mean = pixels.mean()
    pixels = (mean + contrast * (pixels - mean)).clamp(0, 1)
    if len(pixels) != 3:
        return pixels
    grey = torch.einsum("chw,c->hw", pixels, pixels.new_tensor(GREY))
    return (grey + saturation * (pixels - grey)).clamp(0, 1)


def _percent(shares: Tensor) -> float:
    return 100 * shares.double().mean().item()
