"""The studies of distillation: what is compared with what, and that a stopped one goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import distillation_cost
from benchmarks.distillation_cost import Cost, SharedSteps
from benchmarks.learning import distillation as study
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.distillation.settings import Distill
from dinov3core.train.engine.schedules import constant
from dinov3core.train.recipes.distill import quickstart_distill

STEPS = 2


def shortened(recipe: Pretrain) -> Pretrain:
    """Two steps, judged on a few scenes."""
    data = replace(recipe.data, scenes=16, probe_bank=32, probe_queries=24)
    optim = replace(recipe.optim, lr=constant(1e-3))
    run = replace(recipe.run, epochs=STEPS / 100)
    return replace(recipe, data=data, optim=optim, run=run)


def tiny() -> Distill:
    """The recipe's two ViTs, two steps of four images."""
    distill = quickstart_distill()
    vits = [replace(each, recipe=shortened(each.recipe)) for each in distill.students[:2]]
    return replace(distill, base=shortened(distill.base), students=tuple(vits), global_batch=4)


def test_views_are_those_of_any_run_and_masks_too() -> None:
    distill = quickstart_distill()
    steps = SharedSteps(replace(distill, global_batch=2))
    loaded = steps.load(3)
    assert torch.equal(steps.settings.masks_at(3, 0).masks, loaded.masks)
    assert steps.seen_by("vit64", loaded, 3).global_crops is loaded.global_crops
    enlarged = steps.seen_by("convnext", loaded, 3)
    assert enlarged.global_crops.shape == (4, 3, 192, 192)
    assert torch.equal(enlarged.masks, loaded.masks)


def test_the_same_time_is_that_of_a_step_and_a_share_of_the_teacher() -> None:
    seconds = {
        "loading": 9.0,
        "teacher": 0.2,
        "vit64.distilled": 0.3,
        "vit64.scratch": 0.5,
        "vit48.distilled": 0.1,
        "vit48.scratch": 0.1,
    }
    assert study.same_time(tiny(), seconds, 100) == {"vit64": 80, "vit48": 200}


def test_saving_and_its_ideal() -> None:
    def cost(**seconds: float) -> Cost:
        return Cost({"loading": 1.0, "teacher": 2.0, **seconds}, 10, 20)

    costs = {("a",): cost(a=1.0), ("b",): cost(b=2.0), ("a", "b"): cost(a=1.0, b=3.0)}
    one, two = distillation_cost.compared(["a", "b"], costs)
    assert one["saving"] == one["ideal"] == 1
    assert two["saving"] == pytest.approx(9 / 7)
    assert two["ideal"] == pytest.approx(9 / 6)
    assert two["shared_part"] == pytest.approx(0.5)
    results = {"rows": {"small": [one, two]}}
    assert "| small | a + b | 50% | 7.00 | 9.00 | 1.29 x | 1.50 x |" in (
        distillation_cost.rendered(results)
    )


def test_a_trial_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill = tiny()
    distill = replace(distill, students=distill.students[1:])
    monkeypatch.setattr(study, "quickstart_distill", lambda: distill)
    teacher = tmp_path / "teacher"
    words: list[str] = []

    def pretend(command: list[str]) -> None:
        """As if the students had been distilled."""
        words.extend(command)
        out = Path(command[command.index("--run.out") + 1])
        write_summary(out / "vit48")

    def write_summary(folder: Path) -> None:
        folder.mkdir(parents=True)
        summary = {"knn_after": 40.0, "dense_after": 20.0, "steps": STEPS}
        (folder / "summary.json").write_text(json.dumps(summary))

    write_summary(teacher)
    monkeypatch.setattr(study, "run", pretend)
    seconds = {"teacher": 0.3, "vit48.distilled": 0.1, "vit48.scratch": 0.2}
    monkeypatch.setattr(study, "seconds_of_steps", lambda distill, rounds: seconds)

    given = ["--out", str(tmp_path / "out"), "--seeds", "3", "--teachers", str(teacher)]
    study.main(given)
    assert words[1:3] == ["train/distill.py", "quickstart_distill"]
    assert words[words.index("--run.seed") + 1] == "3"
    (outcome,) = json.loads((tmp_path / "out" / "results.json").read_text())["trials"]
    assert outcome["distilled"]["vit48"] == {"knn": 40.0, "dense": 20.0, "steps": STEPS}
    assert {row["steps"] for row in outcome["images"].values()} == {STEPS}
    for row in outcome["time"].values():
        assert row["steps"] == 2 * STEPS  # (0.1 + 0.3) / 0.2
        assert 0 <= row["knn"] <= 100
    assert (tmp_path / "out" / "bars.png").stat().st_size > 10_000

    def refused(*_: object) -> None:
        raise AssertionError("what is finished is done again")

    monkeypatch.setattr(study, "run", refused)
    monkeypatch.setattr(study, "from_scratch", refused)
    study.main(given)


def test_a_teacher_for_each_seed() -> None:
    with pytest.raises(SystemExit, match="a teacher for each of 3 seeds, got 1"):
        study.main(["--teachers", "runs/quickstart"])
