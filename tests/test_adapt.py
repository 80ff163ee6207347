"""The recipe `adapt`: the network of the weights, lengths by the number of images, no harm done."""

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it off the path

import numpy as np
import pytest
import torch
from tiny_runs import metrics_of
from torch import Tensor

from dinov3core.checkpoints import describe, load_model, save_weights
from dinov3core.models import SATELLITE, ConvNeXt, ConvNeXtSettings, ImageStatistics, build
from dinov3core.train import pretrain as command
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.adapt import adapt

ODD = dict(width=48, depth=3, heads=3, patch_size=8, registers=5, ffn="swiglu", ffn_ratio=3.0)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a ViT like no other."""
    torch.manual_seed(0)
    model = build("vit_nano8", **ODD, layer_scale=1.0)
    model.statistics = SATELLITE
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def command_for(init: Path, out: Path, *more: str) -> list[str]:
    heads = [
        text
        for head in ("dino", "ibot")
        for name, size in (("prototypes", 32), ("hidden", 32), ("bottleneck", 16))
        for text in (f"--{head}.{name}", str(size))
    ]
    fields = {
        "run.init": init,
        "run.out": out,
        "run.steps": 8,
        "run.batch-size": 4,
        "run.eval-every": 4,
        "run.log-every": 1,
        "run.threads": 1,
        "crops.global-size": 24,
        "crops.local-size": 16,
        "crops.local-count": 1,
        "data.source": "scenes",
        "data.scenes": 64,
        "data.workers": 0,
        "data.probe-bank": 24,
        "data.probe-queries": 12,
    }
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    return ["adapt", *options, *heads, *more]


@pytest.mark.parametrize("layout", ["official", "huggingface", "timm", "dinov3core"])
def test_the_network_is_that_of_the_weights(tmp_path: Path, weights: Path, layout: str) -> None:
    """Given the file alone; heads need config.json where the file has no periods."""
    model, _ = load_model(weights)
    suffix = {"official": ".pth", "dinov3core": ".safetensors"}.get(layout, "")
    stored = tmp_path / f"stored{suffix}"
    save_weights(model, stored, layout)
    backbone = parse(["adapt", "--run.init", str(stored)]).backbone
    assert {name: getattr(backbone, name) for name in ODD if name != "ffn_ratio"} == {
        name: value for name, value in ODD.items() if name != "ffn_ratio"
    }
    recipe = parse(command_for(stored, tmp_path / "run"))
    assert (recipe.crops.global_size, recipe.crops.local_size) == (24, 16)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 24, 24)
    want = model.features(images).patches
    summary = pretrain(replace(recipe, optim=replace(recipe.optim, freeze_backbone_epochs=9.0)))
    assert summary["steps"] == 8
    trained, _ = load_model(tmp_path / "run")
    torch.testing.assert_close(trained.features(images).patches, want)


def test_statistics_and_crops_follow_the_weights(tmp_path: Path, weights: Path) -> None:
    crops = parse(["adapt", "--run.init", str(weights)]).crops
    assert ImageStatistics(crops.mean, crops.std) == SATELLITE
    assert (crops.global_size, crops.local_size) == (112, 48)  # 14 and 6 patches of 8 px
    pretrain(parse(command_for(weights, tmp_path / "run")))
    again = parse(["adapt", "--run.init", str(tmp_path / "run")])
    assert (again.crops.global_size, again.crops.local_size) == (24, 8)  # of the run it was


def test_python_has_the_same_recipe(weights: Path) -> None:
    assert parse(["adapt", "--run.init", str(weights), "--data.source", "images"]) == adapt(
        str(weights)
    )


def lingbot_vision(model: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict as that family is released: of a compiled network inside a training wrapper.

    ViT with patches of 16, RoPE, four registers ("storage tokens"), masked key bias, layer scale.
    """
    return {f"_orig_mod.backbone.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("wrapper", ["", "model", "teacher"])
def test_the_apache_family_is_known_by_its_file(tmp_path: Path, wrapper: str) -> None:
    """model.pt in a folder, without any description."""
    torch.manual_seed(0)
    model = build("vits16", depth=12, layer_scale=1.0).eval()
    state = lingbot_vision(model)
    (tmp_path / "vits").mkdir()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "vits" / "model.pt")
    settings, statistics = describe(tmp_path / "vits")
    assert (settings.width, settings.depth, settings.heads) == (384, 12, 6)
    assert (settings.patch_size, settings.registers, settings.mask_k_bias) == (16, 4, True)
    assert statistics is None
    recipe = adapt(str(tmp_path / "vits"))
    assert recipe.backbone == settings and recipe.dino.prototypes == 16384
    assert (recipe.crops.global_size, recipe.crops.local_size) == (224, 96)
    images = torch.rand(1, 3, 32, 32)
    same = load_model(tmp_path / "vits").model.features(images)
    torch.testing.assert_close(same.patches, model.features(images).patches)


