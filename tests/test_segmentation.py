"""Segmentation against scikit-learn, loops and backbones that know the answer or nothing."""

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_stubs import PairList, Stub, classes_drawn, diverged, noise, one_hot
from PIL import Image
from torch import nn

from dinov3core.data.errors import DataError
from dinov3core.data.labelled import IGNORE, Segmented
from dinov3core.evals import dense_head
from dinov3core.evals.dense_head import (
    DenseHead,
    DenseSettings,
    DenseTask,
    check_cache,
    fit_head,
    rate_at,
)
from dinov3core.evals.frozen import FrozenEncoder
from dinov3core.evals.reading import evenly
from dinov3core.evals.segmentation import (
    SEGMENTATION,
    _Cached,
    _Crops,
    confusion_matrix,
    distorted,
    patch_counts,
    scores_of,
    segmentation,
)
from dinov3core.evals.views import resized_target
from dinov3core.evals.windows import cut, join, resolve_side, window_origins

NAMES = ["a", "b", "c", "d"]


def drawn(train: int = 12, test: int = 6) -> Segmented:
    return Segmented(classes_drawn(train, 4), classes_drawn(test, 4, seed=1), NAMES)


def settings(**changes) -> DenseSettings:
    return replace(SEGMENTATION, **changes)


def test_scores_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(5, (40, 30), generator=generator)
    guess = torch.where(
        torch.rand(40, 30, generator=generator) < 0.6, truth, torch.randint(5, (40, 30))
    )
    truth[:4] = IGNORE
    known = truth != IGNORE
    found = confusion_matrix(truth, guess, 5, "t")
    expected = metrics.confusion_matrix(truth[known].numpy(), guess[known].numpy(), labels=range(5))
    assert (found.numpy() == expected).all()
    scores = scores_of(found)
    jaccard = metrics.jaccard_score(
        truth[known].numpy(), guess[known].numpy(), average=None, labels=range(5)
    )
    np.testing.assert_allclose(scores.iou, 100 * jaccard, rtol=1e-12)
    assert scores.miou == pytest.approx(100 * jaccard.mean())
    assert scores.pixel_accuracy == pytest.approx(
        100 * (truth[known] == guess[known]).double().mean().item()
    )


def test_a_class_that_neither_occurs_nor_is_predicted_does_not_count():
    scores = scores_of(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert scores.iou[:2] == [75.0, 80.0] and np.isnan(scores.iou[2])
    assert scores.miou == 77.5 and scores.pixel_accuracy == 87.5


def test_patch_counts_match_a_loop():
    target = torch.randint(4, (24, 16), generator=torch.Generator().manual_seed(0))
    target[target == 3] = IGNORE
    found = patch_counts(target, (3, 2), 3)
    for row in range(3):
        for column in range(2):
            patch = target[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert found[:, row, column].tolist() == [int((patch == one).sum()) for one in range(3)]
    assert found.dtype == torch.int16
    assert patch_counts(torch.ones(224, 224, dtype=torch.int64), (1, 1), 2).flatten().tolist() == [
        0,
        224**2,
    ]


def test_the_loss_of_patches_is_the_loss_of_pixels_with_their_patch_logits():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(4, (2, 32, 32), generator=generator)
    target[:, :5] = IGNORE
    logits = torch.randn(2, 4, 4, 4, generator=generator)
    counts = torch.stack([patch_counts(one, (4, 4), 4) for one in target]).float()
    found = -(counts * logits.log_softmax(1)).sum() / counts.sum()
    pixels = F.interpolate(logits, scale_factor=8, mode="nearest")
    torch.testing.assert_close(found, F.cross_entropy(pixels, target, ignore_index=IGNORE))


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((64, 100), 64, 43), ((90, 77), 32, 20), ((32, 32), 32, 32)]
)
def test_windows_cover_every_pixel_and_join_without_a_seam(size, window, stride):
    origins = window_origins(*size, window, stride)
    seen = torch.zeros(size)
    for top, left in origins:
        assert 0 <= top <= size[0] - window and 0 <= left <= size[1] - window
        seen[top : top + window, left : left + window] += 1
    assert seen.min() >= 1
    planes = torch.rand(2, *size)
    torch.testing.assert_close(join(cut(planes, origins, window), origins, size, window), planes)


