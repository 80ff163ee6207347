"""The shell of a page in one file: light and dark, any width, pictures inside, no network."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov3core.writing import write_whole


class Section(NamedTuple):
    """A part of a page."""

    title: str
    note: str  # a sentence or two below the heading; empty for none
    body: str  # HTML


def document(title: str, header: str, sections: Sequence[Section], style: str = "") -> str:
    """A whole page: header, a bar of links that stays in view, the sections.

    Args:
        header: HTML.
        style: CSS that is added to that of every page.
    """
    links = "".join(f'<a href="#part-{i}">{escape(s.title)}</a>' for i, s in enumerate(sections, 1))
    parts = [header, f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 1 else ""]
    for number, section in enumerate(sections, 1):
        note = f"<p>{escape(section.note)}</p>" if section.note else ""
        heading = f"<h2>{escape(section.title)}</h2>"
        parts.append(f'<section id="part-{number}">{heading}{note}{section.body}</section>')
    return _DOCUMENT.format(
        title=escape(title), style=_STYLE + style, body="\n".join(filter(None, parts))
    )


def write(path: Path, text: str) -> None:
    """Replace a page at once; a lone surrogate, which UTF-8 does not have, becomes an escape."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def breakable(name: str) -> str:
    """A name as HTML that may be broken where its parts meet."""
    return re.sub(r"([:/_.-])(?=\w)", r"\1<wbr>", escape(name))


def img(picture: np.ndarray | Image.Image, alt: str) -> str:
    """A picture, uint8 [H, W, 3] or of Pillow, as an <img> element that holds it.

    As JPEG: a gallery of eight images and two models is 18 MB as PNG. The sheets are the lossless
    copies. What is transparent, for the ground of the page to show through, stays PNG.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    kind = "png" if image.mode == "RGBA" else "jpeg"
    options = {"quality": 85, "subsampling": 0} if kind == "jpeg" else {}
    image.save(buffer, kind, optimize=True, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/{kind};base64,{data}">'
    )


def card(views: Sequence[tuple[str, str]]) -> str:
    """Pictures that belong together side by side: pairs of a name and an <img> element."""
    many = " many" if len(views) > 4 else ""
    return f'<div class="card{many}">{figures(views)}</div>'


def figures(views: Sequence[tuple[str, str]]) -> str:
    """Pairs of a name and an <img> element as figures."""
    return "".join(
        f"<figure>{image}<figcaption>{breakable(name)}</figcaption></figure>"
        for name, image in views
    )


def groups(parts: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """One card of groups of small pictures, side by side where there is room.

    Args:
        parts: the name of each group and its pictures, as for `card`.
    """
    inner = "".join(
        f'<div class="group"><h3>{breakable(name)}</h3>'
        f'<div class="many">{figures(views)}</div></div>'
        for name, views in parts
    )
    return f'<div class="card groups">{inner}</div>'


def cards(contents: Sequence[str]) -> str:
    """Cards in rows of as many as there is room for."""
    return f'<div class="cards">{"".join(contents)}</div>'


def sheets(views: Sequence[tuple[str, str]]) -> str:
    """Large pictures on white, two in a row where there is room.

    Args:
        views: pairs of a caption and an <img> element.
    """
    return cards(
        [
            f'<figure class="sheet">{image}<figcaption>{escape(name)}</figcaption></figure>'
            for name, image in views
        ]
    )


def folded(summary: str, body: str) -> str:
    """HTML that is hidden until the line above it is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def scale(bar: np.ndarray, low: str, high: str) -> str:
    """A colour bar, uint8 [h, w, 3], between the words for its ends."""
    picture = img(bar, f"colour scale from {low} to {high}")
    return f'<div class="scale">{escape(low)} {picture} {escape(high)}</div>'


