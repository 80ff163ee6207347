"""See the dense features of any backbone: PNG sheets, and one page with models side by side.

From the command line `python train/evaluate.py --compare A B --data scenes --out DIR`; in Python,
with images uint8 [n, C, H, W]:

    models = {
        "untrained": build("vits16"),
        "trained": load_model("runs/x/checkpoints/step_00001250").model,
    }
    write_gallery(models, images, "gallery")
    write_gallery(models, images, "gallery", bank=Bank(others))  # with nearest neighbours

Shapes: n images, M images of a bank, C channels, H x W pixels, h x w patches.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3core.data.pixels import checked_pixels
from dinov3core.data.progress import progress
from dinov3core.evals.knn import nearest
from dinov3core.evals.views import resized
from dinov3core.models import ConvNeXt, VisionTransformer
from dinov3core.pictures import page, paint
from dinov3core.pictures.clusters import kmeans, match_labels
from dinov3core.pictures.explorer import STYLE, encode, explorer
from dinov3core.pictures.sheets import Row, Scale, framed, sheet
from dinov3core.pictures.sight import Place, Sight, cell_at, encoder_of, look
from dinov3core.printable import printable

NEIGHBOURS = 6
HEADS = 16  # attention heads shown at most
# Attention is shown up to this quantile: single patches often hold ten times more than all around.
PEAK = 0.98
# A patch longer than so many medians counts as an outlier; those of Darcet et al. 2024, "Vision
# Transformers Need Registers", are about ten times as long as others.
OUTLIER = 2.0


@dataclass(frozen=True)
class Bank:
    """Images to search for neighbours of the gallery's own, by their CLS tokens.

    Args:
        images: [M, C, H, W], uint8 or float in [0, 1]; the gallery's images are resized to these.
        labels, query_labels: classes of these images and of the gallery's own; with both, right and
            wrong neighbours are marked.
    """

    images: Tensor
    labels: Tensor | None = None
    query_labels: Tensor | None = None


@dataclass(frozen=True)
class Drawing:
    """How a gallery is drawn.

    Args:
        patches: along the shorter side of the images as the models see them.
        segments: clusters of patch features, joint over the images; 2 to 8.
        foreground: fit the principal components on objects alone (see `paint.foreground`), the rest
            is pale.
        attention_scale: every attention map on its own range, or all maps of a row, that is of one
            model and head, on one, so that images can be compared.
        tile: pixels of the shorter side of one picture in the sheets and the page.
        seed: of the clusters.
    """

    patches: int = 32
    segments: int = 6
    foreground: bool = False
    attention_scale: Literal["map", "row"] = "map"
    tile: int = 192
    seed: int = 0


class Panel(NamedTuple):
    """Rows of pictures, one column per image: a PNG sheet, and a section of the page."""

    file: str
    title: str
    note: str
    rows: Sequence[Row]
    scale: Scale | None = None


def _scale(low: str, high: str) -> Scale:
    return Scale(paint.colour_bar(), low, high)


SIMILARITY = _scale("0 or below", "1")


def write_gallery(
    models: Mapping[str, nn.Module],
    images: Tensor,
    out_dir: Path | str,
    *,
    points: Sequence[tuple[int, int]] | None = None,
    bank: Bank | None = None,
    drawing: Drawing = Drawing(),
    device: torch.device | str = "cpu",
) -> Path:
    """Write gallery.html, which needs no other file, and its pictures as PNG; returns the page.

    Principal components, segments, similarity maps (in the page of any patch that is clicked),
    attention, norms and neighbours. What a model does not offer is left out with a sentence in the
    page.

    Args:
        models: by the name shown; each with `.features(images)`, `patch_size` and, unless it takes
            plain pixels, `statistics`. Every model sees the same images and points.
        images: [n, C, H, W] of one size, uint8 or float in [0, 1]; eight are a good number.
        points: (row, column) in pixels of `images`, one each, for similarity and attention; by
            default where the contrast is strongest.
        bank: where neighbours are sought; None: nowhere.

    Raises:
        ValueError: for arguments that do not fit, features that are not finite, and unknown image
            statistics.
    """
    models = {printable(name): model for name, model in models.items()}
    _check(models, images, points, drawing.segments)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    places = _places(images, points)
    photos = paint.scaled_photos(paint.as_rgb(images), drawing.tile)
    sights = {}
    for name, model in progress(models.items(), desc="looking", unit="model"):
        sights[name] = look(model, images, places, patches=drawing.patches, device=device)

    shared = [
        _components(sights, photos, drawing.foreground),
        _segments(sights, photos, drawing.segments, drawing.seed),
        _similarity(sights, photos, places),
    ]
    attention = _attention(sights, photos, places, drawing.attention_scale)
    norms = _norms(sights, photos)
    panels = [*shared, *attention.values(), *norms]
    overviews = [
        _overview(name, number, shared, attention.get(name)) for number, name in enumerate(models)
    ]
    for panel in progress([*panels, *overviews], desc="drawing", unit="sheet"):
        _save_sheet(panel, out, drawing.tile)

    sections = [_explored(sights, photos, places), *map(_section, shared)]
    sections += [*_attention_sections(attention, drawing.attention_scale), *map(_section, norms)]
    if bank is not None:
        neighbours = {
            name: _neighbours(model, images, photos, bank, device) for name, model in models.items()
        }
        sections.append(_saved_neighbours(neighbours, len(bank.images), out))
    path = out / "gallery.html"
    title = "What the patches know: " + " and ".join(models)
    page.write(path, page.document(title, _header(models, sights), sections, STYLE))
    return path


def _check(
    models: Mapping[str, nn.Module],
    images: Tensor,
    points: Sequence[tuple[int, int]] | None,
    segments: int,
) -> None:
    if not models:
        raise ValueError("models: expected at least one by name, got none")
    if len({_slug(name) for name in models}) < len(models):
        raise ValueError(
            f"models: expected names that differ in letters or digits, got {list(models)}"
        )
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images: expected a stack [n, C, H, W] with n >= 1, got {list(images.shape)}"
        )
    if not 2 <= segments <= len(paint.SEGMENT_COLOURS):
        raise ValueError(f"segments: expected 2 to {len(paint.SEGMENT_COLOURS)}, got {segments}")
    height, width = images.shape[-2:]
    inside = points is None or all(
        0 <= row < height and 0 <= column < width for row, column in points
    )
    if points is not None and (len(points) != len(images) or not inside):
        raise ValueError(
            f"points: expected a (row, column) within {height} x {width} pixels for each of "
            f"{len(images)} images, got {list(points)}"
        )


def _places(images: Tensor, points: Sequence[tuple[int, int]] | None) -> list[Place]:
    if points is None:
        return [paint.contrast_peak(image) for image in images]
    height, width = images.shape[-2:]
    return [((row + 0.5) / height, (column + 0.5) / width) for row, column in points]


def _components(sights: Mapping[str, Sight], photos: np.ndarray, foreground: bool) -> Panel:
    rows = [Row("Image", list(photos))]
    for name, sight in sights.items():
        mask = paint.foreground(sight.patches) if foreground else None
        colours = paint.pca_rgb(sight.patches, size=photos.shape[1:3], mask=mask)
        rows.append(Row(name, list(colours)))
    note = (
        "The three leading principal components of the patch features as red, green and blue, "
        "joint over the images of a model: the same colour means the same features. Colours of "
        "different models do not correspond."
    )
    return Panel("components", "Principal components", note, rows)


def _segments(sights: Mapping[str, Sight], photos: np.ndarray, count: int, seed: int) -> Panel:
    rows = [Row("Image", list(photos))]
    first: Tensor | None = None  # labels of the first model, whose colours the others take
    for name, sight in sights.items():
        unit = F.normalize(sight.patches, dim=1).permute(0, 2, 3, 1)
        most = min(count, unit[..., 0].numel())
        clusters = kmeans(unit.flatten(0, 2), most, seed=seed)
        labels = clusters.labels.view(unit.shape[:3])
        shown = paint.smooth_labels(labels, count, photos.shape[1:3])
        first = shown if first is None else first
        shown = match_labels(shown, first, count)
        rows.append(Row(name, list(paint.label_rgb(shown, photos))))
    note = (
        f"k-means of the patch directions into {count} groups, joint over the images: one colour "
        "is one group, and the light of the photo lies over it. No label was used. Between models "
        "colours are matched by overlap."
    )
    return Panel("segments", "Segments", note, rows)


def _similarity(sights: Mapping[str, Sight], photos: np.ndarray, places: Sequence[Place]) -> Panel:
    grids = (tuple(sight.patches.shape[-2:]) for sight in sights.values())
    finest = max(grids, key=lambda grid: grid[0])
    rows = [Row("Image", _ringed(photos, places, finest))]
    for name, sight in sights.items():
        grid = tuple(sight.patches.shape[-2:])
        maps = [
            paint.cosine_map(sight.patches[i : i + 1], cell_at(place, grid))[0]
            for i, place in enumerate(places)
        ]
        heat = paint.heatmap(torch.stack(maps), size=photos.shape[1:3])
        rows.append(Row(name, _ringed(heat, places, grid)))
    note = (
        "Cosine similarity of the ringed patch to every patch of its image, on one scale for all."
    )
    return Panel("similarity", "Similarity to one patch", note, rows, SIMILARITY)


ATTENTION = "rotary positions and registers included"
SCALES = {
    "map": f"Every map runs from 0 to its own {PEAK:.0%} quantile.",
    "row": f"All maps of one model and head run from 0 to their joint {PEAK:.0%} quantile.",
}


def _attention(
    sights: Mapping[str, Sight],
    photos: np.ndarray,
    places: Sequence[Place],
    scale: Literal["map", "row"],
) -> dict[str, Panel]:
    """A panel for every model with attention.

    Its rows: images, CLS and patch (means over heads), CLS by heads.
    """
    panels = {}
    for name, sight in sights.items():
        if sight.cls_attention is None or sight.patch_attention is None:
            continue
        size = photos.shape[1:3]
        grid = tuple(sight.cls_attention.shape[-2:])
        heads = sight.cls_attention.shape[1]
        maps = {"CLS": sight.cls_attention.mean(1), "Patch": sight.patch_attention.mean(1)}
        maps |= {
            f"CLS head {head + 1}": sight.cls_attention[:, head]
            for head in range(min(heads, HEADS))
        }
        rows = [Row("Image", _ringed(photos, places, grid))]
        rows += [
            Row(label, list(_attention_rgb(each, size, scale))) for label, each in maps.items()
        ]
        note = (
            "Attention in the last block, from the CLS token and from the ringed patch, mean over "
            f"heads and head by head, {ATTENTION}. {SCALES[scale]}"
        )
        if heads > HEADS:
            note += f" The first {HEADS} of {heads} heads."
        panels[name] = Panel(
            f"attention-{_slug(name)}", f"Attention: {name}", note, rows, _scale("0", "most")
        )
    return panels


def _attention_rgb(maps: Tensor, size: tuple[int, int], scale: Literal["map", "row"]) -> np.ndarray:
    """Maps [n, h, w] of one model and head, as pictures of `size`."""
    values = maps.flatten(1) if scale == "map" else maps.flatten()[None]
    peak = values.quantile(PEAK, dim=1).clamp_min(1e-12)
    # Cut before they are enlarged: bicubic rings around single high patches.
    return paint.heatmap((maps / peak[:, None, None]).clamp_max(1), size=size)


def _attention_sections(
    panels: Mapping[str, Panel], scale: Literal["map", "row"]
) -> list[page.Section]:
    """The models beside one another: means over heads, then head by head."""
    if not panels:
        return []
    images = next(iter(panels.values())).rows[0]
    bar = page.scale(*_scale("0", "most"))
    sections = []
    for number, start in ((1, "CLS"), (2, "the ringed patch")):
        rows = [images, *(Row(name, panel.rows[number].tiles) for name, panel in panels.items())]
        title = f"Attention of {start}"
        note = f"In the last block, mean over heads, {ATTENTION}. {SCALES[scale]}"
        sections.append(page.Section(title, note, bar + _cards(title, rows)))
    note = f"From the CLS token, in the last block. {SCALES[scale]}"
    note += " Heads of different models do not correspond."
    note += "".join(
        f" {name}: the first {HEADS} heads."
        for name, p in panels.items()
        if len(p.rows) - 3 == HEADS
    )
    cards = []
    for index in range(len(images.tiles)):
        heads = {
            f"Picture {index + 1}": [images],
            **{name: panel.rows[3:] for name, panel in panels.items()},
        }
        cards.append(
            page.groups([(name, _views(name, rows, index)) for name, rows in heads.items()])
        )
    return [*sections, page.Section("Attention by head", note, bar + page.cards(cards))]


def _overview(name: str, number: int, shared: Sequence[Panel], attention: Panel | None) -> Panel:
    """The model of that number at a glance, with rows of the other panels."""
    rows = [
        shared[-1].rows[0],
        *(Row(panel.title, panel.rows[1 + number].tiles) for panel in shared),
    ]
    note = (
        "Principal components of the patch features as colours and k-means groups of them, both "
        "joint over the images; cosine similarity to the ringed patch"
    )
    if attention is not None:
        rows.append(Row("CLS attention", attention.rows[1].tiles))
        note += "; where the CLS token looks in the last block"
    return Panel(f"overview-{_slug(name)}", f"{name} at a glance", f"{note}.", rows)


def _norms(sights: Mapping[str, Sight], photos: np.ndarray) -> list[Panel]:
    """A panel of all models that have norms, or none."""
    rows = [Row("Image", list(photos))]
    notes: list[str] = []
    for name, sight in sights.items():
        if sight.norms is None or sight.prefix_norms is None:
            continue
        low = sight.norms.min().item()
        high = sight.norms.max().item()
        median = sight.norms.median().item()
        heat = paint.heatmap(sight.norms, size=photos.shape[1:3], low=low, high=high + 1e-9)
        rows.append(Row(name, list(heat)))
        cls, *registers = sight.prefix_norms.mean(0).tolist()
        outliers = int((sight.norms > OUTLIER * median).sum())
        listed = f", registers {', '.join(f'{r:.3g}' for r in registers)}" if registers else ""
        notes.append(
            f"{name}: from {low:.3g} to {high:.3g}, median {median:.3g}; {outliers} of "
            f"{sight.norms.numel()} patches above {OUTLIER:.0f} medians; CLS {cls:.3g}{listed}."
        )
    if not notes:
        return []
    note = (
        "Length of the patch tokens after the last block, before the final norm, each model on its "
        "own range. Outliers in even areas mean that patches are used as scratch space. "
    )
    return [Panel("norms", "Norms", note + " ".join(notes), rows, _scale("shortest", "longest"))]


def _neighbours(
    model: nn.Module,
    images: Tensor,
    photos: np.ndarray,
    bank: Bank,
    device: torch.device | str,
) -> tuple[Image.Image, str]:
    """The sheet of neighbours, and how many are right where classes are known."""
    encoder = encoder_of(model, images.shape[1], device)
    queries = resized(checked_pixels(images), bank.images.shape[-2:])
    banked, asked = (encoder.embed(stack).cls for stack in (bank.images, queries))
    rows = nearest(banked, asked, min(NEIGHBOURS, len(banked))).indices
    right: np.ndarray | None = None
    if bank.labels is not None and bank.query_labels is not None:
        right = (bank.labels[rows] == bank.query_labels[:, None]).numpy()
    shown = np.stack([paint.as_rgb(bank.images[row]) for row in rows])
    count = "" if right is None else f"{int(right.sum())} of {right.size} are of the same class"
    return paint.neighbour_sheet(photos, shown, right, tile=photos.shape[1] // 2), count


def _explored(
    sights: Mapping[str, Sight], photos: np.ndarray, places: Sequence[Place]
) -> page.Section:
    codes = {name: encode(sight.patches) for name, sight in sights.items()}
    worst = max(code.error for code in codes.values())
    note = (
        "Click a patch in any picture, or move with the arrow keys: all pictures are coloured by "
        "the cosine similarity of their patches to it, from dark blue (0 or below) to pale yellow "
        "(1), and a dot marks the closest patch of every other picture, with its cosine below. "
        f"Cosines in this page are right within {worst:.4f}."
    )
    tags = [page.img(photo, f"Picture {i + 1}") for i, photo in enumerate(photos)]
    return page.Section(
        "Ask a patch", note, page.scale(*SIMILARITY) + explorer(tags, codes, (0, *places[0]))
    )


def _header(models: Mapping[str, nn.Module], sights: Mapping[str, Sight]) -> str:
    rows = [_description(name, model, sights[name]) for name, model in models.items()]
    lacking = [
        f"{name}: {sentence}" for name, sight in sights.items() for sentence in sight.skipped
    ]
    skipped = "".join(f'<p class="skipped">{escape(sentence)}</p>' for sentence in lacking)
    count = len(next(iter(sights.values())).patches)
    lead = (
        f"{count} images, seen by {'one model' if len(models) == 1 else f'{len(models)} models'}."
    )
    table = page.facts(rows, ("Model", "Kind", "Parameters", "Width", "Images seen at", "Patches"))
    return (
        '<header><p class="kicker">Dense features</p><h1>What the patches know</h1>'
        f'<p class="lead">{lead}</p>'
        f"{table}{skipped}</header>"
    )


def _description(name: str, model: nn.Module, sight: Sight) -> tuple[str, ...]:
    kind = type(model).__name__
    if isinstance(model, VisionTransformer):
        kind = f"ViT, {model.depth} blocks, {model.heads} heads, {model.patch_size}-px patches"
    elif isinstance(model, ConvNeXt):
        kind = "ConvNeXt"
    parameters = sum(p.numel() for p in model.parameters())
    D, h, w = sight.patches.shape[1:]
    seen = f"{sight.seen[0]} x {sight.seen[1]} px"
    return (
        name,
        kind,
        f"{parameters / 1e6:.1f} M" if parameters else "none",
        str(D),
        seen,
        f"{h} x {w}",
    )


def _section(panel: Panel) -> page.Section:
    """The panel's pictures, image by image."""
    scale = "" if panel.scale is None else page.scale(*panel.scale)
    return page.Section(panel.title, panel.note, scale + _cards(panel.title, panel.rows))


