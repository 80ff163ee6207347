"""Line charts as inline SVG: no plotting library, crisp at any size, colours that CSS may set."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito 2008 in an order whose first three also differ in lightness; a page may override
# them by --series-N.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_WIDTH = 400
_HEIGHT = 230
_LEFT = 46  # margins
_RIGHT = 10
_TOP = 8
_BOTTOM = 28
_LETTER = 7  # pixels a digit of the labels is wide
_POINTS = 240  # of a curve at most: more are below a pixel at this width


class Series(NamedTuple):
    """One curve: its name, steps ascending, a finite value per step, the half height of a band."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] = ()


class Level(NamedTuple):
    """A dashed horizontal line to compare with: ln K, the score of raw pixels, ..."""

    name: str
    value: float


class Mark(NamedTuple):
    """A step to point at, with a vertical line."""

    name: str
    step: float


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    log: bool = False,
    right: Series | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """A chart over training steps as one <svg> element.

    Args:
        title: for screen readers; the caption is the page's business.
        log: logarithmic value axis; values that are not positive are left out.
        right: a curve on an axis of its own, on the right; the labels of both axes then have the
            colours of their curves.

    Raises:
        ValueError: no point to draw.
    """
    curves = [_thinned(curve, log) for curve in series]
    values = [value for curve in curves for value in (*curve.values, *_edges(curve))]
    values += [level.value for level in levels]
    if not any(curve.values for curve in curves):
        raise ValueError(f"{title}: expected at least one point to draw, got none")
    others = [] if right is None else [_thinned(right, False)]
    steps = [step for curve in (*curves, *others) for step in curve.steps]

    # The axes, with room at the sides for the longest label.
    x_ticks = nice_ticks(min(steps), max(steps), 5)
    y, y_ticks, y_labels = _value_axis(values, log)
    left = max(_LEFT, _room(y_labels))
    end = _WIDTH - _RIGHT
    if others:
        edges = [*others[0].values, *_edges(others[0])]
        other_y, other_ticks, other_labels = _value_axis(edges, False)
        end = _WIDTH - _room(other_labels)
    x = _Axis(min(steps), max(steps), left, end, False)
    inside = [t for t in x_ticks if min(steps) <= t <= max(steps) and abs(t - round(t)) < 1e-9]

    # What is drawn later lies above: grid, marks, levels, bands, curves.
    ink = _colour(0) if others else "currentColor"
    parts = [_grid_line(left, end, y(t)) for t in y_ticks]
    parts += [
        _label(left - 7, y(t), "end", ink, text) for t, text in zip(y_ticks, y_labels, strict=True)
    ]
    parts += [_step_label(x(t), end, text) for t, text in zip(inside, tick_labels(inside))]
    parts += [_mark(mark.name, x(mark.step), left, end) for mark in marks]
    parts += [_level(left, end, y(level.value), i) for i, level in enumerate(levels)]
    parts += [_band(c, x, y, i) for i, c in enumerate(curves) if c.errors]
    parts += [_curve(c, x, y, i) for i, c in enumerate(curves) if c.values]
    for other in others:
        ink = _colour(len(curves))
        parts += [
            _label(end + 7, other_y(t), "start", ink, text)
            for t, text in zip(other_ticks, other_labels)
        ]
        parts += [_band(other, x, other_y, len(curves))] if other.errors else []
        parts += [_curve(other, x, other_y, len(curves))]
    spoken = escape(_spoken(title, [*curves, *others]))
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">'
        f"{''.join(parts)}</svg>"
    )


