"""Draws docs/rooms.svg, the rooms of the project and who may import whom: `python docs/rooms.py`.

Boxes carry their own light ground and arrows a middle grey, so the picture reads on white and on
black.
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).with_name("rooms.svg")
WIDTH = 920
HEIGHT = 470
BOX_WIDTH = 148
BOX_HEIGHT = 58
INK = "#1b1f24"
QUIET = "#57606a"
ARROW = "#7d8590"  # contrast 3.9 to white and 5.4 to black


class Room(NamedTuple):
    """A box: the place of its upper left corner, and what stands in it."""

    left: int
    top: int
    title: str
    text: str
    ground: str

    @property
    def right(self) -> int:
        return self.left + BOX_WIDTH

    @property
    def bottom(self) -> int:
        return self.top + BOX_HEIGHT

    @property
    def middle(self) -> tuple[int, int]:
        return self.left + BOX_WIDTH // 2, self.top + BOX_HEIGHT // 2


GPU, MATHS, LOOK, RUN, FILES = "#ffe3c2", "#d9ecff", "#dff3dc", "#f6dcec", "#ececec"
ROOMS = {
    "kernels": Room(24, 186, "kernels", "Triton: tiles", GPU),
    "ops": Room(204, 186, "ops", "fused, differentiable", MATHS),
    "models": Room(384, 126, "models", "ViT, ConvNeXt, heads", MATHS),
    "losses": Room(384, 246, "losses", "terms of the objective", MATHS),
    "integrations": Room(204, 24, "integrations", "timm, transformers", FILES),
    "checkpoints": Room(384, 24, "checkpoints", "weights, any layout", FILES),
    "data": Room(384, 376, "data", "images, crops, masks", FILES),
    "evals": Room(564, 246, "evals", "measure", LOOK),
    "pictures": Room(564, 126, "pictures", "draw", LOOK),
    "engine": Room(748, 376, "train/engine", "step, time, processes", RUN),
    "recipes": Room(748, 246, "train/recipes", "a run as a value", RUN),
    "commands": Room(748, 126, "train/*.py", "the commands", RUN),
}
# (who imports, whom): the arrows worth seeing; tests/test_architecture.py has all.
ARROWS = (
    ("ops", "kernels"),
    ("models", "ops"),
    ("losses", "ops"),
    ("evals", "losses"),
    ("evals", "models"),
    ("evals", "data"),
    ("pictures", "evals"),
    ("engine", "pictures"),
    ("engine", "evals"),
    ("engine", "data"),
    ("recipes", "engine"),
    ("commands", "recipes"),
    ("checkpoints", "models"),
    ("engine", "checkpoints"),
    ("integrations", "ops"),
    ("integrations", "models"),
)
# Arrows that would cross a box take corners.
CORNERS = {
    ("engine", "checkpoints"): ((908, 400), (908, 53)),
    ("engine", "pictures"): ((730, 390), (730, 155)),
}


def _edge(room: Room, towards: tuple[float, float]) -> tuple[float, float]:
    """Where a line from the middle of a room towards a point leaves its box."""
    x, y = room.middle
    across, down = towards[0] - x, towards[1] - y
    share = min(
        BOX_WIDTH / 2 / abs(across) if across else 1e9,
        BOX_HEIGHT / 2 / abs(down) if down else 1e9,
    )
    return x + share * across, y + share * down


def _arrow(pair: tuple[str, str]) -> str:
    start, end = (ROOMS[name] for name in pair)
    corners = CORNERS.get(pair, ())
    if corners:
        first, last = corners[0], corners[-1]
        points = [(start.right if first[0] > start.right else start.left, first[1]), *corners]
        points.append((end.right if last[0] > end.right else end.left, last[1]))
    else:
        points = [_edge(start, end.middle), _edge(end, start.middle)]
    path = " L ".join(f"{x:.0f} {y:.0f}" for x, y in points)
    return f'<path d="M {path}" marker-end="url(#head)"/>'


def _box(room: Room) -> str:
    x = room.middle[0]
    return (
        f'<rect x="{room.left}" y="{room.top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" '
        f'fill="{room.ground}" stroke="{ARROW}"/>'
        f'<text x="{x}" y="{room.top + 26}" class="title">{escape(room.title)}</text>'
        f'<text x="{x}" y="{room.top + 44}" class="text">{escape(room.text)}</text>'
    )


def drawing() -> str:
    """The whole picture."""
    names = ", ".join(room.title for room in ROOMS.values())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>Rooms and the arrows between them: {escape(names)}</title>",
        "<style>text{font-family:system-ui,sans-serif;text-anchor:middle}"
        f".title{{font-size:15px;font-weight:600;fill:{INK}}}"
        f".text{{font-size:12px;fill:{QUIET}}}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{ARROW}"/>'
        "</marker></defs>",
        f'<g fill="none" stroke="{ARROW}" stroke-width="1.6">',
        *map(_arrow, ARROWS),
        "</g>",
        *map(_box, ROOMS.values()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
