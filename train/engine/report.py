"""report.html of a run: did it learn, what did it cost, and what does the model see now?

One file, no network.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dinov3core.pictures import page, paint
from dinov3core.pictures.charts import Level, Series, legend, line_chart
from dinov3core.printable import printable
from dinov3core.train.engine.snapshot import Snapshot, take_snapshot

__all__ = ["Snapshot", "take_snapshot", "write_report"]


def write_report(
    run_folder: Path | str,
    before: Snapshot | None,
    after: Snapshot | None,
    metrics_rows: Sequence[Mapping[str, object]],
    summary: Mapping[str, object],
    config_text: str,
) -> Path:
    """Write `run_folder`/report.html, replacing an older one at once; whatever is missing is left
    out.

    Args:
        before, after: snapshots of the untrained and the trained model.
        metrics_rows: rows of metrics.jsonl, training and evaluation mixed.
        summary: of summary.json; k-NN in percent with standard errors, `collapse` a kind, `verdict`
            its badge and `collapse_sentence` its explanation, `images` the sets looked at in words,
            `skipped` names of images, `environment` a mapping.
        config_text: the resolved configuration as text.
    """
    name = str(summary.get("recipe") or Path(run_folder).resolve().name)
    scores = _scores(before, after, summary)
    sets = summary.get("images")
    sets = sets if isinstance(sets, Mapping) else {}
    header = _headline(
        name, scores, summary, _facts(before, after, metrics_rows, summary) + _sets(sets)
    )
    sections = [
        _charts(metrics_rows, scores),
        _pca(before, after, sets),
        _cosines(before, after, sets),
        _neighbours(before, after, sets),
        _appendix(summary, config_text),
    ]
    text = page.document(
        f"{name}: pretraining report", header, [s for s in sections if s is not None], _STYLE
    )
    path = Path(run_folder) / "report.html"
    page.write(path, text)
    return path


Sets = Mapping[str, object]  # the images of a run in words, see probe.py


class Score(NamedTuple):
    """k-NN top-1 and its standard error, both in percent."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return (
            f"{self.value:.1f} %"
            if self.error is None
            else f"{self.value:.1f} &plusmn; {self.error:.1f} %"
        )


class Scores(NamedTuple):
    """k-NN of three representations, and what guessing gives, in percent; None: not measured."""

    pixels: Score | None
    untrained: Score | None
    trained: Score | None
    chance: float | None


def _scores(
    before: Snapshot | None, after: Snapshot | None, summary: Mapping[str, object]
) -> Scores:
    """From the summary, else from the snapshots."""
    untrained, trained = (s.scalars.get("knn") if s is not None else None for s in (before, after))
    return Scores(
        _score(summary, "knn_pixels", None),
        _score(summary, "knn_before", untrained),
        _score(summary, "knn_after", trained),
        _number(summary.get("knn_chance")),
    )


def _score(summary: Mapping[str, object], key: str, otherwise: float | None) -> Score | None:
    value = _first(_number(summary.get(key)), otherwise)
    return None if value is None else Score(value, _number(summary.get(f"{key}_error")))


TONES = {
    "none": "good",
    "uniform": "bad",
    "dimensional": "bad",
}  # of kinds of verdict; others are neutral


def _headline(name: str, scores: Scores, summary: Mapping[str, object], facts: str) -> str:
    verdict, tone = (
        str(summary.get("verdict") or ""),
        TONES.get(str(summary.get("collapse")), "neutral"),
    )
    pill = f'<span class="pill {tone}">{escape(verdict)}</span>' if verdict else ""
    sentence = escape(str(summary.get("collapse_sentence") or ""))
    return (
        f'<header><p class="kicker">Self-supervised pretraining {pill}</p>'
        f"<h1>{page.breakable(name)}</h1>"
        f'<p class="lead">{_lead(scores)}</p>{_bars(scores)}'
        f'<p class="verdict">{sentence}</p>{facts}</header>'
    )