# --- lengths


@pytest.mark.parametrize(
    ("images", "epoch"),
    [(1, 1000), (500, 1000), (64_000, 1000), (128_000, 2000), (1_000_000, 10_000)],
)
def test_lengths_follow_the_number_of_images(weights: Path, images: int, epoch: int) -> None:
    recipe = adapt(str(weights)).for_images(images, 1)
    resolved = resolve(recipe, 1)
    assert (recipe.run.epoch_steps, resolved.frozen_steps, resolved.steps) == (
        epoch,
        epoch,
        4 * epoch,
    )
    shares = resolved.schedules["backbone_share"]
    assert shares[2 * epoch - 1] == 1 and shares[2 * epoch - 2] < 1
    lr = resolved.schedules["lr"]
    assert lr.max() == pytest.approx(1e-3, rel=1e-3)
    assert np.allclose(lr[epoch:], 5e-5)
    assert recipe.for_images(7, 1) == recipe  # once


def test_more_processes_make_shorter_epochs(weights: Path) -> None:
    recipe = adapt(str(weights))
    assert recipe.for_images(1_000_000, 8).run.epoch_steps == 1954


def test_the_run_says_its_phases(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.exit_status(command_for(weights, tmp_path / "run")) == 0
    said = capsys.readouterr()
    assert "heads alone for 2 steps, then the backbone as well: its rate grows over 2" in said.out
    assert f"{weights}: dinov3core layout, " in said.err and " tensors loaded" in said.err
    assert "guard: stops the run when k-NN is more than 2 points" in said.err
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert [row["grad_norm_backbone"] > 0 for row in rows] == [False] * 2 + [True] * 6


# --- channels


def test_thirteen_channels_from_weights_of_three(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        np.save(folder / f"{index}.npy", rng.integers(0, 9999, (40, 40, 13), np.uint16))
    thirteen = [*["0.2"] * 13]
    more = ["--backbone.in-channels", "13", "--crops.mean", *thirteen, "--crops.std", *thirteen]
    more += ["--data.source", str(folder), "--data.channel-scale", "10000", "--data.probe", "none"]
    assert command.exit_status(command_for(weights, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().err
    assert "3 channels, 8 px -> 13 channels, 8 px; every channel has an equal share" in said
    assert "guard: stops the run when RankMe is below 80% of its start, or patch drift" in said
    assert load_model(tmp_path / "run").model.in_channels == 13

    placed = ["--run.rgb-channels", "3", "2", "1", "--run.out", str(tmp_path / "placed")]
    assert command.exit_status(command_for(weights, tmp_path / "run", *more, *placed)) == 0
    assert "red, green and blue are channels 3, 2, 1, all others start" in capsys.readouterr().err


# --- bad input


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--backbone.registers 0", "got those of .* 5 registers.* leave out the backbone fields"),
        (
            "--backbone.norm rmsnorm",
            "unexpected blocks.*norm1.bias.* leave out the backbone fields",
        ),
        ("--backbone.width 96", "expected weights of .*width 96.* got those of .*width 48"),
        ("--backbone.in-channels 4", r"^error: the built-in scenes have 3 channels but backbone"),
        ("--run.rgb-channels 0 1 9", "rgb_channels: expected 3 different channels below 4"),
        ("--run.eval-every 0", r"guard\.margin 2 stops a run whose scores fall"),
    ],
)
def test_what_does_not_fit_the_weights_is_a_sentence(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture, more: str, sentence: str
) -> None:
    options = more.split()
    if "rgb" in more:
        four = ["0.5"] * 4
        options += ["--backbone.in-channels", "4", "--crops.mean", *four, "--crops.std", *four]
        np.save(tmp_path / "image.npy", np.zeros((40, 40, 4), np.uint16))
        options += ["--data.source", str(tmp_path), "--data.probe", "none"]
    assert command.exit_status(command_for(weights, tmp_path / "run", *options)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(sentence, line), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_convnext_is_adapted_as_well(tmp_path: Path) -> None:
    stages = ConvNeXtSettings((1, 1, 1, 1), (8, 8, 8, 8))
    save_weights(ConvNeXt(stages), tmp_path / "convnext.safetensors")
    recipe = parse(["adapt", "--run.init", str(tmp_path / "convnext.safetensors")])
    resolved = resolve(recipe, 1)
    assert recipe.backbone == stages and resolved.frozen_steps == 1000
    assert (recipe.crops.global_size, recipe.crops.local_size) == (448, 192)  # whole patches of 32


def test_weights_that_are_none_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run\.init: .*/absent: expected a file or folder"):
        parse(["adapt", "--run.init", str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match=r"give --run\.init FILE"):
        resolve(adapt(), 1)
