"""A run asked to stop saves and says where; one whose partner hangs or dies says so and ends."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
import torch.distributed as dist
from forked_runs import ForkedRun, slow_main, two_ranks
from tiny_runs import tiny_command

from dinov3core.train.engine import loop, parallel, stopping
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.stopping import Interrupted, StopSignals
from dinov3core.train.pretrain import exit_status

ROOT = Path(__file__).resolve().parents[1]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
LONG = ("--run.epoch-steps", "5000", "--run.checkpoint-every", "5000")
EVALUATED = ("--run.epoch-steps", "10", "--run.eval-every", "4", "--run.checkpoint-every", "0")


def training(out: Path, rows: int = 3) -> bool:
    return len([row for row in read_rows(out / "metrics.jsonl") if "loss" in row]) >= rows


def saved(out: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    paths = (out / "checkpoints").glob("step_????????")
    return sorted(int(path.name.removeprefix("step_")) for path in paths)


def saved_as(out: Path, step: int) -> str:
    return f"{out}/checkpoints/step_{step:08d}"


def last_row(out: Path) -> int:
    return read_rows(out / "metrics.jsonl")[-1]["step"]


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_saves_the_step_and_says_where(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    run = ForkedRun(tiny_command(out, *LONG), tmp_path / "log")
    run.until(lambda: training(out))
    run.signal(number)
    assert run.wait() == STATUS[number], run.said()
    (step,) = saved(out)
    assert step == last_row(out) < 5000
    assert f"stopped by {number.name}: the newest checkpoint is {saved_as(out, step)}" in run.said()
    assert "Traceback" not in run.said()


def test_a_run_to_be_requeued_exits_with_zero(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = ForkedRun(tiny_command(out, *LONG, "--run.requeue", "True"), tmp_path / "log")
    run.until(lambda: training(out))
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.said()
    assert len(saved(out)) == 1


def test_torchrun_passes_sigterm_on_and_both_processes_stop_at_one_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*launcher, "train/pretrain.py", *tiny_command(out, *LONG)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, stdout=log, stderr=log,
        )  # fmt: skip
        patience = time.monotonic() + 60
        while not training(out):
            assert run.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < patience
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) != 0
    assert saved(out) == [last_row(out)]
    said = (tmp_path / "log").read_text()
    assert said.count("stopping after this step") == 1
    assert said.count("stopped by SIGTERM: the newest checkpoint is") == 1


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with two_ranks(tmp_path / "log", exit_status, tiny_command(out, *LONG)) as ranks:
        ranks[0].until(lambda: training(out))
        ranks[1].signal(signal.SIGTERM)
        assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].said() + ranks[1].said()
    assert saved(out) == [last_row(out)]


def test_a_second_ctrl_c_leaves_at_once_but_an_echo_of_the_first_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
        with patch.object(stopping, "ECHO_SECONDS", 0.0), pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@contextmanager
def signal_in(owner: type | object, name: str, when: Callable[..., bool]) -> Iterator[None]:
    """SIGTERM in the middle of a function, where `when(*arguments)`."""

    def interrupted(*arguments: object, **named: object) -> object:
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return whole(*arguments, **named)

    whole = getattr(owner, name)
    with patch.object(owner, name, interrupted):
        yield


def evaluated_steps(out: Path) -> list[int]:
    return [row["step"] for row in read_rows(out / "metrics.jsonl") if row.get("event") == "eval"]


def test_a_signal_before_the_first_step_says_that_nothing_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = tiny_command(tmp_path / "run", *EVALUATED)
    with signal_in(loop, "open_training_images", lambda *_: True):
        assert exit_status(argv) == 143
    assert "stopped before the run began; the same command begins" in capsys.readouterr().err
    with signal_in(Monitor, "evaluate", lambda *_: True):
        assert exit_status(argv) == 143
    assert "stopped by SIGTERM: no checkpoint exists yet;" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_in_an_evaluation_leaves_it_saves_and_it_is_made_up_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = tiny_command(out, *EVALUATED)
    for step in (4, 10):
        with signal_in(Monitor, "evaluate", lambda *arguments, step=step: arguments[-1] == step):
            assert exit_status(argv) == 143
        assert f"the newest checkpoint is {saved_as(out, step)}" in capsys.readouterr().err
        assert step in saved(out) and step not in evaluated_steps(out)
    with signal_in(Monitor, "report", lambda *_: True):
        assert exit_status(argv) == 143
    assert exit_status(argv) == 0
    assert evaluated_steps(out) == [0, 4, 8, 10]


def test_a_hanging_process_ends_the_other_with_a_sentence_in_time(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = tiny_command(out, *LONG, "--run.timeout-minutes", "0.05")
    with two_ranks(tmp_path / "log", exit_status, argv) as ranks:
        ranks[0].until(lambda: training(out))
        ranks[1].signal(signal.SIGSTOP)
        began = time.monotonic()
        assert ranks[0].wait(20) == 1
        assert time.monotonic() - began < 10
        said = ranks[0].said()
    assert re.search(
        r"error: process 0 of 2 has been at one thing for 0.05 minutes \(training step \d+\): "
        r"another process probably hangs or is dead; look at .* continues the run; "
        r"--run.timeout-minutes sets the limit",
        said,
    ), said
    assert "Traceback" not in said


def test_a_dead_process_ends_the_other_with_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with two_ranks(tmp_path / "log", exit_status, tiny_command(out, *LONG)) as ranks:
        ranks[0].until(lambda: training(out))
        ranks[1].signal(signal.SIGKILL)
        assert ranks[0].wait(20) == 1
        said = ranks[0].said()
    assert re.search(r"error: process 0 of 2 lost its connection to another one \(\w+ step", said)
    assert "Traceback" not in said


def test_the_main_process_may_work_alone_for_longer_than_processes_wait(tmp_path: Path) -> None:
    with two_ranks(tmp_path / "log", slow_main, 3.0) as ranks:
        assert [rank.wait(20) for rank in ranks] == [0, 0], ranks[0].said() + ranks[1].said()


def test_wrapping_the_student_warns_of_nothing() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = parallel.wrap(torch.nn.BatchNorm1d(3), World(0, 2, torch.device("cpu")))
        assert not wrapped.forward_sync_buffers
    finally:
        dist.destroy_process_group()
