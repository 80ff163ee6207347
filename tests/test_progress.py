"""Loops say how far they are: a bar on a terminal, now and then a line where nobody watches."""

import io
from pathlib import Path

import pytest
from tqdm import tqdm

from dinov3core.data import progress as module
from dinov3core.data.progress import Lines, progress
from dinov3core.train.evaluate import main

READ = ["--read.scenes-train", "36", "--read.scenes-test", "24", "--read.scene-videos", "1"]
COMMAND = [*READ, "--size", "16", "--iterations", "10", "--pixel-patch", "8", "--device", "cpu"]


class Clock:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Lines, "_last_line", 0.0)
    monkeypatch.setattr(Lines, "_last_sign", 0.0)
    return clock


def test_a_pipe_gets_a_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture):
    bar = progress(range(100), desc="features", unit="image")
    for index in bar:
        clock.work(0.5)
        bar.set_postfix(loss=f"{index}", refresh=False)
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err
    assert said.err.splitlines() == [
        "features: 20 of 100 images in 00:10, 00:40 left, loss 19",
        "features: 40 of 100 images in 00:20, 00:30 left, loss 39",
        "features: 60 of 100 images in 00:30, 00:20 left, loss 59",
        "features: 80 of 100 images in 00:40, 00:10 left, loss 79",
        "features: 100 of 100 images in 00:50, loss 99",
    ]


def test_short_loops_in_a_row_are_not_silent(clock: Clock, capsys: pytest.CaptureFixture):
    for name in ("first", "second", "third"):
        for _ in progress(range(4), desc=name, unit="step"):
            clock.work(1.5)
    assert capsys.readouterr().err.splitlines() == [
        "second: 3 of 4 steps in 00:04, 00:01 left",
        "second: 4 of 4 steps in 00:06",
    ]
    clock.work(3600)  # a pause is no silence of a loop
    for _ in progress(range(4), desc="alone", unit="step"):
        clock.work(1.5)
    assert capsys.readouterr().err == ""


def test_work_of_an_earlier_process_is_no_speed(clock: Clock, capsys: pytest.CaptureFixture):
    with progress(desc="extract", unit="image", total=1000, initial=900) as bar:
        clock.work(10)
        bar.update(50)
    with progress(desc="reading", unit="file") as bar:  # nobody knows how many
        clock.work(10)
        bar.update(1500)
    assert capsys.readouterr().err.splitlines() == [
        "extract: 950 of 1,000 images in 00:10, 00:10 left",
        "reading: 1,500 files in 00:10",
    ]


def test_a_terminal_gets_a_bar_and_other_processes_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert list(progress(range(3), desc="x", unit="step", shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    bar = progress(range(3), desc="x", unit="step", leave=True)
    assert isinstance(bar, tqdm) and list(bar) == [0, 1, 2] and "3/3" in terminal.getvalue()


def test_every_part_of_an_evaluation_speaks_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(module, "EVERY", 0.0)
    tasks = "knn,linear,segmentation,depth,tracking,correspondence,resolution,dense"
    assert main(["pixels", "--out", str(tmp_path), "--tasks", tasks, *COMMAND]) == 0
    said = capsys.readouterr().err
    parts = ["features", "linear probe", "segmentation: training images", "head", "tracking"]
    parts += ["depth: test images", "correspondence", "resolution: test images", "dense"]
    for part in parts:
        assert f"\n{part}: " in f"\n{said}", part
    assert "\r" not in said
