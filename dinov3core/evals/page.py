"""The shell of a page in one file: style for light and dark and any width, pictures inside, nothing from a network."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; `style` is added to the page's own."""
    return _DOCUMENT.format(title=escape(title), style=_STYLE + style, body=body)


def section(title: str, note: str, body: str) -> str:
    """A heading, a sentence or two unless there is nothing to say, and what they are about."""
    said = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def img(picture: np.ndarray | Image.Image, alt: str) -> str:
    """A picture, uint8 [H, W, 3] or of Pillow, as an <img> element that holds it.

    As JPEG: a gallery of eight images and two models is 18 MB as PNG. The sheets are the lossless copies. What is
    transparent, for the ground of the page to show through, stays PNG.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    kind, how = ("png", {}) if image.mode == "RGBA" else ("jpeg", {"quality": 85, "subsampling": 0})
    image.save(buffer, kind, optimize=True, **how)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}" src="data:image/{kind};base64,{data}">'
    )


def card(views: Sequence[tuple[str, str]]) -> str:
    """Pictures that belong together side by side: pairs of a name and an <img> element."""
    figures = "".join(f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>" for name, image in views)
    return f'<div class="card{" many" if len(views) > 4 else ""}">{figures}</div>'


def cards(contents: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(contents)}</div>'


def sheets(views: Sequence[tuple[str, str]]) -> str:
    """Large pictures on white, two in a row where there is room: pairs of a caption and an <img> element."""
    figures = (
        f'<figure class="sheet">{image}<figcaption>{escape(name)}</figcaption></figure>' for name, image in views
    )
    return cards(list(figures))


def scale(bar: np.ndarray, low: str, high: str) -> str:
    """A colour bar, uint8 [h, w, 3], between the words for its ends."""
    picture = img(bar, f"colour scale from {low} to {high}")
    return f'<div class="scale">{escape(low)} {picture} {escape(high)}</div>'


def facts(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A small table whose first column names the row."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


_DOCUMENT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { --ground:#fbfbf9; --card:#fff; --ink:#1d2126; --soft:#5d656f; --line:#e2e3df; --accent:#0072b2 }
@media (prefers-color-scheme: dark) { :root { --ground:#14171b; --card:#1c2026; --ink:#e8eaed; --soft:#9ca5af;
  --line:#2e343c; --accent:#5ab4e8 } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink); line-height:1.55;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif }
main { max-width:1180px; margin:0 auto; padding:40px 24px 72px }
h1 { font-size:2.3rem; line-height:1.15; margin:0 0 12px; letter-spacing:-.02em; overflow-wrap:anywhere }
h2 { font-size:1.4rem; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere }
section { margin-top:52px } section > p { color:var(--soft); max-width:74ch; margin:0 0 18px }
.kicker, .skipped { color:var(--soft); margin:0 0 6px } .skipped { margin-top:12px }
.lead { font-size:1.15rem; max-width:62ch; margin:0 0 22px }
figure { margin:0; min-width:0 } img { max-width:100%; height:auto; display:block }
.cards { display:grid; gap:16px; grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr)) }
.card { display:grid; grid-auto-flow:column; grid-auto-columns:1fr; gap:10px; background:var(--card);
  border:1px solid var(--line); border-radius:10px; padding:14px }
.card.many { grid-auto-flow:row; grid-template-columns:repeat(auto-fit,minmax(66px,1fr)) }
.card img { width:100%; border-radius:5px }
figcaption { font-size:.84rem; color:var(--soft); text-align:center; margin-top:5px; overflow-wrap:anywhere }
.sheet { background:#fff; color:#1d2126; border:1px solid var(--line); border-radius:10px; padding:14px }
.sheet img { margin:0 auto } .sheet figcaption { color:inherit }
.scale { display:flex; gap:8px; align-items:center; margin:0 0 14px; font-size:.84rem; color:var(--soft);
  flex-wrap:wrap } .scale img { width:160px; height:9px; border-radius:3px }
.wide { overflow-x:auto } table { border-collapse:collapse; font-size:.92rem }
th, td { text-align:left; padding:6px 18px 6px 0; border-bottom:1px solid var(--line); white-space:nowrap }
thead th { color:var(--soft); font-weight:400; font-size:.82rem }
@media (max-width:560px) { main { padding:24px 16px 48px } h1 { font-size:1.75rem } .lead { font-size:1.05rem }
  .card { padding:10px; gap:7px } }
"""
