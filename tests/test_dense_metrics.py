"""Correspondence, sizes and label-free measures of dense features: geometry by hand, brute force,
known answers.
"""

import json
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
from dense_stubs import Stub, classes_drawn, diverged, noise
from PIL import Image
from torch import nn

from dinov3core import evals
from dinov3core.data.datasets import (
    DataOptions,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.labelled import Labelled, Segmented
from dinov3core.evals.backbones import PixelBackbone
from dinov3core.evals.correspondence import (
    Warp,
    apply,
    centres,
    correspondence,
    matches,
    random_homography,
    recoloured,
    warped,
)
from dinov3core.evals.dense import dense, local_and_global, outliers
from dinov3core.evals.resolution import resolution
from dinov3core.evals.views import square
from dinov3core.models.vit import VisionTransformer, VitSettings


class ImageList:
    """Images in memory, labelled by place modulo `classes`; None stands for a broken file."""

    def __init__(self, images: list, classes: int | None = 2):
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int):
        if self.images[index] is None:
            raise UnreadableImage(self.name(index), "broken")
        return self.images[index]

    def label(self, index: int) -> int | None:
        return None if self.classes is None else index % self.classes

    def name(self, index: int) -> str:
        return f"image {index}"


def ramps(count: int, side: int = 64) -> ImageList:
    """Red grows to the right and green downwards: each place has its own colour.

    Blue is 1, which marks the inside.
    """
    axis = (torch.arange(side) + 0.5) / side
    image = torch.stack(
        [axis.expand(side, side), axis[:, None].expand(side, side), torch.ones(side, side)]
    )
    return ImageList([image] * count)


def knows_the_place() -> Stub:
    """Features whose cosine falls with the distance of the places that red and green name."""

    def embed(means):
        inside = means[:, 2:].clamp_min(1e-3)
        angles = 2 * means[:, :2] / inside
        return torch.cat([angles.cos(), angles.sin()], 1) * (inside > 0.5)

    return Stub(embed)


def textures(count: int, side: int = 64, seed: int = 0) -> ImageList:
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(1, 3, 8, 8, generator=generator) for _ in range(count)]
    return ImageList(
        [F.interpolate(one, size=(side, side), mode="bicubic")[0].clamp(0, 1) for one in coarse]
    )


def test_places_of_patches():
    assert centres(2, 4)[:5].tolist() == [
        [-0.75, -0.5],
        [-0.25, -0.5],
        [0.25, -0.5],
        [0.75, -0.5],
        [-0.75, 0.5],
    ]


def test_a_homography_maps_places_and_pixels_alike():
    generator = torch.Generator().manual_seed(1)
    image, places = ramps(1).load(0), centres(64, 64)
    for _ in range(5):
        matrix = random_homography(generator, rotation=30, zoom=1.4, perspective=0.15)
        assert torch.dist(apply(torch.linalg.inv(matrix), apply(matrix, places)), places) < 1e-8
        target = apply(matrix, places).view(64, 64, 2)
        inside = (target.abs().amax(2) < 0.95)[None]
        copy = warped(image, matrix)
        found = 2 * copy[:2] - 1  # colours back to places
        assert inside.any() and ((found - target.movedim(2, 0)).abs() * inside).max() < 1e-5


