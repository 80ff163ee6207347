"""Whole runs, small: what the folder holds, bad input, finished runs kept, collapse named."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov3core.data.errors import DataError
from dinov3core.data.images import DatasetSource
from dinov3core.models import HeadSettings
from dinov3core.pictures.states import Snapshot
from dinov3core.train.engine import config
from dinov3core.train.engine.checkpoint import CheckpointError
from dinov3core.train.engine.config import ConfigError, File, GramAnchor, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.parallel import World, WorldError
from dinov3core.train.engine.schedules import CosineSchedule, constant
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.recipes.quickstart import quickstart

ROOT = Path(__file__).resolve().parents[1]


def tiny(folder: Path, **run) -> Pretrain:
    base = quickstart()
    short = dict(
        epochs=1, epoch_steps=4, batch_size=8, eval_every=2, checkpoint_every=2, log_every=1
    )
    head = HeadSettings(prototypes=32, hidden=32, bottleneck=16, init_std=0.1, prototype_std=0.25)
    return replace(
        base,
        backbone=replace(base.backbone, width=24, depth=1, heads=1, registers=1),
        dino=head,
        ibot=head,
        crops=replace(base.crops, global_size=32, local_size=16, local_count=1),
        data=replace(
            base.data,
            scenes=64,
            scene_size=32,
            probe_bank=48,
            probe_queries=24,
            dense_images=24,
        ),
        run=replace(base.run, **(short | run), out=str(folder)),
    )


def test_a_run_leaves_everything_it_promises(tmp_path):
    folder = tmp_path / "run"
    summary = pretrain(tiny(folder))
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == summary
    for key in (
        "seconds",
        "images_per_second",
        "knn_pixels",
        "knn_before",
        "knn_after",
        "peak_memory_bytes",
    ):
        assert saved[key] > 0, key
    assert saved["collapse"] == "unknown" and saved["skipped_images"] == saved["bad_steps"] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "event" not in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, 2, 4]
    assert {
        "dino_global",
        "dino_local",
        "ibot",
        "koleo",
        "target_entropy",
        "log_k",
        "data_seconds",
    } <= rows[1].keys()
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["recipe"]["run"]["batch_size"] == 8
        and config["environment"]["torch"] == torch.__version__
    )
    assert (folder / "checkpoints" / "step_00000004" / "teacher.safetensors").is_file()


def test_a_finished_run_is_kept_aside(tmp_path):
    folder = tmp_path / "run"
    first = pretrain(tiny(folder, epoch_steps=1))
    pretrain(tiny(folder, epoch_steps=2))
    assert json.loads((tmp_path / "run.1" / "summary.json").read_text()) == first
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


def test_any_torch_dataset_trains(tmp_path):
    images = [
        (torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8), index % 2) for index in range(10)
    ]
    recipe = tiny(tmp_path / "run", epoch_steps=1)
    recipe = replace(recipe, data=replace(recipe.data, probe="none"))
    summary = pretrain(recipe, DatasetSource(images))
    assert summary["steps"] == 1 and summary["knn_after"] is None


def test_unreadable_images_are_counted_and_listed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(12):
        Image.new("RGB", (40, 40), (index * 20, 80, 120)).save(images / f"{index}.png")
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "empty.png").write_bytes(b"")
    recipe = tiny(tmp_path / "run", epoch_steps=2)
    recipe = replace(recipe, data=replace(recipe.data, source=str(images)))
    summary = pretrain(recipe)
    assert summary["skipped_images"] >= 2
    assert any("broken.jpg" in name for name in summary["skipped"])
    assert summary["enlarged_images"] == 0
    assert any("empty.png" in name for name in summary["skipped"])


def test_images_smaller_than_a_crop_are_enlarged_and_counted(tmp_path):
    small = [(torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8), 0)] * 8
    recipe = tiny(tmp_path / "run", epoch_steps=1)
    recipe = replace(recipe, data=replace(recipe.data, probe="none"))
    assert pretrain(recipe, DatasetSource(small))["enlarged_images"] == 8


def test_a_collapsed_run_is_called_collapsed(tmp_path):
    """Every image the same and a hot teacher: targets sit at ln K in every step."""
    same = [(torch.full((3, 32, 32), 128, dtype=torch.uint8), 0)] * 16
    recipe = tiny(tmp_path / "run", epoch_steps=110, log_every=5, eval_every=0)
    recipe = replace(
        recipe,
        data=replace(recipe.data, probe="none", probe_bank=16, probe_queries=16),
        teacher=replace(recipe.teacher, temperature=constant(5.0)),
    )
    summary = pretrain(recipe, DatasetSource(same))
    assert summary["collapse"] == "uniform", summary["collapse_sentence"]


def test_a_damaged_look_at_the_start_costs_no_report(tmp_path, monkeypatch, capsys):
    """before.npz is read at the end of a run; pictures are not worth losing the report for."""
    save = Snapshot.save
    monkeypatch.setattr(
        Snapshot, "save", lambda self, path: (save(self, path), Path(path).write_bytes(b"PK cut"))
    )
    summary = pretrain(tiny(tmp_path / "run"))
    assert summary["steps"] == 4 and (tmp_path / "run" / "report.html").is_file()
    assert "the report shows nothing of the start" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingStopped, match=r"cannot write the run folder .* give a writable one with --run\.out"
    ):
        pretrain(tiny(tmp_path / "file" / "run"))


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    from dinov3core.train.engine import tensor_files

    def full_from_the_second_on(*args, whole=tensor_files.dcp_save, calls=[]):  # noqa: B006
        calls.append(args)
        if len(calls) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args)

    monkeypatch.setattr(tensor_files, "dcp_save", full_from_the_second_on)
    with pytest.raises(
        CheckpointError, match="step 4: the disk is full; earlier checkpoints are kept"
    ):
        pretrain(tiny(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(crops=dict(global_size=33)), "not a multiple of the patch"),
        (dict(dino=dict(prototypes=1)), "dino.prototypes is 1 for 8 images"),
        (dict(run=dict(batch_size=9, accumulation=2)), "multiple of run.accumulation"),
        (
            dict(backbone=dict(in_channels=4)),
            "scenes have 3 channels but backbone.in_channels is 4",
        ),
        (
            dict(run=dict(log_every=0)),
            "run.log_every: expected at least 1 and at most 1000000000, got 0",
        ),
        (dict(run=dict(threads=-3)), "run.threads: expected at least 0 and at most 1024, got -3"),
        (dict(run=dict(seed=-1)), "run.seed: expected at least 0 and at most .*07, got -1"),
        (dict(loss=dict(koleo_topk=99)), "koleo_topk 99 must be below the 8 images"),
        (
            dict(loss=dict(sinkhorn_iterations=0)),
            "sinkhorn_iterations: expected at least 1 and at most 1000, got 0",
        ),
        (
            dict(teacher=dict(temperature=constant(0.0))),
            "teacher.temperature: expected at least 0.001 .* got 0 at step 0",
        ),
        (dict(backbone=dict(width=33)), "multiple of 4"),
        (dict(backbone=dict(drop_path=1.5)), "drop_path: expected at least 0 and below 1, got 1.5"),
        (
            dict(backbone=dict(untie_local_cls_norm=True), crops=dict(local_count=0)),
            "crops.local_count is 0",
        ),
        (
            dict(optim=dict(lr=CosineSchedule(1e-3, 1e-6, warmup_epochs=-1))),
            "lr.warmup_epochs: expected at least 0",
        ),
        (dict(optim=dict(clip=0.0)), "optim.clip: expected at least 1e-06"),
    ],
)
def test_recipes_that_cannot_run_are_refused_with_a_sentence(tmp_path, change, sentence):
    recipe = tiny(tmp_path / "run")
    for field, values in change.items():
        recipe = replace(recipe, **{field: replace(getattr(recipe, field), **values)})
    with pytest.raises(ConfigError, match=sentence):
        pretrain(recipe)


def test_an_empty_source_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    recipe = tiny(tmp_path / "run")
    with pytest.raises(DataError):
        pretrain(replace(recipe, data=replace(recipe.data, source=str(tmp_path / "nothing"))))


@pytest.mark.parametrize("gram", [GramAnchor(), GramAnchor(config.Snapshot(every=2), crop_size=48)])
def test_gram_anchoring_runs(tmp_path, gram):
    recipe = tiny(tmp_path / "run", epoch_steps=3)
    pretrain(replace(recipe, gram=gram))
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    values = [row["gram"] for row in rows if "gram" in row]
    assert len(values) == 3 and values[-1] > 0


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(WorldError, match=r"^device cuda: expected a GPU, but torch .*; use cpu"):
        pretrain(tiny(tmp_path / "run", device="cuda"))


def test_a_run_without_local_crops_trains(tmp_path):
    recipe = tiny(tmp_path / "run", epoch_steps=1)
    pretrain(replace(recipe, crops=replace(recipe.crops, local_count=0)))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_weights_of_a_run_start_another_and_anchor_it(tmp_path):
    pretrain(tiny(tmp_path / "first", epoch_steps=1))
    weights = next((tmp_path / "first" / "checkpoints").glob("*/teacher.safetensors"))
    recipe = tiny(tmp_path / "second", epoch_steps=2, init=str(weights))
    gram = GramAnchor(File(str(weights)))
    started = Trainer(replace(recipe, gram=gram), World(0, 1, torch.device("cpu")))
    stored = load_file(weights)
    for name, tensor in started.student.backbone.state_dict().items():
        assert torch.equal(tensor, stored[name]) and torch.equal(
            started.gram_teacher.state_dict()[name], stored[name]
        )
    pretrain(replace(recipe, gram=gram))
    with pytest.raises(ConfigError, match=r"run\.init: "):
        pretrain(tiny(tmp_path / "third", init=str(tmp_path / "absent.safetensors")))


def test_the_file_runs_as_a_newcomer_starts_it(tmp_path):
    """`python train/pretrain.py` from another folder; an error is a sentence and a status."""
    command = [sys.executable, str(ROOT / "train" / "pretrain.py")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    helped = subprocess.run(
        [*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert helped.returncode == 0 and "vitl16_im1k" in helped.stdout
    wrong = subprocess.run(
        [*command, "quikstart"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert wrong.returncode != 0
    assert wrong.stderr.startswith("error: unknown recipe 'quikstart'; did you mean quickstart?"), (
        wrong.stderr
    )
    assert "Traceback" not in wrong.stderr
