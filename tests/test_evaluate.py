"""train/evaluate.py: results on disk and in tables, sentences, caching, pictures, two processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov3core import evals
from dinov3core.checkpoints import save_weights
from dinov3core.data.datasets import DataOptions
from dinov3core.evals import results
from dinov3core.models import build
from dinov3core.train.engine import galleries, tasks
from dinov3core.train.engine.named_models import open_backbone
from dinov3core.train.engine.tasks import Settings
from dinov3core.train.evaluate import evaluate, main
from dinov3core.train.recipes.registry import RECIPES
from tests.two_processes import joined, run_ranks

READ = DataOptions(scenes_train=36, scenes_test=24, scene_size=16, scene_videos=1)
SMALL = Settings(size=16, iterations=10, penalties=2)
COMMAND = [
    *("--read.scenes-train", "36", "--read.scenes-test", "24", "--read.scene-videos", "1"),
    *("--size", "16", "--iterations", "10", "--penalties", "2"),
    *("--pixel-patch", "8", "--device", "cpu"),
]


def weights(folder: Path, **overrides) -> Path:
    torch.manual_seed(0)
    path = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(build("vit_nano8", depth=1, layer_scale=1.0, **overrides), path)
    return path


def metrics(outcomes: dict) -> dict:
    """Results without what differs from call to call."""
    return {
        task: {name: value for name, value in outcome.items() if name != "seconds"}
        for task, outcome in outcomes.items()
    }


def test_a_command_leaves_results_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("sklearn")
    model = weights(tmp_path / "weights")
    out = tmp_path / "out"
    assert main([str(model), "--out", str(out), "--tasks", "knn,linear,logreg", *COMMAND]) == 0
    saved = json.loads((out / "results.json").read_text())
    said = capsys.readouterr()
    assert set(saved["tasks"]) == {"knn", "linear", "logreg"} and "image statistics" in said.err
    assert saved["version"] == results.VERSION and len(saved["backbone"]["digest"]) == 64
    for task, outcome in saved["tasks"].items():
        assert outcome["protocol"]["text"] and outcome["seconds"] > 0, task
        assert outcome["train_images"] == 36, task
        assert outcome["environment"]["torch"] == torch.__version__, task
        assert outcome["command"][0] == str(model), task
        judged = outcome["judged"]
        assert judged["settings"].keys() == set(tasks.USES[task]), task
        assert judged["settings"]["size"] == judged["read"]["scene_size"] == 16
        assert judged["weights"] == saved["backbone"]["digest"], task
        assert len(judged["data"]["digest"]) == 64, task
    line = next(line for line in said.out.splitlines() if "linear top1" in line)
    top1 = saved["tasks"]["linear"]["top1"]
    assert f"{top1:.1f}" in line or f"{top1:.3f}" in line

    # Another task goes beside the earlier ones.
    assert main([str(model), "--out", str(out), "--tasks", "depth", *COMMAND]) == 0
    assert tasks_in(out) == {"knn", "linear", "logreg", "depth"}

    # Results of another model are replaced.
    other = weights(tmp_path / "other", width=48)
    assert main([str(other), "--out", str(out), "--tasks", "knn", *COMMAND]) == 0
    assert tasks_in(out) == {"knn"}


def tasks_in(out: Path) -> set[str]:
    return set(json.loads((out / "results.json").read_text())["tasks"])


@pytest.mark.parametrize(
    "task", ["segmentation", "depth", "tracking", "correspondence", "resolution", "dense"]
)
def test_every_dense_task_runs_on_scenes(task: str):
    backbone = open_backbone("pixels", patch_size=8).backbone
    outcome = evaluate(backbone, "scenes", [task], SMALL, READ)[task]
    assert "error" not in outcome and results.metrics_of(task, outcome)


def test_a_task_without_its_data_is_one_sentence_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    from PIL import Image

    for name in ("train/a/1", "train/a/2", "train/b/3", "train/b/4", "val/a/5", "val/b/6"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (hash(name) % 256, 9, 99)).save(path)
    command = [
        "pixels",
        "--data",
        str(tmp_path / "pets"),
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "tracking,knn",
    ]
    assert main([*command, *COMMAND]) == 1
    said = capsys.readouterr()
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert "tracking: " in said.err and "tracking expects <sequence>" in said.err
    assert "top1" in saved["tasks"]["knn"]
    assert "tracking expects" in saved["tasks"]["tracking"]["error"] and "failed" in said.out


def test_a_crash_keeps_the_results_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def crash(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evals, "depth", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["pixels", "--out", str(tmp_path), "--tasks", "knn,depth", *COMMAND])
    assert list(json.loads((tmp_path / "results.json").read_text())["tasks"]) == ["knn"]


def test_results_lie_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = {
        "model": "a",
        "data": "/x/scenes",
        "tasks": {"knn": {"top1": {"10": 50.0}}, "depth": {"rmse": 0.5}},
    }
    second = {
        "model": "bb",
        "data": "scenes",
        "tasks": {"knn": {"top1": {"10": float("nan")}}, "depth": {"error": "x"}},
    }
    for name, result in (("a", first), ("b", second)):
        results.write_results(result, tmp_path / name / "results.json")
    assert main(["--table", str(tmp_path / "a"), str(tmp_path / "b/results.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|               |      a |     bb |",
        "|---------------|-------:|-------:|",
        "| data          | scenes | scenes |",
        "| knn top1 k=10 |   50.0 |      - |",
        "| depth rmse    |  0.500 |      - |",
        "| depth         |      - | failed |",
    ]
    results.write_results(
        first | {"settings": {"size": 48}, "read": {"seed": 0}}, tmp_path / "a/results.json"
    )
    results.write_results(
        second | {"settings": {"size": 64}, "read": {"seed": 0}}, tmp_path / "b/results.json"
    )
    assert main(["--table", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "| size          |     48 |     64 |" and not any(
        "seed" in line for line in lines
    )
    with pytest.raises(ValueError, match=r"expected results\.json of an evaluation"):
        main(["--table", str(tmp_path / "c")])


def test_names_of_models_are_short_as_long_as_they_differ():
    assert results.short_names(
        ["/x/runs/a", "pixels", "untrained:vits16", "/x/step_2/teacher.pth"]
    ) == [
        "a",
        "pixels",
        "untrained:vits16",
        "step_2/teacher.pth",
    ]
    assert results.short_names(["runs/a", "old/a"]) == ["runs/a", "old/a"]
    assert results.short_names(["runs/a", "runs/a"]) == ["a", "a"]  # one model, judged twice


def test_metrics_by_side_and_neighbours():
    outcome = {
        "knn": [1.0, 2.0],
        "sides": [48, 96],
        "top1": {"5": 3.0},
        "learning_rate": 0.1,
        "count": 7,
        "rankme": 4.0,
    }
    assert results.metrics_of("t", outcome) == {
        "t knn 48 px": 1.0,
        "t knn 96 px": 2.0,
        "t top1 k=5": 3.0,
        "t rankme": 4.0,
    }


def test_what_a_model_may_be_called(tmp_path: Path):
    path = weights(tmp_path / "run/checkpoints/step_00000002")
    (path.parent / "state.json").write_text("{}")
    (tmp_path / "run/config.json").write_text(
        json.dumps({"recipe": {"crops": {"global_size": [48, 56]}}})
    )
    opened = open_backbone(str(tmp_path / "run"))
    assert opened.size == 48 == open_backbone(str(path)).size and "loaded" in opened.report

    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, two = (
        open_backbone("untrained:vit_nano8", seed=seed).backbone for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.cls_token, same.cls_token) and not torch.equal(
        one.cls_token, two.cls_token
    )
    recipe = open_backbone("untrained:quickstart", recipes=RECIPES)
    assert (
        recipe.size == 48
        and recipe.backbone.width == 96
        and recipe.backbone.statistics.mean[0] == 0.485
    )
    assert open_backbone("untrained:vits16", channels=5).backbone.statistics is None

    wide = open_backbone(str(path), channels=5, rgb_channels=(3, 2, 1)).backbone
    assert wide.in_channels == 5 and wide.statistics is None
    assert open_backbone("pixels", channels=5, patch_size=4).backbone.in_channels == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "model 'nowhere': expected a file or folder of weights"),
        (["vits16"], "did you mean untrained:vits16"),
        (["untrained:vits61"], "did you mean untrained:vits16"),
        ([], "expected a model, got none"),
        (["pixels", "--tasks", "knn,sight"], "expected some of knn, .* got sight"),
        (["pixels", "--size", "20", "--pixel-patch", "8", "--tasks", "knn"], None),
    ],
)
def test_mistakes_get_a_sentence(arguments: list[str], sentence: str | None, tmp_path: Path):
    command = [*arguments, "--out", str(tmp_path)]
    if sentence is None:  # a task's own
        assert main([*command, "--read.scenes-train", "12", "--read.scenes-test", "12"]) == 1
        assert (
            "multiple of the patch size 8"
            in json.loads((tmp_path / "results.json").read_text())["tasks"]["knn"]["error"]
        )
        return
    with pytest.raises(ValueError, match=sentence):
        main(command)


def test_a_module_that_is_no_backbone_is_refused():
    with pytest.raises(
        ValueError, match=r"features\(images\), patch_size and statistics, got Linear"
    ):
        evaluate(nn.Linear(2, 2), "scenes", ["knn"], SMALL, READ)


def test_a_misspelt_option_is_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["pixels", "--taks", "knn"])
    assert "--tasks" in capsys.readouterr().err


def test_in_the_middle_of_training(tmp_path: Path):
    """The backbone keeps its training flags, needs no cache, and is given statistics it lacks."""
    torch.manual_seed(0)
    backbone = build("vit_nano8", depth=1).train()
    backbone.norm.eval()
    backbone.statistics = None
    outcomes = evaluate(backbone, "scenes", ["knn", "linear"], SMALL, READ)
    assert backbone.training and backbone.blocks[0].training and not backbone.norm.training
    assert list(outcomes) == ["knn", "linear"]
    assert all(0 <= outcome["seconds"] for outcome in outcomes.values())
    assert 0 < backbone.statistics.mean[0] < 1
    alone = evaluate(backbone, "scenes", ["knn"], SMALL, READ)
    assert metrics(alone) == metrics({"knn": outcomes["knn"]})


def test_pictures_of_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Both see the same test images at 32 patches a side; the bank is at their own size."""
    seen = {}

    def write_gallery(models, images, out, **options):
        seen.update(names=list(models), images=images, **options)
        return out / "gallery.html"

    monkeypatch.setattr(galleries, "write_gallery", write_gallery)
    model = str(weights(tmp_path / "weights"))
    assert main(["--compare", model, "untrained:vit_nano8", "--out", str(tmp_path), *COMMAND]) == 0
    assert f"pictures: {tmp_path}/gallery.html" in capsys.readouterr().out
    assert seen["names"] == ["weights/model.safetensors", "untrained:vit_nano8"] and seen[
        "images"
    ].shape == (
        8,
        3,
        256,
        256,
    )
    bank = seen["bank"]
    assert bank.images.shape == (36, 3, 16, 16) and len(bank.labels) == 36
    assert (
        len(bank.query_labels) == 8
        and main(["pixels", "--tasks", "", "--pictures", "--out", str(tmp_path), *COMMAND]) == 0
    )
    assert seen["names"] == ["pixels"]


def photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(content).save(folder / name)
    return folder


def test_pictures_of_photos_without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Neighbours are sought among images that are not shown; unreadable ones are counted."""
    seen = {}
    monkeypatch.setattr(
        galleries, "write_gallery", lambda _, images, out, **rest: seen.update(rest, images=images)
    )
    folder = photos(tmp_path / "photos", *(f"{i}.png" for i in range(12)))
    (folder / "3.png").write_bytes(b"no image")
    command = [
        "pixels",
        "--data",
        str(folder),
        "--tasks",
        "dense",
        "--pictures",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--pixel-patch", "8", "--size", "16"]) == 0
    said = capsys.readouterr().err
    assert "dense: unreadable and left out: 1" in said
    assert "pictures: unreadable and left out: 1, such as" in said and "3.png" in said
    bank = seen["bank"]
    assert len(seen["images"]) + len(bank.images) == 11
    assert bank.labels is None and bank.query_labels is None
    assert bank.images.shape[1:] == (3, 16, 16) and seen["images"].shape[1:] == (3, 256, 256)

    galleries.draw(
        {"pixels": open_backbone("pixels")}, photos(tmp_path / "one", "1.png"), READ, tmp_path, 16
    )
    assert seen["bank"] is None and len(seen["images"]) == 1  # one image has no others beside it
    (tmp_path / "one/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 images can be read, such as"):
        galleries.draw({"pixels": open_backbone("pixels")}, tmp_path / "one", READ, tmp_path, 16)


def test_what_is_left_out_and_what_fails_alike_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    names = [
        f"{part}/{name}/{i}.png" for part in ("train", "val") for name in "ab" for i in range(3)
    ]
    folder = photos(tmp_path / "pets", *names)
    (folder / "val/a/0.png").write_bytes(b"no image")
    command = [
        "pixels",
        "--data",
        str(folder),
        "--tasks",
        "knn,linear,segmentation,depth",
        "--out",
        str(tmp_path),
    ]
    assert main([*command, *COMMAND]) == 1
    said = capsys.readouterr().err
    assert said.count("knn, linear: unreadable and left out: 1, such as") == 1 and "a/0.png" in said
    assert (
        main(["pixels", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path), *COMMAND]) == 1
    )
    assert capsys.readouterr().err.count("found nothing of the kind") == 1


class Broken(nn.Module):
    """Features of one image in four are not numbers."""

    patch_size, statistics = 8, build("vit_nano8", depth=1).statistics

    def features(self, images):
        features = open_backbone("pixels", patch_size=8).backbone.features(images)
        worst = features.cls[:, 0] <= features.cls[:, 0].quantile(0.25)
        return features._replace(cls=torch.where(worst[:, None], torch.nan, features.cls))


def two_processes(out: Path) -> None:
    """What each rank runs."""
    with joined() as world:
        backbone = open_backbone("untrained:vit_nano8").backbone
        shared = {"cache": out / "cache", "world": world}
        outcomes = evaluate(backbone, "scenes", ["knn", "linear"], SMALL, READ, **shared)
        assert bool(outcomes) == world.is_main
        broken = evaluate(Broken(), "scenes", ["knn"], SMALL, READ, **shared)
        if world.is_main:
            outcomes["broken"] = broken["knn"]
            results.write_results(metrics(outcomes), out / "outcomes.json")


def test_two_processes_equal_one(tmp_path: Path):
    run_ranks(Path(__file__), tmp_path)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    backbone = open_backbone("untrained:vit_nano8").backbone
    alone = evaluate(backbone, "scenes", ["knn", "linear"], SMALL, READ)
    # Refused on both processes alike: none waits for the other for ever.
    assert "rows hold NaN or infinity" in outcomes.pop("broken")["error"]
    assert outcomes == json.loads(json.dumps(metrics(alone)))
    cached = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(cached) == 2  # training and test images, for both tasks


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