def test_targets_are_resized_without_mixing():
    target = torch.tensor([[0, 200], [255, 7]]).repeat_interleave(10, 0).repeat_interleave(10, 1)
    assert (resized_target(target, (4, 4)) == target[::5, ::5]).all()
    assert (
        resized_target(torch.arange(6).expand(6, 6), (2, 2)).tolist() == [[1, 4]] * 2
    )  # by the pixels' centres


def test_rate_rises_and_falls():
    rates = [rate_at(step, 100, 0.1) for step in range(101)]
    assert (
        rates[0] == 1e-6
        and max(rates) == rates[10] == 1
        and rates[55] == pytest.approx(0.5)
        and rates[100] < 1e-12
    )
    assert rates[5] == pytest.approx(0.5, abs=1e-6) and rate_at(0, 10, 0.0) == 1


@pytest.mark.parametrize(("augment", "least"), [(False, 95), (True, 85)])
def test_a_backbone_that_knows_the_class_scores_nearly_all(augment, least):
    """Boundaries lie on the patch grid, so that only corners are cut by the bilinear enlargement;
    crops of another scale mix classes within a patch, and changed colours are other classes to this
    backbone."""
    short = settings(iterations=60, batch_size=8, learning_rate=0.1)
    found = segmentation(one_hot(4), drawn(), short, augment=augment)
    assert least < found["miou"] < found["pixel_accuracy"] <= 100
    assert (
        found["protocol"]["side"] == found["protocol"]["window"] == 64 and found["unreadable"] == 0
    )


def test_a_backbone_that_knows_nothing_scores_chance():
    found = segmentation(noise(), drawn(24, 12), settings(iterations=100))
    assert found["pixel_accuracy"] == pytest.approx(25, abs=6) and found["miou"] < 18


def test_larger_images_are_seen_through_windows():
    data = Segmented(classes_drawn(8, 4, side=128), classes_drawn(4, 4, side=128, seed=1), NAMES)
    aligned, shifted = (
        segmentation(
            one_hot(4),
            data,
            settings(window=64, stride=stride, iterations=60, learning_rate=0.1),
        )
        for stride in (64, None)
    )
    assert aligned["protocol"]["side"] == 128 and shifted["protocol"]["stride"] == 43
    # Two thirds of a window is off the grid on which the squares lie: patches of the second row mix
    # classes.
    assert aligned["miou"] > 95 and 70 < shifted["miou"] < aligned["miou"]


def test_same_seed_same_result_and_the_callers_randomness_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = [segmentation(noise(), drawn(), settings(iterations=5, seed=seed)) for seed in (3, 3)]
    assert found[0] == found[1] and (torch.get_rng_state() == before).all()


def test_limits_do_not_fall_into_step_with_classes_that_take_turns():
    for length, limit in ((3600, 600), (1200, 100), (1200, 200), (3600, 300)):
        chosen = evenly(length, limit)
        counts = np.bincount(np.array(chosen) % 12, minlength=12)  # the class of a built-in scene
        assert (
            len(set(chosen)) == limit
            and chosen == sorted(chosen)
            and 0 <= chosen[0]
            and chosen[-1] < length
        )
        assert counts.min() >= 0.7 * limit / 12 and counts.max() <= 1.3 * limit / 12


def test_broken_images_are_counted():
    data = drawn()
    data.train.pairs[2] = data.test.pairs[0] = None
    for augment in (False, True):
        found = segmentation(
            one_hot(4), data, settings(iterations=2, batch_size=2), augment=augment
        )
        assert found["unreadable"] == 2


def test_limits_take_evenly_spread_images():
    assert evenly(10, 4) == [0, 3, 5, 9] and evenly(3, None) == evenly(3, 9) == [0, 1, 2]
    found = segmentation(noise(), drawn(), settings(iterations=1, train_images=3, test_images=2))
    assert (found["protocol"]["train_images"], found["protocol"]["test_images"]) == (3, 2)


