"""report.html of a run: did it learn, what did it cost, and what does the model see now?

One file, no network. What is drawn is drawn in `dinov3core.pictures`; here stands what a run says.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from dinov3core.evals.differences import Measured, standing
from dinov3core.pictures import bars, page, states
from dinov3core.pictures.bars import Percent
from dinov3core.pictures.charts import Level, Mark, Series, figure
from dinov3core.pictures.states import Snapshot
from dinov3core.printable import printable


def write_report(
    run_folder: Path | str,
    before: Snapshot | None,
    after: Snapshot | None,
    metrics_rows: Sequence[Mapping[str, object]],
    summary: Mapping[str, object],
    config_text: str,
) -> Path:
    """Write report.html in the run's folder at once; whatever is missing is left out.

    Args:
        before, after: snapshots of the model as the run began and as it ended.
        metrics_rows: rows of metrics.jsonl, training and evaluation mixed.
        summary: of summary.json; k-NN in percent with standard errors, `collapse` a kind, `verdict`
            its badge and `collapse_sentence` its explanation; `patches`, `patches_sentence` and
            `patches_command` the same of patches, with what mends them, and `patches_since` the
            step from which they have degraded; `best` the best evaluation,
            `best_sentence` the same in words; `images` the sets looked at in words, `began` what
            the run began as (empty: an untrained network), `skipped` names of images, `environment`
            a mapping.
        config_text: the resolved configuration as text.
    """
    name = str(summary.get("recipe") or Path(run_folder).resolve().name)
    scores = _scores(before, after, summary)
    sets = summary.get("images")
    sets = sets if isinstance(sets, Mapping) else {}
    facts = _facts(before, after, metrics_rows, summary) + _sets(sets)
    header = _headline(name, scores, summary, facts)
    named = ((scores.start.badge, before), ("Trained", after))
    known = {name: snapshot for name, snapshot in named if snapshot is not None}
    sections = [
        _charts(metrics_rows, scores, summary),
        states.components(known, _of(sets, "shown")),
        states.similarity(known, _of(sets, "shown")),
        states.nearest_images(known, _of(sets, "neighbours")),
        _appendix(summary, config_text),
    ]
    written = [section for section in sections if section is not None]
    text = page.document(f"{name}: pretraining report", header, written, STYLE)
    path = Path(run_folder) / "report.html"
    page.write(path, text)
    return path


Sets = Mapping[str, object]  # the images of a run in words, see probe.py


class Start(NamedTuple):
    """What the model as a run began is called."""

    badge: str
    bar: str
    phrase: str


UNTRAINED = Start("Untrained", "Untrained network", "the untrained network")
OF_STAGE = Start("At the start", "At the start of this stage", "the start of this stage")


class KnnScores(NamedTuple):
    """k-NN of three representations, and what guessing gives, in percent; None: not measured."""

    pixels: Percent | None
    before: Percent | None
    after: Percent | None
    chance: float | None
    start: Start


def _scores(
    before: Snapshot | None, after: Snapshot | None, summary: Mapping[str, object]
) -> KnnScores:
    """From the summary, else from the snapshots."""
    untrained = before.scalars.get("knn") if before is not None else None
    trained = after.scalars.get("knn") if after is not None else None
    return KnnScores(
        _score(summary, "knn_pixels", None),
        _score(summary, "knn_before", untrained),
        _score(summary, "knn_after", trained),
        _number(summary.get("knn_chance")),
        OF_STAGE if summary.get("began") else UNTRAINED,
    )


def _score(summary: Mapping[str, object], key: str, otherwise: float | None) -> Percent | None:
    value = _first(_number(summary.get(key)), otherwise)
    return None if value is None else Percent(value, _number(summary.get(f"{key}_error")))


# Of kinds of verdict; all others are neutral.
TONES = {"none": "good", "uniform": "bad", "dimensional": "bad"}


def _headline(name: str, scores: KnnScores, summary: Mapping[str, object], facts: str) -> str:
    verdict = str(summary.get("verdict") or "")
    tone = TONES.get(str(summary.get("collapse")), "neutral")
    pill = f'<span class="pill {tone}">{escape(verdict)}</span>' if verdict else ""
    began = summary.get("began") and f"{name} {summary['began']}."
    said = (began, summary.get("stopped"), summary.get("collapse_sentence"))
    sentence = "<br>".join(escape(str(text)) for text in said if text)
    return (
        f'<header><p class="kicker">Self-supervised pretraining {pill}</p>'
        f"<h1>{page.breakable(name)}</h1>"
        f'<p class="lead">{_lead(scores)}</p>{_bars(scores)}'
        f'<p class="verdict">{sentence}</p>{_of_patches(summary)}{facts}</header>'
    )


def _of_patches(summary: Mapping[str, object]) -> str:
    """Whether the patches have degraded, what mends them, and which step was best."""
    command = str(summary.get("patches_command") or "")
    judged = summary.get("patches") not in (None, "not_judged")
    sentences = (
        str(summary.get("patches_sentence")) if judged else "",
        str(summary.get("best_sentence") or ""),
    )
    patches, best = (f'<p class="verdict">{escape(text)}</p>' if text else "" for text in sentences)
    return f"{patches}{f'<pre>{escape(command)}</pre>' if command else ''}{best}"


def _lead(scores: KnnScores) -> str:
    if scores.after is None:
        return "k-NN accuracy was not measured in this run."
    others = ((scores.start.phrase, scores.before), ("raw pixels", scores.pixels))
    gains = [
        standing(Measured(*scores.after), Measured(*other), name)
        for name, other in others
        if other is not None
    ]
    return (
        "Nearest neighbours in feature space name the right class for "
        f"<b>{scores.after}</b> of the images asked "
        f"about{': ' if gains else ''}{' and '.join(gains)}."
    )


AFTER = "After training"


def _bars(scores: KnnScores) -> str:
    names = ("Raw pixels", scores.start.bar, AFTER)
    known = {name: score for name, score in zip(names, scores) if score is not None}
    chance = None if scores.chance is None else Level("chance", scores.chance)
    drawn = bars.bar_list("k-NN top-1 accuracy", known, main=AFTER, level=chance)
    return drawn + bars.bar_key("k-NN accuracy", known, chance)


def _sets(sets: Sets) -> str:
    """Which images all of this is about."""
    names = (
        ("trained", "Trained on"),
        ("shown", "Pictures of patches, RankMe, drift"),
        ("neighbours", "Nearest neighbours"),
        ("knn", "k-NN accuracy"),
        ("dense", "Dense scores"),
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
    measured = [snapshot.scalars for snapshot in (before, after) if snapshot is not None]
    ranks = [f"{scalars['rankme']:.1f}" for scalars in measured if "rankme" in scalars]
    last = max((_number(row.get("step")) or 0 for row in rows), default=0)
    steps = _first(_number(summary.get("steps")), last or None)
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


MATCHED = ("cls_of_", "patches_of_")  # begin the names of a teacher's terms
CHARTS = (
    Chart(
        "Losses",
        "Cross-entropy in nats. Below ln K, the student predicts the teacher better than chance.",
        (("DINO global", "dino_global"), ("DINO local", "dino_local"), ("iBOT", "ibot")),
        log_k=True,
    ),
    Chart(
        "Entropies",
        "In nats. Targets that stay at ln K are uniform and teach nothing.",
        (("Targets", "target_entropy"), ("Student", "student_entropy")),
        log_k=True,
    ),
    Chart(
        "k-NN accuracy",
        "Percent, EMA teacher; the band is one standard error.",
        (("Teacher", "knn"),),
    ),
    Chart(
        "Linear segmentation",
        "Mean IoU in percent of a linear rule for patches; the band is one standard error.",
        (("Teacher", "dense_miou"),),
    ),
    Chart("RankMe", "Effective number of feature directions in use.", (("RankMe", "rankme"),)),
    Chart(
        "Prototype usage",
        "Share of prototypes that are some image's best match.",
        (("Used", "prototype_usage"),),
    ),
    Chart(
        "Patch drift",
        "How far patch similarities moved from the reference.",
        (("Drift", "patch_drift"),),
    ),
    Chart(
        "Regularisers",
        "KoLeo spreads the features; Gram holds patch similarities.",
        (("KoLeo", "koleo"), ("Gram", "gram")),
    ),
    Chart(
        "Gradient norms",
        "Before clipping, logarithmic.",
        (
            ("Backbone", "grad_norm_backbone"),
            ("DINO head", "grad_norm_dino_head"),
            ("iBOT head", "grad_norm_ibot_head"),
            ("Adapters", "grad_norm_adapters"),
        ),
        log=True,
    ),
    Chart("Learning rate", "After scaling with the batch.", (("lr", "lr"),)),
    Chart(
        "Throughput",
        "Images per second, data loading included.",
        (("Images/s", "images_per_second"),),
    ),
    Chart("Waiting for data", "Percent of the step's time.", (("Waiting", "data_share"),)),
)


def _charts(
    rows: Sequence[Mapping[str, object]], scores: KnnScores, summary: Mapping[str, object]
) -> page.Section | None:
    charts = (_of_frozen_teachers(rows), *CHARTS)
    figures = _both(rows, summary) + "".join(_chart(chart, rows, scores) for chart in charts)
    note = f"Over training steps, with the last value of each.{_several_sizes(rows)}"
    return page.Section("Curves", note, f'<div class="charts">{figures}</div>') if figures else None


def _of_frozen_teachers(rows: Sequence[Mapping[str, object]]) -> Chart:
    """The terms of teachers without heads, as many as there are."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(MATCHED))
    curves = tuple((key.replace("_", " ", 2), key) for key in names)
    note = "Share of the teacher's variance that is not explained; 1: its mean alone is known."
    return Chart("Features of teachers", note, curves)


