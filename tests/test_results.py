"""results.json over several calls: what stays, what does not, and what is said of other files."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3core import evals
from dinov3core.data.datasets import DataOptions, open_ranged, open_segmented, open_videos
from dinov3core.data.identity import data_identity
from dinov3core.evals import results
from dinov3core.models import build
from dinov3core.models.vit import VisionTransformer
from dinov3core.train.engine import tasks
from dinov3core.train.evaluate import evaluate, main

READ = DataOptions(scenes_train=36, scenes_test=24, scene_size=16, scene_videos=1)
SCENES = ["--read.scenes-train", "36", "--read.scenes-test", "24", "--read.scene-videos", "1"]
PIXELS = ["pixels", "--pixel-patch", "8", "--size", "16", "--device", "cpu"]


def saved(out: Path, number: int | None = None) -> dict[str, dict]:
    name = "results.json" if number is None else f"results.{number}.json"
    return json.loads((out / name).read_text())["tasks"]


def judge(out: Path, names: str, *more: str) -> int:
    return main([*PIXELS, "--out", str(out), "--tasks", names, *more])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of two and one photos."""
    for number, name in enumerate(("train/a/1", "train/a/2", "train/b/3", "val/a/4", "val/b/5")):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(content).save(path)
    return tmp_path / "photos"


def test_settings_of_one_task_leave_the_others(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert judge(tmp_path, "knn,tracking,depth", *SCENES, "--iterations", "10") == 0
    before = saved(tmp_path)
    capsys.readouterr()
    assert judge(tmp_path, "linear", *SCENES, "--iterations", "5") == 0  # depth uses them, too
    said, after = capsys.readouterr().err, saved(tmp_path)
    assert after.keys() == {"knn", "tracking", "linear"}
    assert after["knn"] == before["knn"] and after["tracking"] == before["tracking"]
    assert "depth (iterations 10, now 5); they stay in" in said and "knn" not in said
    assert saved(tmp_path, 1) == before  # nothing is lost
    assert judge(tmp_path, "knn", *SCENES, "--iterations", "5") == 0  # the same again
    assert "warning" not in capsys.readouterr().err and saved(tmp_path).keys() == after.keys()

    assert judge(tmp_path, "dense", *SCENES[:2], *SCENES[4:], "--iterations", "5") == 0
    said = capsys.readouterr().err
    assert "knn, linear (scenes_test 24, now 1200)" in said and "tracking" not in said
    assert saved(tmp_path).keys() == {"tracking", "dense"} and saved(tmp_path, 2) == after | {
        "knn": saved(tmp_path, 2)["knn"]
    }


def test_data_changed_behind_a_path(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    assert judge(out, "knn", "--data", str(photos)) == 0
    before = saved(out)
    moved = shutil.move(photos, tmp_path / "moved")
    capsys.readouterr()
    assert judge(out, "dense", "--data", str(moved)) == 0
    assert saved(out)["knn"] == before["knn"] and "warning" not in capsys.readouterr().err

    image = moved / "val/a/4.png"
    Image.new("RGB", (20, 24), (9, 99, 199)).save(image)
    assert judge(out, "correspondence", "--data", str(moved)) == 0
    said = capsys.readouterr().err
    assert f"warning: {out}/results.json holds results that are not of this call: " in said
    assert f"knn (of {photos}); dense (its data have changed since); they stay in" in said
    assert saved(out).keys() == {"correspondence"} and saved(out, 1).keys() == {"knn", "dense"}

    os.utime(image, ns=(1, 1))
    assert judge(out, "dense", "--data", str(moved)) == 0
    assert "correspondence (its data have changed since)" in capsys.readouterr().err


def test_what_fails_now_and_worked_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def missing(*_: object, **__: object) -> dict:
        raise ImportError("expected a package, found none")

    assert judge(tmp_path, "knn", *SCENES) == 0
    before = saved(tmp_path)
    monkeypatch.setattr(evals, "knn", missing)
    monkeypatch.setattr(evals, "tracking", missing)
    assert judge(tmp_path, "knn,tracking", *SCENES) == 1
    assert saved(tmp_path)["knn"] == before["knn"] and "error" in saved(tmp_path)["tracking"]
    assert "knn, tracking: expected a package, found none" in capsys.readouterr().err
    monkeypatch.undo()
    assert judge(tmp_path, "dense", *SCENES) == 0  # a failure beside it stays without a word
    assert judge(tmp_path, "dense", *SCENES[:2]) == 0
    assert "tracking" not in capsys.readouterr().err


def test_files_of_older_versions_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture):
    old = {"model": "pixels", "data": "scenes", "settings": {}, "tasks": {"knn": {"top1": {}}}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert judge(tmp_path, "dense", *SCENES) == 0
    assert "knn (written before tasks recorded their own settings)" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.1.json").read_text()) == old
    (tmp_path / "results.json").write_text("{half")
    assert judge(tmp_path, "dense", *SCENES) == 0
    assert "all of it (it is no results.json of an evaluation)" in capsys.readouterr().err
    assert (tmp_path / "results.2.json").read_text() == "{half"
    assert saved(tmp_path).keys() == {"dense"}


def test_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    backbone, calls, real = build("vit_nano8", depth=1), [], VisionTransformer.state_dict

    def counted(self: VisionTransformer, *args: object, **more: object) -> dict:
        calls.append(self)
        return real(self, *args, **more)

    monkeypatch.setattr(VisionTransformer, "state_dict", counted)
    settings = tasks.Settings(size=16, iterations=2)
    names = ["knn", "linear", "dense"]
    outcomes = evaluate(backbone, "scenes", names, settings, READ, cache=tmp_path)
    assert not any("error" in outcome for outcome in outcomes.values())
    assert len(calls) == 1


@pytest.fixture
def sets(photos: Path, tmp_path: Path) -> dict[Callable[..., Any], Path]:
    """Files for every reader."""
    grey = np.random.default_rng(0).integers(0, 3, (16, 16))
    for number in range(5):
        for name, kind in (("images", np.uint8), ("masks", np.uint8), ("depth", np.uint16)):
            for place in ("masked", "far"):
                path = tmp_path / place / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grey.astype(kind)).save(path)
    shutil.rmtree(tmp_path / "masked/depth")
    shutil.rmtree(tmp_path / "far/masks")
    (tmp_path / "film/walk").mkdir(parents=True)
    for frame in ("0.jpg", "1.jpg", "0.png", "1.png"):
        Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "film/walk" / frame)
    named = {open_segmented: "masked", open_ranged: "far", open_videos: "film"}
    return {opener: tmp_path / named.get(opener, "photos") for opener in tasks.READS}


