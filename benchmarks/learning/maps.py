"""Pictures of what one patch has in common with the others, model by model."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from dinov3core.data.scenes import Scenes
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.models import VisionTransformer
from dinov3core.pictures.paint import colour_bar, cosine_map, heatmap, mark_point
from dinov3core.pictures.sheets import Row, Scale, sheet

SIDE = 96  # of the scenes that are shown, in pixels
TILE = 128  # of a map on the sheet
COUNT = 6  # scenes
CAPTION = (
    "Cosine similarity of the patch in the ring with every patch of its image, EMA teacher, "
    "last layer."
)


def cosine_sheet(
    scenes: Scenes, teachers: Mapping[str, VisionTransformer], title: str = "Similarity to a patch"
) -> Image.Image:
    """A row of scenes with a ring, and below it a row of maps of every teacher.

    The patch is the one nearest to the centre of the main object.
    """
    shown = Scenes(COUNT, seed=scenes.seed, size=SIDE, offset=scenes.offset)
    photos = shown.render(range(COUNT)).images
    pixels = torch.from_numpy(photos).permute(0, 3, 1, 2)
    maps = {name: FrozenEncoder(model)(pixels).patches for name, model in teachers.items()}
    height, width = next(iter(maps.values())).shape[2:]
    grid = (height, width)
    points = [_centre(shown, index, grid) for index in range(COUNT)]

    ringed = [mark_point(_large(p), point, grid) for p, point in zip(photos, points)]
    rows = [Row("scene", ringed)]
    for name, patches in maps.items():
        cosines = torch.cat([cosine_map(patches[i : i + 1], points[i]) for i in range(COUNT)])
        rows.append(Row(name, list(heatmap(cosines, size=(TILE, TILE)))))
    return sheet(title, CAPTION, rows, tile=TILE, scale=Scale(colour_bar(), "0", "1"))


def _centre(scenes: Scenes, index: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch at the centre of the main object, as far as that lies in the image."""
    main = scenes.scene(index).objects[0]
    return (
        min(max(int(main.y * grid[0] / SIDE), 0), grid[0] - 1),
        min(max(int(main.x * grid[1] / SIDE), 0), grid[1] - 1),
    )


def _large(photo: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(photo).resize((TILE, TILE), Image.Resampling.BICUBIC))
