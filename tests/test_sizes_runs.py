"""Runs with several crop sizes: what they log, killed and continued, as two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiny_runs import checkpoint_of, metrics_of, tensors_of, tiny_command, tiny_recipe
from two_processes import joined, run_ranks

from dinov3core.data.crops import CropSettings
from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes, size_at
from dinov3core.train.engine import changes, memory
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
STEPS = 20
TEXTS = ("0.4:40/24", "0.2:32x48/16")
SIDES = (24, 40, 48)  # the longer ones
SHARES = (0.4, 0.4, 0.2)


def command(out: Path, *more: str) -> list[str]:
    slow = ("--run.batch-size", "16", "--run.checkpoint-every", "10")  # time to be killed in
    drawing = ("--backbone.rope.rescale", "2")
    sizes = ("--crops.other-sizes", *TEXTS)
    return [
        *(sys.executable, "train/pretrain.py"),
        *tiny_command(out, *sizes, *slow, *drawing, *more),
    ]


def finish(out: Path, *more: str) -> None:
    run = command(out, *more)
    ran = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in one go, batches made in a thread."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(out, "--data.workers", "0")
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed (kill -9) somewhere after step 10 of 20."""
    out = tmp_path_factory.mktemp("killed") / "run"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = ("--data.workers", "0")
    run = subprocess.Popen(command(out, *workers), cwd=ROOT, env=ENVIRONMENT, **quiet)
    while not checkpoint_of(out, 10).is_dir() or metrics_of(out)[-1]["step"] < 12:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not checkpoint_of(out, STEPS).exists()
    return out


def test_a_row_says_the_size_of_its_step(straight: Path) -> None:
    rows = [row for row in metrics_of(straight) if "loss" in row]
    sizes = [SIDES[size_at(0, step, SHARES)] for step in range(STEPS)]
    assert set(sizes) == set(SIDES)
    assert [row["global_size"] for row in rows] == sizes


def test_the_report_says_that_sizes_are_mixed(straight: Path) -> None:
    page = (straight / "report.html").read_text()
    assert "Steps with global crops of 24, 40 and 48 px are mixed" in page


def test_the_record_of_a_run_holds_its_sizes(straight: Path) -> None:
    config = json.loads((straight / "config.json").read_text())
    sizes = config["recipe"]["crops"]["other_sizes"]
    assert [entry["share"] for entry in sizes] == [0.4, 0.2]
    assert sizes[1]["global_size"] == [32, 48]
    assert "crops.other_sizes = (&#x27;0.4:40/24&#x27;" in (straight / "report.html").read_text()


@pytest.mark.parametrize("workers", ["0", "3"])
def test_kill_and_resume_equals_one_go_to_the_last_bit(
    straight: Path, killed: Path, workers: str, tmp_path: Path
) -> None:
    """Also with another number of loader processes."""
    out = Path(shutil.copytree(killed, tmp_path / "run"))
    finish(out, "--data.workers", workers)
    want = tensors_of(straight, STEPS, tmp_path / "straight.pt")
    got = tensors_of(out, STEPS, tmp_path / "resumed.pt")
    assert got.keys() == want.keys() and any(name.startswith("optimizer.") for name in want)
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    assert metrics_of(out) == metrics_of(straight)


def test_other_sizes_make_another_run() -> None:
    recipes = [tiny_recipe(), replace(tiny_recipe(), crops=several())]
    alone = World(0, 1, torch.device("cpu"))
    before, now = (changes.identity(recipe, Scenes(9), alone) for recipe in recipes)
    difference = "crops.other_sizes [] -> ['0.4:40/24', '0.2:32/16']"
    assert changes.differences(before, now) == [difference]


def several() -> CropSettings:
    sizes = (CropSizes(0.4, 40, 24), CropSizes(0.2, 32, 16))
    return replace(tiny_recipe().crops, other_sizes=sizes)


def test_two_processes_train_on_the_same_sizes() -> None:
    first, second = (json.loads(out) for out in run_ranks(Path(__file__)))
    assert first["sizes"] == second["sizes"]
    assert {side for side, _ in first["sizes"]} == {24, 32, 40}
    assert first["losses"] == second["losses"]  # means over both
    assert first["weights"] == second["weights"]


def train_a_share() -> None:
    """What each of the two processes does."""
    recipe = replace(tiny_recipe(), crops=several())
    settings = BatchSettings(recipe.crops, recipe.masks, 2, recipe.backbone.patch_size)
    with joined() as world:
        trainer = Trainer(replace(recipe, run=replace(recipe.run, batch_size=2)), world)
        place = {"rank": world.rank, "world_size": world.size}
        sizes = []
        losses = []
        with BatchLoader(Scenes(40), settings, **place) as loader:
            for step in range(8):
                batch = next(loader)
                sizes.append((batch.global_crops.shape[-1], batch.local_crops.shape[-1]))
                losses.append(trainer.step(batch, step).values["loss"])
        weights = sum(float(tensor.double().sum()) for tensor in trainer.student.parameters())
        print(json.dumps({"sizes": sizes, "losses": losses, "weights": weights}))


# --- memory, and the command line


def test_memory_is_that_of_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = several()
    alone = replace(crops, global_size=40, local_size=24, other_sizes=())
    recipe = replace(tiny_recipe(), crops=crops)
    assert memory.image_bytes(recipe) == memory.image_bytes(replace(recipe, crops=alone))
    with pytest.raises(ConfigError, match=r"^out of memory .* crops of up to 40 px; lower the"):
        with memory.explained(recipe, torch.device("cpu")):
            raise MemoryError
    weights = memory.WEIGHT_BYTES * sum(memory.weights_of(recipe).values())
    monkeypatch.setattr(memory, "memory_of", lambda device: weights + 1)
    with pytest.raises(ConfigError, match="GiB with sides of up to 40 px"):
        memory.check(recipe, torch.device("cpu"))


def test_sizes_on_a_command_line() -> None:
    recipe = parse(["quickstart", "--crops.other-sizes", "0.3:64/32", "0.1:80x64/24"])
    assert recipe.crops.other_sizes == (CropSizes(0.3, 64, 32), CropSizes(0.1, (80, 64), 24))
    assert parse(["quickstart", "--crops.other-sizes"]).crops.other_sizes == ()
    with pytest.raises(ConfigError, match=r"^crops.other_sizes: expected sizes as SHARE:.*'0.3:4'"):
        parse(["quickstart", "--crops.other-sizes", "0.2:64/32", "0.3:4"])
    with pytest.raises(ConfigError, match=r"other_sizes 0.3:64/28: local crop 28 is not a multip"):
        resolve(parse(["quickstart", "--crops.other-sizes", "0.3:64/28"]), 1)


def test_the_help_shows_how_sizes_are_written(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["quickstart", "--help"])
    assert "SHARE:GLOBAL/LOCAL[/GRAM]" in capsys.readouterr().out


if __name__ == "__main__":
    train_a_share()