def content(opened: Any) -> str:
    """What a task could see of opened data, as text."""
    splits = [getattr(opened, name, opened) for name in ("train", "test")]
    names = [[split.name(index) for index in range(len(split))] for split in splits]
    loaded = splits[0].load(0)
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    pixels = [np.asarray(part).tolist() for part in parts if not isinstance(part, str)]
    return repr((names, pixels))


def test_an_option_that_is_not_recorded_changes_nothing(sets: dict[Callable[..., Any], Path]):
    for opener, (of_scenes, of_files) in tasks.READS.items():
        for spec, recorded in (("scenes", of_scenes), (sets[opener], of_files)):
            before = content(opener(spec, READ))
            for field in fields(DataOptions):
                if field.name not in recorded:
                    other = replace(READ, **{field.name: getattr(READ, field.name) + 1})
                    assert content(opener(spec, other)) == before, (opener, spec, field.name)
    used = {name for parts in tasks.READS.values() for part in parts for name in part}
    assert used == {field.name for field in fields(DataOptions)}


def test_every_setting_is_used_by_a_task_or_changes_the_speed_alone():
    used = {name for names in tasks.USES.values() for name in names}
    assert {field.name for field in fields(tasks.Settings)} == used | {"batch_size", "workers"}
    assert tasks.USES.keys() == tasks.OPENERS.keys()


def test_data_are_known_by_their_files_wherever_they_lie(photos: Path, tmp_path: Path):
    assert data_identity("scenes") == data_identity("scenes") != data_identity(photos)
    copy = shutil.copytree(photos, tmp_path / "elsewhere/photos")  # with the times of change
    assert data_identity(copy) == data_identity(photos)
    (photos / "results.json").write_text("{}")
    assert data_identity(copy) == data_identity(photos)
    shutil.copy(photos / "val/a/4.png", photos / "val/a/6.png")
    assert data_identity(copy) != data_identity(photos)

    (tmp_path / "list.txt").write_text("photos/val/a/4.png\nphotos/val/b/5.png\nphotos/gone.png\n")
    before = data_identity(tmp_path / "list.txt")
    os.utime(photos / "val/b/5.png", ns=(1, 1))
    assert data_identity(tmp_path / "list.txt") != before
    np.savez(tmp_path / "set.npz", x=np.zeros(1))
    assert data_identity(tmp_path / "set.npz") == data_identity(str(tmp_path / "set.npz"))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "got nothing there"),
        ({}, r"got a folder without one; python train/evaluate\.py MODEL --out .* makes it"),
        ({"a/results.json": ""}, "got a folder without one; there is one in its a"),
        ({"results.json": "{half"}, "got a file that cannot be read: Expecting property name"),
        ({"results.json": "[1]"}, "got JSON of something else"),
        ({"results.json": '{"model": 1, "data": 2, "tasks": {"knn": 5}}'}, "got JSON of something"),
        ({"results.json": b"\xff\xfe"}, "got a file that cannot be read: 'utf-8' codec"),
    ],
)
def test_a_table_of_something_else(files: dict[str, Any] | None, sentence: str, tmp_path: Path):
    folder = tmp_path / "judged"
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if files == {}:
        folder.mkdir()
    start = rf"^{folder}: expected results\.json of an evaluation or its folder, "
    with pytest.raises(ValueError, match=start + sentence):
        main(["--table", str(folder)])


def test_a_table_shows_error_bars_and_settings_task_by_task():
    def result(size: int, more: int, percent: float) -> dict:
        knn = {"top1": {"20": percent}, "test_images": 1200, "judged": {"settings": {"size": size}}}
        depth = {"a1": 40.0, "judged": {"settings": {"iterations": 10}, "read": {"seed": 0}}}
        linear = {"top1": 50.0, "judged": {"settings": {"size": 48, "iterations": more}}}
        tasks = {"knn": knn, "depth": depth, "linear": linear}
        return {"model": f"m{size}", "data": "scenes", "tasks": tasks}

    text = results.table([result(48, 10, 57.2), result(64, 20, 0.0)])
    assert text.splitlines() == [
        "|                   |         m48 |          m64 |",
        "|-------------------|------------:|-------------:|",
        "| data              |      scenes |       scenes |",
        "| knn size          |          48 |           64 |",
        "| linear iterations |          10 |           20 |",
        "| knn top1 k=20     | 57.2 +- 1.4 | 0.000 +- 0.0 |",
        "| depth a1          |        40.0 |         40.0 |",
        "| linear top1       |        50.0 |         50.0 |",
    ]