def test_an_unchanged_copy_without_warp_and_colour():
    generator = torch.Generator().manual_seed(0)
    matrix = random_homography(generator, rotation=0, zoom=1, perspective=0)
    matrix[:2, 2] = 0
    image = torch.rand(3, 16, 16)
    torch.testing.assert_close(warped(image, matrix), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(recoloured(image, generator, 0.0), image)
    changed = recoloured(image, generator, 0.4)
    assert 0 <= changed.min() and changed.max() <= 1 and torch.dist(changed, image) > 0.1
    assert recoloured(torch.rand(5, 8, 8), generator, 0.4).shape == (5, 8, 8)


def test_matches_by_hand():
    queries, keys = (
        torch.tensor([[3.0, 0.1], [0.0, -2.0]]),
        torch.tensor([[0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]),
    )
    assert matches(queries, keys).tolist() == [1, 0]
    assert matches(queries, torch.cat([keys, torch.tensor([[50.0, -50.0]])])).tolist() == [
        1,
        0,
    ]  # long, but oblique


@pytest.mark.parametrize(
    ("patch", "shift", "shares"),
    [
        (8, 0, (100, 100, 100)),
        (
            8,
            1,
            (0, 0, 87.5),
        ),  # an eighth of the side; the last patch of each row lands at the other end
        (8, 2, (0, 0, 0)),
        (4, 1, (0, 93.75, 93.75)),  # 1 / 16 of the side
    ],
)
def test_shares_of_matches_by_hand(monkeypatch, patch: int, shift: int, shares: tuple[float, ...]):
    module = sys.modules[matches.__module__]  # the package's `correspondence` is the function
    monkeypatch.setattr(module, "random_homography", lambda *_: torch.eye(3, dtype=torch.float64))
    monkeypatch.setattr(
        module, "matches", lambda queries, _: torch.arange(len(queries)).roll(-shift)
    )
    found = correspondence(Stub(patch_size=patch), textures(1))
    assert (found["pck_5"], found["pck_10"], found["within_one_patch"]) == shares


def test_a_backbone_that_knows_the_place_finds_every_patch():
    found = correspondence(knows_the_place(), ramps(6), warp=Warp(colour=0.0))
    # The nearest centre is up to 0.71 patches away; here a patch is an eighth of the side, so 5 %
    # cannot always be met.
    assert found["within_one_patch"] > 97 and found["pck_10"] > 93 and 20 < found["pck_5"] < 80
    assert found["matches"] > 6 * 30 and found["protocol"]["side"] == 64


def test_a_backbone_that_knows_nothing_matches_by_chance():
    found = correspondence(noise(), ramps(40))
    error = 4 * 100 * (found["chance_pck_10"] / 100 / found["matches"]) ** 0.5
    assert found["pck_10"] == pytest.approx(found["chance_pck_10"], abs=error)


def test_correspondence_is_a_function_of_its_seed():
    once, again, other = (
        correspondence(Stub(), textures(4), warp=Warp(seed=seed)) for seed in (0, 0, 1)
    )
    assert once == again and once["matches"] != other["matches"]


def test_any_data_will_do_and_broken_images_are_counted():
    pairs = classes_drawn(3, 4)
    images = textures(4)
    images.images[0] = None
    for data, unreadable in ((pairs, 0), (Segmented(pairs, pairs, "abcd"), 0), (images, 1)):
        for task in (correspondence, dense):
            assert task(Stub(), data)["unreadable"] == unreadable
    assert resolution(Stub(), images, scales=(1,))["unreadable"] == 1


def test_squares_are_central():
    image = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    pixels = square(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, 30)
    assert pixels.shape == (3, 30, 30) and (255 * pixels[0, 0, 0]).round() == 30


def test_features_that_ignore_the_size_score_one():
    data = Labelled(textures(12), textures(8, seed=1), ["a", "b"])
    found = resolution(Stub(), data, scales=(1, 1.5, 2), k=3)
    assert found["sides"] == [64, 96, 128]
    assert min(found["patch_cosine"]) > 0.99 and min(found["cls_cosine"]) > 0.999
    assert found["patch_cosine"][0] == pytest.approx(1) and max(found["patch_cosine_other"]) < 0.97
    assert found["knn"][0] == found["knn_across"][0] and len(found["knn"]) == 3


def test_features_that_change_with_the_size_are_found_out():
    class Grown(Stub):
        def features(self, images):
            found = super().features(images)
            return found._replace(patches=-found.patches) if images.shape[2] > 64 else found

    found = resolution(Grown(), textures(4), scales=(1, 2))
    assert (
        found["patch_cosine"][1] < -0.99 and found["cls_cosine"][1] > 0.999 and "knn" not in found
    )


def test_neighbours_across_sizes_have_the_bank_of_the_first():
    class Turned(Stub):
        def features(self, images):
            found = super().features(images)
            return found._replace(cls=found.cls.flip(1)) if images.shape[2] > 64 else found

    red = torch.tensor([1.0, 0.0, 0.1]).view(3, 1, 1).expand(3, 64, 64)
    images = ImageList([red, red.flip(0)] * 3)
    found = resolution(Turned(), Labelled(images, images, ["red", "blue"]), scales=(1, 2), k=1)
    assert found["knn"] == [100, 100] and found["knn_across"] == [100, 0]


def test_neighbours_of_labels_that_mean_nothing_are_chance():
    found = resolution(
        Stub(), Labelled(textures(60), textures(100, seed=1), ["a", "b"]), scales=(1, 1.5), k=5
    )
    standard_error = 100 * (0.25 / 100) ** 0.5
    assert all(abs(score - 50) < 4 * standard_error for score in found["knn"] + found["knn_across"])


def test_local_and_global_similarity_match_brute_force():
    patches = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(patches, dim=0).permute(1, 2, 0)
    near = [unit[y, x] @ unit[y, x + 1] for y in range(4) for x in range(5)]
    near += [unit[y, x] @ unit[y + 1, x] for y in range(3) for x in range(6)]
    rows = unit.flatten(0, 1)
    cosines = rows @ rows.T
    across = (cosines.sum() - cosines.trace()) / (24 * 23)
    found = local_and_global(patches)
    assert found == pytest.approx((torch.stack(near).mean().item(), across.item()), abs=1e-6)


def test_outliers_by_hand():
    norms = torch.cat([torch.full((98,), 2.0), torch.tensor([10.0, 20.0])])
    relative, share = outliers(norms, 3.0)
    assert share == 2.0 and relative[0] == 1.0 and relative[-1] == 10.0 and relative[2] == 5.0
    assert outliers(10 * norms, 3.0) == (relative, share)


def test_outlier_patches_are_seen_before_the_final_norm():
    torch.manual_seed(0)
    settings = VitSettings(
        width=16, depth=1, heads=2, patch_size=8, registers=0, norm="layernorm", layer_scale=1.0
    )
    backbone = VisionTransformer(settings)
    backbone.statistics = Stub().statistics
    healthy = dense(backbone, textures(4))
    assert healthy["outlier_share"] == 0 and healthy["protocol"]["norms"] == "before the final norm"

    class Spoiled(nn.Module):
        patch_size, statistics = 8, backbone.statistics

        def features(self, images, *, norm=True):
            found = backbone.features(images, norm=norm)
            patches = found.patches.clone()
            patches[:, :, 0, 0] *= 1.0 if norm else 50.0
            return found._replace(patches=patches)

    assert dense(Spoiled(), textures(4))["outlier_share"] == pytest.approx(100 / 64)
    assert dense(Stub(), textures(4))["protocol"]["norms"] == "of the features as given"


def test_drift_from_a_reference():
    images = textures(5)
    turned = Stub(lambda means: means.flip(1))  # another basis, the same similarities
    same = dense(Stub(), images, reference=turned)
    assert (
        same["gram_drift"] < 1e-6 and same["gram_error"] < 1e-7
    )  # the loss compares in fp32, through D x D
    other = dense(Stub(), images, reference=noise())
    first, second = (
        F.normalize(read.eval().features(torch.stack(images.images)).patches.flatten(2), dim=1)
        for read in map(_without_grad, (Stub(), noise()))
    )
    gap = first.mT @ first - second.mT @ second
    assert other["gram_error"] == pytest.approx(
        gap.square().mean().item(), rel=0.2
    )  # noise is drawn in another order
    assert other["gram_drift"] == pytest.approx(gap.abs().mean().item(), rel=0.2)
    with pytest.raises(ValueError, match="extract both at one image size"):
        dense(Stub(), images, reference=Stub(patch_size=16))


def _without_grad(backbone: Stub) -> Stub:
    features = backbone.features
    backbone.features = torch.no_grad()(features)
    return backbone


def test_smooth_features_are_smooth():
    smooth, rough = dense(knows_the_place(), ramps(2)), dense(noise(), ramps(2))
    assert smooth["smoothness"] > 0.1 and abs(rough["smoothness"]) < 0.05
    assert rough["rankme"] > 15 > 5 > smooth["rankme"]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (correspondence, {"side": 63}, "multiple of the patch size 8, got 63"),
        (resolution, {"scales": (2.0, 3.0)}, "scales: expected 1 and then"),
        (resolution, {"test_images": 1}, "at least 2 readable images, got 1"),
        (dense, {"outlier": 1.0}, "a multiple above 1"),
        (dense, {"images": 0}, "at least 1, got 0"),
        (dense, {"side": 8}, "at least two in an image, got 1"),
    ],
)
def test_bad_settings_get_one_sentence(task, settings, message):
    with pytest.raises(ValueError, match=message):
        task(Stub(), textures(3), **settings)


