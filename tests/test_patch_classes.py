"""Patches and the class of a place: right answers, honest errors, a sentence for bad data."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

from dense_stubs import Stub, classes_drawn, diverged, noise, one_hot

from dinov3core.data.datasets import DataOptions, open_segmented
from dinov3core.data.errors import DataError
from dinov3core.data.labelled import IGNORE, Segmented
from dinov3core.evals.agreement import agreement, patch_labels
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.patch_classes import RIDGE, PatchClasses, Ridge, _mean_iou, discriminant
from dinov3core.evals.segmentation import scores_of

NAMES = ("zero", "one", "two", "three")
DATA = Path(os.environ.get("DINOV3CORE_DATA", "/nonexistent")) / "seg"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="DINOV3CORE_DATA names no image sets")


def drawn(count: int = 12, classes: int = 4) -> Segmented:
    train = classes_drawn(count, classes, seed=1)
    return Segmented(train, classes_drawn(count, classes, seed=2), NAMES[:classes])


def halves(scale: float = 1.0) -> Stub:
    """Two of four classes told apart, one channel of noise, one that is constant."""

    def of_means(means: torch.Tensor) -> torch.Tensor:
        red = means[:, :1]
        return torch.cat([(red > 0.5).float(), scale * means[:, 1:2], torch.ones_like(red)], 1)

    return Stub(of_means)


def test_features_that_are_the_class_score_almost_full_marks() -> None:
    """All but edges, which lie where bilinear enlargement puts them."""
    images = PatchClasses(drawn(), side=64, images=100)
    scores = images.score(FrozenEncoder(one_hot(4)))
    assert 90 < scores.miou.value < 100 and 0 < scores.miou.error < 0.5
    assert scores.agreement.value > 90


def test_features_that_say_nothing_score_like_guessing() -> None:
    images = PatchClasses(drawn(30), side=64, images=100)
    miou, agreement = images.score(FrozenEncoder(noise()))
    guessing = 100 / (4 + 4 - 1)  # a quarter of a class, and a quarter of the answers
    assert miou.value < guessing + 3 * miou.error
    assert abs(agreement.value - 50) < 3 * agreement.error


def test_the_scores_depend_on_nothing_but_features_and_masks() -> None:
    """Not on batches, on scales of channels, or on numbers drawn elsewhere."""
    images = PatchClasses(drawn(), side=64, images=100)
    plain = FrozenEncoder(halves())
    first = images.score(plain)
    torch.manual_seed(3)
    assert images.score(plain) == first
    for other in (plain, FrozenEncoder(halves(scale=1000.0))):
        scores = images.score(other, batch_size=5)
        assert scores.miou == pytest.approx(first.miou, abs=1e-6)
        if other is plain:  # cosines do depend on the scales of channels
            assert scores.agreement == first.agreement


@pytest.mark.parametrize("ridge", [RIDGE, Ridge(0.01, "mean")])
def test_the_rule_is_that_of_normal_classes(ridge: Ridge) -> None:
    """Against the textbook: class means, pooled covariance, log priors, all from the samples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (900,), generator=generator)
    means = 2 * torch.randn(3, 5, generator=generator, dtype=torch.double)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.double)
    noise_RD = torch.randn(900, 5, generator=generator, dtype=torch.double) @ mixing
    patches = means[labels] + noise_RD
    one_hot_RC = torch.nn.functional.one_hot(labels, 4).double()  # the fourth class never occurs

    moments = (one_hot_RC.sum(0), one_hot_RC.T @ patches, patches.T @ patches)
    rule = discriminant(*moments, ridge)
    assert rule.classes.tolist() == [0, 1, 2]

    own = torch.stack([patches[labels == label].mean(0) for label in range(3)])
    centred = patches - own[labels]
    within = centred.T @ centred / 900
    added = 0.01 * torch.diag(patches.var(0, correction=0))  # in units of each channel
    if ridge.of == "mean":
        added = 0.01 * within.diagonal().mean() * torch.eye(5, dtype=torch.double)
    solved = torch.linalg.solve(within + added, own.T)
    priors = torch.bincount(labels).double() / 900
    textbook = patches @ solved + priors.log() - 0.5 * (own.T * solved).sum(0)
    ours = patches @ rule.weight + rule.bias
    difference = ours - textbook  # the same for all classes of a sample
    assert (difference - difference.mean(1, keepdim=True)).abs().max() < 1e-9