def _lead(scores: Scores) -> str:
    if scores.trained is None:
        return "k-NN accuracy was not measured in this run."
    others = (("the untrained network", scores.untrained), ("raw pixels", scores.pixels))
    # Of the rounded figures, so that a reader who subtracts them finds the same gain.
    gains = [
        f"{_points(round(scores.trained.value, 1) - round(other.value, 1))} {name}"
        for name, other in others
        if other is not None
    ]
    return (
        "Nearest neighbours in feature space name the right class for "
        f"<b>{scores.trained}</b> of the images asked "
        f"about{': ' if gains else ''}{' and '.join(gains)}."
    )


def _points(gain: float) -> str:
    if round(gain, 1) == 0:
        return "level with"
    return f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"


# Percent of a track's width that one percent of accuracy takes: the figure behind has room.
_BAR = 0.8


def _bars(scores: Scores) -> str:
    names = ("Raw pixels", "Untrained network", "After training")
    known = [(name, score) for name, score in zip(names, scores) if score is not None]
    if not known:
        return ""
    items = "".join(
        f"<li{' class=main' if name == 'After training' else ''}><span>{name}</span>{_bar(score, scores.chance)}</li>"
        for name, score in known
    )
    legend = (
        [f"the dashed line is chance, {scores.chance:.1f} %"] if scores.chance is not None else []
    )
    if any(score.error is not None for _, score in known):
        legend.append("&plusmn; and the thin line are one standard error")
    key = f'<p class="key">k-NN accuracy; {"; ".join(legend)}.</p>' if legend else ""
    return f'<ul class="bars" aria-label="k-NN top-1 accuracy">{items}</ul>{key}'


def _bar(score: Score, chance: float | None) -> str:
    marks = "" if chance is None else f'<i class="chance" style="left:{_BAR * chance:.1f}%"></i>'
    if score.error is not None:
        left, width = _BAR * max(score.value - score.error, 0), _BAR * 2 * score.error
        marks += f'<i class="error" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
    end = _BAR * (score.value + (score.error or 0))
    return (
        f'<div><i class="bar" style="width:{_BAR * score.value:.1f}%"></i>{marks}'
        f'<b style="left:{end:.1f}%">{score}</b></div>'
    )


def _sets(sets: Sets) -> str:
    """Which images all of this is about."""
    names = (
        ("trained", "Trained on"),
        ("shown", "Pictures of patches, RankMe, drift"),
        ("neighbours", "Nearest neighbours"),
        ("knn", "k-NN accuracy"),
    )
    rows = [(label, str(sets[key])) for key, label in names if sets.get(key)]
    items = "".join(f"<div><dt>{label}</dt><dd>{escape(text)}</dd></div>" for label, text in rows)
    return f'<dl class="table sets">{items}</dl>' if items else ""