def _several_sizes(rows: Sequence[Mapping[str, object]]) -> str:
    """What a reader of curves has to know of a run with several crop sizes."""
    values = (_number(row.get("global_size")) for row in rows)
    sizes = sorted({f"{value:.0f}" for value in values if value is not None}, key=int)
    if len(sizes) < 2:
        return ""
    listed = f"{', '.join(sizes[:-1])} and {sizes[-1]}"
    return (
        f" Steps with global crops of {listed} px are mixed: losses, gradient norms and images per "
        "second depend on the size, so that a jump from one point to the next may be no more than "
        "another size. Evaluations have one size."
    )


def _both(rows: Sequence[Mapping[str, object]], summary: Mapping[str, object]) -> str:
    """The figure in which patches are seen to degrade while images are told apart better."""
    patches = _series(rows, "Patch agreement (right axis)", "dense_agreement")
    if not patches.values:
        return ""
    knn = _series(rows, "k-NN, images (left axis)", "knn")
    marks = []
    best = summary.get("best")
    if isinstance(best, Mapping) and best["step"] != patches.steps[-1]:
        marks.append(Mark("kept as best", best["step"]))
    since = _number(summary.get("patches_since"))
    if since is not None:
        marks = [Mark("patches were best", since), *(m for m in marks if m.step != since)]
    title = "Images and patches"
    note = "Percent, EMA teacher; bands are one standard error. At 50 % patches say nothing."
    if not knn.values:
        patches = patches._replace(name="Patch agreement")
        return figure(title, note, [patches], marks=marks)
    return figure(title, note, [knn], right=patches, marks=marks)