def test_the_mean_is_that_of_the_segmentation_task_and_the_error_a_jackknife() -> None:
    images = PatchClasses(drawn(7), side=64, images=100)
    score = images.score(FrozenEncoder(halves())).miou

    generator = torch.Generator().manual_seed(0)
    confusion = torch.randint(50, (4, 4), generator=generator)
    areas = torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])
    assert _mean_iou(areas).item() == pytest.approx(scores_of(confusion).miou)

    # every image left out in turn, by scoring the others anew
    pixels, masks = images.test
    means = []
    for left_out in range(7):
        others = [index for index in range(7) if index != left_out]
        images.test = type(images.test)(pixels[others], masks[others])
        means.append(images.score(FrozenEncoder(halves())).miou.value)
    spread = torch.tensor(means)
    jackknife = (6 / 7 * (spread - spread.mean()).square().sum()).sqrt()
    assert score.error == pytest.approx(float(jackknife), rel=1e-4)


def test_one_image_has_a_score_and_no_error() -> None:
    data = drawn()
    single = Segmented(data.train, classes_drawn(1, 4, seed=2), NAMES)
    scores = PatchClasses(single, side=64, images=10).score(FrozenEncoder(halves()))
    assert 0 < scores.miou.value < 100 and scores.miou.error is None


def test_features_that_are_all_alike_do_not_end_in_nan() -> None:
    images = PatchClasses(drawn(), side=64, images=100)
    scores = images.score(FrozenEncoder(Stub(lambda means: torch.ones_like(means))))
    assert 0 < scores.miou.value < 25 and scores.agreement.value == 50


def test_agreement_is_of_all_images() -> None:
    """Nothing is learned for it, so that those the rule is learned from count as well."""
    images = PatchClasses(drawn(7), side=64, images=100)
    encoder = FrozenEncoder(halves())
    pixels = torch.cat([images.train.pixels, images.test.pixels])
    masks = torch.cat([images.train.masks, images.test.masks])
    of_all = agreement(encoder.patches(pixels), patch_labels(masks, (8, 8), 4))
    assert images.score(encoder, batch_size=3).agreement == pytest.approx(of_all, abs=1e-9)


def test_images_of_one_class_each_have_no_agreement() -> None:
    """There is nothing to tell apart within an image; a linear rule still has its classes."""
    data = drawn(4)
    for split in (data.train, data.test):
        split.pairs[:] = [
            (image, torch.full_like(mask, place)) for place, (image, mask) in enumerate(split.pairs)
        ]
    scores = PatchClasses(data, side=64, images=100).score(FrozenEncoder(noise()))
    assert scores.agreement is None and scores.miou.value >= 0


def test_features_that_are_not_finite_are_refused() -> None:
    images = PatchClasses(drawn(), side=64, images=100)
    with pytest.raises(ValueError, match="diverged"):
        images.score(FrozenEncoder(diverged()))


def test_a_broken_image_is_passed_over() -> None:
    data = drawn()
    data.train.pairs[3] = None
    assert len(PatchClasses(data, side=64, images=100).train.pixels) == 11


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("one class", "expected training masks of at least two classes, got 1"),
        ("no class", "expected training masks of at least two classes, got 0"),
        ("no test", "expected test masks with a class, got none"),
        ("other classes", "expected classes 0 to 3 or 255"),
        ("empty", "expected at least one image, got an empty split"),
    ],
)
def test_bad_masks_get_one_sentence(damage: str, sentence: str) -> None:
    data = drawn()
    split = data.test if damage == "no test" else data.train
    value = {"one class": 2, "no class": IGNORE, "no test": IGNORE, "other classes": 7}
    split.pairs[:] = [
        (image, torch.full_like(mask, value.get(damage, 0)))
        for image, mask in ([] if damage == "empty" else split.pairs)
    ]
    with pytest.raises(DataError, match=sentence):
        PatchClasses(data, side=64, images=100)


def test_built_in_scenes() -> None:
    options = DataOptions(scenes_train=40, scenes_test=40, scene_size=48)
    images = PatchClasses(open_segmented("scenes", options), side=48, images=40)
    colours = images.score(FrozenEncoder(Stub()))
    assert 0 < colours.miou.error < 2 and 2 < colours.miou.value < 20
    assert 0 < colours.agreement.error < 3 and 80 < colours.agreement.value < 95


@needs_data
@pytest.mark.parametrize("name", ["camvid11_480x360.tar", "davis16val_20x32_240p.tar"])
def test_real_images(name: str) -> None:
    """Colours of patches know something of a street and of an object; noise does not."""
    images = PatchClasses(open_segmented(DATA / name), side=64, images=40)
    colours = images.score(FrozenEncoder(Stub()))
    nothing = images.score(FrozenEncoder(noise()))
    assert colours.miou.value > nothing.miou.value and 0 < colours.miou.error < 3
    assert colours.agreement.value > nothing.agreement.value + 3 * colours.agreement.error
