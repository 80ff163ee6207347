"""Views of an image: geometry, colours, blur, order of draws, sizes, other channel counts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinov3core.data import photometric
from dinov3core.data.crops import (
    BLUR_PROBABILITIES,
    INNER_STEP,
    CropSettings,
    GramCrops,
    MultiCrop,
    Views,
    draw_box,
    validate_gram_crops,
)

PLAIN = CropSettings(
    global_size=32, local_size=16, local_count=2, flip=False, jitter_probability=0, grayscale=0,
    solarize=0, blur="off", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """A smooth colour image with some detail."""
    y, x = np.mgrid[:height, :width] / 20
    planes = [np.sin(x + k) + np.cos(y * (k + 1)) + 0.3 * np.sin(7 * x * y) for k in range(3)]
    grain = np.random.default_rng(seed).normal(0, 0.1, (height, width, 3))
    pixels = np.stack(planes, -1) / 4.6 + 0.5 + grain
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def with_(settings: CropSettings, **changes) -> CropSettings:
    return dataclasses.replace(settings, **changes)


def same(a: Views, b: Views) -> bool:
    views = [(a.global_, b.global_), (a.local, b.local), (a.gram or [], b.gram or [])]
    return all(
        torch.equal(x, y) for first, second in views for x, y in zip(first, second, strict=True)
    )


# --- settings


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"global_size": 100}, "global crop 100 is not a multiple of the patch 16; use 96 or 112"),
        ({"global_size": (96, 100)}, "global crop 100 is not a multiple"),
        ({"local_size": 8}, "local crop 8 is smaller than the patch 16"),
        ({"global_count": 0}, "crops.global_count: expected at least 1 and at most 64, got 0"),
        ({"global_scale": (0.9, 0.3)}, "crops.global_scale: expected the lower end first"),
        ({"local_scale": (0.0, 0.3)}, "crops.local_scale: expected above 0 and at most 1, got"),
        ({"aspect": (0.0, 1.0)}, "crops.aspect: expected at least 0.001 and at most 1000"),
        ({"grayscale": 1.5}, "crops.grayscale: expected at least 0 and at most 1, got 1.5"),
        ({"hue": 0.7}, "crops.hue: expected at least 0 and at most 0.5"),
        ({"rotation": 270}, "crops.rotation: expected at least 0 and at most 180"),
        ({"blur": "sometimes"}, "crops.blur: expected one of executed, intended, off, got 'some"),
        ({"mean": (0.5,)}, "one mean and one std per channel"),
        ({"std": (0.2, 0.2, 0.0)}, "crops.std: expected at least 1e-06"),
        ({"local_inside_global": True, "global_size": 96}, "make global_size at least 16 larger"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_(CropSettings(), **changes).validate(16)


def test_a_gram_crop_that_cannot_work_is_refused_in_one_sentence():
    sentence = "Gram crop 250 is not a multiple of the patch 16; use 240 or 256"
    with pytest.raises(ValueError, match=sentence):
        validate_gram_crops(CropSettings(), GramCrops(250), 16)


def test_default_settings_are_the_published_ones():
    settings = CropSettings()
    settings.validate(16)
    assert (settings.global_scale, settings.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert BLUR_PROBABILITIES["executed"] == (0.0, 0.9, 0.5)
    assert BLUR_PROBABILITIES["intended"] == (1.0, 0.1, 0.5)


# --- random


def test_views_are_a_function_of_the_seed():
    crops = MultiCrop(with_(CropSettings(), global_size=32, local_size=16, rotation=20))
    image = picture()
    assert same(crops(image, 3), crops(image, np.random.default_rng(3)))
    assert not same(crops(image, 3), crops(image, 4))


def test_number_and_shape_of_views():
    views = MultiCrop(
        with_(PLAIN, global_size=(32, 48), local_size=(16, 8), global_count=3, local_count=5)
    )(picture(), 0)
    assert [tuple(view.shape) for view in views.global_] == [(3, 32, 48)] * 3
    assert [tuple(view.shape) for view in views.local] == [(3, 16, 8)] * 5
    assert views.gram is None and not views.upsampled
    assert all(
        view.is_contiguous() and view.dtype == torch.float32 for view in views.global_ + views.local
    )


def test_draws_of_global_views_precede_those_of_local_ones():
    image = picture()
    few, many = (
        MultiCrop(with_(CropSettings(), global_size=32, local_size=16, local_count=n))
        for n in (0, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(few(image, 5).global_, many(image, 5).global_))


# --- geometry


def test_boxes_follow_the_definition_of_a_random_resized_crop():
    """Moments against a direct simulation: area uniform, aspect log-uniform, if it fits."""
    rng = np.random.default_rng(0)
    size = (300, 400)
    scale = (0.05, 0.32)
    aspect = (3 / 4, 4 / 3)
    boxes = np.array([draw_box(size, scale, aspect, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + height <= 300).all()
        and (left + width <= 400).all()
    )
    share = height * width / 120_000
    ratio = np.log(width / height)
    error = 4 / math.sqrt(4000)
    assert (
        abs(share.mean() - 0.185) < error * share.std()
        and abs(share.std() - 0.27 / math.sqrt(12)) < 0.003
    )
    assert (
        abs(ratio.mean()) < error * ratio.std()
        and abs(ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    )
    assert abs((top / (300 - height)).mean() - 0.5) < error * 0.3


@pytest.mark.parametrize(
    "size, expected", [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))]
)
def test_box_of_an_image_too_long_for_any_attempt_is_central(size, expected):
    assert draw_box(size, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == expected


def test_one_pixel_has_a_box():
    assert draw_box((1, 1), (0.05, 0.05), (3 / 4, 4 / 3), np.random.default_rng(0)) == (0, 0, 1, 1)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2, the kernel Pillow and antialiased torch use."""
    d = np.abs(distance)
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


