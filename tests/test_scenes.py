"""Built-in images: a function of seed and index; masks, depths and captions fit the pixels."""

import pickle

import numpy as np
import pytest
from PIL import Image

from dinov3core.data import scenes
from dinov3core.data.patterns import SILHOUETTES, TEXTURES, Phases, tone
from dinov3core.data.scenes import CLASS_NAMES, SHAPE_NAMES, Scenes, hsv, render, uniforms


@pytest.fixture(scope="module")
def drawn() -> scenes.Rendered:
    return render(range(240), seed=1)


def test_numbers_are_uniform_and_independent():
    u = uniforms(0, np.arange(2000), 50)
    assert u.shape == (2000, 50) and u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 2000)
    correlation = np.corrcoef(np.concatenate([u.T, uniforms(1, np.arange(2000), 10).T]))
    assert np.abs(correlation - np.eye(60)).max() < 5 / np.sqrt(2000)
    assert np.array_equal(uniforms(0, np.array([7]), 50)[0], u[7]), (
        "an image does not depend on its neighbours"
    )


def test_an_image_is_a_function_of_seed_and_index(drawn):
    alone = render([37], seed=1)
    assert np.array_equal(alone.images[0], drawn.images[37])
    assert np.array_equal(alone.masks[0], drawn.masks[37]) and np.array_equal(
        alone.depths[0], drawn.depths[37]
    )
    shuffled = render([200, 37, 4], seed=1)
    assert np.array_equal(shuffled.images, drawn.images[[200, 37, 4]])
    assert not np.array_equal(render([37], seed=2).images[0], drawn.images[37])


def test_no_image_comes_twice(drawn):
    assert len({image.tobytes() for image in drawn.images}) == len(drawn.images)


def test_offsets_slide_along_one_collection():
    a = Scenes(40, seed=3)
    b = Scenes(20, seed=3, offset=20)
    assert [np.array_equal(x, y) for x, y in zip(a.loads(range(20, 40)), b.loads(range(20)))] == [
        True
    ] * 20
    assert [a.label(20 + i) for i in range(20)] == [b.label(i) for i in range(20)]
    assert a.name(25) == b.name(5) == "scene 25 of seed 3"


def test_labels_are_balanced_and_are_the_class_of_the_main_object(drawn):
    assert np.array_equal(np.bincount(drawn.labels), np.full(12, 20))
    sizes = np.stack([(drawn.masks == 1 + number).sum((1, 2)) for number in range(12)], 1)
    assert (sizes.argmax(1) == drawn.labels).mean() > 0.95, "the main object is the largest"
    shown = sizes[np.arange(240), drawn.labels] / drawn.masks[0].size
    assert shown.min() > 0.05 and np.median(shown) > 0.4
    others = (sizes > 0).sum(1) - 1
    assert 0.3 < (others > 0).mean() < 0.7, "some scenes have smaller objects of other classes"


def test_depths_agree_with_occlusion(drawn):
    """Metres: objects before the main one are nearer, those behind it and the ground farther."""
    main = drawn.masks == (1 + drawn.labels)[:, None, None]
    other = (drawn.masks > 0) & ~main
    assert 1.6 < drawn.depths[main].min() and drawn.depths[main].max() < 3.5
    assert ((drawn.depths[other] < 1.61) | (drawn.depths[other] > 3.6)).all()
    assert (drawn.depths[other] < 1.61).any() and (drawn.depths[other] > 3.6).any()
    assert drawn.depths[drawn.masks == 0].min() > 3.9 and drawn.depths.max() <= scenes.FAR
    assert drawn.depths.dtype == np.float32


def test_ground_recedes_towards_the_horizon(drawn):
    background = np.where(drawn.masks == 0, drawn.depths, np.nan)
    ground = np.nanmax(background.reshape(240, -1), 1) == scenes.FAR
    assert 0.3 < ground.mean() < 0.7
    for depth in background[ground]:
        down = np.diff(depth, axis=0)
        assert np.nanmax(down) <= 0, "rows further down are nearer"


def test_objects_do_not_change_with_the_size_they_are_drawn_at():
    small = render(range(24), size=32)
    large = render(range(24), size=128)
    shrunk = large.masks[:, 2::4, 2::4]
    assert (shrunk == small.masks).mean() > 0.97
    means = [r.images.reshape(24, -1, 3).astype(float).mean(1) for r in (small, large)]
    assert np.abs(means[0] - means[1]).max() < 12


