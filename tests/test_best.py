"""Every run keeps the teacher that scored highest, whole, and says which step it is of."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from tiny_runs import checkpoint_of, tiny_command, tiny_recipe, with_run
from torch import nn

from dinov3core.checkpoints import load_model
from dinov3core.models import VisionTransformer, VitSettings
from dinov3core.train.engine import best
from dinov3core.train.engine.best import Best, BestTeacher
from dinov3core.train.engine.closing import closing
from dinov3core.train.engine.config import ConfigError, File, GramAnchor
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.evaluate import main as evaluate
from dinov3core.train.pretrain import parse
from dinov3core.writing import publish_folder

SETTINGS = VitSettings(width=24, depth=1, heads=1, patch_size=8, registers=1)


def teacher(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    backbone = VisionTransformer(SETTINGS)
    nn.init.normal_(backbone.cls_token)
    return backbone


def scores(knn: float | None, agreement: float | None = None) -> dict[str, float | None]:
    """Of an evaluation; linear segmentation goes the other way, and must not matter."""
    spread = None if agreement is None else 0.5
    return {
        "knn": knn,
        "knn_error": knn and 1.0,
        "dense_miou": agreement and 100 - agreement,
        "dense_miou_error": spread,
        "dense_agreement": agreement,
        "dense_agreement_error": spread,
    }


def keeper_in(folder: Path, by: str = "knn", said: "Said | None" = None) -> BestTeacher:
    """Of a run in that folder which begins with weights, so that step 0 counts."""
    recipe = with_run(tiny_recipe(), out=str(folder), keep_best=by, init="some weights")
    return BestTeacher(recipe, Said() if said is None else said)


class Said(list):
    """What a run has said."""

    def __call__(self, text: str) -> None:
        self.append(text)


def same(folder: Path, backbone: nn.Module) -> bool:
    """Whether the weights in a folder are those of a backbone, bit for bit."""
    stored = load_model(folder).model.state_dict()
    return all(torch.equal(stored[name], value) for name, value in backbone.state_dict().items())


def test_the_highest_score_is_kept_and_of_equal_ones_the_later(tmp_path: Path) -> None:
    keeper = keeper_in(tmp_path)
    assert keeper.summary({}) is None
    for step, knn in enumerate((30.0, 50.0, 40.0, 50.0, 49.9)):
        keeper.offer(teacher(step), step, scores(knn, 10.0))

    assert sorted(os.listdir(tmp_path)) == ["best"]
    assert sorted(os.listdir(tmp_path / "best")) == ["best.json", "teacher.safetensors"]
    assert same(tmp_path / "best", teacher(3))
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record == {"step": 3, "by": "knn", "scores": scores(50.0, 10.0)}
    last = {"step": 4, **scores(49.9)}
    assert keeper.summary(last) == Best(3, "knn", 50.0, 1.0, 4, 49.9, 1.0)


def test_by_patch_agreement_when_asked_or_when_there_is_no_other(tmp_path: Path) -> None:
    for by, knn in (("dense", 1.0), ("knn", None)):
        said = Said()
        keeper = keeper_in(tmp_path / by, by, said)
        (tmp_path / by).mkdir()
        for step, agreement in enumerate((60.0, 62.0, 61.0)):
            keeper.offer(teacher(step), step, scores(knn and knn * step, agreement))
        last = {"step": 2, **scores(2.0, 61.0)}
        assert keeper.summary(last) == Best(1, "dense", 62.0, 0.5, 2, 61.0, 0.5)
        assert not said


def test_without_any_score_nothing_is_kept_and_that_is_said_once(tmp_path: Path) -> None:
    said = Said()
    keeper = keeper_in(tmp_path, "knn", said)
    for step in range(3):
        keeper.offer(teacher(0), step, scores(None))
    assert said == [best.NOTHING] and not os.listdir(tmp_path) and keeper.summary({}) is None


def test_a_score_that_is_not_finite_is_no_best(tmp_path: Path) -> None:
    keeper = keeper_in(tmp_path)
    keeper.offer(teacher(0), 0, scores(float("nan")))
    assert not os.listdir(tmp_path)


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    keeper_in(tmp_path).offer(teacher(1), 1, scores(50.0, 10.0))
    resumed = keeper_in(tmp_path)
    resumed.offer(teacher(2), 2, scores(49.0, 11.0))
    assert same(tmp_path / "best", teacher(1))

    # by another score, the earlier best is compared by that one
    by_patches = keeper_in(tmp_path, "dense")
    by_patches.offer(teacher(3), 3, scores(60.0, 9.0))
    assert same(tmp_path / "best", teacher(1))
    by_patches.offer(teacher(4), 4, scores(1.0, 12.0))
    assert same(tmp_path / "best", teacher(4))


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"step": 3}', b'{"step": 3, "by": "x"}', None])
def test_a_record_that_cannot_be_used_gives_way(tmp_path: Path, damage: bytes | None) -> None:
    keeper = keeper_in(tmp_path)
    keeper.offer(teacher(1), 1, scores(50.0))
    record = tmp_path / "best" / "best.json"
    record.unlink() if damage is None else record.write_bytes(damage)
    assert keeper.summary(scores(1.0)) is None
    keeper.offer(teacher(2), 2, scores(10.0))
    assert keeper.summary(scores(1.0)).step == 2 and same(tmp_path / "best", teacher(2))


def test_a_full_disk_leaves_the_earlier_best(tmp_path: Path) -> None:
    said = Said()
    keeper = keeper_in(tmp_path, "knn", said)
    keeper.offer(teacher(1), 1, scores(10.0))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(best, "write_whole", side_effect=full):
        keeper.offer(teacher(2), 2, scores(20.0))
    assert said == [
        f"{tmp_path / 'best'} could not be written (No space left on device); training goes on"
    ]
    assert os.listdir(tmp_path) == ["best"] and same(tmp_path / "best", teacher(1))
    keeper.offer(teacher(3), 3, scores(15.0))
    assert same(tmp_path / "best", teacher(3))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_two_names_loses_no_best(tmp_path: Path, renames: int) -> None:
    """The earlier folder is moved aside, then the new one gets its name."""
    keeper = keeper_in(tmp_path)
    keeper.offer(teacher(1), 1, scores(10.0))
    replace_folder = os.replace
    calls = iter(range(9))

    def killed(source: Path, target: Path) -> None:
        if next(calls) == renames:
            raise KeyboardInterrupt
        replace_folder(source, target)

    partial = tmp_path / "new"
    partial.mkdir()
    with patch.object(os, "replace", killed), pytest.raises(KeyboardInterrupt):
        publish_folder(partial, tmp_path / "best")
    assert (tmp_path / "best").exists() == (renames == 0)
    resumed = keeper_in(tmp_path)
    assert resumed.summary(scores(1.0)).step == 1 and same(tmp_path / "best", teacher(1))


def test_an_untrained_network_is_never_kept(tmp_path: Path) -> None:
    """By patch agreement it can be the best of all, as it sees little but colours."""
    recipe = with_run(tiny_recipe(), out=str(tmp_path), keep_best="dense")
    keeper = BestTeacher(recipe, Said())
    for step, agreement in ((0, 63.0), (2, 62.0), (4, 61.0)):
        keeper.offer(teacher(step), step, scores(1.0, agreement))
    assert keeper.summary({}).step == 2

    stage = with_run(recipe, from_="quickstart", out=str(tmp_path / "stage"))
    (tmp_path / "stage").mkdir()
    keeper = BestTeacher(stage, Said())
    keeper.offer(teacher(0), 0, scores(1.0, 63.0))
    keeper.offer(teacher(2), 2, scores(1.0, 62.0))
    assert keeper.summary({}).step == 0


def test_sentences() -> None:
    folder = Path("runs/quickstart")
    earlier = Best(400, "knn", 55.04, 1.43, 600, 50.1, 1.43)
    assert earlier.sentence(folder) == (
        "Best by k-NN: step 400 (55.0 +- 1.4 %), 4.9 points above the last one, "
        "in runs/quickstart/best"
    )
    level = earlier._replace(last=53.1)
    assert level.sentence(folder) == (
        "Best by k-NN: step 400 (55.0 +- 1.4 %), level with the last one (1.9 points above, within "
        "two standard errors), in runs/quickstart/best"
    )
    last = Best(600, "dense", 61.7, None, 600, 61.7, None)
    assert last.sentence(folder) == (
        "Best by patch agreement: the last step, 600 (61.7 %), in runs/quickstart/best"
    )


# ---- in runs

SHORT = ("--run.epoch-steps", "8", "--run.checkpoint-every", "2", "--run.eval-every", "2")
KNN = {0: 10.0, 2: 20.0, 4: 60.0, 6: 50.0, 8: 30.0}
AGREEMENT = {0: 75.0, 2: 65.0, 4: 57.0, 6: 56.0, 8: 55.0}


@pytest.fixture
def scored() -> Iterator[None]:
    """Runs whose evaluations say `KNN` and `AGREEMENT`, whatever the teacher; no pictures."""

    def evaluate(monitor: Monitor, backbone: nn.Module, counts: object, step: int) -> dict:
        return scores(KNN[step], AGREEMENT[step]) | {"rankme": 9.0, "patch_drift": 0.1}

    with (
        patch.object(Monitor, "evaluate", evaluate),
        patch.object(Monitor, "report", lambda *_: None),
        patch.object(Monitor, "snapshot_before", lambda *_: None),
    ):
        yield


def start(out: Path, *more: str) -> dict:
    argv = tiny_command(out, *SHORT, "--run.keep-checkpoints", "9", *more)
    return pretrain(parse(argv), argv=argv)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).model.state_dict()


def equal(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(("by", "step"), [("knn", 4), ("dense", 2)])
def test_a_run_keeps_its_best_and_says_so(tmp_path: Path, scored: None, by: str, step: int) -> None:
    out = tmp_path / "run"
    summary = start(out, "--run.keep-best", by)
    assert equal(out / "best", checkpoint_of(out, step))
    assert equal(out, checkpoint_of(out, 8)) and not equal(out, out / "best")

    saved = json.loads((out / "summary.json").read_text())["best"]
    assert saved == summary["best"] and saved["step"] == step and saved["by"] == by
    said = closing(summary, out)
    assert f": step {step} (" in said and f"points above the last one, in {out / 'best'}" in said
    assert "dense scores: 24 held-out built-in scenes, 13 classes. Patch agreement: " in said
    assert "  patch agreement: untrained 75.0 +- 0.5 %, trained 55.0 +- 0.5 %\n" in said
    assert "  linear segmentation: untrained 25.0 +- 0.5 %, trained 45.0 +- 0.5 %\n" in said


def test_the_best_is_a_model_like_any_other(tmp_path: Path, scored: None) -> None:
    """For train/evaluate.py, as weights to start from, and as the anchor of a Gram term."""
    out = tmp_path / "run"
    start(out)
    judged = ("--tasks", "knn", "--read.scenes-train", "24", "--read.scenes-test", "12")
    assert evaluate([str(out / "best"), "--out", str(tmp_path / "judged"), *judged]) == 0

    recipe = parse(tiny_command(tmp_path / "next", *SHORT))
    begun = replace(recipe, run=replace(recipe.run, init=str(out / "best")))
    anchored = replace(begun, gram=GramAnchor(File(str(out / "best"))))
    trainer = Trainer(anchored, World(0, 1, torch.device("cpu")))
    for backbone in (trainer.student.backbone, trainer.gram_teacher):
        stored = weights(out / "best")
        assert all(torch.equal(stored[k], v) for k, v in backbone.state_dict().items())


class Halted(Exception):
    """The end of a run that is to stay unfinished."""


@pytest.mark.parametrize("stop", [5, 7])
def test_a_killed_run_ends_with_the_same_best(tmp_path: Path, scored: None, stop: int) -> None:
    straight = tmp_path / "straight"
    out = tmp_path / "run"
    start(straight)
    step_of_trainer = Trainer.step

    def step(trainer: Trainer, batch: object, step: int, *rest: object) -> object:
        if step == stop:
            raise Halted
        return step_of_trainer(trainer, batch, step, *rest)

    with patch.object(Trainer, "step", step), pytest.raises(Halted):
        start(out)
    assert start(out)["best"] == Best(4, "knn", 60.0, 1.0, 8, 30.0, 1.0)._asdict()
    assert equal(out / "best", straight / "best")


def test_a_best_that_was_deleted_in_mid_run_is_made_anew(tmp_path: Path, scored: None) -> None:
    out = tmp_path / "run"
    step_of_trainer = Trainer.step

    def step(trainer: Trainer, batch: object, step: int, *rest: object) -> object:
        if step == 5:
            shutil.rmtree(out / "best")
        return step_of_trainer(trainer, batch, step, *rest)

    with patch.object(Trainer, "step", step):
        assert start(out)["best"]["step"] == 6


def test_keeping_by_a_score_that_is_not_measured_is_refused() -> None:
    recipe = tiny_recipe()
    wanting = replace(recipe.run, keep_best="dense")
    for data in (
        replace(recipe.data, dense="none"),
        replace(recipe.data, source="/some/photos"),
        replace(recipe.data, source="from Python: DatasetSource"),
    ):
        with pytest.raises(ConfigError, match=r"^run\.keep_best=dense needs a dense score, .*knn$"):
            resolve(replace(recipe, run=wanting, data=data), 1)
    for data in (recipe.data, replace(recipe.data, source="/some/photos", dense="/some/masks")):
        resolve(replace(recipe, run=wanting, data=data), 1)


def test_early_checkpoints_stay_for_good_when_asked(tmp_path: Path, scored: None) -> None:
    """Such as one to anchor the Gram term to; the others go as newer ones come."""
    out = tmp_path / "run"
    start(out, "--run.keep-checkpoints", "1", "--run.keep-every", "3")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000008"]
