"""Who loads and who trains on what in a step of several students, and what travels for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch

from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings
from dinov3core.train.engine.distillation.exchange import (
    Exchange,
    ImageBytes,
    Plan,
    published_bytes,
    received_bytes,
)
from dinov3core.train.engine.parallel import World
from dinov3core.train.recipes.registry import RECIPES

# S, S+, B and L of the published layout
PUBLISHED = Plan.even(296, [(0, 48), (48, 96), (96, 176), (176, 296)], 1920)
PLANS = {
    "published": PUBLISHED,
    "5 images, 3 processes": Plan.even(3, [(0, 1), (1, 2), (2, 3)], 5),
    "fewer images than processes": Plan.even(3, [(0, 1), (1, 3)], 2),
    "2 and 1": Plan.even(3, [(0, 2), (2, 3)], 6),
    "1 and 3": Plan.even(4, [(0, 1), (1, 4)], 6),
    "all": Plan.even(4, [(0, 4)], 8),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_image_is_loaded_once_and_trained_on_in_every_range(plan: Plan) -> None:
    everything = list(range(plan.images))
    ranks = range(plan.processes)
    assert [number for rank in ranks for number in plan.loads(rank)] == everything
    assert max(plan.loaded) - min(plan.loaded) <= 1
    assert list(plan.loaded) == sorted(plan.loaded, reverse=True)
    for first, past in plan.ranges:
        shares = [plan.trains_on(rank) for rank in range(first, past)]
        assert [number for share in shares for number in share] == everything
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_moves_is_what_is_needed(plan: Plan) -> None:
    ranks = range(plan.processes)
    for rank in list(ranks)[:: max(plan.processes // 7, 1)]:
        moved = [plan.moved(other, rank) for other in ranks]
        assert [number for one in moved for number in one] == list(plan.trains_on(rank))
        assert all(set(one) <= set(plan.loads(other)) for other, one in zip(ranks, moved))
        assert plan.receives(rank) == [len(one) for one in moved]
        assert plan.sends(rank) == [len(plan.moved(rank, other)) for other in ranks]


def test_the_published_layout() -> None:
    """Images per process 40, 40, 24 and 16; 7 or 6 loaded where the publication loads 7 and drops
    152 of 2072.
    """
    assert [len(PUBLISHED.trains_on(first)) for first, _ in PUBLISHED.ranges] == [40, 40, 24, 16]
    assert PUBLISHED.in_words() == (
        "1920 images a step, loaded by 296 processes: 7 by each of 144, 6 by each of 152; none is "
        "dropped"
    )
    assert PLANS["all"].in_words() == (
        "8 images a step, loaded by 4 processes: 2 by each of 4; none is dropped"
    )


def test_one_range_of_all_processes_needs_no_exchange() -> None:
    """Nothing is copied: nor does it where one process is alone."""
    assert not PLANS["all"].moves and PLANS["2 and 1"].moves
    assert Plan.even(3, [(0, 3)], 6).moves is False
    exchange = Exchange(Plan.even(1, [(0, 1)], 3), World(0, 1, torch.device("cpu")))
    crops = torch.randn(6, 3, 4, 4)
    assert exchange.views("global crops", crops, 2) is crops

    masks = torch.rand(6, 4) < 0.5
    asked = exchange.ask(masks)
    assert torch.equal(asked.rows, masks.flatten().nonzero()[:, 0])
    rows = torch.randn(len(asked.rows), 5)
    assert exchange.answer(rows, asked) is rows
    assert not exchange.sent and not exchange.received


@pytest.mark.parametrize(
    "ranges, images, message",
    [
        ([(0, 2), (1, 3)], 6, "every one of 3 processes in one range"),
        ([(0, 2)], 6, "every one of 3 processes in one range"),
        ([(0, 2), (2, 3)], 5, "divide among the processes of each range, got 5"),
    ],
    ids=["overlap", "gap", "not divisible"],
)
def test_refusals(ranges: list, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.even(3, ranges, images)


def test_bytes_of_the_published_layout() -> None:
    """256 and 112 pixels, bf16, bottlenecks of the 7B model: 3.7 GB come to every process, of which
    one of S needs 1/64, one of L 1/159.
    """
    teacher = RECIPES["vit7b16_pretrain"]()
    widths = (teacher.dino.bottleneck, teacher.ibot.bottleneck)
    assert widths == (512, 384)
    crops = CropSettings(global_size=256, local_size=112)
    image = ImageBytes.of(crops, 16, MaskSettings(), widths, torch.bfloat16)

    published = published_bytes(PUBLISHED, image)
    gigabytes = {kind: round(count / 1e9, 3) for kind, count in published.items()}
    assert gigabytes == {
        "global crops": 1.629,
        "local crops": 1.248,
        "class rows": 0.004,
        "patch rows": 0.815,
    }
    assert 3.69e9 < sum(published.values()) < 3.70e9

    # The process of S, S+, B and L that needs most of what it did not load.
    needed = [
        max(
            (received_bytes(PUBLISHED, rank, image) for rank in range(*ranks)),
            key=lambda kinds: sum(kinds.values()),
        )
        for ranks in PUBLISHED.ranges
    ]
    megabytes = [round(sum(kinds.values()) / 1e6, 1) for kinds in needed]
    assert megabytes == [58.0, 58.0, 34.8, 23.2]
    assert {kind: round(count / 1e6, 2) for kind, count in needed[0].items()} == {
        "global crops": 31.46,
        "local crops": 24.08,
        "class rows": 0.08,
        "patch rows": 2.38,
        "row requests": 0.01,
    }


def test_bytes_are_counted_by_the_plan() -> None:
    """5 images, 3 processes that train on all of them: what each did not load comes to it."""
    crops = CropSettings(global_size=16, local_size=8, local_count=3)
    image = ImageBytes.of(crops, 8, MaskSettings(1.0, 0.5, 0.5), (6, 10), torch.float32)
    assert (image.global_crops, image.local_crops) == (2 * 3 * 256 * 4, 3 * 3 * 64 * 4)
    assert received_bytes(PLANS["5 images, 3 processes"], 2, image) == {
        "global crops": 4 * image.global_crops,
        "local crops": 4 * image.local_crops,
        "class rows": 4 * 2 * 6 * 4,
        "patch rows": 4 * 2 * 2 * 10 * 4,  # half of 4 patches
        "row requests": 2 * 1 * 2 * 4,  # by two others, of the one image that it loads
    }
    assert not sum(received_bytes(PLANS["all"], 1, image).values())
