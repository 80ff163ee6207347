"""Pictures of what a model sees, as uint8 arrays: PCA colours, cosine maps, segments, neighbours.

Shapes: B images, D width, h x w patches, H x W pixels, Q queries, k neighbours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from dinov3core.data.pixels import as_float

# Dark blue over teal to pale yellow: lightness rises steadily, so the map also reads in grey and
# for colour-blind eyes.
_HEAT = (
    (18, 14, 54),
    (39, 46, 122),
    (31, 96, 146),
    (32, 145, 140),
    (92, 190, 112),
    (189, 220, 88),
    (253, 245, 180),
)
# Blue and vermilion of Okabe and Ito 2008, told apart by all common kinds of colour vision.
_RIGHT = (0, 114, 178)
_WRONG = (213, 94, 0)
_NEUTRAL = (140, 140, 140)
# Seven colours of Okabe and Ito 2008 and a grey, neighbours far apart in lightness; for segments.
SEGMENT_COLOURS = (
    (0, 114, 178), (240, 228, 66), (213, 94, 0), (86, 180, 233),
    (0, 158, 115), (204, 121, 167), (230, 159, 0), (110, 110, 110),
)  # fmt: skip
# Share of the features' mean square below which a principal component is rounding noise and is
# drawn as mid-grey.
_FLAT = 1e-10


def principal_components(patches_BDhw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores [B, 3, h, w], of unit variance, of the three leading components of patch features.

    Components are joint over all images. Signs are fixed by a positive third moment, so that the
    rarer side is the high one; unlike a rule on the loadings this does not depend on the basis the
    features are written in.

    Args:
        patches_BDhw: patch maps of any width D >= 1.
        mask: bool [B, h, w]: fit on these patches only; all are projected.
    """
    B, D, h, w = patches_BDhw.shape
    x = patches_BDhw.detach().double().cpu().permute(0, 2, 3, 1).reshape(-1, D)
    if not x.isfinite().all():
        raise ValueError(
            "patches: expected finite features, got NaN or infinity; the model that made them has "
            "diverged"
        )
    chosen = x if mask is None else x[mask.flatten().cpu()]
    if len(chosen) < 4:
        raise ValueError(
            f"mask: expected at least 4 patches to fit three components, got {len(chosen)}"
        )
    mean = chosen.mean(0)
    floor = _FLAT * chosen.square().mean() * D
    centred = chosen - mean
    variances, directions = _leading(centred)
    sign = torch.where((centred @ directions).pow(3).mean(0) < 0, -1.0, 1.0).to(x)
    scale = torch.where(variances > floor, variances.clamp_min(1e-300).rsqrt(), 0.0)
    padded = F.pad((x - mean) @ directions * sign * scale, (0, 3 - len(variances)))
    return padded.view(B, h, w, 3).permute(0, 3, 1, 2).float()


def pca_rgb(
    patches_BDhw: Tensor, *, size: tuple[int, int] | None = None, mask: Tensor | None = None
) -> np.ndarray:
    """Patch features as colours, uint8 [B, H, W, 3]; equal colours mean equal features.

    That holds across images as well. Components become red, green and blue through sigmoid(2z);
    they are enlarged first, so edges stay smooth.

    Args:
        size: (H, W) of the pictures; None keeps one pixel per patch.
        mask: bool [B, h, w], for instance of `foreground`: components are fitted there and the rest
            is drawn pale.
    """
    maps = principal_components(patches_BDhw, mask)
    rgb = torch.sigmoid(2 * enlarge(maps, size))
    if mask is not None:
        shown = enlarge(mask[:, None].float().cpu(), size).clamp(0, 1)
        rgb = rgb * shown + 0.93 * (1 - shown)
    return _to_uint8(rgb)


def foreground(patches_BDhw: Tensor) -> Tensor:
    """Patches on objects, bool [B, h, w]: the side of the first component with less of the border.

    The component is cut by Otsu's threshold (Otsu 1979), which parts two groups of values best.
    """
    first = principal_components(patches_BDhw)[:, 0]
    high = first > _otsu(first.flatten())
    border = torch.ones_like(high)
    border[:, 1:-1, 1:-1] = False
    return high if high[border].float().mean() <= high.float().mean() else ~high


def cosine_map(patches_BDhw: Tensor, point: tuple[int, int], image: int = 0) -> Tensor:
    """Cosine similarity of one patch to every patch of all images, float32 [B, h, w].

    Args:
        patches_BDhw: patch maps.
        point: (row, column) of the patch.
        image: whose patch it is.

    Raises:
        ValueError: a patch outside the grid.
    """
    B, _, h, w = patches_BDhw.shape
    if not (0 <= point[0] < h and 0 <= point[1] < w and 0 <= image < B):
        raise ValueError(
            f"point: expected a patch of the {h} x {w} grid of {B} images, got {point} of image "
            f"{image}"
        )
    unit = F.normalize(patches_BDhw.float(), dim=1)
    return torch.einsum("bdhw,d->bhw", unit, unit[image, :, point[0], point[1]])