def test_scene_describes_itself():
    source = Scenes(60, seed=2, size=48, offset=12)
    words = set()
    for index in range(60):
        scene = source.scene(index)
        assert np.array_equal(np.asarray(scene.image), np.asarray(source.load(index)))
        assert scene.label == source.label(index) == CLASS_NAMES.index(scene.objects[0].texture)
        assert scene.caption.startswith(
            f"a large {scene.objects[0].texture} {scene.objects[0].shape}, "
        )
        for other in scene.objects[1:]:
            assert f"a small {other.texture} {other.shape}" in scene.caption
            if "in front of a small" not in scene.caption:
                assert other.depth < scene.objects[0].depth
            assert other.texture != scene.objects[0].texture
        assert set(np.unique(scene.mask)) <= {0} | {
            1 + CLASS_NAMES.index(item.texture) for item in scene.objects
        }
        words.update(scene.caption.replace(",", "").split())
    assert (
        set(CLASS_NAMES) <= words
        and {"above", "below", "left", "right", "front", "wall", "ground"} <= words
    )


@pytest.mark.parametrize(
    "main, other, expected",
    [
        ((0, 0, 2.0), (0, -5, 1.0), "below"),
        ((0, 0, 2.0), (9, 5, 1.0), "left of"),
        ((0, 0, 2.0), (9, 5, 4.0), "in front of"),
    ],
)
def test_relation_of_the_main_object_to_another(main, other, expected):
    first, second = (
        scenes.SceneObject("striped", "disc", x, y, 1.0, depth) for x, y, depth in (main, other)
    )
    assert (
        scenes._relation(first, second)
        == {"below": "below", "left of": "left of", "in front of": "in front of"}[expected]
    )


def test_silhouette_and_colours_say_nothing_of_the_class():
    """A class histogram of silhouettes and mean colours is that of chance."""
    _, objects = scenes._layout(0, np.arange(6000))
    counts = np.zeros((12, 12))
    np.add.at(counts, (np.arange(6000) % 12, objects.shape[:, 0]), 1)
    expected = 6000 / 144
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 121) < 5 * np.sqrt(2 * 121)
    tones = objects.tones[:, 0].reshape(6000, 6)
    by_class = np.stack([tones[number::12].mean(0) for number in range(12)])
    assert np.abs(by_class - tones.mean(0)).max() < 5 * tones.std(0).max() / np.sqrt(500)


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_silhouettes_fill_a_sensible_part_of_their_circle(name):
    axis = np.linspace(-1.5, 1.5, 151, dtype=np.float32)
    inside = SILHOUETTES[name](axis[None, None, :], axis[None, :, None])[0] > 0
    reach = np.hypot(*np.meshgrid(axis, axis))[inside].max()
    assert 0.6 < reach < 1.5 and 0.2 < inside.mean() * 9 / np.pi < 1.1


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_textures_have_two_balanced_tones(name):
    u, v = np.meshgrid(*[np.linspace(-1, 1, 128, dtype=np.float32)] * 2)
    one = np.ones((1, 1, 1), np.float32)
    share = tone(TEXTURES[name](u[None], v[None], Phases(13 * one, one, 2 * one)), 2.5)
    assert share.shape == (1, 128, 128) and share.min() < 0.1 and share.max() > 0.9
    assert 0.15 < share.mean() < 0.85


def test_colours():
    red, teal, grey = hsv(np.float32([0, 0.5, 0.3]), np.float32([1, 1, 0]), np.float32([1, 1, 0.4]))
    assert np.allclose(red, [1, 0, 0]) and np.allclose(teal, [0, 1, 1]) and np.allclose(grey, 0.4)


def test_images_are_kept_and_the_same_when_drawn_anew(monkeypatch):
    source = Scenes(70, seed=5)
    first = np.asarray(source.load(33))
    calls = []
    monkeypatch.setattr(
        scenes, "render", lambda *args, **kwargs: calls.append(args) or render(*args, **kwargs)
    )
    assert np.array_equal(np.asarray(source.load(33)), first) and np.asarray(source.load(50)).any()
    assert not calls, "an image and its neighbours are drawn once"
    assert [np.asarray(image).shape for image in source.loads([33, 0, 33])] == [(64, 64, 3)] * 3
    assert np.array_equal(np.asarray(source.loads([0, 33])[1]), first) and len(calls) == 1
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 10_000 and np.array_equal(np.asarray(copy.load(33)), first)


def test_a_large_source_keeps_nothing(monkeypatch):
    monkeypatch.setattr(scenes, "CACHE_BYTES", 1000)
    source = Scenes(10**12)
    assert np.array_equal(np.asarray(source.load(10**11)), np.asarray(source.loads([10**11])[0]))
    assert source._kept is None and isinstance(source.load(0), Image.Image)


def test_bad_arguments():
    with pytest.raises(ValueError, match="a size of at least 8 pixels"):
        Scenes(10, size=4)
    with pytest.raises(IndexError, match="from 0 to 9, got 10"):
        Scenes(10).load(10)