def facts(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A small table whose first column names the row; on a narrow screen a row becomes a list."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = ""
    for name, *cells in rows:
        columns = zip(heads[1:], cells, strict=True)
        inner = "".join(
            f'<td data-head="{escape(head)}">{escape(cell)}</td>' for head, cell in columns
        )
        body += f'<tr><th scope="row">{breakable(name)}</th>{inner}</tr>'
    return f'<table class="wide"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


_DOCUMENT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { --ground:#fbfbf9; --card:#fff; --ink:#1d2126; --soft:#5d656f; --line:#e2e3df;
  --accent:#0072b2 }
@media (prefers-color-scheme: dark) { :root { --ground:#14171b; --card:#1c2026; --ink:#e8eaed;
  --soft:#9ca5af;
  --line:#2e343c; --accent:#5ab4e8 } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink); line-height:1.55;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,\
sans-serif }
main { max-width:1180px; margin:0 auto; padding:40px 24px 72px }
h1 { font-size:2.3rem; line-height:1.15; margin:0 0 12px; letter-spacing:-.02em;
  overflow-wrap:anywhere }
h2 { font-size:1.4rem; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere }
nav { position:sticky; top:0; z-index:2; display:flex; gap:4px 20px; overflow-x:auto;
  margin:28px -24px 0; padding:10px 24px; background:var(--ground); font-size:.9rem;
  border-bottom:1px solid var(--line); scrollbar-width:thin }
nav a { color:var(--accent); text-decoration:none; white-space:nowrap }
nav a:hover { text-decoration:underline }
html { scroll-padding-top:60px }
section { margin-top:44px } section > p { color:var(--soft); max-width:74ch; margin:0 0 18px }
.kicker, .skipped { color:var(--soft); margin:0 0 6px } .skipped { margin-top:12px }
.lead { font-size:1.15rem; max-width:62ch; margin:0 0 22px }
figure { margin:0; min-width:0 } img { max-width:100%; height:auto; display:block }
.cards { display:grid; gap:16px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr)) }
.card { display:grid; grid-auto-flow:column; grid-auto-columns:1fr; gap:10px;
  background:var(--card);
  border:1px solid var(--line); border-radius:10px; padding:14px }
.many { display:grid; gap:10px; grid-auto-flow:row;
  grid-template-columns:repeat(auto-fill,minmax(66px,1fr)) }
.card.groups { gap:18px; grid-template-columns:110px }
.group .many { grid-template-columns:repeat(auto-fit,minmax(56px,1fr)) }
.group img { max-width:160px }
.group h3 { font-size:.9rem; margin:0 0 8px; overflow-wrap:anywhere }
.card img { width:100%; border-radius:5px }
figcaption { font-size:.84rem; color:var(--soft); text-align:center; margin-top:5px;
  overflow-wrap:anywhere }
.sheet { background:#fff; color:#1d2126; border:1px solid var(--line); border-radius:10px;
  padding:14px }
.sheet img { margin:0 auto } .sheet figcaption { color:inherit }
.scale { display:flex; gap:8px; align-items:center; margin:0 0 14px; font-size:.84rem;
  color:var(--soft);
  flex-wrap:wrap } .scale img { width:160px; height:9px; border-radius:3px }
table { border-collapse:collapse; font-size:.92rem }
th, td { text-align:left; padding:6px 18px 6px 0; border-bottom:1px solid var(--line);
  vertical-align:top; overflow-wrap:anywhere }
thead th { color:var(--soft); font-weight:400; font-size:.82rem }
@media (max-width:560px) { main { padding:24px 16px 48px } h1 { font-size:1.75rem }
  .lead { font-size:1.05rem }
  nav { margin:20px -16px 0; padding:10px 16px } .card { padding:10px; gap:7px }
  .card.groups { grid-auto-flow:row; grid-template-columns:1fr }
  .wide thead { display:none } .wide, .wide tbody, .wide tr, .wide th, .wide td { display:block }
  .wide th, .wide td { border:0; padding:1px 0 }
  .wide tr { border-bottom:1px solid var(--line); padding:8px 0 }
  .wide td { display:grid; grid-template-columns:minmax(90px,130px) 1fr; gap:12px }
  .wide td::before { content:attr(data-head); color:var(--soft) } }
"""
