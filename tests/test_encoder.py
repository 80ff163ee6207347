"""One line from an image file to features: the transform, every kind of image, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import dinov3core
from dinov3core import extract as extract_command
from dinov3core.checkpoints import save_weights
from dinov3core.data.errors import UnreadableImage
from dinov3core.evals.encoder import MOST_PATCHES, ImageEncoder
from dinov3core.models import IMAGENET, SATELLITE, Features, ImageStatistics, build

SMALL = dict(depth=2, width=48, heads=3, layer_scale=1.0)
OWN = ImageStatistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = build("vit_nano8", **SMALL).eval()
    model.statistics = OWN
    return model


@pytest.fixture
def weights(model: nn.Module, tmp_path: Path) -> Path:
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def pixels(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(pixels(60, 91, 3)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def by_hand(model: nn.Module, image: np.ndarray, size: tuple[int, int]) -> Features:
    """The transform, written out."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    resized = F.interpolate(planes, size=size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in OWN)
    with torch.no_grad():
        return model.features((resized - mean) / std)


def assert_equal(features: Features, expected: Features) -> None:
    for name in Features._fields:
        torch.testing.assert_close(getattr(features, name), getattr(expected, name))


def test_one_line_gives_what_the_steps_by_hand_give(model, weights, photo):
    """60 x 91 px: the shorter side becomes 64, the longer one 97.07, which is 12.1 patches."""
    features = dinov3core.load(weights).features(photo, size=64)
    assert_equal(features, by_hand(model, pixels(60, 91, 3), (64, 96)))
    assert features.cls.shape == (1, 48)
    assert features.registers.shape == (1, 2, 48)
    assert features.patches.shape == (1, 48, 8, 12)
    assert all(not tensor.requires_grad and tensor.dtype == torch.float32 for tensor in features)


def test_default_size_and_an_exact_one(model, weights, photo):
    encoder = dinov3core.load(str(weights))
    assert_equal(encoder.features(str(photo)), by_hand(model, pixels(60, 91, 3), (256, 392)))
    assert_equal(
        encoder.features(photo, size=(40, 24)),
        by_hand(model, pixels(60, 91, 3), (40, 24)),
    )
    assert encoder.features(photo, size=1).patches.shape == (1, 48, 1, 1)
    assert encoder.features(photo, size=(45, 3)).patches.shape == (1, 48, 6, 1)


def test_every_kind_of_image_gives_the_same(model, weights, photo, monkeypatch):
    encoder = dinov3core.load(weights)
    image = pixels(60, 91, 3)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    expected = encoder.features(photo, size=32)
    for same in (
        str(
            photo,
        ),
        Image.open(photo),
        Image.fromarray(image),
        planes,
        planes.float() / 255,
    ):
        assert_equal(encoder.features(same, size=32), expected)
    monkeypatch.setenv("HOME", str(photo.parent))
    assert_equal(encoder.features("~/photo.png", size=32), expected)


def test_several_images_in_batches(model, weights, tmp_path):
    images = [pixels(48, 64, 3, seed=seed) for seed in range(5)]
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    encoder = dinov3core.load(weights)
    features = encoder.features(paths, size=48, batch_size=2)
    one_by_one = [by_hand(model, image, (48, 64)) for image in images]
    assert_equal(features, Features(*map(torch.cat, zip(*one_by_one, strict=True))))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert_equal(encoder.features(stacked, size=48), features)


def test_images_of_different_proportions_need_one_size(weights, photo, tmp_path):
    Image.fromarray(pixels(91, 60, 3)).save(tmp_path / "upright.png")
    encoder = dinov3core.load(weights)
    with pytest.raises(ValueError, match=r"one size after resizing, got 32 x 48 and 48 x 32; pass"):
        encoder.features([photo, tmp_path / "upright.png"], size=32)
    assert encoder.features([photo, tmp_path / "upright.png"], size=(32, 32)).cls.shape == (2, 48)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_photo_taken_sideways_is_turned(weights, tmp_path, suffix):
    """EXIF orientation 6: the camera was turned; viewers show the image rotated to the right."""
    smooth = np.kron(pixels(6, 9, 3), np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / f"sideways.{suffix}", exif=exif)
    plain = Image.open(tmp_path / f"sideways.{suffix}")
    upright = np.rot90(np.asarray(plain), -1).copy()
    encoder = dinov3core.load(weights)
    expected = encoder.features(Image.fromarray(upright), size=48)
    assert expected.patches.shape == (1, 48, 9, 6)
    assert_equal(encoder.features(tmp_path / f"sideways.{suffix}", size=48), expected)
    assert_equal(encoder.features(plain, size=48), expected)