def test_colours_change_within_bounds():
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    changed = [np.asarray(distorted(image)) for _ in range(6)]
    assert (
        all(one.shape == (16, 16, 3) for one in changed)
        and len({one.tobytes() for one in changed}) > 3
    )
    planes = [distorted(torch.rand(5, 8, 8)) for _ in range(6)]
    assert all(0 <= one.min() and one.max() <= 1 for one in planes)


def test_the_head_is_the_published_one():
    head = DenseHead(6, 3, 0.1)
    assert [type(one) for one in head.children()] == [nn.Dropout2d, nn.BatchNorm2d, nn.Conv2d]
    assert head.predict.bias.abs().max() == 0 and head.predict.weight.std() < 0.03


def _labelled(value: int, count: int = 2) -> PairList:
    return PairList([(torch.rand(3, 64, 64), torch.full((64, 64), value))] * count)


SHORT = PairList([(torch.rand(3, 64, 64), torch.zeros(64, 60).long())])
BAD = [
    (SHORT, _labelled(0), "pair 0: expected a target of the image's size [64, 64], got [64, 60]"),
    (_labelled(IGNORE), _labelled(0), "pixels of a known target in the training split, got none"),
    (
        classes_drawn(2, 4),
        _labelled(IGNORE),
        "pixels of a known target in the test split, got none",
    ),
    (_labelled(1), _labelled(1), "got only class 1"),
    (_labelled(4), _labelled(1), "expected classes 0 to 3 or 255 (no class), got 4"),
    (
        PairList([]),
        _labelled(1),
        "training images: expected at least one image, got an empty split",
    ),
    (PairList([None, None]), _labelled(1), "one readable image, got 2 unreadable ones"),
]


@pytest.mark.parametrize(("train", "test", "message"), BAD)
@pytest.mark.parametrize("augment", [False, True])
def test_bad_data_gets_one_sentence(train, test, message, augment):
    with pytest.raises(DataError, match=re.escape(message)):
        segmentation(
            noise(),
            Segmented(train, test, NAMES),
            settings(iterations=1, batch_size=2),
            augment=augment,
        )


def test_one_class_name_is_refused():
    with pytest.raises(DataError, match="at least two classes"):
        segmentation(noise(), Segmented(_labelled(0), _labelled(0), ["a"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 60}, "side: expected a multiple of the patch size 8, got 60; take 64"),
        ({"side": 64, "window": 128}, "up to side=64, got 128"),
        ({"stride": 65}, "stride: expected 1 to window=64, got 65"),
        ({"iterations": 0}, "at least 1 iteration"),
        ({"train_images": 0}, "at least 1, got 0"),
        ({"learning_rate": 1e30}, "finite loss, got"),
    ],
)
def test_bad_settings_get_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        segmentation(one_hot(4), drawn(2, 2), settings(**{"iterations": 10, **changes}))


def test_bad_backbones_get_one_sentence():
    with pytest.raises(ValueError, match="finite values, got NaN or infinity"):
        segmentation(diverged(), drawn(), settings(iterations=1))
    backbone = Stub()
    backbone.statistics = None
    with pytest.raises(
        ValueError, match="image statistics: expected them with the backbone, got none"
    ):
        segmentation(backbone, drawn(), settings(iterations=1))


def test_features_that_fill_the_memory_are_refused():
    check_cache(2**20, 100, "segmentation")
    with pytest.raises(
        ValueError, match=r"at most 8 GiB in memory, got about 9\.8 GiB; use fewer train_images"
    ):
        check_cache(10 * 2**20, 1000, "segmentation")


