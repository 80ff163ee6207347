"""The guard stops a run whose features get worse than those it began with, in good order."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it off the path

import pytest
import torch
from tiny_runs import checkpoint_of, metrics_of, tiny_command, tiny_recipe
from two_processes import joined, run_ranks

from dinov3core.train import pretrain as command
from dinov3core.train.engine import loop
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.folder import open_folder
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.session import Here, Session
from dinov3core.train.engine.stopping import StopSignals
from dinov3core.train.pretrain import parse

LABELLED = {"knn": 60.0, "rankme": 50.0}
BLIND = {"knn": None, "rankme": 50.0}


def scores(**of: float | None) -> dict[str, Any]:
    return {"knn": None, "knn_error": None, "rankme": 50.0, "patch_drift": 0.0, **of}


@pytest.mark.parametrize(
    ("start", "row", "words"),
    [
        (LABELLED, scores(knn=57.9, knn_error=0.5), "k-NN fell from 60.0 to 57.9 %, by more than"),
        (LABELLED, scores(knn=58.1, knn_error=0.5), ""),  # within the margin of 2
        (LABELLED, scores(knn=57.0, knn_error=1.6), ""),  # within two standard errors
        (
            LABELLED,
            scores(knn=56.7, knn_error=1.6),
            r"3.2 points allowed .margin 2, standard error",
        ),
        (LABELLED, scores(knn=70.0, knn_error=1.6), ""),
        (LABELLED, scores(knn=60.0, knn_error=1.0, rankme=1.0, patch_drift=1.0), ""),
        (BLIND, scores(rankme=41.0, patch_drift=0.05), ""),
        (BLIND, scores(rankme=39.0, patch_drift=0.05), "RankMe fell from 50.0 to 39.0, below 80%"),
        (BLIND, scores(rankme=50.0, patch_drift=0.3), "have moved by 0.30 since the start, more"),
        # labels only now, or none any more: the start of what is not measured is unknown
        (BLIND, scores(knn=1.0, knn_error=1.0, rankme=50.0), ""),
        ({"knn": None, "rankme": None}, scores(rankme=1.0), ""),
    ],
)
def test_what_stops_a_run(start: dict, row: dict, words: str) -> None:
    complaint = Guard(margin=2.0).complaint(start, row)
    assert bool(complaint) == bool(words)
    if words:
        assert re.search(words, complaint)
    assert Guard().complaint(start, row) == ""


def test_the_guard_says_what_it_watches() -> None:
    guard = Guard(margin=2.0)
    assert guard.in_words(True, 250) == (
        "guard: stops the run when k-NN is more than 2 points, and two standard errors, below its "
        "start; it looks every 250 steps"
    )
    assert "RankMe is below 80% of its start, or patch drift above 0.1 (no labelled" in (
        guard.in_words(False, 250)
    )
    assert Guard().in_words(True, 250) == ""


def test_a_guard_that_never_looks_is_refused() -> None:
    recipe = replace(tiny_recipe(), guard=Guard(margin=1.0))
    blind = replace(recipe, run=replace(recipe.run, eval_every=0))
    with pytest.raises(ConfigError, match=r"^guard\.margin 1 .* run\.eval_every is 0, so nothing"):
        resolve(blind, 1)
    assert resolve(recipe, 1).steps == 8


KNN = {0: 60.0, 5: 59.0, 10: 40.0, 15: 80.0, 20: 80.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """The k-NN of each evaluation, as the test has it; everything else as it is."""
    knn = dict(KNN)
    evaluate = Monitor.evaluate

    def told(self: Monitor, backbone: Any, counts: torch.Tensor, step: int) -> dict:
        return evaluate(self, backbone, counts, step) | {"knn": knn[step], "knn_error": 1.0}

    monkeypatch.setattr(Monitor, "evaluate", told)
    yield knn


def guarded(out: Path, *more: str) -> list[str]:
    return tiny_command(out, "--run.eval-every", "5", "--guard.margin", "2", *more)


def test_a_falling_run_ends_in_good_order(
    tmp_path: Path, measured: dict, capsys: pytest.CaptureFixture
) -> None:
    """Exit status 0, a last checkpoint, a report and a summary in words; no step beyond."""
    assert command.exit_status(guarded(tmp_path / "run")) == 0
    sentence = "stopped by the guard after step 10 of 20: k-NN fell from 60.0 to 40.0 %"
    said = capsys.readouterr()
    assert sentence in said.err and sentence in said.out and "Traceback" not in said.err
    assert "guard: stops the run when k-NN is more than 2 points" in said.err

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["stopped"].startswith(sentence)
    assert summary["stopped"].endswith(f"the best weights are in {tmp_path / 'run' / 'best'}")
    assert sentence in (tmp_path / "run" / "report.html").read_text()
    assert checkpoint_of(tmp_path / "run", 10).is_dir()
    assert metrics_of(tmp_path / "run")[-1]["step"] == 10


def test_the_same_command_does_not_train_a_stopped_run_on(tmp_path: Path, measured: dict) -> None:
    out = tmp_path / "run"
    first = loop.pretrain(parse(guarded(out)))
    rows = metrics_of(out)
    again = loop.pretrain(parse(guarded(out)))
    assert again["stopped"] == first["stopped"] and metrics_of(out) == rows
    on = loop.pretrain(parse(guarded(out, "--guard.margin", "0")))
    assert on["steps"] == 20 and on["stopped"] == ""


def test_a_resumed_run_knows_its_start(
    tmp_path: Path, measured: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5, before the fall; metrics.jsonl, where the start also stands, is lost."""
    out = tmp_path / "run"
    trained = Session.train

    def killed(self: Session, batch: Any, step: int, *more: Any) -> Any:
        if step == 7:
            raise KeyboardInterrupt
        return trained(self, batch, step, *more)

    monkeypatch.setattr(Session, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.pretrain(parse(guarded(out)))
    monkeypatch.setattr(Session, "train", trained)
    (out / "metrics.jsonl").unlink()
    summary = loop.pretrain(parse(guarded(out)))
    assert summary["steps"] == 10 and "from 60.0 to 40.0" in summary["stopped"]


def test_the_last_evaluation_is_judged_as_well(tmp_path: Path, measured: dict) -> None:
    measured |= {10: 60.0, 20: 10.0}
    summary = loop.pretrain(parse(guarded(tmp_path / "run")))
    assert summary["steps"] == 20
    assert summary["stopped"].startswith("stopped by the guard after the last step: k-NN fell")


def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    said = run_ranks(Path(__file__), tmp_path / "run")
    assert [text.split()[-1] for text in said] == ["10", "10"]


def main() -> None:
    """Only the main process measures; both stop after step 10, or one would wait for ever."""
    evaluate = Monitor.evaluate

    def told(self: Monitor, backbone: Any, counts: torch.Tensor, step: int) -> dict:
        return evaluate(self, backbone, counts, step) | {"knn": KNN[step], "knn_error": 1.0}

    Monitor.evaluate = told  # type: ignore[method-assign]
    recipe = parse(guarded(Path(sys.argv[1])))
    with joined() as world, StopSignals() as signals:
        source, _ = loop.open_training_images(recipe)
        with open_folder(recipe.folder, True, world) as folder:
            run = loop.Loop(recipe, Here(world, signals), source, folder, Origin())
            run.run()
            session = run.session
            assert session.stopped.startswith("stopped by the guard after step 10 of 20")
            state = session.trainer.optimizer.state
            print(int(next(iter(state.values()))["step"]))


if __name__ == "__main__":
    main()