def test_transparency_and_grey(model, weights, tmp_path):
    """Transparent pixels become white; a grey image is three equal channels."""
    encoder = dinov3core.load(weights)
    colours, alpha = pixels(48, 48, 3), np.zeros((48, 48, 1), np.uint8)
    alpha[:24] = 255
    Image.fromarray(np.concatenate([colours, alpha], 2)).save(tmp_path / "transparent.png")
    over_white = np.where(alpha == 255, colours, 255).astype(np.uint8)
    expected = by_hand(model, over_white, (48, 48))
    assert_equal(encoder.features(tmp_path / "transparent.png", size=48), expected)
    assert_equal(encoder.features(Image.open(tmp_path / "transparent.png"), size=48), expected)
    grey = pixels(48, 48)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = by_hand(model, np.repeat(grey[..., None], 3, 2), (48, 48))
    assert_equal(encoder.features(tmp_path / "grey.png", size=48), expected)


def test_large_sizes_are_read_with_all_their_pixels(model, weights, tmp_path):
    """A JPEG that training would decode at half its sides."""
    smooth = np.kron(pixels(33, 33, 3), np.ones((64, 64, 1), np.uint8))
    Image.fromarray(smooth).save(tmp_path / "large.jpg", quality=95)
    decoded = np.asarray(Image.open(tmp_path / "large.jpg"))
    encoder = dinov3core.load(weights)
    planes = encoder.pixels(tmp_path / "large.jpg", (8, 2112))
    expected = F.interpolate(
        torch.from_numpy(decoded.copy()).permute(2, 0, 1)[None].float() / 255,
        size=(8, 2112),
        mode="bilinear",
        antialias=True,
    )
    assert torch.equal(planes, expected[0])


def test_other_channel_counts(tmp_path):
    torch.manual_seed(0)
    model = build("vit_nano8", **SMALL, in_channels=5)
    model.statistics = ImageStatistics((0.5,) * 5, (0.25,) * 5)
    save_weights(model, tmp_path / "five.safetensors")
    encoder = dinov3core.load(tmp_path / "five.safetensors")
    np.save(tmp_path / "five.npy", pixels(48, 48, 5))
    features = encoder.features(tmp_path / "five.npy", size=48)
    assert_equal(
        features,
        encoder.features(torch.from_numpy(pixels(48, 48, 5)).permute(2, 0, 1), size=48),
    )
    with pytest.raises(
        ValueError,
        match=r"expected \[5, H, W\] .* got \[3, 48, 48\]; this model has 5",
    ):
        encoder.features(torch.zeros(3, 48, 48))


def test_a_convnext(tmp_path, photo):
    model = build("convnext_tiny", depths=(1, 1, 1, 1), widths=(4, 8, 8, 16))
    save_weights(model, tmp_path / "conv", "huggingface")
    features = dinov3core.load(tmp_path / "conv").features(photo, size=64)
    assert features.cls.shape == (1, 16) and features.patches.shape == (1, 16, 2, 3)


def test_the_folder_of_a_run(model, tmp_path, photo):
    newest = tmp_path / "run" / "checkpoints" / "step_00000020"
    save_weights(model, newest / "teacher.safetensors")
    (newest / "state.json").write_text("{}")
    features = dinov3core.load(tmp_path / "run").features(photo, size=64)
    assert_equal(features, by_hand(model, pixels(60, 91, 3), (64, 96)))


def test_statistics_that_the_weights_do_not_state(model, tmp_path, photo):
    save_weights(model, tmp_path / "mine.pth", "official")
    with pytest.raises(
        ValueError,
        match=r"mine\.pth: expected image statistics .* pass statistics='imagenet'",
    ):
        dinov3core.load(tmp_path / "mine.pth")
    assert dinov3core.load(tmp_path / "mine.pth", statistics="imagenet").statistics == IMAGENET
    assert dinov3core.load(tmp_path / "mine.pth", statistics="satellite").statistics == SATELLITE
    with pytest.raises(ValueError, match="image statistics: expected them with the backbone"):
        model.statistics = None
        ImageEncoder(model)