def test_images_after_the_first_count_too(monkeypatch):
    """The first image is unlabelled, so that nothing of it is kept and nothing follows from its
    size.
    """
    monkeypatch.setattr(dense_head, "CACHE_BYTES", 5_000)
    labelled = classes_drawn(3, 4).pairs
    nothing = (labelled[0][0], torch.full((64, 64), IGNORE))
    with pytest.raises(ValueError, match="at most 0 GiB in memory"):
        segmentation(
            noise(),
            Segmented(PairList([nothing, *labelled]), PairList(labelled), NAMES),
            settings(iterations=1),
        )


def test_sides_follow_the_images():
    assert resolve_side(None, torch.rand(3, 70, 90), 16) == 64
    assert resolve_side(None, torch.rand(3, 700, 900), 16) == 512
    assert resolve_side(None, torch.rand(3, 5, 5), 16) == 16


def dense_task(images: int, window: int = 64) -> DenseTask:
    """A backbone that knows four classes; images of 64 pixels, windows that do not overlap."""
    data = Segmented(classes_drawn(images, 4), classes_drawn(1, 4, seed=1), NAMES)
    return DenseTask(
        FrozenEncoder(one_hot(4)), data, settings(window=window, stride=window), "segmentation"
    )


def _pixel_loss(logits: torch.Tensor, target: torch.Tensor, mode: str) -> float:
    enlarged = F.interpolate(logits, size=target.shape[1:], mode=mode)
    return F.cross_entropy(enlarged, target, ignore_index=IGNORE).item()


def test_losses_are_means_over_labelled_pixels(monkeypatch):
    task = dense_task(1)
    image, target = (one[None] for one in task.train.source.load(0))
    head = DenseHead(4, 4).eval()
    nn.init.normal_(head.predict.weight)
    logits = head(task.encoder(image).patches)
    fixed = _Cached(task, 4)
    assert fixed.loss(head, 2).item() == pytest.approx(
        _pixel_loss(logits, target, "nearest"), rel=1e-3
    )  # fp16
    crops = _Crops(task, 4)
    monkeypatch.setattr(crops, "_crop", lambda: (image[0], target[0]))
    assert crops.loss(head, 2).item() == pytest.approx(
        _pixel_loss(logits, target, "bilinear"), rel=1e-5
    )


def test_crops_cut_image_and_target_alike(monkeypatch):
    monkeypatch.setattr(sys.modules[_Crops.__module__], "distorted", lambda image: image)
    torch.manual_seed(0)
    crops = _Crops(dense_task(4), 4)
    for _ in range(10):
        pixels, target = crops._crop()
        known = target != IGNORE
        assert ((pixels[0] * 4).long() == target)[
            known
        ].double().mean() > 0.8  # bicubic edges are other classes


def test_crops_of_one_class_are_drawn_anew():
    torch.manual_seed(0)
    target = torch.zeros(8, 64, dtype=torch.int64)
    target[:, 32:] = torch.arange(32) % 2
    crops = _Crops(dense_task(1, window=8), 4)
    lefts = [crops._place(target)[1] for _ in range(50)]
    assert min(lefts) > 27 and max(lefts) > 45


def test_gradients_are_clipped():
    def change(clip: float | None) -> float:
        torch.manual_seed(0)
        head, inputs = DenseHead(4, 2), torch.randn(4, 4, 3, 3)
        before = head.predict.weight.detach().clone()
        once = DenseSettings(iterations=1, learning_rate=0.1, weight_decay=0.0)
        fit_head(head, lambda step: head(inputs).square().mean(), once, warmup=0.0, clip=clip)
        return (head.predict.weight - before).abs().max().item()

    # Adam undoes any factor that leaves gradients above its epsilon of 1e-8.
    assert change(None) == pytest.approx(0.1, rel=1e-3) and change(1e-12) < 1e-4


def test_the_training_loss_falls():
    head, inputs = DenseHead(4, 2), torch.randn(4, 4, 3, 3)
    target = (inputs[:, 0] > 0).long()
    short = DenseSettings(iterations=50, learning_rate=0.1, weight_decay=0.0)
    loss = fit_head(
        head, lambda step: F.cross_entropy(head(inputs), target), short, warmup=0.0, clip=1.0
    )
    assert loss < 0.2