def _chart(chart: Chart, rows: Sequence[Mapping[str, object]], scores: KnnScores) -> str:
    series = [_series(rows, name, key) for name, key in chart.curves]
    # A term that is off is logged as zero throughout; on its own it would only flatten the others.
    alone = len(chart.curves) == 1
    series = [curve for curve in series if curve.values and (any(curve.values) or alone)]
    if chart.log:
        series = [curve for curve in series if any(value > 0 for value in curve.values)]
    if not series:
        return ""
    levels: list[Level] = []
    if chart.log_k and (log_k := _series(rows, "ln K", "log_k").values):
        levels.append(Level("ln K", log_k[-1]))
    if chart.title == "k-NN accuracy":
        known = ((scores.start.badge, scores.before), ("Raw pixels", scores.pixels))
        levels += [Level(name, score.value) for name, score in known if score is not None]
        levels += [Level("Chance", scores.chance)] if scores.chance is not None else []
    return figure(chart.title, chart.note, series, levels=levels, log=chart.log)


def _series(rows: Sequence[Mapping[str, object]], name: str, key: str) -> Series:
    points = []
    for row in rows:
        step = _number(row.get("step"))
        value = _data_share(row) if key == "data_share" else _number(row.get(key))
        if step is not None and value is not None:
            points.append((step, value, _number(row.get(f"{key}_error"))))
    points.sort(key=lambda point: point[0])
    steps, values, errors = zip(*points) if points else ((), (), ())
    return Series(name, steps, values, errors if None not in errors else ())


def _data_share(row: Mapping[str, object]) -> float | None:
    """Percent of a step's time that went by waiting for data."""
    work = _number(row.get("step_seconds"))
    wait = _number(row.get("data_seconds"))
    if work is None or wait is None or work + wait <= 0:
        return None
    return 100 * wait / (work + wait)


