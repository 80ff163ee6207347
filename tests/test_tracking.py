"""Label propagation against the full similarity matrix, J and F by hand and by distance transforms,
known answers.
"""

import math
import os
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_stubs import Stub, diverged, noise, one_hot
from PIL import Image

from dinov3core.data.datasets import open_videos
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.labelled import IGNORE, Video
from dinov3core.evals.backbones import PixelBackbone
from dinov3core.evals.tracking import (
    Propagation,
    boundary,
    boundary_accuracy,
    pixel_labels,
    propagate,
    region_similarity,
    tracking,
    vote,
)


class VideoList:
    def __init__(self, videos: list[Video | None]):
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def load(self, index: int) -> Video:
        if self.videos[index] is None:
            raise UnreadableImage(self.name(index), "broken")
        return self.videos[index]

    def name(self, index: int) -> str:
        return f"video {index}"


def moving(step: int, frames: int = 6, name: str = "squares") -> Video:
    """Two squares of 16 pixels on 64 x 96 that move by `step` pixels a frame; red is the object's
    number.
    """
    masks = []
    for time in range(frames):
        mask = torch.zeros(64, 96, dtype=torch.int64)
        mask[8:24, 8 + step * time : 24 + step * time] = 1
        mask[40:56, 72 - step * time : 88 - step * time] = 2
        masks.append(mask)
    red = [((mask + 0.5) / 3 * 255).byte().numpy() for mask in masks]
    return Video(
        name, [Image.fromarray(np.stack([one, one * 0, one * 0], 2)) for one in red], masks
    )


def test_votes_match_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    propagation = Propagation(queue=7, radius=3.5, neighbours=5, temperature=0.2)
    n, h, w = 3, 11, 18
    target = F.normalize(torch.randn(h, w, 6, generator=generator), dim=2)
    keys = F.normalize(torch.randn(n, h, w, 6, generator=generator), dim=3)
    labels = torch.rand(n, h, w, 4, generator=generator)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([y, x], 2).flatten(0, 1).double()
    far = (torch.cdist(places, places) > 3.5).repeat(1, n)  # [targets, context]
    cosines = (target.flatten(0, 1) @ keys.flatten(0, 2).T).masked_fill(far, -torch.inf)
    best, rows = cosines.topk(5, dim=1)
    expected = (
        ((best / 0.2).softmax(1)[..., None] * labels.flatten(0, 2)[rows]).sum(1).view(h, w, 4)
    )
    torch.testing.assert_close(vote(target, keys, labels, propagation), expected)


def test_fewer_places_than_neighbours():
    propagation = Propagation(queue=0, radius=0.0, neighbours=5, temperature=0.2)
    labels = torch.rand(1, 3, 9, 2)
    features = F.normalize(torch.randn(3, 9, 4), dim=2)
    torch.testing.assert_close(
        vote(features, features[None], labels, propagation), labels[0]
    )  # each sees itself alone


def test_the_context_is_the_first_frame_and_a_queue(monkeypatch):
    seen = []

    def spy(target, keys, labels, propagation):
        seen.append(keys[:, 0, 0, 0].tolist())
        return labels[0]

    monkeypatch.setattr(
        sys.modules[vote.__module__], "vote", spy
    )  # the package's `tracking` is the function
    propagation = Propagation(queue=2, radius=1, neighbours=1, temperature=1)
    frames = (torch.full((1, 1, 1), float(number)) for number in range(5))
    assert len(list(propagate(frames, torch.ones(1, 1, 2), propagation))) == 4
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 2, 3]]


def test_region_similarity_by_hand():
    a, b = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    assert region_similarity(a, b) == 1.0
    a[0, :3], b[0, 1:] = True, True
    assert region_similarity(a, b) == 0.5 and region_similarity(a, ~a) == 0.0


