"""States of one model side by side: feature colours, similarity to one patch, nearest images.

Shapes: n pictures, Q queries, k neighbours, h x w patches, H x W pixels of an image, S pixels of a
feature picture.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from dinov3core.pictures import page, paint
from dinov3core.writing import written_whole


@dataclass(frozen=True)
class Snapshot:
    """What one model state looks like: n pictures, Q queries and their neighbours, and figures."""

    photos: np.ndarray  # uint8 [n, H, W, 3]
    pca: np.ndarray  # uint8 [n, S, S, 3]
    cosines: np.ndarray  # float32 [n, h, w]: similarity to the patch at `points`
    points: np.ndarray  # int [n, 2]: row, column
    queries: np.ndarray  # uint8 [Q, H, W, 3]
    neighbours: np.ndarray  # uint8 [Q, k, H, W, 3]
    agreement: np.ndarray  # int [Q, k]: 1 same class, 0 another, -1 no labels
    scalars: Mapping[str, float]  # figures by name

    def save(self, path: Path | str) -> None:
        """Write an .npz without pickled objects; a kill in between leaves the old file."""
        path = Path(path)
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scalars"}
        with written_whole(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays, scalars=np.array(json.dumps(dict(self.scalars))))

    @classmethod
    def load(cls, path: Path | str) -> "Snapshot":
        """Read what `save` wrote; a file that is something else raises ValueError."""
        names = [f.name for f in fields(cls)]
        try:
            # Opened here: numpy leaves a file open that turns out to be no archive.
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in names}
        except (BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: expected a snapshot of a run, got an unreadable file ({error}); delete it"
            ) from None
        return cls(**{**arrays, "scalars": json.loads(str(arrays["scalars"]))})


States = Mapping[str, Snapshot]  # by the name shown; all of the same images and patches


def components(states: States, about: str = "") -> page.Section | None:
    """Patch features as colours, a card per picture; None without states.

    Args:
        about: sentences that are added to the note, such as which images are shown.
    """
    if not states:
        return None
    cards = []
    for i, photo in enumerate(_any(states).photos):
        views = [("Image", page.img(photo, f"Picture {i + 1}"))]
        for name, state in states.items():
            alt = f"Patch features of picture {i + 1}, {name.lower()}"
            views.append((name, page.img(state.pca[i], alt)))
        cards.append(page.card(views))
    note = (
        "The three leading principal components of the patch features as red, green and blue, "
        "joint over all pictures of a column: the same colour means the same features. Objects and "
        "their parts should stand out. Small images are enlarged before the model sees them."
    )
    return page.Section("What the patches know", note + about, page.cards(cards))


def similarity(states: States, about: str = "") -> page.Section | None:
    """Similarity of one patch of each picture to all its others; None without states."""
    if not states:
        return None
    shown = _any(states)
    size = shown.pca.shape[1:3]
    grid = shown.cosines.shape[1:]
    cards = []
    for i, photo in enumerate(shown.photos):
        point = tuple(shown.points[i])
        ringed = paint.mark_point(paint.resized_photo(photo, size), point, grid)
        views = [("Chosen patch", page.img(ringed, f"Picture {i + 1}, one patch ringed"))]
        for name, state in states.items():
            heat = paint.heatmap(torch.from_numpy(state.cosines[i : i + 1]), size=size)[0]
            alt = f"Similarity to the ringed patch of picture {i + 1}, {name.lower()}"
            views.append((name, page.img(paint.mark_point(heat, point, grid), alt)))
        cards.append(page.card(views))
    note = "Cosine similarity of the ringed patch to every other patch, on one scale for all."
    scale = page.scale(paint.colour_bar(), "0", "1")
    return page.Section("What belongs together", note + about, scale + page.cards(cards))


def nearest_images(states: States, about: str = "") -> page.Section | None:
    """Queries with the images nearest to them; None where there are none."""
    figures = []
    labelled = False
    for name, state in states.items():
        if not state.agreement.size:  # a single image has no others
            continue
        labelled = bool((state.agreement >= 0).all())
        right = state.agreement == 1 if labelled else None
        sheet = paint.neighbour_sheet(state.queries, state.neighbours, right)
        count = ""
        if labelled:
            hits = int((state.agreement == 1).sum())
            count = f"{hits} of {state.agreement.size} show the class asked for"
        alt = (
            f"{len(state.queries)} queries with {state.neighbours.shape[1]} nearest images each, "
            f"{name.lower()}. {count}"
        )
        caption = f"<b>{name}</b>{': ' + count if count else ''}"
        figures.append(f"<figure>{page.img(sheet, alt)}<figcaption>{caption}</figcaption></figure>")
    if not figures:
        return None
    note = "Left the image asked about, right of it the images whose CLS token is closest."
    if labelled:
        note += (
            " A tick and a blue frame mark the same class, a cross and an orange frame another one."
        )
    body = f'<div class="pair">{"".join(figures)}</div>'
    return page.Section("Nearest neighbours", note + about, body)


def _any(states: States) -> Snapshot:
    """One of the states: photos, points and grid are those of all."""
    return next(iter(states.values()))