def test_the_extract_command_sees_the_same(model, weights, photo, tmp_path):
    out = tmp_path / "features.safetensors"
    extract_command.main([str(photo), "--model", str(weights), "--out", str(out), "--size", "64"])
    features = dinov3core.load(weights).features(photo, size=(64, 64))
    torch.testing.assert_close(load_file(out)["cls"], features.cls)


def test_autocast_stays_near_and_half_weights_are_widened(model, weights, photo, tmp_path):
    exact = dinov3core.load(weights).features(photo, size=32)
    rounded = dinov3core.load(weights, autocast=True).features(photo, size=32)
    assert rounded.cls.dtype == torch.float32 and not torch.equal(rounded.cls, exact.cls)
    assert F.cosine_similarity(rounded.cls, exact.cls) > 0.999
    save_weights(model.bfloat16(), tmp_path / "half.safetensors")
    assert dinov3core.load(tmp_path / "half.safetensors").features(photo).cls.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(weights, photo):
    expected = dinov3core.load(weights, device="cpu").features(photo, size=64)
    encoder = dinov3core.load(weights)
    assert next(encoder.model.parameters()).is_cuda
    features = encoder.features(photo, size=64)
    assert features.cls.device.type == "cpu"
    torch.testing.assert_close(features.cls, expected.cls, rtol=1e-3, atol=1e-3)


UNREADABLE = {
    "missing.jpg": "no such file",
    "text.jpg": "not an image file",
    "folder.jpg": "directory|regular|no such file",
}


@pytest.mark.parametrize("size", [64, 2048])
@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_no_images(weights, tmp_path, name, size):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImage, match=f"{name}: ") as caught:
        dinov3core.load(weights).features(tmp_path / name, size=size)
    assert str(caught.value).isprintable()


def test_a_pillow_image_whose_file_is_cut(weights, photo):
    photo.write_bytes(photo.read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match=r"photo\.png: "):
        with Image.open(photo) as image:
            dinov3core.load(weights).features(image)


BAD_IMAGES = {
    "an array": (np.zeros((8, 8, 3), np.uint8), "got ndarray; torch.from_numpy"),
    "a number": (7, "expected paths, Pillow images or tensors .* got int"),
    "none": ([], "expected at least one each, got 0 and 32"),
    "no pixel": (torch.zeros(3, 0, 8), r"at least one pixel, got \[3, 0, 8\]"),
    "two dimensions": (torch.zeros(8, 8), r"expected \[3, H, W\] .* got \[8, 8\]"),
    "one channel": (torch.zeros(1, 8, 8), "this model has 3 channels"),
    "normalised": (torch.full((3, 8, 8), -2.0), r"pixels in \[0, 1\], got values from -2"),
    "NaN": (torch.full((3, 8, 8), float("nan")), r"pixels in \[0, 1\]"),
}


@pytest.mark.parametrize(("images", "match"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_what_is_no_image(weights, images, match):
    with pytest.raises(ValueError, match=match):
        dinov3core.load(weights).features(images)


@pytest.mark.parametrize("size", [0, -8, 2.5, (8,), (8, 0), (8, 8, 8), "256", True, (8, 2.0)])
def test_sizes_that_are_none(weights, photo, size):
    with pytest.raises(ValueError, match="size: expected pixels of the shorter side or"):
        dinov3core.load(weights).features(photo, size=size)


def test_proportions_that_would_fill_the_memory(weights):
    with pytest.raises(
        ValueError,
        match=rf"at most {MOST_PATCHES:,} patches of 8 px, got 32 x 320000 ",
    ):
        dinov3core.load(weights).features(torch.zeros(3, 1, 10_000))


def test_weights_and_devices_that_are_not_there(weights, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"absent: expected a file or folder of weights, found nothing",
    ):
        dinov3core.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"statistics: expected stored, imagenet, satellite, got"):
        dinov3core.load(weights, statistics="imagnet")
    with pytest.raises(ValueError, match=r"device: expected one that is here .* got 'gpu'"):
        dinov3core.load(weights, device="gpu")


def test_importing_the_package_imports_nothing_else():
    program = "import sys, dinov3core; assert callable(dinov3core.load); print(*sys.modules)"
    root = Path(dinov3core.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert not {"torch", "numpy", "PIL", "safetensors"} & set(ran.stdout.split())