@pytest.mark.parametrize("changes", [{"zoom": 0.5}, {"rotation": 181}, {"colour": -0.1}])
def test_a_warp_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match="expected rotation 0 to 180, zoom 1 to 4"):
        Warp(**changes)


@pytest.mark.parametrize("task", [correspondence, resolution, dense])
def test_bad_data_and_backbones_get_one_sentence(task):
    with pytest.raises(DataError, match="expected at least one image, got an empty split"):
        task(Stub(), ImageList([]))
    with pytest.raises(DataError, match="one readable image, got 2 unreadable"):
        task(Stub(), ImageList([None, None]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        task(diverged(), textures(2))
    with pytest.raises(
        ValueError, match=re.escape("expected 3 channels as in the statistics, got 5")
    ):
        task(Stub(), ImageList([torch.rand(5, 64, 64)] * 2))


def test_labels_are_needed_for_neighbours():
    data = Labelled(ImageList(textures(3).images, classes=None), textures(3), ["a", "b"])
    with pytest.raises(DataError, match="image 0: expected a label for k-NN, got none"):
        resolution(Stub(), data, scales=(1,))


def test_every_task_runs_on_the_built_in_scenes_and_gives_plain_numbers():
    options = DataOptions(scenes_train=24, scenes_test=8, scene_videos=1)
    pixels, head = PixelBackbone(8), {"iterations": 3, "batch_size": 2}
    segmentation, depth = (replace(task, **head) for task in (evals.SEGMENTATION, evals.DEPTH))
    found = [
        evals.segmentation(pixels, open_segmented("scenes", options), segmentation),
        evals.depth(pixels, open_ranged("scenes", options), depth),
        evals.tracking(pixels, open_videos("scenes", options), frames=3),
        evals.correspondence(pixels, open_labelled("scenes", options)),
        evals.resolution(pixels, open_labelled("scenes", options), scales=(1, 1.5)),
        evals.dense(pixels, open_labelled("scenes", options), reference=pixels),
    ]
    for one in found:
        assert (
            json.loads(json.dumps(one, allow_nan=False)) == one
            and len(one["protocol"]["text"]) > 40
        )