def _of(sets: Sets, key: str) -> str:
    """A sentence that names the images of a section, where they are known."""
    return f" Images from: {sets[key]}." if sets.get(key) else ""


def _appendix(summary: Mapping[str, object], config_text: str) -> page.Section | None:
    parts = []
    skipped = summary.get("skipped") or ()
    if skipped:
        items = "".join(f"<li>{escape(printable(str(name)))}</li>" for name in skipped)
        parts.append(page.folded(f"Skipped images ({len(skipped)} listed)", f"<ul>{items}</ul>"))
    if config_text:
        parts.append(page.folded("Configuration", f"<pre>{escape(config_text)}</pre>"))
    environment = summary.get("environment")
    if isinstance(environment, Mapping):
        items = "".join(
            f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in environment.items()
        )
        parts.append(page.folded("Environment", f'<dl class="table">{items}</dl>'))
    return page.Section("How it was run", "", "".join(parts)) if parts else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _plain(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# What a report has beside the style of every page.
_HEAD_STYLE = """
:root { --good:#00734f; --bad:#b23a00; --series-0:#0072b2; --series-1:#d55e00; --series-2:#009e73;
  --series-3:#a8588a;
  --series-4:#8a6d00 }
@media (prefers-color-scheme: dark) { :root { --good:#4fcf9f; --bad:#ff9d66; --series-0:#5ab4e8;
  --series-1:#ff9248;
  --series-2:#3fd0a0; --series-3:#e39ac4; --series-4:#e6c04a } }
h3 { font-size:1rem; margin:0; color:var(--ink) }
.kicker { display:flex; gap:12px; align-items:center; flex-wrap:wrap }
.pill { border:1.5px solid currentColor; border-radius:99px; padding:1px 12px; font-size:.85rem;
  font-weight:600 }
.good { color:var(--good) } .bad { color:var(--bad) } .neutral { color:var(--soft) }
.verdict { color:var(--soft); max-width:74ch }
ul { list-style:none; margin:0; padding:0 }
"""
_BODY_STYLE = """\
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(120px,1fr)); gap:12px 24px;
  margin:24px 0 0; padding:18px 0 0; border-top:1px solid var(--line) }
.facts dt { color:var(--soft); font-size:.82rem } .facts dd { margin:0; font-size:1.15rem;
  font-weight:600 }
.charts { display:flex; flex-wrap:wrap; gap:18px } .charts figure { flex:1 1 min(100%,320px) }
.charts figure, .pair figure { background:var(--card); border:1px solid var(--line);
  border-radius:10px; padding:14px }
.charts figure { display:flex; flex-direction:column } .chart { margin-top:auto; padding-top:6px }
.charts figcaption, .pair figcaption { text-align:left; margin-top:0 }
.charts figcaption p { color:var(--soft); font-size:.84rem; margin:2px 0 8px; line-height:1.4 }
.chart { display:block; width:100%; max-width:440px; margin-inline:auto; height:auto;
  color:var(--soft); font-size:11.5px }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px; font-size:.82rem }
  .legend svg { margin-right:6px }
.legend b { font-variant-numeric:tabular-nums }
.pair { display:grid; gap:16px; grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr)) }
.pair img { width:100%; max-width:640px } .pair figcaption { margin-top:10px; font-size:.92rem }
details { border-top:1px solid var(--line); padding:12px 0 } summary { cursor:pointer;
  font-weight:600 }
pre, details ul, .table dd {
  font:13px/1.5 ui-monospace,"Cascadia Mono","DejaVu Sans Mono",Menlo,monospace }
pre { overflow-x:auto; margin:10px 0 0 } details ul { margin-top:10px; overflow-wrap:anywhere }
.table div { display:grid; grid-template-columns:minmax(110px,200px) 1fr; gap:14px; padding:3px 0 }
.table dt { color:var(--soft) } .table dd { margin:0; overflow-wrap:anywhere }
.sets { margin:22px 0 0; font-size:.92rem }
.sets div { grid-template-columns:minmax(110px,240px) 1fr }
.sets dd { font:inherit }
@media (max-width:560px) { .bars li, .table div { grid-template-columns:1fr; gap:2px }
  .table div { padding:6px 0 } }
"""
STYLE = _HEAD_STYLE + bars.STYLE + _BODY_STYLE