def _facts(
    before: Snapshot | None,
    after: Snapshot | None,
    rows: Sequence[Mapping[str, object]],
    summary: Mapping[str, object],
) -> str:
    ranks = [
        f"{s.scalars['rankme']:.1f}"
        for s in (before, after)
        if s is not None and "rankme" in s.scalars
    ]
    steps = _first(
        _number(summary.get("steps")),
        max((_number(r.get("step")) or 0 for r in rows), default=0) or None,
    )
    memory = _number(summary.get("peak_memory_bytes"))
    shown = [
        ("Training time", _duration(_number(summary.get("seconds")))),
        ("Steps", None if steps is None else f"{steps:,.0f}"),
        ("Images per second", _plain(_number(summary.get("images_per_second")))),
        ("RankMe", " to ".join(ranks) or None),
        ("Peak memory", None if memory is None else f"{memory / 2**30:.2f} GiB"),
        ("Skipped steps", _plain(_number(summary.get("bad_steps")))),
        ("Skipped images", _plain(_number(summary.get("skipped_images")))),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in shown if text is not None
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


class Chart(NamedTuple):
    """One chart of the report: title, what it says, and (name, metrics key) of its curves."""

    title: str
    note: str
    curves: tuple[tuple[str, str], ...]
    log_k: bool = False
    log: bool = False


CHARTS = (
    Chart("Losses", "Cross-entropy in nats. Below ln K, the student predicts the teacher better than chance.",
          (("DINO global", "dino_global"), ("DINO local", "dino_local"), ("iBOT", "ibot")), log_k=True),
    Chart("Entropies", "In nats. Targets that stay at ln K are uniform and teach nothing.",
          (("Targets", "target_entropy"), ("Student", "student_entropy")), log_k=True),
    Chart("k-NN accuracy", "Percent, EMA teacher; the band is one standard error.",
          (("Teacher", "knn"),)),
    Chart("RankMe", "Effective number of feature directions in use.", (("RankMe", "rankme"),)),
    Chart("Prototype usage", "Share of prototypes that are some image's best match.", (("Used", "prototype_usage"),)),
    Chart("Patch drift", "How far patch similarities moved from the reference.", (("Drift", "patch_drift"),)),
    Chart("Regularisers", "KoLeo spreads the features; Gram holds patch similarities.",
          (("KoLeo", "koleo"), ("Gram", "gram"))),
    Chart("Gradient norms", "Before clipping, logarithmic.",
          (("Backbone", "grad_norm_backbone"), ("DINO head", "grad_norm_dino_head"),
           ("iBOT head", "grad_norm_ibot_head")), log=True),
    Chart("Learning rate", "After scaling with the batch.", (("lr", "lr"),)),
    Chart("Throughput", "Images per second, data loading included.", (("Images/s", "images_per_second"),)),
    Chart("Waiting for data", "Percent of the step's time.", (("Waiting", "data_share"),)),
)  # fmt: skip


def _charts(rows: Sequence[Mapping[str, object]], scores: Scores) -> page.Section | None:
    figures = "".join(_chart(chart, rows, scores) for chart in CHARTS)
    note = "Over training steps, with the last value of each."
    return page.Section("Curves", note, f'<div class="charts">{figures}</div>') if figures else None


def _chart(chart: Chart, rows: Sequence[Mapping[str, object]], scores: Scores) -> str:
    series = [_series(rows, name, key) for name, key in chart.curves]
    # A term that is off is logged as zero throughout; on its own it would only flatten the others.
    series = [s for s in series if s.values and (any(s.values) or len(chart.curves) == 1)]
    if chart.log:
        series = [s for s in series if any(v > 0 for v in s.values)]
    if not series:
        return ""
    levels = []
    if chart.log_k and (found := _series(rows, "ln K", "log_k").values):
        levels.append(Level("ln K", found[-1]))
    if chart.title == "k-NN accuracy":
        known = (("Untrained", scores.untrained), ("Raw pixels", scores.pixels))
        levels += [Level(name, score.value) for name, score in known if score is not None]
        levels += [Level("Chance", scores.chance)] if scores.chance is not None else []
    svg = line_chart(chart.title, series, levels=levels, log=chart.log)
    caption = f"<figcaption><h3>{chart.title}</h3><p>{chart.note}</p></figcaption>"
    return f"<figure>{caption}{legend(series, levels)}{svg}</figure>"


def _series(rows: Sequence[Mapping[str, object]], name: str, key: str) -> Series:
    points = []
    for row in rows:
        step, value = (
            _number(row.get("step")),
            _data_share(row) if key == "data_share" else _number(row.get(key)),
        )
        if step is not None and value is not None:
            points.append((step, value, _number(row.get(f"{key}_error"))))
    points.sort(key=lambda point: point[0])
    steps, values, errors = zip(*points) if points else ((), (), ())
    return Series(name, steps, values, errors if None not in errors else ())


def _data_share(row: Mapping[str, object]) -> float | None:
    work, wait = _number(row.get("step_seconds")), _number(row.get("data_seconds"))
    return (
        100 * wait / (work + wait)
        if work is not None and wait is not None and work + wait > 0
        else None
    )


def _pca(before: Snapshot | None, after: Snapshot | None, sets: Sets) -> page.Section | None:
    states = _states(before, after)
    if not states:
        return None
    cards = []
    for i, photo in enumerate(states[0][1].photos):
        views = [
            (name, page.img(s.pca[i], f"Patch features of picture {i + 1}, {name.lower()}"))
            for name, s in states
        ]
        cards.append(page.card([("Image", page.img(photo, f"Picture {i + 1}")), *views]))
    note = (
        "The three leading principal components of the patch features as red, green and blue, "
        "joint over all pictures of a column: the same colour means the same features. Objects and "
        "their parts should stand out. Small images are enlarged before the model sees them."
    )
    return page.Section("What the patches know", note + _of(sets, "shown"), page.cards(cards))


def _cosines(before: Snapshot | None, after: Snapshot | None, sets: Sets) -> page.Section | None:
    states = _states(before, after)
    if not states:
        return None
    cards = []
    for i, photo in enumerate(states[0][1].photos):
        size = states[0][1].pca.shape[1:3]
        large = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC))
        point, grid = tuple(states[0][1].points[i]), states[0][1].cosines.shape[1:]
        views = [
            (
                "Chosen patch",
                page.img(
                    paint.mark_point(large, point, grid), f"Picture {i + 1}, one patch ringed"
                ),
            )
        ]
        for name, snapshot in states:
            heat = paint.heatmap(torch.from_numpy(snapshot.cosines[i : i + 1]), size=size)[0]
            heat = paint.mark_point(heat, point, grid)
            views.append(
                (
                    name,
                    page.img(
                        heat, f"Similarity to the ringed patch of picture {i + 1}, {name.lower()}"
                    ),
                )
            )
        cards.append(page.card(views))
    scale = page.scale(
        paint.heatmap(torch.linspace(0, 1, 64)[None, None], size=(8, 256))[0], "0", "1"
    )
    note = "Cosine similarity of the ringed patch to every other patch, on one scale for all."
    return page.Section(
        "What belongs together", note + _of(sets, "shown"), scale + page.cards(cards)
    )