def heatmap(
    values: Tensor, *, size: tuple[int, int] | None = None, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """Values [B, h, w] as colours, uint8 [B, H, W, 3]: dark blue at `low` to yellow at `high`."""
    level = (enlarge(values[:, None].float().cpu(), size)[:, 0] - low) / (high - low)
    stops = torch.tensor(_HEAT, dtype=torch.float32) / 255
    place = level.clamp(0, 1) * (len(stops) - 1)
    below = place.floor().long().clamp(max=len(stops) - 2)
    rgb = torch.lerp(stops[below], stops[below + 1], (place - below)[..., None])
    return _to_uint8(rgb.permute(0, 3, 1, 2))


def heat_stops() -> list[list[int]]:
    """The colours `heatmap` runs through at equal distances, for pages that paint themselves."""
    return [list(colour) for colour in _HEAT]


def colour_bar() -> np.ndarray:
    """All colours of `heatmap` from low to high, uint8 [8, 256, 3]."""
    return heatmap(torch.linspace(0, 1, 64)[None, None], size=(8, 256))[0]


def smooth_labels(labels: Tensor, count: int, size: tuple[int, int] | None) -> Tensor:
    """Labels [B, h, w] below `count` on a finer grid: the one whose enlarged mask is largest.

    Returns:
        int64 [B, H, W].
    """
    masks = F.one_hot(labels.cpu(), count).permute(0, 3, 1, 2).float()
    return enlarge(masks, size).argmax(1)


def label_rgb(labels: Tensor, photos: np.ndarray | None = None) -> np.ndarray:
    """Labels [B, H, W] from 0 to 7 as flat colours, uint8 [B, H, W, 3].

    Photos [B, H, W, 3] lend them their light.
    """
    if labels.max() >= len(SEGMENT_COLOURS) or labels.min() < 0:
        raise ValueError(
            f"labels: expected 0 to {len(SEGMENT_COLOURS) - 1}, got {labels.min()} to "
            f"{labels.max()}; more colours than that cannot be told apart"
        )
    rgb = torch.tensor(SEGMENT_COLOURS)[labels.cpu()].permute(0, 3, 1, 2) / 255
    if photos is not None:
        light = torch.from_numpy(photos).float().mean(3)[:, None] / 255
        rgb = rgb * (0.55 + 0.6 * light)
    return _to_uint8(rgb)


def contrast_peak(image: Tensor, grid: tuple[int, int] = (16, 16)) -> tuple[float, float]:
    """Where something is likely to be seen in an image [C, H, W]: (y, x) as shares of its sides.

    The cell of `grid` with the strongest local contrast, the centre preferred.
    """
    grey = image.float().mean(0)[None, None]
    mean, square = (F.adaptive_avg_pool2d(x, grid)[0, 0] for x in (grey, grey.square()))
    rows, columns = (torch.linspace(-1, 1, n) for n in grid)
    centred = torch.exp(-2 * (rows[:, None] ** 2 + columns**2))
    contrast = (square - mean.square()).clamp_min(0).sqrt()
    # The small second term decides for the centre where all is flat.
    best = (contrast * centred + 1e-6 * centred).argmax().item()
    row, column = divmod(best, grid[1])
    return (row + 0.5) / grid[0], (column + 0.5) / grid[1]


def as_rgb(images: Tensor) -> np.ndarray:
    """Pixels [B, C, H, W], uint8 or float in [0, 1], for showing: uint8 [B, H, W, 3].

    One or two channels are shown as grey, of more than three the first three. Unlike RGB, which
    stays as is, they are stretched, each over all images, so that 2 to 98 % of the values fill the
    range: bands of a satellite use little.
    """
    pixels = as_float(images.cpu())
    if pixels.shape[1] == 3:
        return _to_uint8(pixels)
    pixels = pixels[:, :1].expand(-1, 3, -1, -1) if pixels.shape[1] < 3 else pixels[:, :3]
    # numpy, as torch's quantile takes 16 million values at most
    bounds = np.quantile(pixels.numpy(), (0.02, 0.98), axis=(0, 2, 3))
    low, high = torch.from_numpy(bounds).float().view(2, 1, 3, 1, 1)
    return _to_uint8(torch.where(high > low, (pixels - low) / (high - low).clamp_min(1e-6), pixels))


def scaled_photos(photos: np.ndarray, side: int) -> np.ndarray:
    """Photos uint8 [n, H, W, 3] with a shorter side of `side` pixels (bicubic)."""
    height, width = photos.shape[1:3]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    return np.stack([resized_photo(photo, size) for photo in photos])


def resized_photo(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A photo uint8 [H, W, 3] at another size (height, width), bicubic."""
    image = Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image)


def mark_point(picture: np.ndarray, point: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """A ring around the patch `point` = (row, column) of `grid` = (h, w) on a picture [H, W, 3]."""
    height, width = picture.shape[:2]
    y = (point[0] + 0.5) * height / grid[0]
    x = (point[1] + 0.5) * width / grid[1]
    scale = 4  # drawn large and reduced: PIL draws without antialiasing
    canvas = Image.fromarray(picture).resize(
        (width * scale, height * scale), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(canvas)
    radius = 0.045 * min(height, width) * scale
    for r, colour, line in (
        (radius + scale, (0, 0, 0), 3 * scale),
        (radius, (255, 255, 255), 2 * scale),
    ):
        draw.ellipse(
            (x * scale - r, y * scale - r, x * scale + r, y * scale + r), outline=colour, width=line
        )
    return np.asarray(canvas.resize((width, height), Image.Resampling.LANCZOS))


def neighbour_sheet(
    queries: np.ndarray,
    neighbours: np.ndarray,
    correct: np.ndarray | None = None,
    *,
    tile: int = 96,
) -> Image.Image:
    """One row per query: the query, a gap, its neighbours; an RGBA image on a transparent ground.

    Args:
        queries: uint8 [Q, H, W, 3]; neighbours: uint8 [Q, k, H, W, 3], best first.
        correct: bool [Q, k]: right ones get a blue frame and a tick, wrong ones a vermilion frame
            and a cross. None: all frames grey.
        tile: side of one picture in pixels.
    """
    gap = tile // 12
    frame = max(2, tile // 24)
    pitch = tile + gap
    indent = 2 * gap
    rows, k = neighbours.shape[:2]
    sheet = Image.new("RGBA", (indent + (k + 1) * pitch - gap, rows * pitch - gap), (0, 0, 0, 0))
    for row in range(rows):
        sheet.paste(_tile(queries[row], tile, 0, None), (0, row * pitch))
        for column in range(k):
            verdict = None if correct is None else bool(correct[row, column])
            picture = _tile(neighbours[row, column], tile, frame, verdict)
            sheet.paste(picture, (indent + (column + 1) * pitch, row * pitch))
    return sheet


def enlarge(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bicubic enlargement of maps [B, C, h, w] to `size`; None leaves them."""
    if size is None:
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bicubic", align_corners=False)


def _leading(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The up to three leading components of rows [n, D]: variances [c], directions [D, c]."""
    n, D = centred.shape
    if n >= D:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
        return values[-3:].flip(0).clamp_min(0), vectors[:, -3:].flip(1)
    values, left = torch.linalg.eigh(centred @ centred.T / n)
    directions = F.normalize(centred.T @ left[:, -3:].flip(1), dim=0)
    return values[-3:].flip(0).clamp_min(0), directions


def _otsu(values: Tensor) -> float:
    """The threshold with the largest variance between the two sides."""
    ordered = values.double().sort().values
    n = len(ordered)
    below = torch.arange(1, n, dtype=torch.float64)
    sums = ordered.cumsum(0)
    low = sums[:-1] / below  # means of the two sides
    high = (sums[-1] - sums[:-1]) / (n - below)
    best = (below * (n - below) * (high - low).square()).argmax()
    return ((ordered[best] + ordered[best + 1]) / 2).item()


def _tile(picture: np.ndarray, side: int, frame: int, correct: bool | None) -> Image.Image:
    colour = _NEUTRAL if correct is None else _RIGHT if correct else _WRONG
    tile = Image.new("RGBA", (side, side), (*colour, 255))
    inner = side - 2 * frame
    tile.paste(
        Image.fromarray(picture).resize((inner, inner), Image.Resampling.BICUBIC), (frame, frame)
    )
    if correct is not None:
        badge = _badge(side // 4, correct)
        tile.paste(badge, (side - badge.width, side - badge.height), badge)
    return tile


def _badge(side: int, correct: bool) -> Image.Image:
    """A white tick or cross on the frame's colour: colour alone never carries the meaning."""
    s = side * 4  # drawn large and reduced: PIL draws without antialiasing
    badge = Image.new("RGBA", (s, s), (*(_RIGHT if correct else _WRONG), 255))
    draw = ImageDraw.Draw(badge)
    tick = [((0.24, 0.54), (0.43, 0.72)), ((0.43, 0.72), (0.78, 0.30))]
    cross = [((0.28, 0.28), (0.72, 0.72)), ((0.72, 0.28), (0.28, 0.72))]
    for start, end in tick if correct else cross:
        draw.line(
            [tuple(c * s for c in start), tuple(c * s for c in end)], fill="white", width=s // 8
        )
    return badge.resize((side, side), Image.Resampling.LANCZOS)


def _to_uint8(rgb_B3HW: Tensor) -> np.ndarray:
    return (rgb_B3HW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
