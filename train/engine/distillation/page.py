"""The page above all students of a distillation: report.html and summary.json of the whole.

All students stand beside their teacher: scores, size, speed, what a step costs, and how they came
there. What was not measured is said to be so. Scores are those of each student's own run; sizes and
speeds are measured here, of the weights that a student's last checkpoint exports.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import nn

from dinov3core.checkpoints import load_model
from dinov3core.data.sizes import in_text
from dinov3core.evals.frozen import frozen
from dinov3core.pictures import bars, page
from dinov3core.pictures.bars import Percent
from dinov3core.pictures.charts import Level, Series, figure
from dinov3core.printable import printable
from dinov3core.train.engine.environment import environment
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.report import STYLE
from dinov3core.writing import write_whole

BATCH = 8  # images of a call whose time is taken
ROUNDS = 7  # calls at least, of which the median counts, but for what follows
STEADY_SECONDS = 0.5  # at least: what disturbs a machine may outlast a few calls of a small network
ENOUGH_SECONDS = 5.0  # after which no further call is made
UNKNOWN = "not measured"


@dataclass(frozen=True)
class StudentOutcome:
    """What became of one student."""

    name: str
    folder: Path
    """of its run"""
    summary: Mapping[str, Any]
    """its summary.json; empty: it did not come to that"""
    size: tuple[int, int]
    """height and width in pixels of the global crops that it sees"""
    seconds: float | None = None
    """of a step, for it alone; None: not measured"""
    ranks: tuple[int, int] = (0, 1)
    """of the processes that trained it: the first, and the one past the last"""
    failure: str = ""
    """why it did not come to its end, as a sentence; empty: it did"""

    @property
    def weights(self) -> Path | None:
        """What its last checkpoint exports; None: there is no checkpoint."""
        files = sorted(self.folder.glob("checkpoints/step_*/teacher.safetensors"))
        return files[-1] if files else None


@dataclass(frozen=True)
class TeacherOutcome:
    """A frozen teacher, as far as it is known."""

    name: str
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """by their names in metrics.jsonl: knn, knn_error, dense_miou, dense_miou_error"""
    weights: Path | None = None
    """a file or folder that `load_model` knows; None: its size and speed are not measured"""
    size: tuple[int, int] = (224, 224)
    """height and width in pixels of its input"""


@dataclass(frozen=True)
class Costs:
    """Seconds of a step beside those of students; None: not measured."""

    teacher: float | None = None
    """the pass of all teachers, or reading what a cache has of it"""
    exchange: float | None = None
    """rows on their way between processes"""
    data: float | None = None
    """waiting for images"""


@dataclass(frozen=True)
class Outcome:
    """A distillation that is over."""

    name: str
    teachers: tuple[TeacherOutcome, ...]
    students: tuple[StudentOutcome, ...]
    costs: Costs = Costs()
    notes: tuple[str, ...] = ()
    """sentences on how it went: who loaded what, what a cache saved"""


class Figures(NamedTuple):
    """A network in numbers; None: not measured."""

    name: str
    knn: Percent | None
    dense: Percent | None
    parameters: int | None
    file_bytes: int | None
    images_per_second: float | None
    size: str  # of its images in pixels
    reason: str  # why something was not measured; empty: there is nothing to say


def write_page(folder: Path, outcome: Outcome, device: torch.device) -> dict[str, Any]:
    """Measure sizes and speeds, write report.html and summary.json, and return the summary.

    Args:
        folder: of the whole; students' folders may be anywhere.
        device: on which speed is measured.
    """
    teachers = [_of_teacher(teacher, device) for teacher in outcome.teachers]
    students = [_of_student(student, device) for student in outcome.students]
    summary = _summary(outcome, teachers, students, device)
    header = _header(outcome, teachers, students)
    sections = [
        _beside(folder, outcome, teachers, students),
        _costs(outcome),
        _curves(outcome, teachers),
        _appendix(outcome, teachers + students, summary, device),
    ]
    written = [section for section in sections if section is not None]
    page.write(
        folder / "report.html",
        page.document(f"{outcome.name}: distillation report", header, written, STYLE + _STYLE),
    )
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _of_student(student: StudentOutcome, device: torch.device) -> Figures:
    """Scores at its end; of one that failed, none: it did not come to its end."""
    scores = {
        "knn": student.summary.get("knn_after"),
        "knn_error": student.summary.get("knn_after_error"),
        "dense_miou": student.summary.get("dense_miou_after"),
        "dense_miou_error": student.summary.get("dense_miou_after_error"),
    }
    return _figures(student.name, scores, student.weights, student.size, device)


def _of_teacher(teacher: TeacherOutcome, device: torch.device) -> Figures:
    return _figures(teacher.name, teacher.scores, teacher.weights, teacher.size, device)


def _figures(
    name: str,
    scores: Mapping[str, object],
    weights: Path | None,
    size: tuple[int, int],
    device: torch.device,
) -> Figures:
    known = {
        "name": name,
        "knn": _percent(scores, "knn", "knn_error"),
        "dense": _percent(scores, "dense_miou", "dense_miou_error"),
        "size": in_text(size if size[0] != size[1] else size[0]),
    }
    nothing = {"parameters": None, "file_bytes": None, "images_per_second": None}
    if weights is None:
        return Figures(**known, **nothing, reason="there is no file of its weights")
    try:
        model = load_model(weights).model
        speed = images_per_second(model, size, device)
    except (ValueError, OSError, RuntimeError) as error:
        return Figures(**known, **nothing, reason=str(error).partition("\n")[0])
    return Figures(
        **known,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=weights.stat().st_size if weights.is_file() else None,
        images_per_second=speed,
        reason="",
    )


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")
def images_per_second(
    model: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How many images a backbone takes in a second, float32: the median over batches.

    They are taken for half a second, and a first one is not counted.

    Args:
        model: with `features`; moved to `device`.
        size: height and width of the images.
    """
    model = model.float().to(device)
    images = torch.randn(BATCH, model.in_channels, *size, device=device)

    def seconds() -> float:
        began = clock()
        model.features(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    with frozen(model):
        seconds()
        taken = [seconds()]
        while sum(taken) < ENOUGH_SECONDS and (len(taken) < ROUNDS or sum(taken) < STEADY_SECONDS):
            taken.append(seconds())
    return BATCH / median(taken)


def _summary(
    outcome: Outcome,
    teachers: Sequence[Figures],
    students: Sequence[Figures],
    device: torch.device,
) -> dict[str, Any]:
    of_students = {
        student.name: _record(figures)
        | {
            "folder": str(student.folder),
            "steps": student.summary.get("steps"),
            "seconds_per_step": _number(student.seconds),
            "ranks": list(student.ranks),
            "failure": student.failure,
        }
        for student, figures in zip(outcome.students, students, strict=True)
    }
    return {
        "recipe": outcome.name,
        "teachers": {figures.name: _record(figures) for figures in teachers},
        "students": of_students,
        "failed": [student.name for student in outcome.students if student.failure],
        "seconds_per_step": {
            name: _number(getattr(outcome.costs, name)) for name in ("teacher", "exchange", "data")
        },
        "notes": list(outcome.notes),
        "environment": environment(device),
    }


def _record(figures: Figures) -> dict[str, Any]:
    """For summary.json."""
    scores = {"knn": figures.knn, "dense": figures.dense}
    flat: dict[str, Any] = {}
    for name, percent in scores.items():
        flat[name] = percent and percent.value
        flat[f"{name}_error"] = percent and percent.error
    speed = figures.images_per_second
    return flat | {
        "parameters": figures.parameters,
        "file_bytes": figures.file_bytes,
        "images_per_second": None if speed is None else round(speed, 1),
        "pixels": figures.size,
        "not_measured": figures.reason,
    }


def _header(outcome: Outcome, teachers: Sequence[Figures], students: Sequence[Figures]) -> str:
    failed = [student for student in outcome.students if student.failure]
    count = len(outcome.students)
    words = f"{count - len(failed)} of {count} students finished"
    tone = "bad" if failed else "good"
    of_failed = "".join(
        f'<p class="bad"><b>Student {escape(printable(student.name))} failed:</b> '
        f"{escape(printable(student.failure))}</p>"
        for student in failed
    )
    scores = {one.name: one.knn for one in (*teachers, *students) if one.knn is not None}
    main = teachers[0].name if teachers else ""
    drawn = bars.bar_list("k-NN top-1 accuracy", scores, main=main)
    return (
        f'<header><p class="kicker">Distillation <span class="pill {tone}">{words}</span></p>'
        f"<h1>{page.breakable(outcome.name)}</h1>"
        f'<p class="lead">{_lead(teachers, students)}</p>{of_failed}'
        f"{drawn}{bars.bar_key('k-NN accuracy', scores)}</header>"
    )


def _lead(teachers: Sequence[Figures], students: Sequence[Figures]) -> str:
    """Who learned from whom, and how near the best of them came."""
    names = " and ".join(escape(printable(teacher.name)) for teacher in teachers)
    number = f"{len(students)} students" if len(students) > 1 else "One student"
    learned = f"{number} learned from {names}."
    scored = [student for student in students if student.knn is not None]
    if not scored:
        return f"{learned} k-NN accuracy was not measured."
    best = max(scored, key=lambda student: student.knn.value)
    said = (
        f"{learned} The best by k-NN, <b>{escape(printable(best.name))}</b>, names the right class "
        f"for <b>{best.knn}</b> of the images asked about"
    )
    of_teachers = [teacher.knn.value for teacher in teachers if teacher.knn is not None]
    if not of_teachers:
        return f"{said}; that of the teacher was not measured."
    # Of the rounded figures, so that a reader who subtracts them finds the same distance.
    gain = round(best.knn.value, 1) - round(max(of_teachers), 1)
    distance = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    return f"{said}, {distance if round(gain, 1) else 'level with'} the teacher."


HEADS = ("", "k-NN", "Linear segmentation", "Parameters", "Weights", "Images per second", "At")


def _beside(
    folder: Path, outcome: Outcome, teachers: Sequence[Figures], students: Sequence[Figures]
) -> page.Section:
    """The table of all, and the way to each student's own report."""
    rows = [_cells(teacher, " (teacher)") for teacher in teachers]
    rows += [
        _cells(figures, *([" (failed)", "did not finish"] if student.failure else []))
        for student, figures in zip(outcome.students, students, strict=True)
    ]
    links = "".join(f"<li>{_link(folder, student)}</li>" for student in outcome.students)
    note = (
        "k-NN and linear segmentation (mean IoU of patches) in percent, each student's at the end "
        "of its own run. Speed is that of the exported network on this machine."
    )
    body = page.facts(rows, HEADS) + f'<h3>Reports of the students</h3><ul class="links">{links}'
    return page.Section("Students beside the teacher", note, f"{body}</ul>")


def _cells(figures: Figures, remark: str = "", without: str = UNKNOWN) -> list[str]:
    """A row of the table.

    Args:
        remark: beside the name.
        without: what stands for a score that there is not.
    """
    parameters = figures.parameters
    size = figures.file_bytes
    speed = figures.images_per_second
    return [
        printable(figures.name) + remark,
        _text(figures.knn, without),
        _text(figures.dense, without),
        UNKNOWN if parameters is None else f"{parameters / 1e6:,.2f} M",
        UNKNOWN if size is None else f"{size / 1e6:,.1f} MB",
        UNKNOWN if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
        f"{figures.size} px",
    ]


def _text(percent: Percent | None, without: str) -> str:
    if percent is None:
        return without
    error = "" if percent.error is None else f" \u00b1 {percent.error:.1f}"
    return f"{percent.value:.1f}{error}"


def _link(folder: Path, student: StudentOutcome) -> str:
    """To a student's own report, where there is one."""
    name = escape(printable(student.name))
    steps = student.summary.get("steps")
    done = "" if steps is None else f": {steps:,} steps"
    failed = "; failed" if student.failure else ""
    path = student.folder / "report.html"
    if not path.is_file():
        return f"{name}{done}: no report{failed}"
    inside = path.is_relative_to(folder)
    place = str(path.relative_to(folder)) if inside else path.resolve().as_uri()
    target = quote(place) if inside else place
    return f'<a href="{escape(target)}">{name}</a>{done}{failed}'


def _costs(outcome: Outcome) -> page.Section | None:
    """What a step of each range of processes consists of."""
    body = ""
    ranges = dict.fromkeys(student.ranks for student in outcome.students)
    for ranks in ranges:
        trained = [student for student in outcome.students if student.ranks == ranks]
        seconds = _parts(outcome.costs, trained)
        known = {name: value for name, value in seconds.items() if value is not None}
        total = sum(known.values())
        if total <= 0:
            continue
        first, past = ranks
        heading = f"Process {first}" if past == first + 1 else f"Processes {first} to {past - 1}"
        shares = {name: Percent(100 * value / total) for name, value in known.items()}
        rows = [
            [name, UNKNOWN if value is None else f"{1e3 * value:,.1f} ms"]
            for name, value in seconds.items()
        ]
        body += f"<h3>{heading}</h3>" if len(ranges) > 1 else ""
        body += bars.bar_list(f"Shares of a step, {heading}", shares, main=TEACHER)
        body += page.facts(rows, ("Part", "Time of a step"))
    notes = "".join(f"<li>{escape(printable(note))}</li>" for note in outcome.notes)
    body += f'<ul class="links">{notes}</ul>' if notes else ""
    note = "Shares of the time of a step; what was not measured is left out of them."
    return page.Section("What a step costs", note, body) if body else None


TEACHER = "Teacher"


def _parts(costs: Costs, trained: Sequence[StudentOutcome]) -> dict[str, float | None]:
    """Seconds by what is shown of them."""
    shared = {TEACHER: costs.teacher, "Exchange": costs.exchange, "Waiting for data": costs.data}
    own = {f"Student {printable(student.name)}": student.seconds for student in trained}
    return {name: _number(value) for name, value in (shared | own).items()}


CURVES = (
    ("k-NN accuracy", "Percent; bands are one standard error.", "knn", "knn_error"),
    (
        "Linear segmentation",
        "Percent; bands are one standard error.",
        "dense_miou",
        "dense_miou_error",
    ),
    (
        "Loss",
        "Of each student's objective; students with other terms have other losses.",
        "loss",
        "",
    ),
    ("RankMe", "Effective number of feature directions in use.", "rankme", ""),
)


def _curves(outcome: Outcome, teachers: Sequence[Figures]) -> page.Section | None:
    """Every score of all students in one chart."""
    rows_of = {student.name: _rows(student.folder) for student in outcome.students}
    body = ""
    for title, note, key, error_key in CURVES:
        series = [_series(name, rows, key, error_key) for name, rows in rows_of.items()]
        known = [one for one in series if one.values]
        if known:
            levels = [
                Level(printable(teacher.name), percent.value)
                for teacher in teachers
                for percent in [{"knn": teacher.knn, "dense_miou": teacher.dense}.get(key)]
                if percent is not None
            ]
            body += figure(title, note, known, levels=levels)
    note = "Over training steps, with the last value of each; dashed lines are teachers."
    return page.Section("Curves", note, f'<div class="charts">{body}</div>') if body else None


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def _series(name: str, rows: Sequence[Mapping[str, object]], key: str, error_key: str) -> Series:
    points = [
        (row["step"], value, _number(row.get(error_key)))
        for row in rows
        if (value := _number(row.get(key))) is not None
    ]
    steps, values, errors = zip(*points) if points else ((), (), ())
    return Series(printable(name), steps, values, errors if None not in errors else ())


def _appendix(
    outcome: Outcome,
    networks: Sequence[Figures],
    summary: Mapping[str, Any],
    device: torch.device,
) -> page.Section:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    how = (
        f"Speed: batches of {BATCH} images of random pixels through the backbone, float32, on "
        f"{device.type}{threads}; the median over {STEADY_SECONDS:g} s or longer, after a first "
        "batch that is not counted."
    )
    missing = "".join(
        f"<li>{escape(printable(one.name))}: {escape(printable(one.reason))}</li>"
        for one in networks
        if one.reason
    )
    items = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in summary["environment"].items()
    )
    body = f"<p>{escape(how)}</p>"
    if missing:
        body += f'<p>Size and speed were not measured:</p><ul class="links">{missing}</ul>'
    body += page.folded("Environment", f'<dl class="table">{items}</dl>')
    return page.Section("How it was measured", "", body)


def _percent(scores: Mapping[str, object], key: str, error_key: str) -> Percent | None:
    value = _number(scores.get(key))
    return None if value is None else Percent(value, _number(scores.get(error_key)))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


_STYLE = """\
.links { margin:8px 0 18px } .links li { padding:2px 0 } .links a { color:var(--accent) }
section > h3 { margin:18px 0 4px }
"""
