"""A piece of a web page: clicking a patch colours all pictures by similarity to it.

The page carries the patch features themselves, few and small: unit vectors turned to their
principal axes, of which those stay that keep every cosine, rounded to 16 bits. Any two patches of
any two pictures can then be compared, from n * P * r numbers instead of the (n * P)^2 of all
cosines.

Shapes: n pictures, D width, P = h x w patches, r axes kept.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.pictures.page import breakable
from dinov3core.pictures.paint import heat_stops

# The largest error of a cosine in the page: one step of an 8-bit colour scale from -1 to 1.
TOLERANCE = 1 / 127
_UNIT = 32767


class Codes(NamedTuple):
    """Patch features of one model as the page keeps them."""

    values: Tensor  # int16 [n * h * w, r], in units of 1 / 32767
    grid: tuple[int, int]
    error: float  # bound on the error of any cosine


def encode(patches_BDhw: Tensor) -> Codes:
    """Directions of patch features in few numbers: every cosine is right within `TOLERANCE`.

    What the dropped axes hold of two unit vectors has an inner product of at most the product of
    their lengths (Cauchy-Schwarz), so axes are dropped while the longest remainder squared is below
    half of the tolerance. Rounding adds 2 * sqrt(r) * step / 2 + r * (step / 2)^2 at most, with
    step = 1 / 32767.
    """
    rows = F.normalize(patches_BDhw.double().cpu(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
    turned = rows @ axes
    # What the longest row loses when an axis and all that follow are dropped, squared.
    remainder = turned.square().flip(1).cumsum(1).flip(1).amax(0)
    count = max(1, int((remainder > TOLERANCE / 2).sum()))
    dropped = remainder[count].item() if count < len(remainder) else 0.0
    step = 1 / _UNIT
    error = dropped + count**0.5 * step + count * step * step / 4
    values = (turned[:, :count] * _UNIT).round().clamp(-_UNIT, _UNIT).short()
    return Codes(values, tuple(patches_BDhw.shape[-2:]), error)


def explorer(
    photos: Sequence[str], codes: Mapping[str, Codes], start: tuple[int, float, float]
) -> str:
    """The markup with its data and script.

    Args:
        photos: one <img> element per picture.
        codes: per model name.
        start: picture, y and x (shares) of the patch that is chosen when the page opens.
    """
    cards = "".join(_card(index, photo, codes) for index, photo in enumerate(photos))
    models = [
        {"name": name, "grid": c.grid, "codes": _base64(c.values)} for name, c in codes.items()
    ]
    data = {"pictures": len(photos), "start": start, "heat": heat_stops(), "models": models}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<p class="readout" id="readout" aria-live="polite">Needs JavaScript.</p>'
        f'<div class="cards">{cards}</div>'
        f'<script type="application/json" id="patch-data">{text}</script>'
        f"<script>{_SCRIPT}</script>"
    )


def _card(index: int, photo: str, codes: Mapping[str, Codes]) -> str:
    label = f"Picture {index + 1}: click a patch, or move the chosen one with the arrow keys"
    figures = [
        f'<figure><div class="pick" data-image="{index}" tabindex="0" role="application" '
        f'aria-label="{label}">{photo}<i class="ring" hidden></i></div>'
        "<figcaption>Image</figcaption></figure>"
    ]
    for number, (name, code) in enumerate(codes.items()):
        h, w = code.grid
        alt = escape(f"Similarity of picture {index + 1} to the chosen patch, {name}")
        figures.append(
            f'<figure><div class="pick" data-image="{index}" data-model="{number}">'
            f'<canvas width="{w}" height="{h}" role="img" aria-label="{alt}"></canvas>'
            '<i class="ring" hidden></i><i class="match" hidden></i></div>'
            f'<figcaption>{breakable(name)} <b class="closest"></b></figcaption></figure>'
        )
    return f'<div class="card">{"".join(figures)}</div>'


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<i2").tobytes()).decode()


STYLE = """
.pick { position:relative; cursor:crosshair; line-height:0; touch-action:manipulation }
.pick canvas { width:100%; border-radius:5px }
.pick:focus-visible { outline:3px solid var(--accent); outline-offset:3px; border-radius:5px }
.ring, .match { position:absolute; width:16px; height:16px; border:2px solid #fff;
  border-radius:50%;
  box-shadow:0 0 0 1.5px #000, inset 0 0 0 1.5px #000; transform:translate(-50%,-50%);
  pointer-events:none }
