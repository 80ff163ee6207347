"""A run killed at any moment and continued equals one left alone to the last bit, times apart.

`DINOV3CORE_FUZZ=14` makes it 42 kills.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from forked_runs import Forked, ForkedRun, two_ranks
from PIL import Image
from tiny_runs import checkpoint_of, metrics_of, summary_of, tensors_of, tiny_command

from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.pretrain import exit_status

KILLS = 3 * int(os.environ.get("DINOV3CORE_FUZZ", "1"))
STEPS = 20
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = 1.5  # seconds; a run takes about two


def command(out: Path) -> list[str]:
    """Evaluations at 0, 6, 12, 18, 20, checkpoints at 4, 8, ... 20: apart, together, at the end."""
    drawing = ("--backbone.drop-path", "0.3", "--backbone.rope.rescale", "2")
    return tiny_command(out, *drawing, "--run.eval-every", "6", "--run.checkpoint-every", "4")


def has_row(out: Path, step: int, event: str | None) -> bool:
    rows = read_rows(out / "metrics.jsonl")
    return any(row["step"] == step and row.get("event") == event for row in rows)


def moment(number: int, draw: random.Random, out: Path) -> tuple[Callable[[], bool], float]:
    """What to wait for (a checkpoint, an evaluation, the report, nothing) and seconds after it."""
    if number % 4 == 0:
        step = draw.choice([4, 12, 20])
        return lambda: checkpoint_of(out, step).is_dir(), draw.choice([0, draw.uniform(0, 0.1)])
    if number % 4 == 1:
        step = draw.choice([6, 12, 18, 20])
        return lambda: has_row(out, step, None), draw.uniform(0, 0.05)
    if number % 4 == 2:
        return lambda: has_row(out, STEPS, "eval"), draw.choice([0, draw.uniform(0, 1.5)])
    return lambda: True, draw.uniform(0, LONGEST)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run = ForkedRun(command(out), out.parent / "log")
    assert run.wait() == 0, run.said()
    return out


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_equals_one_left_alone(alone: Path, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    out, log = tmp_path / "run", tmp_path / "log"
    for _ in range(draw.choice([1, 1, 2])):
        run = ForkedRun(command(out), log)
        happened, delay = moment(number, draw, out)
        while run.running() and not happened():
            time.sleep(0.001)
        time.sleep(delay)
        if not run.running() or (out / "summary.json").is_file():
            run.end()
            break
        run.signal(draw.choice(SIGNALS))
        run.wait()
    if not (out / "summary.json").is_file():
        run = ForkedRun(command(out), log)
        assert run.wait() == 0, run.said()
    assert not (tmp_path / "run.1").exists()  # it was never taken for finished
    assert metrics_of(out) == metrics_of(alone), run.said()
    assert summary_of(out) == summary_of(alone)
    want = tensors_of(alone, STEPS, tmp_path / "alone.pt")
    got = tensors_of(out, STEPS, tmp_path / "killed.pt")
    assert got.keys() == want.keys() and {"buffers.prototype_counts"} < want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    assert "Traceback" not in run.said()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen pictures, some too small, and three that cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(16):
        side = 20 if index % 4 == 0 else 40
        picture = Image.new("RGB", (side, side), (index * 15, 80, 255 - index * 15))
        picture.save(folder / f"{index:02d}.png")
    for index in range(3):
        (folder / f"broken{index}.png").write_bytes(b"not an image")
    return folder


def test_two_processes_count_as_if_never_stopped(tmp_path: Path, images: Path) -> None:
    """Images that were skipped or enlarged, and prototypes in use."""
    more = ("--data.source", str(images), "--data.probe", "none", "--run.epoch-steps", "8")
    more += ("--run.eval-every", "6")
    for name, stops in (("alone", 0), ("stopped", 1)):
        argv = tiny_command(tmp_path / name, *more)
        for attempt in range(stops + 1):
            with two_ranks(tmp_path / f"log_{name}{attempt}_", exit_status, argv) as ranks:
                if attempt < stops:
                    ranks[0].until(lambda: has_row(tmp_path / "stopped", 3, None))
                    ranks[1].signal(signal.SIGTERM)
                wanted = 143 if attempt < stops else 0
                assert [rank.wait() for rank in ranks] == [wanted] * 2, said(ranks)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "alone")
    assert summary_of(tmp_path / "stopped") == summary_of(tmp_path / "alone")
    assert summary_of(tmp_path / "alone")["skipped_images"] > 3
    assert summary_of(tmp_path / "alone")["enlarged_images"] > 3
    assert len(summary_of(tmp_path / "alone")["skipped"]) == 3


def said(ranks: list[Forked]) -> str:
    return "\n".join(rank.said() for rank in ranks)
