"""Silhouettes and textures of the built-in scenes, as formulas over an object's own coordinates.

u points right and v down in the object's frame, in units of its radius; arrays are [k, S, S],
per-object numbers [k, 1, 1]. A silhouette is positive inside, roughly in units of the radius. A
texture is positive on one of its two tones and grows at the rate of its phase, so that `tone` gives
edges of one width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TURN = np.float32(2 * np.pi)


class Phases(NamedTuple):
    """Numbers of one texture: angular frequency per radius and two offsets."""

    f: np.ndarray
    a: np.ndarray
    b: np.ndarray


def tone(t: np.ndarray, sharpness: float) -> np.ndarray:
    """Share of the second tone in [0, 1]."""
    return 0.5 + 0.5 * np.tanh(np.float32(sharpness) * t)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int) -> np.ndarray:
    sector = TURN / sides
    angle = np.mod(np.arctan2(u, -v) + sector / 2, sector) - sector / 2
    return np.float32(np.cos(np.pi / sides)) / np.cos(angle) - np.hypot(u, v)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.9 - np.hypot(u, v)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.8 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _polygon(u, v, 3) + 0.1


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    spikes = np.abs(np.mod(np.arctan2(u, -v) * (5 / TURN), 1) - 0.5)
    return 0.52 + 0.9 * spikes - np.hypot(u, v)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    wide = np.maximum(np.abs(u), np.abs(v))
    narrow = np.minimum(np.abs(u), np.abs(v))
    return np.minimum(1 - wide, 0.38 - narrow)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.32 - np.abs(np.hypot(u, v) - 0.65)


def _hexagon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _polygon(u, v, 6)


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.7 * (1 - np.hypot(u, v / 0.55))


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.55, v) - 0.7)


def _flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.72 + 0.24 * np.cos(6 * np.arctan2(v, u)) - np.hypot(u, v)


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(
        0.78 - np.hypot(u, v - 0.2) * (1 + 0.25 * np.maximum(-v, 0)), 1 + v - 0.9 * np.abs(u)
    )


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(1 - np.abs(u), 0.5 - np.abs(v))


def _striped(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return np.sin(p.f * u + p.a)


def _checked(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return 2 * np.sin(0.8 * p.f * u + p.a) * np.sin(0.8 * p.f * v + p.b)


def _dotted(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return 1.6 * (np.cos(p.f * u + p.a) + np.cos(p.f * v + p.b) - 0.7)


def _gridded(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return 3 * (np.maximum(np.cos(p.f * u + p.a), np.cos(p.f * v + p.b)) - 0.75)


def _ringed(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return np.sin(1.2 * p.f * np.hypot(u, v) + p.a)


def _spoked(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return np.sin(9 * np.arctan2(v, u) + p.a)


def _spiral(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    return np.sin(0.9 * p.f * np.hypot(u, v) + 3 * np.arctan2(v, u) + p.a)


def _zigzag(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    triangle = 4 * np.abs(np.mod((0.7 * p.f * v + p.b) / TURN, 1) - 0.5) - 1
    return np.sin(p.f * u + 3.4 * triangle + p.a)


def _bricked(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    height = (p.f * v + p.b) / 5
    joints = np.cos(0.62 * p.f * u + np.float32(np.pi) * np.floor(height) + p.a)
    return 3.2 * (0.78 - np.maximum(np.cos(TURN * height), joints))


def _scaly(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    height = (p.f * v + p.b) / 3.6
    row = np.floor(height)
    across = np.mod((p.f * u + p.a) / 6.2 + 0.5 * row, 1) - 0.5
    return 3 * (np.hypot(1.5 * across, height - row) - 0.62)


def _blotchy(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    g = 0.7 * p.f
    waves = np.sin(g * u + p.a) + np.sin(g * (0.5 * u + 0.87 * v) + p.b)
    return waves + np.sin(g * (0.8 * v - 0.6 * u) - p.a)


def _woven(u: np.ndarray, v: np.ndarray, p: Phases) -> np.ndarray:
    x = 0.42 * p.f * u + p.a
    y = 0.42 * p.f * v + p.b
    return np.where(np.sin(x) * np.sin(y) > 0, np.sin(4 * x), np.sin(4 * y))


Silhouette = Callable[[np.ndarray, np.ndarray], np.ndarray]
Texture = Callable[[np.ndarray, np.ndarray, Phases], np.ndarray]

SILHOUETTES: dict[str, Silhouette] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "hexagon": _hexagon,
    "ellipse": _ellipse,
    "crescent": _crescent,
    "flower": _flower,
    "drop": _drop,
    "bar": _bar,
}
TEXTURES: dict[str, Texture] = {
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
    "gridded": _gridded,
    "ringed": _ringed,
    "spoked": _spoked,
    "spiral": _spiral,
    "zigzag": _zigzag,
    "bricked": _bricked,
    "scaly": _scaly,
    "blotchy": _blotchy,
    "woven": _woven,
}