def _neighbours(before: Snapshot | None, after: Snapshot | None, sets: Sets) -> page.Section | None:
    figures = []
    for name, s in _states(before, after):
        if not s.agreement.size:  # a single image has no others
            continue
        known = bool((s.agreement >= 0).all())
        sheet = paint.neighbour_sheet(s.queries, s.neighbours, s.agreement == 1 if known else None)
        count = (
            f"{int((s.agreement == 1).sum())} of {s.agreement.size} show the class asked for"
            if known
            else ""
        )
        alt = f"{len(s.queries)} queries with {s.neighbours.shape[1]} nearest images each, {name.lower()}. {count}"
        caption = f"<b>{name}</b>{': ' + count if count else ''}"
        figures.append(f"<figure>{page.img(sheet, alt)}<figcaption>{caption}</figcaption></figure>")
    if not figures:
        return None
    note = "Left the image asked about, right of it the images whose CLS token is closest."
    if known:
        note += (
            " A tick and a blue frame mark the same class, a cross and an orange frame another one."
        )
    body = f'<div class="pair">{"".join(figures)}</div>'
    return page.Section("Nearest neighbours", note + _of(sets, "neighbours"), body)


def _of(sets: Sets, key: str) -> str:
    """A sentence that names the images of a section, where they are known."""
    return f" Images from: {sets[key]}." if sets.get(key) else ""


def _appendix(summary: Mapping[str, object], config_text: str) -> page.Section | None:
    parts = []
    skipped = summary.get("skipped") or ()
    if skipped:
        items = "".join(f"<li>{escape(printable(str(name)))}</li>" for name in skipped)
        parts.append(
            f"<details><summary>Skipped images ({len(skipped)} "
            f"listed)</summary><ul>{items}</ul></details>"
        )
    if config_text:
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>"
        )
    environment = summary.get("environment")
    if isinstance(environment, Mapping):
        items = "".join(
            f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>"
            for k, v in environment.items()
        )
        parts.append(
            f'<details><summary>Environment</summary><dl class="table">{items}</dl></details>'
        )
    return page.Section("How it was run", "", "".join(parts)) if parts else None


def _states(before: Snapshot | None, after: Snapshot | None) -> list[tuple[str, Snapshot]]:
    return [(name, s) for name, s in (("Untrained", before), ("Trained", after)) if s is not None]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)