def test_boundary_of_a_square():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:4, 2:4] = True
    found = {tuple(place) for place in boundary(mask).nonzero().tolist()}
    # The ring above and left of the square belongs to the background, the lower right pixels to the
    # square.
    assert found == {(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 3), (3, 3), (3, 2)}
    assert not boundary(torch.ones(5, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("size", [(48, 64), (240, 427)])
def test_boundary_accuracy_agrees_with_distance_transforms(size):
    ndimage = pytest.importorskip("scipy.ndimage")
    y, x = np.mgrid[: size[0], : size[1]]
    radius = min(size) / 3
    truth = (y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2 < radius**2
    for shift, scale in ((0, 1.0), (2, 1.0), (5, 0.9), (9, 1.3)):
        guess = (y - size[0] / 2 - shift) ** 2 + ((x - size[1] / 2) / scale) ** 2 < radius**2
        lines = [boundary(torch.from_numpy(mask)).numpy() for mask in (guess, truth)]
        reach = math.ceil(0.008 * math.hypot(*size))
        precision = (ndimage.distance_transform_edt(~lines[1])[lines[0]] <= reach).mean()
        recall = (ndimage.distance_transform_edt(~lines[0])[lines[1]] <= reach).mean()
        expected = 2 * precision * recall / (precision + recall)
        found = boundary_accuracy(torch.from_numpy(guess), torch.from_numpy(truth))
        assert found == pytest.approx(expected, rel=1e-9) and (shift or found == 1)


def test_boundary_accuracy_of_empty_masks():
    mask, empty = torch.zeros(20, 20, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    mask[5:9, 5:9] = True
    assert (
        boundary_accuracy(empty, empty) == 1
        and boundary_accuracy(mask, empty) == boundary_accuracy(empty, mask) == 0
    )
    corner = torch.zeros(20, 20, dtype=torch.bool)
    corner[18:, 18:] = True
    assert boundary_accuracy(mask, corner) == 0


def test_shares_become_labels():
    shares = torch.tensor(
        [[[0.9, 0.1, 0.0], [0.5, 0.4, 0.0]]]
    )  # 1 x 2 patches; the second label is lost
    assert pixel_labels(shares, (2, 4), "nearest").tolist() == [[0, 0, 1, 1]] * 2
    assert pixel_labels(shares, (2, 4), "bilinear").shape == (2, 4)
    weak = torch.tensor(
        [[[0.9, 0.1], [0.68, 0.32], [0.5, 0.5]]]
    )  # stretched: 1, 0.45, 0 and 0, 0.55, 1
    assert pixel_labels(weak, (1, 3), "nearest").tolist() == [[0, 1, 1]]
    alone = torch.tensor([[[1.0, 0.0]]])
    assert pixel_labels(alone, (2, 2), "nearest").tolist() == [[0, 0]] * 2


def test_a_backbone_that_knows_the_objects_follows_them():
    on_grid, off_grid = (tracking(one_hot(3), VideoList([moving(step)])) for step in (8, 3))
    assert on_grid["j"] == on_grid["f"] == on_grid["j_and_f"] == on_grid["j_recall"] == 100
    # Off the grid a patch of 8 pixels holds two labels, at both sides of an object of 16, and half
    # of the second object is the first one to this backbone.
    assert 50 < off_grid["j"] < 100 and off_grid["objects"] == 2
    assert on_grid["videos"] == {"squares": {"j": 100.0, "f": 100.0}}


def test_masks_that_stay_behind_score_by_hand():
    """With a circle of radius 0 the first masks stay where they are while squares of 16 pixels move
    on by 8.
    """
    found, masks = (
        tracking(one_hot(3), VideoList([moving(8)]), propagation=Propagation(radius=0)),
        moving(8).masks,
    )
    assert found["j"] == pytest.approx(100 * (1 / 3) / 5) and found["j_recall"] == 0
    boundaries = [
        boundary_accuracy(masks[0] == one, mask == one) for mask in masks[1:] for one in (1, 2)
    ]
    assert found["f"] == pytest.approx(100 * sum(boundaries) / 10) and found["f"] > 1.5 * found["j"]
    assert found["f_recall"] == pytest.approx(100 * sum(one > 0.5 for one in boundaries) / 10)
    assert found["j_and_f"] == pytest.approx((found["j"] + found["f"]) / 2)


def test_the_length_of_features_does_not_matter():
    features = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 1.0]])
    backbone = Stub(lambda means: features[(means[:, 0] * 3).long().clamp(0, 2)].movedim(3, 1))
    assert tracking(backbone, VideoList([moving(8)]))["j"] == 100


def test_pixels_of_no_object_do_not_count():
    video = moving(8)
    for mask in video.masks[1:]:
        mask[8:16][mask[8:16] == 1] = IGNORE  # half of an object that is found as a whole
    found = tracking(one_hot(3), VideoList([video]))
    assert found["j"] == found["f"] == 100


def test_a_backbone_that_knows_nothing_loses_them():
    found = tracking(noise(), VideoList([moving(8)]))
    assert found["j"] < 40


def test_frames_are_resized_to_the_grid():
    found = tracking(
        one_hot(3), VideoList([moving(4)]), side=128, propagation=Propagation(enlarge="bilinear")
    )
    assert (
        found["protocol"]["side"] == 128 and found["j"] > 90
    )  # patches of 4 of the frame's pixels


def test_limits_and_broken_videos():
    videos = VideoList([moving(8, name="a"), None, moving(8, name="c")])
    found = tracking(one_hot(3), videos, frames=3)
    assert (
        found["unreadable"] == 1
        and list(found["videos"]) == ["a", "c"]
        and found["protocol"]["frames"] == 3
    )
    assert list(tracking(one_hot(3), videos, count=1)["videos"]) == ["a"]


def _with(**changes) -> Video:
    return moving(8)._replace(**changes)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (moving(8, frames=1), "squares: expected at least 2 frames, got 1"),
        (_with(masks=moving(8).masks[:3]), "expected a mask for each of 6 frames, got 3 masks"),
        (
            _with(masks=[torch.zeros(64, 96).long()] * 6),
            "an object in the first mask, got background alone",
        ),
        (
            _with(masks=[*moving(8).masks[:5], torch.zeros(8, 8).long()]),
            r"got frame 5 of \[64, 96\] with a mask of \[8",
        ),
        (None, "at least one readable video, got 1 of which none can be read"),
    ],
)
def test_bad_videos_get_one_sentence(video, message):
    with pytest.raises(DataError, match=message):
        tracking(one_hot(3), VideoList([video]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue": -1}, "queue and radius of at least 0"),
        ({"temperature": 0.0}, "positive temperature"),
        ({"enlarge": "cubic"}, "got .*'cubic'"),
    ],
)
def test_a_propagation_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Propagation(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 60}, "multiple of the patch size 8, got 60"),
        ({"frames": 1}, "frames: expected at least 2"),
    ],
)
def test_bad_settings_get_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        tracking(one_hot(3), VideoList([moving(8)]), **settings)


def test_diverged_features_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        tracking(diverged(), VideoList([moving(8)]))


def test_a_real_clip_is_followed_from_pixels_alone():
    path = (
        Path(os.environ.get("DINOV3CORE_DATA", "/nonexistent"))
        / "seg"
        / "davis16_blackswan30_480p.tar"
    )
    if not path.is_file():
        pytest.skip(f"set DINOV3CORE_DATA to a folder of image sets with seg/{path.name}")
    found = tracking(PixelBackbone(16), open_videos(path), frames=4)
    # 480 x 854 pixels on 30 x 54 patches: blocks of 16 pixels cost a part of the overlap.
    assert found["protocol"]["side"] == 480 and 60 < found["j"] < 90 and found["objects"] == 1