def _resampling(source: int, target: int) -> np.ndarray:
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale
    weights = _cubic((np.arange(source)[None] + 0.5 - centres) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


def test_a_view_is_its_box_resampled_with_an_antialiased_cubic_kernel():
    image = picture()
    seed = 7
    top, left, height, width = draw_box(
        (60, 80), (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed)
    )
    view = MultiCrop(with_(PLAIN, global_scale=(0.9, 1.0)))(image, seed).global_[0].double().numpy()
    box = (
        np.asarray(image, np.float64)[top : top + height, left : left + width].transpose(2, 0, 1)
        / 255
    )
    expected = (_resampling(height, 32) @ box @ _resampling(width, 32).T).clip(0, 1)
    assert np.abs(view - expected).max() < 2 / 255  # two passes, each rounded to 8 bits


def test_flip_mirrors_half_of_the_views():
    image = picture()
    mirrored = 0
    scale = {"global_scale": (1.0, 1.0), "aspect": (1.0, 1.0), "local_count": 0, "global_count": 1}
    square = image.crop((0, 0, 60, 60))
    straight = MultiCrop(with_(PLAIN, **scale))(square, 0).global_[0]
    for seed in range(200):
        view = MultiCrop(with_(PLAIN, flip=True, **scale))(square, seed).global_[0]
        mirrored += torch.equal(view, straight.flip(-1))
        assert torch.equal(view, straight) or torch.equal(view, straight.flip(-1))
    assert 70 < mirrored < 130


def test_small_image_is_enlarged_and_flagged():
    small = MultiCrop(PLAIN)(picture(20, 40), 0)
    assert small.upsampled and small.global_[0].shape == (3, 32, 32)
    assert MultiCrop(PLAIN, GramCrops(64))(picture(60, 80), 0).upsampled
    assert not MultiCrop(PLAIN)(picture(32, 32), 0).upsampled


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rotation_turns_about_the_centre_and_mirrors_beyond_the_border(as_tensor):
    """Turned views of a linear ramp are ramps turned by the same angle, inside the image."""
    ramp = (np.mgrid[:64, :64][1] * 3 + 20).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp] * 3, -1))
    source = torch.from_numpy(np.stack([ramp] * 2)).float() / 255 if as_tensor else image
    channels = 2 if as_tensor else 3
    settings = with_(
        PLAIN, rotation=30, global_scale=(1.0, 1.0), aspect=(1.0, 1.0), global_count=1,
        local_count=0, mean=(0.0,) * channels, std=(1.0,) * channels,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    draw_box((64, 64), (1.0, 1.0), (1.0, 1.0), rng)
    degrees = rng.uniform(-30, 30)
    assert abs(degrees) > 5
    view = MultiCrop(settings)(source, 3).global_[0][0].numpy()
    down, right = np.gradient(view * 255)
    middle = slice(8, 24)
    angle = np.degrees(np.arctan2(down[middle, middle].mean(), right[middle, middle].mean()))
    # counter-clockwise on screen: the direction of growth turns from right towards the top
    # (negative rows)
    assert angle == pytest.approx(-degrees, abs=1.0)
    assert view[16, 16] * 255 == pytest.approx(ramp[32, 32], abs=4)
    assert view.min() * 255 > 15  # mirrored, no black corners


# --- colours


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def _grey(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
def test_brightness_contrast_saturation_are_blends(pixels, factor):
    image = Image.fromarray(pixels)
    rgb = pixels.astype(float)
    grey = np.floor(_grey(rgb) + 0.5)[..., None]
    for adjust, other in (
        (photometric.adjust_brightness, 0.0),
        (photometric.adjust_contrast, np.floor(grey.mean() + 0.5)),
        (photometric.adjust_saturation, grey),
    ):
        expected = (other + factor * (rgb - other)).clip(0, 255)
        assert np.abs(np.asarray(adjust(image, factor)) - expected).max() <= 1 + abs(factor - 1)


def test_hue_turns_the_colour_circle():
    colours = np.array([[[200, 40, 40], [40, 200, 40], [40, 40, 200], [90, 90, 90]]], np.uint8)
    third = np.asarray(photometric.adjust_hue(Image.fromarray(colours), 1 / 3)).astype(int)
    expected = np.array([[[40, 200, 40], [40, 40, 200], [200, 40, 40], [90, 90, 90]]])
    assert np.abs(third - expected).max() <= 4  # 8-bit hue: a third of 255 is 85
    assert (
        np.abs(
            np.asarray(photometric.adjust_hue(Image.fromarray(colours), 0.0)).astype(int) - colours
        ).max()
        <= 3
    )
    back = photometric.adjust_hue(photometric.adjust_hue(Image.fromarray(colours), 0.1), -0.1)
    assert np.abs(np.asarray(back).astype(int) - colours).max() <= 8


def test_grey_and_solarize(pixels):
    grey = np.asarray(photometric.to_grey(Image.fromarray(pixels)))
    assert np.abs(grey - _grey(pixels.astype(float))[..., None]).max() <= 1
    expected = np.where(pixels < 128, pixels, 255 - pixels)
    assert np.array_equal(np.asarray(photometric.solarize(Image.fromarray(pixels))), expected)


@pytest.mark.parametrize("shape", [(3, 37, 50), (2, 3, 70), (1, 1, 5), (4, 48, 24)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_the_separable_gaussian_reflected_at_the_border(shape, sigma):
    planes = np.random.default_rng(0).random(shape)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    expected = planes
    for axis in (1, 2):
        side = shape[axis]
        total = np.zeros(shape)
        for offset, weight in zip(range(-4, 5), taps):
            total += weight * np.take(
                expected, [_reflect(i + offset, side) for i in range(side)], axis=axis
            )
        expected = total
    blurred = photometric.blur_tensor(torch.from_numpy(planes).float(), sigma).numpy()
    assert np.abs(blurred - expected).max() < 1e-6
    if shape[0] == 3:
        image = Image.fromarray((planes.transpose(1, 2, 0) * 255).astype(np.uint8))
        assert (
            np.abs(
                np.asarray(photometric.blur(image, sigma)) / 255 - expected.transpose(1, 2, 0)
            ).max()
            < 1 / 127
        )


def _reflect(index: int, side: int) -> int:
    while side > 1 and not 0 <= index < side:
        index = -index if index < 0 else 2 * (side - 1) - index
    return index if side > 1 else 0


def _calls(monkeypatch, name: str, settings: CropSettings, images: int = 300) -> float:
    """How often one step of the pipeline acts, per image."""
    count = 0
    original = getattr(photometric, name)

    def counting(*args):
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(photometric, name, counting)
    crops = MultiCrop(settings)
    image = picture(32, 32)
    for seed in range(images):
        crops(image, seed)
    return count / images


@pytest.mark.parametrize(
    "blur, per_image",
    [("executed", 0.0 + 0.9 + 2 * 0.5), ("intended", 1.0 + 0.1 + 2 * 0.5), ("off", 0)],
)
def test_blur_probabilities(monkeypatch, blur, per_image):
    calls = _calls(monkeypatch, "blur", with_(PLAIN, blur=blur))
    assert calls == pytest.approx(per_image, abs=4 * math.sqrt(0.6 / 300))


def test_solarize_spares_the_first_global_and_local_views(monkeypatch):
    assert _calls(monkeypatch, "solarize", with_(PLAIN, solarize=1.0), 10) == 1


def test_grey_probability(monkeypatch):
    assert _calls(monkeypatch, "to_grey", with_(PLAIN, grayscale=0.2)) == pytest.approx(
        0.8, abs=4 * math.sqrt(0.64 / 300)
    )


def test_jitter_acts_in_random_order_with_its_probability(monkeypatch):
    from dinov3core.data import crops as module

    orders = []
    original = module._jitter_rgb
    monkeypatch.setattr(
        module, "_jitter_rgb", lambda i, f, o: (orders.append((tuple(o), f)), original(i, f, o))[1]
    )
    cut = MultiCrop(with_(PLAIN, jitter_probability=0.8))
    for seed in range(300):
        cut(picture(32, 32), seed)
    assert len(orders) / 1200 == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 1200))
    assert len({order for order, _ in orders}) == 24
    factors = np.stack([factor for _, factor in orders])
    assert (np.abs(factors).max(0) <= (0.4, 0.4, 0.2, 0.1)).all()
    assert (np.abs(factors).max(0) > (0.39, 0.39, 0.19, 0.09)).all()


def test_normalisation():
    settings = with_(PLAIN, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    plain = MultiCrop(PLAIN)(picture(), 1).global_[0]
    normal = MultiCrop(settings)(picture(), 1).global_[0]
    expected = (plain - torch.tensor(settings.mean)[:, None, None]) / torch.tensor(settings.std)[
        :, None, None
    ]
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-6)
    assert 0 <= plain.min() and plain.max() <= 1


def test_shared_jitter_gives_every_view_one_colouring():
    grey_image = Image.new("RGB", (64, 64), (120, 60, 200))
    shared = with_(PLAIN, jitter_probability=1.0, share_color_jitter=True)
    views = MultiCrop(shared)(grey_image, 0)
    assert (
        len({view.mean((1, 2)).numpy().round(4).tobytes() for view in views.global_ + views.local})
        == 1
    )
    apart = MultiCrop(with_(shared, share_color_jitter=False))(grey_image, 0)
    assert (
        len({view.mean((1, 2)).numpy().round(4).tobytes() for view in apart.global_ + apart.local})
        == 4
    )


# --- Gram crops and local crops inside global ones


def test_clean_gram_crops_share_the_geometry_and_not_the_colours():
    settings = with_(PLAIN, flip=True, global_scale=(0.3, 0.5))
    clean = GramCrops(48)
    views = MultiCrop(settings, clean)(picture(), 2)
    image = picture()
    assert [tuple(view.shape) for view in views.gram] == [(3, 48, 48)] * 2
    for crop, gram in zip(views.global_, views.gram):
        smaller = F.interpolate(gram[None], size=32, mode="bicubic", antialias=True)[0].clamp(0, 1)
        assert (crop - smaller).abs().max() < 3 / 255
    colourful = with_(
        settings, jitter_probability=1.0, brightness=1.0, blur="intended", solarize=1.0
    )
    for seed in range(3):
        distorted = MultiCrop(colourful, clean)(image, seed)
        plain_first = MultiCrop(with_(settings, local_count=0, global_count=1), clean)(image, seed)
        assert torch.equal(distorted.gram[0], plain_first.gram[0])
        assert not torch.equal(distorted.global_[0], plain_first.global_[0])


def test_distorted_gram_crops_are_resized_from_the_distorted_view():
    settings = with_(
        CropSettings(),
        global_size=32,
        local_size=16,
        local_count=0,
    )
    views = MultiCrop(settings, GramCrops(48, distorted=True))(picture(), 4)
    for crop, gram in zip(views.global_, views.gram):
        assert gram.shape == (3, 48, 48)
        torch.testing.assert_close(
            crop,
            F.interpolate(gram[None], size=32, mode="bicubic", antialias=True)[0],
            rtol=0,
            atol=1e-5,
        )


def test_local_views_inside_global_ones_lie_on_the_grid():
    settings = with_(PLAIN, global_size=80, local_size=32, local_count=4, local_inside_global=True)
    last = (80 - 32) // INNER_STEP - 1
    seen = set()
    for seed in range(30):
        views = MultiCrop(settings)(picture(120, 120), seed)
        for number, view in enumerate(views.local):
            parent = views.global_[0 if number < 2 else 1]
            matches = [
                (y, x)
                for y in range(0, 49, INNER_STEP)
                for x in range(0, 49, INNER_STEP)
                if torch.equal(view, parent[:, y : y + 32, x : x + 32])
            ]
            assert matches, "each half of the local views comes from its global view"
            seen.update(matches)
    assert seen == {
        (y * INNER_STEP, x * INNER_STEP) for y in range(last + 1) for x in range(last + 1)
    }


# --- other channel counts


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_any_number_of_channels(channels):
    settings = with_(
        CropSettings(), global_size=32, local_size=16, mean=(0.5,) * channels,
        std=(0.25,) * channels, rotation=10, blur="intended",
    )  # fmt: skip
    source = torch.rand(channels, 40, 50, generator=torch.Generator().manual_seed(0))
    views = MultiCrop(settings, GramCrops(48))(source, 0)
    assert views.global_[1].shape == (channels, 32, 32) and views.local[7].shape == (
        channels,
        16,
        16,
    )
    assert views.gram[0].shape == (channels, 48, 48)
    for view in views.global_ + views.local:
        assert view.min() >= -2 - 1e-5 and view.max() <= 2 + 1e-5 and torch.isfinite(view).all()
    assert same(views, MultiCrop(settings, GramCrops(48))(source, 0))


def test_tensor_geometry_is_that_of_images():
    image = picture().point(
        [64 + value // 2 for value in range(256)] * 3
    )  # no clipping between Pillow's two passes
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    four = torch.cat([planes, planes[:1]])
    settings = with_(PLAIN, flip=True)
    wide = with_(settings, mean=(0.0,) * 4, std=(1.0,) * 4)
    for seed in range(5):
        a = MultiCrop(settings)(image, seed)
        b = MultiCrop(wide)(four, seed)
        for x, y in zip(a.global_ + a.local, b.global_ + b.local):
            assert (
                x - y[:3]
            ).abs().max() < 1.5 / 255  # two roundings to 8 bits, the first amplified by the kernel


def test_tensor_contrast_blends_with_the_mean_of_each_channel():
    planes = torch.stack([torch.full((4, 4), 0.2), torch.linspace(0.3, 0.7, 16).view(4, 4)])
    adjusted = photometric.adjust_tensor_contrast(planes, 0.5)
    torch.testing.assert_close(adjusted[0], planes[0])
    torch.testing.assert_close(adjusted[1], 0.5 + 0.5 * (planes[1] - 0.5))


def test_wrong_channel_count_is_refused():
    with pytest.raises(ValueError, match=r"expected an image of 3 channels .* got 4"):
        MultiCrop(PLAIN)(torch.rand(4, 8, 8), 0)
    with pytest.raises(ValueError, match=r"expected an image of 1 channels .* got 3"):
        MultiCrop(with_(PLAIN, mean=(0.5,), std=(0.5,)))(picture(), 0)
