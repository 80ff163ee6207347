"""The extract command: numbers, tiles, unreadable images, and going on after a kill."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dinov3core import extract as command
from dinov3core.checkpoints import save_weights
from dinov3core.data import progress
from dinov3core.evals.feature_file import FeatureFile
from dinov3core.models import IMAGENET, build

SMALL = dict(depth=2, width=48, heads=3)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = build("vit_nano8", **SMALL, layer_scale=1.0).eval()
    save_weights(model, tmp_path / "model.safetensors")
    return model


@pytest.fixture
def folder(tmp_path):
    """Seven images of several sizes, one of them broken."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for index in range(6):
        pixels = rng.integers(0, 256, (40 + 8 * index, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "3b.png").write_bytes(b"not an image")
    return folder


def arguments(tmp_path, folder, *more):
    out = tmp_path / "features.safetensors"
    return [
        str(folder),
        "--model",
        str(tmp_path / "model.safetensors"),
        "--out",
        str(out),
        "--size",
        "32",
        *more,
    ]


def by_hand(model, path):
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(
        pixels, size=(32, 32), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        return model.features(IMAGENET.normalise(resized))


def test_features_are_those_of_the_model(tmp_path, folder, model, capsys):
    command.main(arguments(tmp_path, folder, "--patches", "--batch-size", "3"))
    printed = capsys.readouterr()
    assert "not read: " in printed.out and "3b.png" in printed.out
    found = load_file(tmp_path / "features.safetensors")
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
    assert found["readable"].tolist() == [0 if name.endswith("3b.png") else 1 for name in names]
    assert found["patches"].shape == (7, 48, 4, 4)
    for row, name in enumerate(names):
        if name.endswith("3b.png"):
            assert not found["cls"][row].any()
            continue
        want = by_hand(model, name)
        torch.testing.assert_close(found["cls"][row], want.cls[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["patches"][row], want.patches[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found["patch_mean"][row], want.patches[0].mean((1, 2)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("tiled", [False, True])
def test_a_killed_run_continues_and_gives_the_same_file(
    tmp_path, folder, model, monkeypatch, tiled
):
    more = [
        "--patches",
        "--batch-size",
        "2",
        *(["--tile", "32", "--overlap", "8"] if tiled else []),
    ]
    command.main(arguments(tmp_path, folder, *more))
    out = tmp_path / "features.safetensors"
    whole = out.read_bytes()
    out.unlink()

    real, calls = command.Extractor.write, []

    def dies(self, file, images):
        calls.append(images)
        real(self, file, images)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Extractor, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments(tmp_path, folder, *more))
    assert not out.exists()
    with pytest.raises(SystemExit, match="of other work"):
        command.main(arguments(tmp_path, folder, *more, "--store", "float16"))
    monkeypatch.setattr(command.Extractor, "write", lambda *a: calls.append(a[2]) or real(*a))
    calls.clear()
    command.main(arguments(tmp_path, folder, *more))
    assert out.read_bytes() == whole
    # kept: two batches of two, of which image 4 is the broken one; with tiles two images
    assert min(min(images) for images in calls) == (2 if tiled else 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.safetensors",
        "images",
        "model.safetensors",
    ]


def test_tiles_without_overlap_are_the_crops_themselves(tmp_path, folder, model):
    command.main(arguments(tmp_path, folder, "--tile", "32", "--patches"))
    found = load_file(tmp_path / "features.safetensors")
    pixels = (
        torch.from_numpy(np.array(Image.open(folder / "3.png"))).permute(2, 0, 1)[None].float()
        / 255
    )  # 64 x 64
    with torch.no_grad():
        inputs = IMAGENET.normalise(pixels)
        corners = [(y, x) for y in (0, 32) for x in (0, 32)]
        tiles = [model.features(inputs[:, :, y : y + 32, x : x + 32]) for y, x in corners]
    torch.testing.assert_close(
        found["patches.3"][:, 4:, :4], tiles[2].patches[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found["cls"][3], torch.cat([t.cls for t in tiles]).mean(0), rtol=1e-4, atol=1e-5
    )
    assert found["patches.0"].shape == (48, 5, 8) and found["patches.6"].shape == (48, 10, 8)
    assert "patches.4" not in found  # 3b.png


def test_one_image_is_enough(tmp_path, folder, model, capsys):
    command.main(arguments(tmp_path, folder / "3.png", "--tile", "32"))
    assert "features of 1 of 1 images" in capsys.readouterr().out
    one = load_file(tmp_path / "features.safetensors")["cls"]
    (tmp_path / "features.safetensors").unlink()
    command.main(arguments(tmp_path, folder, "--tile", "32"))
    assert "features of 6 of 7 images" in capsys.readouterr().out
    torch.testing.assert_close(load_file(tmp_path / "features.safetensors")["cls"][3], one[0])


def test_images_beyond_the_pixel_limit_are_what_tiles_are_for(tmp_path, folder, model, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    command.main(arguments(tmp_path, folder, "--tile", "32"))
    assert load_file(tmp_path / "features.safetensors")["readable"].sum() == 6
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_extraction_in_a_pipe_says_how_far_it_is(tmp_path, folder, model, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    command.main(arguments(tmp_path, folder, "--tile", "32", "--batch-size", "2"))
    said = capsys.readouterr().err
    assert "extract: 3 of 7 images in" in said and "extract: 7 of 7 images in" in said
    assert "tiles of an image: 4 of 6 tiles in" in said and "\r" not in said


def test_a_tile_of_very_many_patches_is_warned_of(tmp_path, folder, model, capsys):
    command.main(arguments(tmp_path, folder / "3.png", "--tile", "512"))  # 4,096 patches of 8 px
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "features.safetensors").unlink()
    command.main(arguments(tmp_path, folder / "3.png", "--tile", "1024"))
    said = capsys.readouterr().err
    assert "warning: --tile 1024 shows the model 16,384 patches at once, more than 4,096" in said
    assert "--tile 512 or less" in said
    with pytest.raises(SystemExit):  # the file is there; the warning comes before any work
        command.main([*arguments(tmp_path, folder / "3.png"), "--size", "520"])
    assert "warning: --size 520 shows the model 4,225 patches at once" in capsys.readouterr().err


def test_overlapping_tiles_cover_every_patch():
    for side, tile, overlap in ((64, 32, 0), (72, 32, 8), (40, 32, 24), (24, 32, 8), (32, 32, 16)):
        starts = command._starts(side, tile, overlap)
        covered = {pixel for start in starts for pixel in range(start, min(start + tile, side))}
        assert covered == set(range(side)) and all(
            start + tile <= max(side, tile) for start in starts
        )


def test_weights_by_name_and_scenes(tmp_path, model):
    torch.manual_seed(0)
    save_weights(build("vit_nano8"), tmp_path / "nano.pth", "official")
    base = [
        "scenes",
        "--out",
        str(tmp_path / "f.safetensors"),
        "--size",
        "32",
        "--model",
        "vit_nano8",
    ]
    with pytest.raises(SystemExit, match="expected --weights beside a name"):
        command.main(base)
    with pytest.raises(
        SystemExit, match=r"or with --weights one of vits16, .* got 'vits61', which is neither"
    ):
        command.main([*base[:-1], "vits61"])
    with pytest.raises(SystemExit, match="pass --statistics"):
        command.main([*base, "--weights", str(tmp_path / "nano.pth")])


def test_refusals(tmp_path, folder, model):
    for more, match in (
        (["--size", "30"], "--size: expected a multiple of the patch size 8, got 30"),
        (["--tile", "32", "--overlap", "32"], "--overlap: expected less than --tile 32"),
        (["--size", "0"], "--size: expected at least 1, got 0"),
        (["--tile", "-8"], "--tile: expected at least 0, got -8"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--device", "gpu"], "--device: expected one that is here .*, got 'gpu'"),
        (["--device", "cuda:99"], "--device: expected one that is here .*, got 'cuda:99'"),
    ):
        with pytest.raises(SystemExit, match=match):
            command.main([*arguments(tmp_path, folder), *more])
    (tmp_path / "features.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="expected a new file"):
        command.main(arguments(tmp_path, folder))


def test_feature_file_keeps_dtypes_and_checks_rows(tmp_path):
    path = tmp_path / "f.safetensors"
    with FeatureFile(path, {"a": (torch.float16, [3, 2])}, {"k": "v"}, appended=2) as file:
        file.write("a", 1, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        file.append("b", torch.arange(4.0).view(2, 2))
        with pytest.raises(ValueError, match=r"expected rows of shape \[2\]"):
            file.write("a", 0, torch.zeros(1, 3))
        file.finish()
    found = load_file(path)
    assert found["a"].dtype == torch.float16 and found["a"].tolist() == [[0, 0], [1, 2], [3, 4]]
    assert found["b"].tolist() == [[0, 1], [2, 3]]