def _plain(value: float | None) -> str | None:
    return (
        None
        if value is None
        else f"{value:,.0f}"
        if value == int(value) or value >= 100
        else f"{value:.1f}"
    )


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# What a report has beside the style of every page.
_STYLE = """
:root { --good:#00734f; --bad:#b23a00; --series-0:#0072b2; --series-1:#d55e00; --series-2:#009e73; --series-3:#a8588a;
  --series-4:#8a6d00 }
@media (prefers-color-scheme: dark) { :root { --good:#4fcf9f; --bad:#ff9d66; --series-0:#5ab4e8; --series-1:#ff9248;
  --series-2:#3fd0a0; --series-3:#e39ac4; --series-4:#e6c04a } }
h3 { font-size:1rem; margin:0; color:var(--ink) }
.kicker { display:flex; gap:12px; align-items:center; flex-wrap:wrap }
.pill { border:1.5px solid currentColor; border-radius:99px; padding:1px 12px; font-size:.85rem; font-weight:600 }
.good { color:var(--good) } .bad { color:var(--bad) } .neutral { color:var(--soft) }
.verdict { color:var(--soft); max-width:74ch }
ul { list-style:none; margin:0; padding:0 }
.bars li { display:grid; grid-template-columns:150px 1fr; align-items:center; gap:4px 14px; margin:8px 0 }
.bars div { position:relative; height:22px } .bars i { position:absolute }
.bars b { position:absolute; padding-left:10px; white-space:nowrap;
  font-variant-numeric:tabular-nums }
.bar { left:0; height:22px; background:var(--soft); opacity:.45; border-radius:4px; min-width:2px }
.bars .main .bar { background:var(--accent); opacity:1 } .bars .main { font-weight:600 }
.error { top:10px; height:2px; background:var(--ink) }
.chance { top:-4px; height:30px; border-left:2px dashed var(--ink) }
.key { color:var(--soft); font-size:.84rem; margin:6px 0 18px }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(120px,1fr)); gap:12px 24px;
  margin:24px 0 0; padding:18px 0 0; border-top:1px solid var(--line) }
.facts dt { color:var(--soft); font-size:.82rem } .facts dd { margin:0; font-size:1.15rem; font-weight:600 }
.charts { display:flex; flex-wrap:wrap; gap:18px } .charts figure { flex:1 1 min(100%,320px) }
.charts figure, .pair figure { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px }
.charts figure { display:flex; flex-direction:column } .chart { margin-top:auto; padding-top:6px }
.charts figcaption, .pair figcaption { text-align:left; margin-top:0 }
.charts figcaption p { color:var(--soft); font-size:.84rem; margin:2px 0 8px; line-height:1.4 }
.chart { display:block; width:100%; max-width:440px; margin-inline:auto; height:auto;
  color:var(--soft); font-size:11.5px }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px; font-size:.82rem } .legend svg { margin-right:6px }
.legend b { font-variant-numeric:tabular-nums }
.pair { display:grid; gap:16px; grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr)) }
.pair img { width:100%; max-width:640px } .pair figcaption { margin-top:10px; font-size:.92rem }
details { border-top:1px solid var(--line); padding:12px 0 } summary { cursor:pointer; font-weight:600 }
pre, details ul, .table dd { font:13px/1.5 ui-monospace,"Cascadia Mono","DejaVu Sans Mono",Menlo,monospace }
pre { overflow-x:auto; margin:10px 0 0 } details ul { margin-top:10px; overflow-wrap:anywhere }
.table div { display:grid; grid-template-columns:minmax(110px,200px) 1fr; gap:14px; padding:3px 0 }
.table dt { color:var(--soft) } .table dd { margin:0; overflow-wrap:anywhere }
.sets { margin:22px 0 0; font-size:.92rem }
.sets div { grid-template-columns:minmax(110px,240px) 1fr }
.sets dd { font:inherit }
@media (max-width:560px) { .bars li, .table div { grid-template-columns:1fr; gap:2px }
  .table div { padding:6px 0 } }
"""
