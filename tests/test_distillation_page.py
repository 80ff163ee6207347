"""The page above all students: what it says, what it measures, and what it does not invent."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3core.checkpoints import save_weights
from dinov3core.models import VisionTransformer, VitSettings
from dinov3core.train.engine.distillation import page as module
from dinov3core.train.engine.distillation.page import (
    BATCH,
    Costs,
    Outcome,
    StudentOutcome,
    TeacherOutcome,
    images_per_second,
    write_page,
)
from dinov3core.train.engine.monitor import of_row

CPU = torch.device("cpu")
SIZE = (32, 32)


def weights_in(folder: Path, width: int) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(width)
    settings = VitSettings(width=width, depth=1, heads=2, patch_size=16, registers=1)
    path = folder / "teacher.safetensors"
    save_weights(VisionTransformer(settings), path)
    return path


def rows_of(steps: int, knn: float) -> list[dict]:
    rows: list[dict] = [{"step": step, "loss": 9 - step / 100} for step in range(10, steps, 10)]
    for step in range(0, steps + 1, 50):
        score = knn * step / steps
        scores = {"knn": score, "knn_error": 1.5, "dense_miou": score / 2, "dense_miou_error": 0.5}
        rows.append({"step": step, "event": "eval", "rankme": 40.0, **scores})
    return rows


def student_in(out: Path, name: str, width: int, knn: float, **fields) -> StudentOutcome:
    """A student whose run came to its end."""
    folder = out / name
    weights_in(folder / "checkpoints" / "step_00000100", width)
    weights_in(folder / "checkpoints" / "step_00000200", width)
    rows = rows_of(200, knn)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.html").write_text("<p>its own</p>")
    last = {"knn": knn, "knn_error": 1.5, "dense_miou": knn / 2, "dense_miou_error": 0.5}
    summary = {"steps": 200}
    for score in ("knn", "dense_miou"):  # under the names of a run's own summary
        summary |= of_row(score, last, "after")
    return StudentOutcome(name, folder, summary, SIZE, **fields)


def failed_in(out: Path, name: str, **fields) -> StudentOutcome:
    """A student whose loss was NaN: its folder is as its own run would leave it."""
    student = student_in(out, name, 32, 30.0, **fields)
    (student.folder / "report.html").unlink()
    sentence = "20 steps in a row had a NaN or Inf (loss); lower optim.lr"
    return replace(student, summary={}, failure=sentence)


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    out = tmp_path / "run"
    teacher = TeacherOutcome(
        "runs/quickstart",
        {"knn": 61.2, "knn_error": 1.4, "dense_miou": 33.0, "dense_miou_error": 0.6},
        weights_in(tmp_path / "teacher", 64),
        SIZE,
    )
    students = (
        student_in(out, "small", 32, 52.5, seconds=0.1),
        student_in(out, "large", 48, 58.3, seconds=0.2),
        failed_in(out, "third", seconds=0.1),
    )
    notes = ("8 images a step, loaded by 1 process: 8 by each of 1; none is dropped",)
    return Outcome("quickstart_distill", (teacher,), students, Costs(0.4, None, 0.05), notes)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.0)


class Reader(HTMLParser):
    """Text of a page, what its elements are, and where its links go."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.classes: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.links += [given["href"]] if tag == "a" else []
        self.classes.append(given.get("class") or "")
        if tag not in ("meta", "wbr", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def page_of(outcome: Outcome, folder: Path) -> tuple[Reader, dict]:
    summary = write_page(folder, outcome, CPU)
    reader = Reader((folder / "report.html").read_text())
    assert not reader.open
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    return reader, summary


def test_students_stand_beside_their_teacher(outcome, tmp_path):
    reader, summary = page_of(outcome, tmp_path / "run")
    text = reader.text
    assert "3 students learned from runs/quickstart. The best by k-NN, large, names" in text
    assert "58.3 \u00b1 1.5 % of the images asked about, 2.9 points below the teacher." in text
    assert "quickstart_distill" in text and "none is dropped" in text
    for title in ("k-NN accuracy", "Linear segmentation", "Loss", "RankMe"):
        assert text.count(title) >= 1
    large = summary["students"]["large"]
    assert (large["knn"], large["knn_error"], large["dense"]) == (58.3, 1.5, 29.15)
    assert large["steps"] == 200 and large["seconds_per_step"] == 0.2 and large["failure"] == ""
    assert summary["teachers"]["runs/quickstart"]["knn"] == 61.2


def test_sizes_and_speeds_are_those_of_the_exported_weights(outcome, tmp_path):
    _, summary = page_of(outcome, tmp_path / "run")
    for student, width in zip(outcome.students, (32, 48, 32)):
        record = summary["students"][student.name]
        settings = VitSettings(width=width, depth=1, heads=2, patch_size=16, registers=1)
        count = sum(p.numel() for p in VisionTransformer(settings).parameters())
        newest = student.folder / "checkpoints/step_00000200/teacher.safetensors"
        assert student.weights == newest and record["file_bytes"] == newest.stat().st_size
        assert record["parameters"] == count and record["images_per_second"] > 0
        assert record["pixels"] == "32"


def test_a_student_that_failed_is_named_in_plain_words_and_without_green(outcome, tmp_path):
    reader, summary = page_of(outcome, tmp_path / "run")
    assert "2 of 3 students finished" in reader.text
    assert "Student third failed: 20 steps in a row had a NaN or Inf (loss)" in reader.text
    assert "third (failed)did not finishdid not finish" in reader.text
    assert "third: no report; failed" in reader.text
    assert not any("good" in name.split() for name in reader.classes)
    assert summary["failed"] == ["third"] and summary["students"]["third"]["knn"] is None
    whole = replace(outcome, students=outcome.students[:2])
    reader, summary = page_of(whole, tmp_path / "run")
    assert "pill good" in reader.classes and summary["failed"] == []
    assert "bad" not in " ".join(reader.classes) and "failed" not in reader.text


def test_links_lead_to_the_reports_of_students(outcome, tmp_path):
    folder = tmp_path / "run"
    reader, _ = page_of(outcome, folder)
    links = [link for link in reader.links if not link.startswith("#")]
    assert links == ["small/report.html", "large/report.html"]
    assert all((folder / link).is_file() for link in links)
    elsewhere = student_in(tmp_path / "other place", "afar", 32, 50.0)
    reader, _ = page_of(replace(outcome, students=(elsewhere,)), folder)
    assert reader.links[-1] == (elsewhere.folder / "report.html").as_uri()


def test_shares_of_a_step_are_those_of_the_processes_that_work_together(outcome, tmp_path):
    reader, summary = page_of(outcome, tmp_path / "run")
    # 0.4 s teacher, 0.05 data, 0.1 + 0.2 + 0.1 students; the exchange is not known.
    shares = dict(re.findall(r"(Teacher|Student [a-z]+|Waiting for data)(\d+\.\d) %", reader.text))
    assert shares == {
        "Teacher": "47.1", "Waiting for data": "5.9",
        "Student small": "11.8", "Student large": "23.5", "Student third": "11.8",
    }  # fmt: skip
    assert "Exchangenot measured" in reader.text and "Teacher400.0 ms" in reader.text
    assert summary["seconds_per_step"] == {"teacher": 0.4, "exchange": None, "data": 0.05}

    small, large, third = outcome.students
    apart = (
        replace(small, ranks=(0, 1)),
        replace(large, ranks=(1, 3)),
        replace(third, ranks=(1, 3)),
    )
    reader, _ = page_of(replace(outcome, students=apart), tmp_path / "run")
    assert "Process 0" in reader.text and "Processes 1 to 2" in reader.text
    shares = re.findall(r"Student ([a-z]+)(\d+\.\d) %", reader.text)
    assert shares == [("small", "18.2"), ("large", "26.7"), ("third", "13.3")]


def test_what_was_not_measured_is_said(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    teacher = TeacherOutcome("a model of somebody else")
    student = StudentOutcome("only", out / "only", {}, SIZE)
    reader, summary = page_of(Outcome("run", (teacher,), (student,)), out)
    assert "One student learned from a model of somebody else. k-NN accuracy was not" in reader.text
    assert reader.text.count("not measured") >= 10
    assert "only: there is no file of its weights" in reader.text
    assert "What a step costs" not in reader.text and "Curves" not in reader.text
    for record in (*summary["students"].values(), *summary["teachers"].values()):
        assert all(record[key] is None for key in ("knn", "dense", "parameters", "file_bytes"))


def test_numbers_that_are_none_and_names_that_are_hostile(outcome, tmp_path):
    folder = tmp_path / "run"
    student = replace(
        outcome.students[0],
        name="<b>\x1b[31m",
        summary={"knn_after": float("nan"), "steps": 200},
        seconds=float("nan"),
    )
    reader, _ = page_of(replace(outcome, students=(student,)), folder)
    assert "nan" not in reader.text.lower() and "\x1b" not in reader.text
    assert "NaN" not in (folder / "summary.json").read_text()
    assert "<b>\\x1b[31m" in reader.text


def test_weights_that_cannot_be_opened_are_a_sentence(outcome, tmp_path):
    student = outcome.students[0]
    student.weights.write_bytes(b"what is left of a file")
    reader, summary = page_of(replace(outcome, students=(student,)), tmp_path / "run")
    record = summary["students"]["small"]
    assert record["parameters"] is None and record["images_per_second"] is None
    assert record["knn"] == 52.5 and record["not_measured"] and "\n" not in record["not_measured"]
    assert "Size and speed were not measured: small: " in reader.text.replace(":small", ": small")


class Clocked(nn.Module):
    """Takes the next of some durations on a clock of its own."""

    in_channels = 3

    def __init__(self, durations: list[float]):
        super().__init__()
        self.left = list(durations)
        self.now = 0.0
        self.calls: list[tuple[int, ...]] = []

    def features(self, images: torch.Tensor) -> None:
        assert not self.training
        self.calls.append(tuple(images.shape))
        self.now += self.left.pop(0)


def test_speed_is_the_median_after_a_warm_up(monkeypatch):
    model = Clocked([3.0, 0.2, 0.1, 0.9, 0.1, 0.2, 0.2, 0.3])
    speed = images_per_second(model, (32, 48), CPU, clock=lambda: model.now)
    assert speed == pytest.approx(BATCH / 0.2)
    assert model.calls == [(BATCH, 3, 32, 48)] * (1 + module.ROUNDS)
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.5)
    disturbed = Clocked([9.0] + [0.02] * 10 + [0.01] * 40)
    speed = images_per_second(disturbed, SIZE, CPU, clock=lambda: disturbed.now)
    assert speed == pytest.approx(BATCH / 0.01) and disturbed.now == pytest.approx(9.5, abs=0.02)
    slow = Clocked([50.0, 40.0, 1.0])
    assert images_per_second(slow, SIZE, CPU, clock=lambda: slow.now) == pytest.approx(BATCH / 40)
    assert len(slow.calls) == 2