def figure(
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    log: bool = False,
    right: Series | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """A `line_chart` with its caption above and its key, as one <figure> element."""
    caption = f"<figcaption><h3>{escape(title)}</h3><p>{escape(note, quote=False)}</p></figcaption>"
    chart = line_chart(title, series, levels=levels, log=log, right=right, marks=marks)
    named = [*series, *([right] if right is not None else [])]
    return f"<figure>{caption}{legend(named, levels)}{chart}</figure>"


def legend(series: Sequence[Series], levels: Sequence[Level] = ()) -> str:
    """The key of a chart as an HTML list in its colours, each entry with its last value."""
    items = [
        _key(s.name, s.values[-1], f'style="stroke:{_colour(i)}"')
        for i, s in enumerate(series)
        if s.values
    ]
    items += [_key(level.name, level.value, _dashed(i)) for i, level in enumerate(levels)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that enclose low to high."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        spread = abs(low) / 10 or 1.0
        low -= spread
        high += spread
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, digits: int = 3) -> str:
    """A short number: 0.25, 12, 15k, 1.2M, 2e-4; `digits` significant ones, at least."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.{digits}g}M"
    if size >= 1e4:
        return f"{value / 1e3:.{digits}g}k"
    if 0 < size < 1e-2:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
    return f"{value:.{max(digits, 4 if size >= 1000 else 3)}g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of an axis with as many digits as it takes to tell its ticks apart."""
    different = len(set(ticks))
    candidates = ([label(tick, digits) for tick in ticks] for digits in range(3, 16))
    exact = [str(tick) for tick in ticks]
    return next((labels for labels in candidates if len(set(labels)) == different), exact)


class _Axis(NamedTuple):
    """Maps low..high to start..end on the canvas."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def _thinned(series: Series, log: bool) -> Series:
    """At most `_POINTS` points, each the mean of a run of neighbours (geometric on a log axis)."""
    pairs = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if v > 0 or not log]
    size = -(-len(pairs) // _POINTS) or 1
    runs = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    steps = [sum(s for s, _ in run) / len(run) for run in runs]
    if series.errors:  # as they are: only evaluations have errors, and those are few
        return series
    if log:
        values = [math.exp(sum(math.log(v) for _, v in run) / len(run)) for run in runs]
    else:
        values = [sum(v for _, v in run) / len(run) for run in runs]
    return Series(series.name, steps, values)


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = -(-len(powers) // 6)
    return [10.0**p for p in powers[::stride]]


def _value_axis(values: Sequence[float], log: bool) -> tuple[_Axis, list[float], list[str]]:
    """An axis that holds all values, its ticks and their labels."""
    low, high = min(values), max(values)
    ticks = _decades(low, high) if log else nice_ticks(low, high, 5)
    axis = _Axis(min(low, ticks[0]), max(high, ticks[-1]), _HEIGHT - _BOTTOM, _TOP, log)
    return axis, ticks, tick_labels(ticks)


def _room(labels: Sequence[str]) -> int:
    """Pixels beside an axis for the longest of its labels."""
    return 14 + _LETTER * max(map(len, labels))


def _grid_line(left: float, right: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" '
        f'stroke="currentColor" stroke-opacity=".14"/>'
    )


def _label(x: float, y: float, anchor: str, ink: str, text: str) -> str:
    """The label of a tick at height `y`."""
    place = f'x="{x}" y="{y + 3.8:.1f}" text-anchor="{anchor}"'
    return f'<text {place} style="fill:{ink}">{text}</text>'


def _step_label(x: float, end: float, text: str) -> str:
    anchor = "end" if x > end - 14 else "middle"
    place = f'x="{x:.1f}" y="{_HEIGHT - 9}"'
    return f'<text {place} text-anchor="{anchor}" fill="currentColor">{text}</text>'


def _mark(name: str, x: float, left: float, right: float) -> str:
    """A vertical line with its name on the side that has more room, at the foot of the chart."""
    foot = _HEIGHT - _BOTTOM
    to_left = x > (left + right) / 2
    place = f'x="{x - 5 if to_left else x + 5:.1f}" y="{foot - 6}"'
    anchor = "end" if to_left else "start"
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{foot}" stroke="currentColor" '
        f'stroke-width="1.2" stroke-dasharray="2 3"/>'
        f'<text {place} text-anchor="{anchor}" fill="currentColor">{escape(name)}</text>'
    )


def _level(left: float, right: float, y: float, index: int) -> str:
    ends = f'x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {ends} {_dashed(index)} stroke-width="1.6"/>'


def _dashed(index: int) -> str:
    return f'stroke="currentColor" stroke-dasharray="{("6 4", "1.5 3.5", "9 3 1.5 3")[index % 3]}"'


def _edges(series: Series) -> list[float]:
    """The lower and the upper edge of a band."""
    return [v + sign * e for v, e in zip(series.values, series.errors) for sign in (-1, 1)]


def _band(series: Series, x: _Axis, y: _Axis, index: int) -> str:
    edges = _edges(series)
    low = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(series.steps, edges[::2], strict=True)]
    high = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(series.steps, edges[1::2], strict=True)]
    points = " ".join(low + high[::-1])
    return f'<polygon points="{points}" style="fill:{_colour(index)}" fill-opacity=".18"/>'


def _curve(series: Series, x: _Axis, y: _Axis, index: int) -> str:
    points = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(series.steps, series.values)]
    style = (
        f'style="stroke:{_colour(index)}" stroke-width="2" stroke-linejoin="round" '
        'stroke-linecap="round"'
    )
    line = f'<polyline points="{" ".join(points)}" fill="none" {style}/>' if len(points) > 1 else ""
    few = points if len(points) <= 12 else points[-1:]
    places = (p.split(",") for p in few)
    return line + "".join(
        f'<circle cx="{a}" cy="{b}" r="3" style="fill:{_colour(index)}"/>' for a, b in places
    )


def _key(name: str, value: float, stroke: str) -> str:
    swatch = f'<line x1="0" x2="20" y1="5" y2="5" {stroke} stroke-width="3"/>'
    icon = f'<svg width="20" height="10" aria-hidden="true">{swatch}</svg>'
    return f"<li>{icon}{escape(name)} <b>{label(value)}</b></li>"


def _colour(index: int) -> str:
    index %= len(PALETTE)
    return f"var(--series-{index},{PALETTE[index]})"


def _spoken(title: str, curves: Sequence[Series]) -> str:
    facts = [
        f"{c.name} from {label(c.values[0])} to {label(c.values[-1])}" for c in curves if c.values
    ]
    return f"{title}: {'; '.join(facts)}"
