"""Built-in images: textured objects in simple places, drawn by formulas, without a download.

An image is a pure function of (seed, index). Its class is the texture of the main object, which is
large enough for most crops to hold it; silhouette, colours, polarity, place, size, light,
background and the smaller objects of other classes say nothing about it. Every pixel also has a
class and a depth in metres, and the whole has a caption.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov3core.data.patterns import SILHOUETTES, TEXTURES, TURN, Phases, tone

CLASS_NAMES = tuple(TEXTURES)
SHAPE_NAMES = tuple(SILHOUETTES)
HUES = (  # each up to so many degrees
    (15, "red"), (45, "orange"), (70, "yellow"), (160, "green"), (200, "teal"), (255, "blue"),
    (290, "purple"), (345, "pink"), (360, "red"),
)  # fmt: skip
SURFACE_NAMES = ("plain", "wavy", "cloudy", "grainy")

SLOTS = 3  # the main object and up to two small ones
FAR = 20.0  # metres; the sky, and the end of the ground
GROWTH = 0.2  # by which the main object is fattened: a thin one leaves crops without texture
CHUNK = 32  # images drawn at once: planes of 64 x 64 then stay in the cache of one core
CACHE_BYTES = 2**27  # images of a source kept in memory at most


class SceneSet(NamedTuple):
    """Which of the built-in images: how many, their side in pixels, and the seed."""

    length: int = 8192
    size: int = 64
    seed: int = 0


SCENES = SceneSet()


class SceneObject(NamedTuple):
    """One object of a scene; centre and radius are in pixels."""

    texture: str  # its class
    shape: str
    x: float
    y: float
    radius: float
    depth: float  # metres


class Scene(NamedTuple):
    """An image and everything known about it."""

    image: Image.Image
    label: int  # class of the main object, an index into CLASS_NAMES
    mask: np.ndarray  # uint8 [S, S]: 0 background, 1 + class on objects
    depth: np.ndarray  # fp32 [S, S], metres
    caption: str
    objects: list[SceneObject]  # the main one first


class Rendered(NamedTuple):
    """A stack of n drawn scenes of side S."""

    images: np.ndarray  # uint8 [n, S, S, 3]
    labels: np.ndarray  # int64 [n]
    masks: np.ndarray  # uint8 [n, S, S]
    depths: np.ndarray  # fp32 [n, S, S]


class _Objects(NamedTuple):
    """Parameters of objects, [n, SLOTS] each; slot 0 is the main object."""

    present: np.ndarray
    texture: np.ndarray
    shape: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    stretch: np.ndarray
    frequency: np.ndarray
    phase_a: np.ndarray
    phase_b: np.ndarray
    growth: np.ndarray
    bulge: np.ndarray
    depth: np.ndarray
    tones: np.ndarray  # [n, SLOTS, 2, 3]


class _Place(NamedTuple):
    """Parameters of background and light, [n] each."""

    horizon: np.ndarray  # height of the horizon; above the image for a wall
    distance: np.ndarray  # metres to the wall, or to the ground at the lower edge
    tilt: np.ndarray  # of the wall, share of its distance per half image
    surface: np.ndarray  # index into SURFACE_NAMES
    hue: np.ndarray
    tones: np.ndarray  # [n, 2, 3] of wall or ground
    sky: np.ndarray  # [n, 2, 3]
    waves: np.ndarray  # [n, 6] numbers of the surface pattern
    light: np.ndarray  # [n, 2] towards the light, image plane
    shading: np.ndarray
    exposure: np.ndarray
    shadow: np.ndarray


class _Canvas(NamedTuple):
    """What is drawn into."""

    image: np.ndarray  # fp32 [n, 3, S, S]
    mask: np.ndarray  # uint8 [n, S, S]
    depth: np.ndarray  # fp32 [n, S, S]


def uniforms(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1), fp32 [n, count], which depend on seed and index alone.

    The generator is splitmix64 (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        word = (
            np.asarray(indices, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
            + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
            + np.uint64(seed + 1) * np.uint64(0x632BE59BD9B4E019)
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return (word >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _between(u: np.ndarray, low: object, high: object) -> np.ndarray:
    low = np.float32(low)
    high = np.float32(high)
    return low + (high - low) * u


def _pick(u: np.ndarray, count: int) -> np.ndarray:
    return np.minimum((u * count).astype(np.int64), count - 1)


def hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB [..., 3] of colours given as numbers in [0, 1]."""
    sector = np.mod(hue[..., None] * 6 + np.float32([5, 3, 1]), 6)
    return value[..., None] * (
        1 - saturation[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    )


def _tones(u: np.ndarray, base_hue: np.ndarray) -> np.ndarray:
    """A dark and a light colour [..., 2, 3] in random order; numbers u [..., 7]."""
    hue = base_hue + np.float32([0.0, 0.07, 0.33, 0.5])[_pick(u[..., 0], 4)]
    dark = hsv(base_hue, _between(u[..., 1], 0.45, 1.0), _between(u[..., 2], 0.1, 0.5))
    light = hsv(hue, _between(u[..., 3], 0.05, 0.65), _between(u[..., 4], 0.78, 1.0))
    swap = (u[..., 5] < 0.5)[..., None]
    return np.stack([np.where(swap, light, dark), np.where(swap, dark, light)], -2)


def _draw_place(u: np.ndarray) -> _Place:
    """Background and light from numbers u [n, 40]."""
    wall = u[:, 0] < 0.5
    angle = TURN * u[:, 1]
    hue = u[:, 2]
    low = hsv(hue, _between(u[:, 3], 0.15, 0.7), _between(u[:, 4], 0.35, 0.8))
    high = hsv(
        hue + _between(u[:, 5], -0.08, 0.08),
        _between(u[:, 6], 0.1, 0.6),
        _between(u[:, 7], 0.5, 0.95),
    )
    sky_hue = _between(u[:, 8], 0.0, 1.0)
    sky_low = hsv(sky_hue, _between(u[:, 9], 0.0, 0.35), _between(u[:, 10], 0.75, 1.0))
    sky_high = hsv(sky_hue, _between(u[:, 11], 0.2, 0.7), _between(u[:, 12], 0.5, 0.95))
    return _Place(
        horizon=np.where(wall, np.float32(-9), _between(u[:, 13], -0.6, 0.3)),
        distance=np.where(wall, _between(u[:, 14], 6, 10), _between(u[:, 14], 4, 5)),
        tilt=_between(u[:, 15], -0.25, 0.25),
        surface=_pick(u[:, 16], len(SURFACE_NAMES)),
        hue=hue,
        tones=np.stack([low, high], 1),
        sky=np.stack([sky_low, sky_high], 1),
        waves=u[:, 17:23],
        light=np.stack([np.cos(angle), np.sin(angle)], 1),
        shading=_between(u[:, 23], 0.1, 0.35),
        exposure=_between(u[:, 24], 0.85, 1.15),
        shadow=_between(u[:, 25], 0.25, 0.6),
    )


def _draw_objects(u: np.ndarray, main_class: np.ndarray, place: _Place) -> _Objects:
    """Objects from numbers u [n, SLOTS, 24]: a large one of a class, small ones of others."""
    n = len(u)
    extra = np.arange(SLOTS) > 0
    other = (main_class[:, None] + 1 + _pick(u[..., 0], len(CLASS_NAMES) - 1)) % len(CLASS_NAMES)
    radius = _between(u[..., 1], [0.8, 0.2, 0.2], [1.2, 0.38, 0.38])
    y = _between(u[..., 2], [-0.45, -0.8, -0.8], [0.45, 0.8, 0.8])
    before = _between(u[..., 3], [2.0, 0.9, 0.9], [3.5, 1.6, 1.6])
    # On the ground, before the wall.
    behind = np.clip(0.7 * _floor_depth(place, y + radius), 3.9, 10.0)
    hue = u[..., 4] + np.float32(0.0)
    return _Objects(
        present=u[..., 5] < np.float32([1.1, 0.4, 0.2]),
        texture=np.where(extra, other, main_class[:, None]),
        shape=_pick(u[..., 6], len(SHAPE_NAMES)),
        x=_between(u[..., 7], [-0.45, -0.85, -0.85], [0.45, 0.85, 0.85]),
        y=y,
        radius=radius,
        angle=_between(u[..., 8], -0.5, 0.5),
        stretch=np.exp(_between(u[..., 9], -0.2, 0.2)),
        frequency=np.exp(_between(u[..., 10], -0.3, 0.3)) * np.float32([13.5, 9.0, 9.0]),
        phase_a=TURN * u[..., 11],
        phase_b=TURN * u[..., 12],
        growth=np.broadcast_to(np.where(extra, np.float32(0), np.float32(GROWTH)), (n, SLOTS)),
        bulge=_between(u[..., 13], 0.03, 0.15),
        depth=np.where(extra & (u[..., 14] < 0.3), behind, before),
        tones=_tones(u[..., 15:22], hue),
    )


def _floor_depth(place: _Place, y: np.ndarray) -> np.ndarray:
    """Metres to the background at heights y [n, k].

    It is a wall, or a ground plane that is seen from above up to its horizon.
    """
    below = y - place.horizon[:, None]
    ground = place.distance[:, None] * (1 - place.horizon)[:, None] / np.maximum(below, 1e-3)
    return np.where(place.horizon[:, None] < -1, place.distance[:, None], np.minimum(ground, FAR))


def _layout(seed: int, indices: np.ndarray) -> tuple[_Place, _Objects]:
    u = uniforms(seed, indices, 40 + SLOTS * 24)
    place = _draw_place(u[:, :40])
    main_class = np.asarray(indices) % len(CLASS_NAMES)
    return place, _draw_objects(u[:, 40:].reshape(-1, SLOTS, 24), main_class, place)


def render(indices: Sequence[int] | np.ndarray, *, seed: int = 0, size: int = 64) -> Rendered:
    """Draw scenes by index.

    Args:
        indices: any non-negative integers; the class is the index modulo 12.
        seed: of the whole collection.
        size: side in pixels.
    """
    indices = np.asarray(indices, np.int64)
    chunks = [
        _render(indices[start : start + CHUNK], seed, size)
        for start in range(0, len(indices), CHUNK)
    ]
    return Rendered(*(np.concatenate(parts) for parts in zip(*chunks)))


def _render(indices: np.ndarray, seed: int, size: int) -> Rendered:
    place, objects = _layout(seed, indices)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    grid = axis[None, None, :], axis[None, :, None]
    image, depth = _background(place, indices, seed, grid)
    canvas = _Canvas(image, np.zeros(depth.shape, np.uint8), depth)
    for slot in np.argsort(-objects.depth, axis=1).T:  # far to near
        rows = np.flatnonzero(np.take_along_axis(objects.present, slot[:, None], 1)[:, 0])
        if len(rows):
            one = _Objects(*(column[rows, slot[rows]] for column in objects))
            _paint(canvas, rows, one, _Place(*(column[rows] for column in place)), grid)
    noise = _noise(indices, seed, size, 0.05)
    image *= place.exposure[:, None, None, None]
    image += noise[:, None]
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    labels = indices % len(CLASS_NAMES)
    return Rendered(np.ascontiguousarray(pixels), labels, canvas.mask, depth)


def _column(values: np.ndarray) -> np.ndarray:
    """[n, ...] as [n, ..., 1, 1], to meet planes."""
    return values[..., None, None]


def _background(
    place: _Place, indices: np.ndarray, seed: int, grid: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Image [n, 3, S, S] and depth [n, S, S] of wall, or ground and sky."""
    x, y = grid
    size = x.shape[-1]
    depth_of_rows = _floor_depth(place, y[0, :, 0][None])
    plane = np.broadcast_to(depth_of_rows[..., None], (len(indices), size, size))
    is_wall = _column(place.horizon < -1)
    # 1 at the lower edge, 0 far away.
    near = np.where(is_wall, np.float32(1), _column(place.distance) / plane)

    # Two waves across the surface, which its kind combines to a pattern.
    angle = TURN * _column(place.waves[:, 0])
    speed = _between(_column(place.waves[:, 1]), 3.0, 8.0)
    across = x / near
    down = np.where(is_wall, y, 2 / near)
    phase = TURN * _column(place.waves[:, 2])
    first = speed * (np.cos(angle) * across + np.sin(angle) * down) + phase
    phase = TURN * _column(place.waves[:, 3])
    second = 0.7 * speed * (np.cos(angle) * down - np.sin(angle) * across) + phase
    wavy, cloudy, grainy = (_column(place.surface == kind) for kind in (1, 2, 3))
    sway = np.sin(second)
    clouds = 0.3 * (np.sin(first) + sway)
    pattern = np.where(cloudy, clouds, 0.45 * np.sin(first + 1.3 * sway) * wavy)
    if grainy.any():
        pattern = pattern + np.where(grainy, _noise(indices, seed + 1, size, 0.9), np.float32(0))

    # The share of the lighter tone: patterns fade with distance, and light falls from one side.
    fading = np.minimum(near * near * 1.5, 1)
    share = 0.5 + pattern * fading + 0.25 * (np.cos(angle) * x + np.sin(angle) * y)
    share = 0.8 * np.clip(share, 0, 1)
    low = _column(place.tones[:, 0])
    high = _column(place.tones[:, 1])
    image = low + (high - low) * share[:, None]
    if not is_wall.all():
        above = (y < _column(place.horizon))[:, None] & ~is_wall[:, None]
        drop = np.clip((_column(place.horizon) - y) / 1.2, 0, 1)[:, None]
        sky_low = _column(place.sky[:, 0])
        sky_high = _column(place.sky[:, 1])
        image = np.where(above, sky_low + (sky_high - sky_low) * drop, image)
    return image, plane * np.where(is_wall, 1 + _column(place.tilt) * x, np.float32(1))


def _paint(
    canvas: _Canvas,
    rows: np.ndarray,
    objects: _Objects,
    place: _Place,
    grid: tuple[np.ndarray, np.ndarray],
) -> None:
    """Draw one object (parameters [k] each) and its shadow into each of the images `rows`."""
    image, mask, depth = canvas
    size = image.shape[-1]
    dx = grid[0] - _column(objects.x)
    dy = grid[1] - _column(objects.y)
    u, v = _turned(objects, dx, dy)
    light_x = _column(place.light[:, 0])
    light_y = _column(place.light[:, 1])

    # Silhouette and shadow: the same form, moved away from the light. Edges are a pixel wide.
    reach = 0.14 * _column(objects.radius)
    inside = _silhouettes(objects, u, v)
    shadow = _silhouettes(objects, *_turned(objects, dx + light_x * reach, dy + light_y * reach))
    darkening = _column(place.shadow) * np.clip(0.5 + 4 * shadow, 0, 1)
    edge = _column(objects.radius) * (size / 2)
    cover = np.clip(0.5 + inside * edge, 0, 1)

    # Two tones of the texture, lit from one side and darker at the rim.
    share = tone(_textures(objects, u, v), 2.5 * max(size / 64, 1))[:, None]
    first = _column(objects.tones[:, 0])
    second = _column(objects.tones[:, 1])
    lit = 1 + _column(place.shading) / _column(objects.radius) * (light_x * dx + light_y * dy)
    lit *= 0.8 + 0.2 * np.clip(inside * 8, 0, 1)
    surface = (first + (second - first) * share) * lit[:, None]
    under = image[rows] * (1 - darkening)[:, None]
    image[rows] = under + (surface - under) * cover[:, None]

    # Class and depth where more than half of a pixel is covered; bodies bulge towards the eye.
    solid = cover > 0.5
    dome = 1 - _column(objects.bulge * objects.radius) * np.maximum(1 - u * u - v * v, 0)
    mask[rows] = np.where(solid, (objects.texture + 1).astype(np.uint8)[:, None, None], mask[rows])
    depth[rows] = np.where(solid, _column(objects.depth) * dome, depth[rows])


def _turned(objects: _Objects, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from the centre in an object's own frame, in units of its radius."""
    cos = np.cos(objects.angle)
    sin = np.sin(objects.angle)
    wide = objects.stretch / objects.radius
    high = 1 / (objects.stretch * objects.radius)
    return (
        _column(cos * wide) * dx + _column(sin * wide) * dy,
        _column(cos * high) * dy - _column(sin * high) * dx,
    )


def _silhouettes(objects: _Objects, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    inside = np.empty_like(u)
    for number, silhouette in enumerate(SILHOUETTES.values()):
        rows = np.flatnonzero(objects.shape == number)
        if len(rows):
            inside[rows] = silhouette(u[rows], v[rows])
    return inside + _column(objects.growth)


def _textures(objects: _Objects, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    share = np.empty_like(u)
    phases = Phases(_column(objects.frequency), _column(objects.phase_a), _column(objects.phase_b))
    for number, texture in enumerate(TEXTURES.values()):
        rows = np.flatnonzero(objects.texture == number)
        if len(rows):
            share[rows] = texture(u[rows], v[rows], Phases(*(phase[rows] for phase in phases)))
    return share


def _noise(indices: np.ndarray, seed: int, size: int, amplitude: float) -> np.ndarray:
    """Grain [n, S, S] of mean 0: windows of one long strip of noise.

    Noise of their own would take half of the time that images take.
    """
    strip = uniforms(seed, np.arange(256), size * size // 64 + 64).ravel() - np.float32(0.5)
    start = (uniforms(seed + 1, indices, 1)[:, 0] * (len(strip) - size * size)).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(strip, size * size)[start]
    return np.float32(amplitude) * windows.reshape(-1, size, size)


class Scenes:
    """Built-in labelled images as an image source.

    Args:
        length: number of images.
        seed: of the collection.
        size: side in pixels.
        offset: index of the first one; sources with other ranges share no image, as training and
            held-out data should.
    """

    class_names = CLASS_NAMES

    def __init__(self, length: int, *, seed: int = 0, size: int = 64, offset: int = 0):
        if length < 0 or offset < 0 or seed < 0 or size < 8:
            raise ValueError(
                "expected length, seed and offset of at least 0 and a size of at least 8 pixels, "
                f"got length {length}, seed {seed}, offset {offset}, size {size}"
            )
        self.length = length
        self.seed = seed
        self.size = size
        self.offset = offset
        self._keeps = length * size**2 * 3 <= CACHE_BYTES
        self._kept: np.ndarray | None = None  # images drawn so far
        self._drawn = np.zeros(length if self._keeps else 0, bool)  # and which they are

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Image.Image:
        """The image as RGB.

        Its neighbours are drawn with it: images are mostly read in order, and cost less together.
        """
        first = self._checked(index) // CHUNK * CHUNK
        if self._keeps and not self._drawn[index]:
            self.loads(range(first, min(first + CHUNK, self.length)))
        return self.loads([index])[0]

    def loads(self, indices: Sequence[int]) -> list[Image.Image]:
        """Many images at once, drawn together and kept in memory while `CACHE_BYTES` allow."""
        wanted = np.asarray(indices, np.int64)
        if not self._keeps:
            return [Image.fromarray(image) for image in self.render(wanted).images]
        if self._kept is None:
            self._kept = np.zeros((self.length, self.size, self.size, 3), np.uint8)
        missing = np.unique(wanted[~self._drawn[wanted]])
        if len(missing):
            self._kept[missing] = self.render(missing).images
            self._drawn[missing] = True
        return [Image.fromarray(self._kept[index]) for index in wanted]

    def render(self, indices: Sequence[int] | np.ndarray) -> Rendered:
        """Images, labels, masks and depths as arrays."""
        return render(np.asarray(indices) + self.offset, seed=self.seed, size=self.size)

    def label(self, index: int) -> int:
        return (self._checked(index) + self.offset) % len(CLASS_NAMES)

    def name(self, index: int) -> str:
        return f"scene {self._checked(index) + self.offset} of seed {self.seed}"

    def scene(self, index: int) -> Scene:
        """One image with its mask, depth, caption and objects."""
        place, objects = _layout(self.seed, np.asarray([self._checked(index) + self.offset]))
        drawn = self.render([index])
        listed = [
            _describe(objects, slot, self.size) for slot in range(SLOTS) if objects.present[0, slot]
        ]
        return Scene(
            Image.fromarray(drawn.images[0]),
            int(drawn.labels[0]),
            drawn.masks[0],
            drawn.depths[0],
            _caption(place, listed),
            listed,
        )

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index from 0 to {self.length - 1}, got {index}")
        return int(index)

    def __getstate__(self) -> dict:
        """Without the images drawn so far: a worker process draws what it needs."""
        return {**self.__dict__, "_kept": None, "_drawn": np.zeros_like(self._drawn)}


def _describe(objects: _Objects, slot: int, size: int) -> SceneObject:
    row = {name: float(getattr(objects, name)[0, slot]) for name in ("x", "y", "radius", "depth")}
    return SceneObject(
        CLASS_NAMES[objects.texture[0, slot]],
        SHAPE_NAMES[objects.shape[0, slot]],
        x=(row["x"] + 1) * size / 2,
        y=(row["y"] + 1) * size / 2,
        radius=row["radius"] * size / 2,
        depth=row["depth"],
    )


def _caption(place: _Place, objects: list[SceneObject]) -> str:
    """What is to be seen, the main object first."""
    main, *others = objects
    around = " and ".join(
        f"{_relation(main, other)} a small {other.texture} {other.shape}" for other in others
    )
    surface = SURFACE_NAMES[place.surface[0]]
    degrees = 360 * float(place.hue[0])
    hue = next(name for limit, name in HUES if degrees <= limit)
    is_wall = place.horizon[0] < -1
    where = f"before a {surface} {hue} wall" if is_wall else f"over {surface} {hue} ground"
    parts = (f"a large {main.texture} {main.shape}", around, where)
    return ", ".join(part for part in parts if part)


def _relation(main: SceneObject, other: SceneObject) -> str:
    if other.depth > main.depth:
        return "in front of"
    dx = other.x - main.x
    dy = other.y - main.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"