.match { width:9px; height:9px; background:#d55e00; box-shadow:0 0 0 1px #000 }
  [hidden] { display:none }
.closest { display:block; min-height:1.5em; font-variant-numeric:tabular-nums; color:var(--ink) }
section > .readout { position:sticky; top:42px; z-index:1; max-width:none; margin:0 0 14px;
  padding:8px 0; background:var(--ground); color:var(--ink); font-variant-numeric:tabular-nums }
@media (max-width:560px) { section > .readout { font-size:.88rem; line-height:1.4 } }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("patch-data").textContent);
const picks = [...document.querySelectorAll(".pick")];
for (const model of data.models) {
  const bytes = Uint8Array.from(atob(model.codes), c => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  model.vectors = Float32Array.from({ length: bytes.length / 2 },
    (_, i) => view.getInt16(2 * i, true) / 32767);
  model.cells = model.grid[0] * model.grid[1];
  model.axes = model.vectors.length / (data.pictures * model.cells);
}
const cellAt = (share, count) => Math.min(count - 1, Math.floor(share * count));
const middle = (cell, count) => (cell + 0.5) / count;

// Similarity of the patch at (y, x) of a picture to every patch of all pictures.
function cosines(model, image, y, x) {
  const [h, w] = model.grid, { vectors, axes } = model;
  const own = (image * model.cells + cellAt(y, h) * w + cellAt(x, w)) * axes;
  const similar = new Float32Array(data.pictures * model.cells);
  for (let row = 0; row < similar.length; row++) {
    let sum = 0;
    for (let axis = 0; axis < axes; axis++) sum += vectors[own + axis] * vectors[row * axes + axis];
    similar[row] = sum;
  }
  return similar;
}

function paint(canvas, values) {
  const context = canvas.getContext("2d"),
    pixels = context.createImageData(canvas.width, canvas.height);
  const last = data.heat.length - 1;
  values.forEach((value, i) => {
    const place = Math.min(1, Math.max(0, value)) * last,
      below = Math.min(last - 1, Math.floor(place));
    for (let c = 0; c < 3; c++) {
      const low = data.heat[below][c], high = data.heat[below + 1][c];
      pixels.data[4 * i + c] = Math.round(low + (high - low) * (place - below));
    }
    pixels.data[4 * i + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
}

function put(mark, y, x) {
  mark.hidden = false;
  mark.style.top = 100 * y + "%";
  mark.style.left = 100 * x + "%";
}

let chosen;
function choose(image, y, x) {
  chosen = { image, y, x };
  const similar = data.models.map(model => cosines(model, image, y, x));
  const best = data.models.map(() => ({ value: -2 }));
  for (const pick of picks) {
    const own = Number(pick.dataset.image), number = Number(pick.dataset.model ?? 0),
      model = data.models[number];
    const [h, w] = model.grid, ring = pick.querySelector(".ring");
    ring.hidden = own !== image;
    if (own === image) put(ring, middle(cellAt(y, h), h), middle(cellAt(x, w), w));
    if (pick.dataset.model === undefined) continue;
    const values = similar[number].subarray(own * model.cells, (own + 1) * model.cells);
    paint(pick.querySelector("canvas"), values);
    const match = pick.querySelector(".match"), top = values.indexOf(Math.max(...values));
    match.hidden = own === image;
    const closest = pick.parentElement.querySelector(".closest");
    closest.textContent = own === image ? "" : values[top].toFixed(2);
    if (own === image) continue;
    put(match, middle(Math.floor(top / w), h), middle(top % w, w));
    if (values[top] > best[number].value) best[number] = { value: values[top], picture: own + 1 };
  }
  const [h, w] = data.models[0].grid;
  const closest = data.models.map((model, i) => best[i].picture
    ? `${model.name}: closest elsewhere in picture ${best[i].picture}, \
cosine ${best[i].value.toFixed(2)}` : "");
  document.getElementById("readout").textContent =
    [`Picture ${image + 1}, patch in row ${cellAt(y, h) + 1} of ${h}, ` +
    `column ${cellAt(x, w) + 1} of ${w}`, ...closest.filter(Boolean)].join(". ") + ".";
}

for (const pick of picks) {
  const image = Number(pick.dataset.image);
  pick.addEventListener("click", event => {
    const box = pick.getBoundingClientRect();
    choose(image, (event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
  });
  if (pick.dataset.model !== undefined) continue;
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  pick.addEventListener("focus", () => chosen.image === image || choose(image, 0.5, 0.5));
  pick.addEventListener("keydown", event => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    const grids = data.models.map(model => model.grid), [down, right] = moves[event.key];
    const h = Math.max(...grids.map(grid => grid[0])), w = Math.max(...grids.map(grid => grid[1]));
    const from = chosen.image === image ? chosen : { y: 0.5, x: 0.5 };
    const inside = (share, step, n) =>
      middle(Math.min(n - 1, Math.max(0, cellAt(share, n) + step)), n);
    choose(image, inside(from.y, down, h), inside(from.x, right, w));
  });
}
choose(...data.start);
"""
