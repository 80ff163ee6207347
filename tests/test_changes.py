"""A run is continued as the run it is: what may change passes, the rest is named and refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from tiny_runs import tiny_command, tiny_recipe

from dinov3core.data.images import DatasetSource
from dinov3core.train.engine import changes, loop
from dinov3core.train.engine.changes import FREE, identity
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import dotted
from dinov3core.train.engine.schedules import CosineSchedule
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.registry import RECIPES

ALONE = World(0, 1, torch.device("cpu"))
SHORT = ("--run.epoch-steps", "8", "--run.checkpoint-every", "4", "--data.probe", "none")


class Halted(Exception):
    """The end of a run that is to stay unfinished."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second of every run."""
    monkeypatch.setattr(Monitor, "report", lambda *_: None)
    monkeypatch.setattr(Monitor, "snapshot_before", lambda *_: None)


@contextmanager
def halting() -> Iterator[None]:
    """Within, runs end before step 5."""

    def step(trainer: Trainer, crops: object, step: int, *rest: object) -> object:
        if step == 5:
            raise Halted
        return step_of_trainer(trainer, crops, step, *rest)

    step_of_trainer = Trainer.step
    with patch.object(Trainer, "step", step), pytest.raises(Halted):
        yield


def start(out: Path, *more: str, source: DatasetSource | None = None) -> dict:
    argv = tiny_command(out, *SHORT, *more)
    return loop.pretrain(parse(argv), source, argv=argv)


REFUSED = [
    ("--run.batch-size 8", r"images per step 4 -> 8"),
    ("--run.seed 1", r"run\.seed 0 -> 1"),
    ("--run.epochs 2", r"run\.epochs 1(\.0)? -> 2(\.0)?"),
    ("--data.scenes 65", r"data\.scenes 64 -> 65; images in data\.source 64 -> 65"),
    ("--optim.clip 2 --optim.beta2 0.9", r"optim\.beta2 0\.99 -> 0\.9; optim\.clip 3\.0 -> 2\.0"),
    ("--optim.lr.base 0.1", r"optim\.lr\.base 0\.003 -> 0\.1"),
    ("--crops.hue 0.2", r"crops\.hue 0\.4 -> 0\.2"),
    ("--backbone.depth 3", r"backbone\.depth 2 -> 3"),
]


def test_changes_that_make_another_run_are_named_and_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with halting():
        start(out)
    for flags, sentence in REFUSED:
        named = rf"step_00000004 is of a run with another recipe: {sentence}\. Give"
        with pytest.raises(TrainingStopped, match=named):
            start(out, *flags.split())
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000004"]
    assert start(out)["steps"] == 8


def test_changes_of_where_and_how_often_a_run_works_pass(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    with halting():
        start(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    free = {
        "data.workers": 1,
        "run.accumulation": 2,
        "run.checkpoint-every": 3,
        "run.device": "cpu",
        "run.eval-every": 3,
        "run.keep-checkpoints": 1,
        "run.log-every": 2,
        "run.max-bad-steps": 9,
        "run.precision": "bf16",
        "run.requeue": True,
        "run.threads": 2,
        "run.timeout-minutes": 5,
    }
    with halting():
        start(moved, *(text for name, value in free.items() for text in (f"--{name}", str(value))))
    assert "resuming after step 4" in capsys.readouterr().err
    torch.set_num_threads(1)


def test_a_change_that_is_accepted_passes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    with halting():
        start(out)
    assert start(out, "--optim.clip", "2", "--run.accept-changes", "True")["steps"] == 8
    said = "continuing with another recipe, as accepted: optim.clip 3.0 -> 2.0"
    assert said in capsys.readouterr().err


def test_a_shorter_run_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with halting():
        start(tmp_path / "run")
    with pytest.raises(TrainingStopped, match="has done 4 steps, more than the 3 of this recipe"):
        start(tmp_path / "run", "--run.epoch-steps", "3", "--run.accept-changes", "True")


def test_another_dataset_from_python_is_refused(tmp_path: Path) -> None:
    images = [(torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8), 0) for _ in range(12)]
    with halting():
        start(tmp_path / "run", source=DatasetSource(images))
    with pytest.raises(TrainingStopped, match=r"images in data\.source 12 -> 11\."):
        start(tmp_path / "run", source=DatasetSource(images[1:]))
    with halting():
        start(tmp_path / "run", source=DatasetSource(images))


def test_free_fields_exist_and_the_rest_counts() -> None:
    recipe = tiny_recipe()
    names = {name for name, _ in dotted(recipe)}
    assert FREE <= names
    counted = identity(recipe, DatasetSource([0] * 5), World(0, 2, torch.device("cuda")))
    assert counted.keys() >= names - FREE
    assert (counted["images per step"], counted["images in data.source"]) == (8, 5)
    assert "run.precision" not in identity(recipe, DatasetSource([0]), ALONE)  # a CPU has one


def test_another_kind_of_schedule_is_a_difference() -> None:
    recipe = tiny_recipe()
    other = replace(recipe, optim=replace(recipe.optim, lr=CosineSchedule(1e-3, 1e-3)))
    source = DatasetSource([0])
    changed = changes.differences(identity(recipe, source, ALONE), identity(other, source, ALONE))
    assert changed == ["optim.lr PhasedSchedule -> CosineSchedule", "optim.lr.start 0.001 -> 0.0"]


def test_runs_that_named_the_class_of_every_part_are_continued() -> None:
    """Only parts that may be of several classes are named now: renaming a class ends no run."""
    recipe, source = tiny_recipe(), DatasetSource([0])
    now = identity(recipe, source, ALONE)
    named = {"backbone.rope": "Rope", "dino": "Head", "ibot": "Head"}
    named |= {"masks": "Masks", "crops": "CropSettings", "optim": "Optim", "run": "Run"}
    young = {"proj_bias", "ffn_bias", "rope.min_period", "rope.max_period"}
    before = {name: now[name] for name in now if name.removeprefix("backbone.") not in young}
    assert not now.keys() & named.keys() and now["optim.lr"] == "PhasedSchedule"
    assert changes.differences(before | named, now) == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_not_differ_from_itself_through_json(name: str) -> None:
    once = identity(RECIPES[name](), DatasetSource([0]), ALONE)
    assert changes.differences(changes.json.loads(changes.json.dumps(once)), once) == []
