"""The trials of what a stage does to features: their scores, their stages, their files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.learning import course, degradation, high_resolution
from benchmarks.learning.course import Course
from benchmarks.learning.judging import CLASSES, patch_miou
from benchmarks.learning.results import Spread, table
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes, size_at
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.pretrain import parse
from tests.tiny_runs import tiny_recipe, with_run

SOURCE = Scenes(24, size=32)


def of_classes(classes: torch.Tensor, noise: float, offset: float = 0.0) -> torch.Tensor:
    """Patch maps [N, 16, h, w] that point where their class does, moved along another axis."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    maps = (axes[:CLASSES][classes] + offset * axes[-1]).permute(0, 3, 1, 2)
    return maps + noise * torch.randn(maps.shape)


def test_a_linear_classifier_of_patches() -> None:
    classes = torch.randint(CLASSES, (40, 6, 6), generator=torch.Generator().manual_seed(0))
    maps = of_classes(classes, 0.01)
    assert patch_miou(maps[:20], classes[:20], maps[20:], classes[20:]) > 99
    blind = patch_miou(torch.randn(20, 16, 6, 6), classes[:20], maps[20:], classes[20:])
    assert blind < 20


def test_a_class_that_was_not_shown_is_not_named() -> None:
    classes = torch.randint(2, (40, 6, 6), generator=torch.Generator().manual_seed(0))
    fitted = of_classes(classes[:20], 0.01, offset=3.0)
    elsewhere = of_classes(classes[20:], 0.01, offset=-3.0)  # far from both, as an outlier is
    assert patch_miou(fitted, classes[:20], elsewhere, classes[20:]) > 99


def test_a_stage_goes_on_as_its_kind_says(tmp_path: Path) -> None:
    """The engine takes over what a stage begins with, of a finished run."""
    first = with_run(tiny_recipe(), epochs=0.25, out=str(tmp_path / "run"))
    pretrain(first, SOURCE)
    run = Course(with_run(first, from_=str(first.folder)), SOURCE).trainer
    teacher = Course(with_run(first, from_=str(first.folder), take="teacher"), SOURCE).trainer
    anew = Course(first, SOURCE).trainer

    assert run.optimizer.state_dict()["state"] and not teacher.optimizer.state_dict()["state"]
    assert torch.equal(_flat(run.teacher), _flat(teacher.teacher))
    assert torch.equal(_flat(teacher.student), _flat(teacher.teacher))
    assert not torch.equal(_flat(run.student), _flat(teacher.student))
    assert not torch.equal(_flat(run.teacher), _flat(anew.teacher))


def test_rows_of_a_stage() -> None:
    rows = Course(tiny_recipe(), SOURCE).run(lambda _: {"score": 1.0}, 4, say=lambda _: None)
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert rows[0].keys() == {"step", "score"}
    assert {"loss", "gram", "ibot"} <= rows[1].keys()


def test_sizes_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_run(tiny_recipe(), epochs=3)
    sizes = (CropSizes(0.5, 32, 16),)
    stage = Course(replace(recipe, crops=replace(recipe.crops, other_sizes=sizes)), SOURCE)
    sides: list[int] = []
    step = stage.trainer.step
    monkeypatch.setattr(
        stage.trainer,
        "step",
        lambda batch, number: (sides.append(batch.global_crops.shape[-1]), step(batch, number))[1],
    )
    stage.run(lambda _: {}, 8, say=lambda _: None)
    assert sides == [(24, 32)[size_at(recipe.run.seed, number, (0.5, 0.5))] for number in range(24)]


def _flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


SMALL = ["--backbone.width", "32", "--backbone.depth", "1", "--backbone.heads", "1"]
SHORT = ["--run.steps", "4", "--run.batch-size", "4", "--data.scenes", "24", "--data.probe", "none"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny quick start of seed 0, with checkpoints after 2 and 4 steps."""
    folder = tmp_path / "runs"
    given = ["quickstart", "--run.out", str(folder / "seed0"), *SMALL, *SHORT]
    pretrain(parse([*given, "--run.checkpoint-every", "2"]))
    monkeypatch.setattr(course, "parse", lambda argv: parse([*argv, *SMALL, *SHORT]))
    return folder


def test_the_trial_of_degradation_from_end_to_end(tmp_path: Path, runs: Path) -> None:
    given = ["--out", str(tmp_path), "--runs", str(runs), "--seeds", "0"]
    looks = ["--steps", "2", "--every", "1", "--bank", "60", "--queries", "24"]
    degradation.main([*given, *looks])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["steps"] == 2
    (trial,) = results["trials"]
    assert [row["step"] for row in trial["rows"]["pretraining"]] == [0, 2, 4]
    assert trial["early"] in (2, 4)
    assert [row["step"] for row in trial["rows"]["gram"]] == [0, 1, 2]
    # both stages begin where pretraining ended
    last = trial["rows"]["pretraining"][-1]
    for name in ("gram", "control"):
        assert trial["rows"][name][0] == last | {"step": 0}
        assert ("gram" in trial["rows"][name][1]) == (name == "gram")
    for name in ("curves.png", "seed0/cosines.png", "seed0/early.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_seed_with_results_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed3").mkdir()
    (tmp_path / "seed3" / "results.json").write_text('{"seed": 3}')
    monkeypatch.setattr(degradation, "Course", None)
    assert degradation.trial(degradation.Command(out=tmp_path), 3) == {"seed": 3}
    assert high_resolution.trial(high_resolution.Command(out=tmp_path), 3) == {"seed": 3}


def test_the_trial_of_sizes_from_end_to_end(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(high_resolution, "SCALES", (1.0, 1.5, 2.0))
    given = ["--out", str(tmp_path), "--runs", str(runs), "--seeds", "0"]
    high_resolution.main([*given, "--steps", "4", "--bank", "24", "--queries", "12"])
    (trial,) = json.loads((tmp_path / "results.json").read_text())["trials"]
    assert trial["scores"]["before"]["cls_cosine"][0] == pytest.approx(1, abs=1e-5)
    assert trial["scores"]["adapted"]["cls_cosine"] != trial["scores"]["control"]["cls_cosine"]
    assert high_resolution.table([trial, trial]).count("\n") == 1 + len(high_resolution.ROWS)


def test_spreads_and_tables() -> None:
    assert Spread.of([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert Spread.of([4.0]).text(1) == "4.0 \u00b1 0.0"
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |"]
