"""A run that is killed (kill -9) continues as if nothing had happened, to the last bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import checkpoint_of, metrics_of, tensors_of, tiny_command

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
STEPS = 20


def command(out: Path, *more: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    drawing = ("--backbone.drop-path", "0.3", "--backbone.rope.rescale", "2")
    slow = ("--run.batch-size", "16", "--run.checkpoint-every", "10")  # time to be killed in
    return [*launcher, "train/pretrain.py", *tiny_command(out, *drawing, *slow, *more)]


def finish(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, **options),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def kill_after_checkpoint(out: Path, step: int) -> None:
    """Start a run and kill -9 it once the checkpoint of `step` is there and two more steps are in
    the metrics.
    """
    run = subprocess.Popen(
        command(out),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not checkpoint_of(out, step).is_dir() or metrics_of(out)[-1]["step"] < step + 2:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not checkpoint_of(out, STEPS).exists()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    ran = finish(out)
    assert ran.returncode == 0, ran.stderr
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed somewhere after step 10 of 20."""
    out = tmp_path_factory.mktemp("killed") / "run"
    kill_after_checkpoint(out, 10)
    return out


@pytest.fixture
def copy_of_killed(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_kill_and_resume_equals_one_go_to_the_last_bit(
    straight: Path, copy_of_killed: Path, tmp_path: Path
) -> None:
    ran = finish(copy_of_killed)
    assert ran.returncode == 0, ran.stderr
    want = tensors_of(straight, STEPS, tmp_path / "straight.pt")
    got = tensors_of(copy_of_killed, STEPS, tmp_path / "resumed.pt")
    assert got.keys() == want.keys() and any(name.startswith("optimizer.") for name in want)
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    assert metrics_of(copy_of_killed) == metrics_of(straight)


def test_metrics_hold_every_step_once(straight: Path) -> None:
    rows = metrics_of(straight)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, STEPS]


def test_one_process_resumes_as_two(copy_of_killed: Path) -> None:
    ran = finish(copy_of_killed, "--run.batch-size", "8", processes=2)
    assert ran.returncode == 0, ran.stderr
    assert "resuming after step 10" in ran.stderr
    assert [row["step"] for row in metrics_of(copy_of_killed) if "loss" in row] == list(
        range(1, STEPS + 1)
    )
    assert json.loads((copy_of_killed / "summary.json").read_text())["steps"] == STEPS


def test_another_architecture_is_refused_with_one_sentence(copy_of_killed: Path) -> None:
    ran = finish(copy_of_killed, "--backbone.width", "48")
    assert ran.returncode == 1
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("error:")]
    assert (
        "another recipe: backbone.width 32 -> 48. Give" in sentence
        and "give another --run.out" in sentence
    )
    assert "Traceback" not in ran.stderr
    assert checkpoint_of(copy_of_killed, 10).is_dir()
