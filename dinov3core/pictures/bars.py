"""Percentages as horizontal bars of HTML, with standard errors and a line to compare with."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from dinov3core.pictures.charts import Level

# Percent of a track's width that one percent takes: the figure behind the bar has room.
_SCALE = 0.8


class Percent(NamedTuple):
    """A percentage and its standard error, None where that is not known; as text it is HTML."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.value:.1f} %"
        return f"{self.value:.1f} &plusmn; {self.error:.1f} %"


def bar_list(
    title: str, percents: Mapping[str, Percent], *, main: str, level: Level | None = None
) -> str:
    """Bars below one another as an HTML list; empty without any.

    Args:
        title: for screen readers.
        percents: by the name shown.
        main: the name of the bar that stands out.
        level: a dashed line across all bars.
    """
    if not percents:
        return ""
    items = "".join(
        f"<li{' class=main' if name == main else ''}><span>{escape(name)}</span>"
        f"{_bar(percent, level)}</li>"
        for name, percent in percents.items()
    )
    return f'<ul class="bars" aria-label="{escape(title)}">{items}</ul>'


def bar_key(subject: str, percents: Mapping[str, Percent], level: Level | None = None) -> str:
    """What the lines of a `bar_list` mean, in a sentence about `subject`; empty without lines."""
    meanings = []
    if percents and level is not None:
        meanings.append(f"the dashed line is {escape(level.name)}, {level.value:.1f} %")
    if any(percent.error is not None for percent in percents.values()):
        meanings.append("&plusmn; and the thin line are one standard error")
    return f'<p class="key">{escape(subject)}; {"; ".join(meanings)}.</p>' if meanings else ""


def _bar(percent: Percent, level: Level | None) -> str:
    marks = ""
    if level is not None:
        marks += f'<i class="chance" style="left:{_SCALE * level.value:.1f}%"></i>'
    if percent.error is not None:
        left = _SCALE * max(percent.value - percent.error, 0)
        width = _SCALE * 2 * percent.error
        marks += f'<i class="error" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
    end = _SCALE * (percent.value + (percent.error or 0))
    return (
        f'<div><i class="bar" style="width:{_SCALE * percent.value:.1f}%"></i>{marks}'
        f'<b style="left:{end:.1f}%">{percent}</b></div>'
    )


STYLE = """\
.bars li { display:grid; grid-template-columns:150px 1fr; align-items:center; gap:4px 14px;
  margin:8px 0 }
.bars div { position:relative; height:22px } .bars i { position:absolute }
.bars b { position:absolute; padding-left:10px; white-space:nowrap;
  font-variant-numeric:tabular-nums }
.bar { left:0; height:22px; background:var(--soft); opacity:.45; border-radius:4px; min-width:2px }
.bars .main .bar { background:var(--accent); opacity:1 } .bars .main { font-weight:600 }
.error { top:10px; height:2px; background:var(--ink) }
.chance { top:-4px; height:30px; border-left:2px dashed var(--ink) }
.key { color:var(--soft); font-size:.84rem; margin:6px 0 18px }
"""
