"""Whose images a run reports on: the user's own unless others are named, and it says whose."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

from dense_stubs import Stub
from test_report import Page
from tiny_runs import tiny_command

from dinov3core.data.errors import DataError
from dinov3core.data.images import DatasetSource, open_source
from dinov3core.data.scenes import Scenes
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.pictures.states import Snapshot
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.loop import open_training_images, pretrain
from dinov3core.train.engine.probe import Probe
from dinov3core.train.pretrain import main
from dinov3core.train.recipes.quickstart import quickstart

CLASSES = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def _folder(root: Path, count: int, parts: tuple[str, ...] = ("",)) -> Path:
    """Class folders of plain images, every one of another shade: `count` per class and part."""
    for part in parts:
        for name, colour in CLASSES.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                shade = tuple(min(255, channel + 3 * index) for channel in colour)
                Image.new("RGB", (40, 40), shade).save(root / part / name / f"{index}.png")
    return root


def _recipe(source: Path | str, probe: str = "auto", **data) -> Pretrain:
    recipe = quickstart()
    settings = {"probe_bank": 24, "probe_queries": 16, "dense_images": 16, **data}
    return replace(recipe, data=replace(recipe.data, source=str(source), probe=probe, **settings))


def _probe(source: Path | str, probe: str = "auto", **data) -> Probe:
    recipe = _recipe(source, probe, **data)
    return Probe(recipe, open_training_images(recipe)[0])


def _plain(images: torch.Tensor) -> bool:
    """Images of one colour each, as those of `_folder`; scenes are not."""
    return bool((images.flatten(2).float().std(2) < 1).all())


def test_a_run_on_own_images_shows_them(tmp_path, capsys):
    folder = _folder(tmp_path / "photos", 8)
    main([*tiny_command(tmp_path / "run", "--data.source", str(folder), "--run.epoch-steps", "3")])
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    page = Page((tmp_path / "run" / "report.html").read_text())
    shown = " ".join(" ".join(page.texts).split())
    before = Snapshot.load(tmp_path / "run" / "before.npz")
    assert _plain(torch.from_numpy(before.photos).permute(0, 3, 1, 2))
    assert _plain(torch.from_numpy(before.neighbours).flatten(0, 1).permute(0, 3, 1, 2))
    assert summary["knn_after"] is summary["knn_before"] is summary["knn_pixels"] is None
    assert summary["images"]["trained"] == f"16 images in {folder}"
    assert summary["images"]["shown"] == f"12 of the 16 training images in {folder}, not held out"
    assert summary["images"]["neighbours"] == (
        f"6 images in {folder}, not held out, each compared with 6 others"
    )
    command = f"dinov3core pretrain quickstart --data.source {folder} --data.probe FOLDER"
    for text in (said, shown):
        assert f"16 images in {folder}" in text and "not held out" in text and command in text
        assert "scenes" not in text.replace("data.scenes", "").replace("scenes =", "").replace(
            "(recipe: scenes)", ""
        )
    assert "held-out" not in shown


def test_patches_are_scored_on_a_folder_of_images_and_masks(tmp_path):
    """Colours are the classes here; the words say what was measured on what."""
    masked = tmp_path / "masked"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (masked / kind / split).mkdir(parents=True)
        for index in range(6):
            mask = torch.zeros(48, 48, dtype=torch.uint8)
            mask[:, : 8 * (index + 1) // 2] = 1
            mask[40:] = 255
            pixels = torch.stack([200 * mask.clamp(max=1), 90 + 0 * mask, 40 + 0 * mask], 2)
            Image.fromarray(pixels.numpy()).save(masked / "images" / split / f"{index}.png")
            Image.fromarray(mask.numpy()).save(masked / "masks" / split / f"{index}.png")
    probe = _probe(_folder(tmp_path / "own", 8), dense=str(masked))
    scores = probe.masked.score(FrozenEncoder(Stub()))
    assert scores.agreement.value > 95 and scores.agreement.error < 3 and scores.miou.value > 50
    assert probe.sets.dense.startswith(f"12 images with masks of {masked}, 2 classes. Patch ")


def test_a_named_probe_is_scored_and_the_pictures_stay_own(tmp_path):
    own, named = _folder(tmp_path / "own", 8), _folder(tmp_path / "named", 6, ("train", "val"))
    probe = _probe(own, str(named))
    assert probe.knn(probe.bank.flatten(1).float(), probe.queries.flatten(1).float()).value > 50
    assert (
        len(probe.bank) == len(probe.queries) == 12
        and probe.chance == 50
        and len(probe.views) == 16
    )
    assert probe.sets.knn == (
        f"12-NN, 12 test images of {named}, each compared with 12 others; 2 classes, chance 50.0 %"
    )
    assert str(own) in probe.sets.shown and str(named) in probe.sets.neighbours


def test_scenes_named_beside_own_images_are_only_scored(tmp_path):
    probe = _probe(_folder(tmp_path / "own", 8), "scenes")
    assert _plain(probe.views) and not _plain(probe.queries) and probe.view_labels is None
    assert "16 held-out built-in scenes" in probe.sets.knn and "own" in probe.sets.shown


def test_training_on_scenes_looks_at_held_out_ones():
    recipe = _recipe("scenes", scenes=64)
    found = Probe(recipe, Scenes(64, size=64))
    named = Probe(replace(recipe, data=replace(recipe.data, probe="scenes")), Scenes(64, size=64))
    assert found.views is found.queries and torch.equal(found.views, named.views)
    assert (
        found.sets.trained == "64 built-in scenes"
        and found.sets.shown == "16 held-out built-in scenes"
    )
    assert "12 classes, chance 8.3 %" in found.sets.knn
    without = Probe(replace(recipe, data=replace(recipe.data, probe="none")), Scenes(64, size=64))
    assert without.chance is None and "not held out" in without.sets.shown


def test_a_probe_inside_the_training_folder_is_not_called_held_out(tmp_path):
    folder = _folder(tmp_path / "own", 6, ("train", "val"))
    assert "inside the training folder, so not held out" in _probe(folder, str(folder)).sets.knn
    assert "held out" not in _probe(folder / "train", str(folder)).sets.knn


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_the_sample_is_even_seeded_and_apart(tmp_path, count):
    for index in range(count):
        Image.new("RGB", (40, 40), (6 * index, 0, 0)).save(tmp_path / f"{index:02d}.png")
    probe = _probe(tmp_path)
    reds = [int(image[0, 0, 0]) for image in probe.views]
    assert len(set(reds)) == len(reds) == min(count, 16)
    assert len(probe.queries) + len(probe.bank) == len(reds)  # nobody is its own neighbour
    if count == 40:  # one of every stretch
        places = [red // 6 for red in sorted(reds)]
        assert all(40 * i // 16 <= place < 40 * (i + 1) // 16 for i, place in enumerate(places))
        assert reds != sorted(reds)
    assert [int(image[0, 0, 0]) for image in _probe(tmp_path).views] == reds


def test_a_dataset_from_python_is_named_as_such(tmp_path):
    images = [
        (torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8), "no number") for _ in range(9)
    ]
    recipe = _recipe("scenes")
    recipe = replace(
        recipe,
        run=replace(recipe.run, epochs=1, epoch_steps=1, batch_size=4, out=str(tmp_path / "run")),
    )
    recipe = replace(
        recipe, optim=replace(recipe.optim, lr=replace(recipe.optim.lr, warmup_epochs=0))
    )
    summary = pretrain(recipe, DatasetSource(images))
    assert summary["images"]["trained"] == "9 images of a DatasetSource given in Python"
    assert 'set data.probe to "FOLDER"' in summary["images"]["knn"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["data"]["source"] == "from Python: DatasetSource"


def test_images_none_of_which_can_be_read_are_those_of_the_source(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"not an image")
    with pytest.raises(
        DataError, match=r"^none of the 3 images of .* can be read, such as .*not an image"
    ):
        _probe(tmp_path)


@pytest.mark.parametrize("layout", ["nothing", "no classes", "one class"])
def test_a_probe_without_classes_is_refused(tmp_path, layout):
    own, named = _folder(tmp_path / "own", 4), tmp_path / "named"
    if layout == "no classes":
        named.mkdir()
        Image.new("RGB", (40, 40)).save(named / "a.png")
    if layout == "one class":
        (named / "only").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (40, 40)).save(named / "only" / f"{index}.png")
    with pytest.raises(DataError, match=r"^data\.probe: .*or leave it at auto, without k-NN$"):
        _probe(own, str(named))


def test_a_few_training_images_bound_the_rank(tmp_path):
    """RankMe is judged against the number of images where that is smaller than the width."""
    from dinov3core.train.engine.monitor import Monitor

    recipe = _recipe(_folder(tmp_path / "own", 4))
    monitor = Monitor(recipe, open_source(recipe.data.source), tmp_path, torch.device("cpu"))
    assert monitor.largest_rank == 8 and monitor.patience == 100
