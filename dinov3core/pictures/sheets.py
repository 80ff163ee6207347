"""Sheets of pictures for talks and documents: labelled rows of tiles as one Pillow image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GROUND = (255, 255, 255)
_INK = (29, 33, 38)
_SOFT = (93, 101, 111)
_MARGIN = 36
_GAP = 10
_LABEL = 150  # width of the label column at most; longer labels are broken


class Row(NamedTuple):
    """A label and one picture per column, uint8 [H, W, 3]."""

    label: str
    tiles: Sequence[np.ndarray]


class Scale(NamedTuple):
    """A colour bar, uint8 [h, w, 3], and what its ends mean."""

    bar: np.ndarray
    low: str
    high: str


def sheet(
    title: str, caption: str, rows: Sequence[Row], *, tile: int = 192, scale: Scale | None = None
) -> Image.Image:
    """Rows of equally large tiles: labels on the left, title above, caption and scale below.

    Args:
        tile: shorter side of a tile in pixels; the ratio of sides is that of the pictures.
    """
    columns = {len(row.tiles) for row in rows}
    if len(columns) != 1 or 0 in columns:
        raise ValueError(
            "rows: expected at least one row, all of as many tiles, got "
            f"{[len(r.tiles) for r in rows]}"
        )
    height, width = rows[0].tiles[0].shape[:2]
    size = tuple(round(side * tile / min(height, width)) for side in (width, height))
    large, medium, small = (ImageFont.load_default(points) for points in (30, 19, 18))
    left = _MARGIN + _label_width([row.label for row in rows], medium)
    full = max(left + columns.pop() * (size[0] + _GAP) - _GAP + _MARGIN, 560)
    heading, text = (
        _wrapped(words, font, full - 2 * _MARGIN)
        for words, font in ((title, large), (caption, small))
    )
    top = _MARGIN + _block(heading, large) + 18
    below = top + len(rows) * (size[1] + _GAP) - _GAP + 20
    canvas = Image.new(
        "RGB", (full, below + _block(text, small) + (34 if scale else 0) + _MARGIN), _GROUND
    )
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_MARGIN, _MARGIN), heading, large, _INK)
    for index, row in enumerate(rows):
        y = top + index * (size[1] + _GAP)
        lines = _wrapped(row.label, medium, _LABEL)
        _write(draw, (_MARGIN, y + (size[1] - _block(lines, medium)) // 2), lines, medium, _INK)
        for column, picture in enumerate(row.tiles):
            image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
            canvas.paste(image, (left + column * (size[0] + _GAP), y))
    _write(draw, (_MARGIN, below), text, small, _SOFT)
    if scale is not None:
        _draw_scale(canvas, draw, scale, below + _block(text, small) + 12, small)
    return canvas


def framed(title: str, caption: str, picture: Image.Image) -> Image.Image:
    """Any picture, transparent ones too, on white with a title above and a caption below."""
    large = ImageFont.load_default(30)
    small = ImageFont.load_default(18)
    full = max(picture.width, 420) + 2 * _MARGIN
    heading, text = (
        _wrapped(words, font, full - 2 * _MARGIN)
        for words, font in ((title, large), (caption, small))
    )
    top = _MARGIN + _block(heading, large) + 18
    below = top + picture.height + 20
    canvas = Image.new("RGB", (full, below + _block(text, small) + _MARGIN), _GROUND)
    canvas.paste(picture, (_MARGIN, top), picture if picture.mode == "RGBA" else None)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_MARGIN, _MARGIN), heading, large, _INK)
    _write(draw, (_MARGIN, below), text, small, _SOFT)
    return canvas


def _label_width(labels: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    widest = max(
        (font.getlength(line) for label in labels for line in _wrapped(label, font, _LABEL)),
        default=0,
    )
    return round(widest) + 16 if widest else 0


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks, and inside words that are wider alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _pitch(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.35)


def _block(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return len(lines) * _pitch(font)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
) -> None:
    for index, line in enumerate(lines):
        draw.text((corner[0], corner[1] + index * _pitch(font)), line, font=font, fill=colour)


def _draw_scale(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    scale: Scale,
    y: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    x = _MARGIN
    for part in (
        scale.low,
        Image.fromarray(scale.bar).resize((220, 14), Image.Resampling.BICUBIC),
        scale.high,
    ):
        if isinstance(part, str):
            draw.text((x, y), part, font=font, fill=_SOFT)
            x += round(font.getlength(part)) + 10
        else:
            canvas.paste(part, (x, y + 4))
            x += part.width + 10