def _cards(title: str, rows: Sequence[Row]) -> str:
    """A card per image with its picture of every row."""
    return page.cards(
        [page.card(_views(title, rows, index)) for index in range(len(rows[0].tiles))]
    )


def _views(title: str, rows: Sequence[Row], index: int) -> list[tuple[str, str]]:
    """The pictures of one image: label and <img> element of every row."""
    return [
        (row.label, page.img(row.tiles[index], f"{title}, picture {index + 1}: {row.label}"))
        for row in rows
    ]


def _save_sheet(panel: Panel, out: Path, tile: int) -> None:
    """With tiles of half the size where there are many rows, as a slide is wide, not high."""
    side = tile if len(panel.rows) <= 6 else tile // 2
    sheet(panel.title, panel.note, panel.rows, tile=side, scale=panel.scale).save(
        out / f"{panel.file}.png", optimize=True
    )


def _saved_neighbours(
    neighbours: Mapping[str, tuple[Image.Image, str]], size: int, out: Path
) -> page.Section:
    """Save the sheets; the section of the page that lays them side by side."""
    note = f"Left the image asked about, right of it the closest of {size} others by the CLS token."
    if any(count for _, count in neighbours.values()):
        note += " A tick and blue: of the same class; a cross and orange: of another."
    shown = []
    for name, (picture, count) in neighbours.items():
        caption = f"{note} {count}." if count else note
        framed(f"Nearest neighbours: {name}", caption, picture).save(
            out / f"neighbours-{_slug(name)}.png", optimize=True
        )
        flat = Image.new("RGB", picture.size, "white")
        flat.paste(picture, (0, 0), picture)
        label = f"{name}: {count}" if count else name
        shown.append((label, page.img(np.asarray(flat), f"Nearest neighbours, {label}")))
    return page.Section("Nearest neighbours", note, page.sheets(shown))


def _ringed(photos: np.ndarray, places: Sequence[Place], grid: tuple[int, int]) -> list[np.ndarray]:
    return [
        paint.mark_point(photo, cell_at(place, grid), grid)
        for photo, place in zip(photos, places, strict=True)
    ]


def _slug(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "model"
