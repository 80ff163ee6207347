"""Several crop sizes in one run: which step has which, what its batch holds, what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings, GramCrops, validate_gram_crops
from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.masks import MaskSettings, masked_total
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes, size_at

CROPS = CropSettings(
    global_size=32,
    local_size=16,
    local_count=2,
    other_sizes=(CropSizes(0.4, 48, (16, 24)), CropSizes(0.3, (40, 56), 24)),
)
PUBLISHED = CropSettings(
    global_size=512,
    local_size=112,
    other_sizes=(
        CropSizes(0.3, 768, 112, 1152),
        CropSizes(0.3, 768, 160, 1152),
        CropSizes(0.05, 768, 224, 1152),
        CropSizes(0.05, 768, 336, 1152),
    ),
)
FIRST = "001121421010301112301002002112040212022040220103"


def batches(
    crops: CropSettings,
    count: int,
    *,
    seed: int = 0,
    gram: GramCrops | None = None,
    **options,
) -> list[Batch]:
    settings = BatchSettings(crops, MaskSettings(), 2, patch_size=8, seed=seed, gram=gram)
    with BatchLoader(Scenes(20), settings, **options) as loader:
        return [next(loader) for _ in range(count)]


def sides(batch: Batch) -> tuple[int, ...]:
    return *batch.global_crops.shape[2:], *batch.local_crops.shape[2:]


# --- which step has which size


def test_seed_0_draws_the_published_sequence() -> None:
    """The settings' own size has what the others leave, and is the first entry."""
    assert PUBLISHED.shares == pytest.approx((0.3, 0.3, 0.3, 0.05, 0.05))
    drawn = [size_at(0, step, PUBLISHED.shares) for step in range(len(FIRST))]
    assert "".join(map(str, drawn)) == FIRST


def test_a_size_is_a_function_of_seed_and_step() -> None:
    def drawn(seed: int) -> list[int]:
        return [size_at(seed, step, (0.5, 0.25, 0.25)) for step in range(50)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert size_at(2**63 - 1, 10**15, (0.5, 0.5)) in (0, 1)
    assert [size_at(3, step, (2, 1, 1)) for step in range(50)] == drawn(3)


def test_shares_are_what_is_drawn() -> None:
    counts = torch.bincount(torch.tensor([size_at(1, step, CROPS.shares) for step in range(4000)]))
    assert (counts / 4000).tolist() == pytest.approx(CROPS.shares, abs=0.025)


# --- batches


def test_every_batch_is_of_its_step_s_size() -> None:
    of_each = {0: (32, 32, 16, 16), 1: (48, 48, 16, 24), 2: (40, 56, 24, 24)}
    made = batches(CROPS, 12)
    drawn = [size_at(0, step, CROPS.shares) for step in range(12)]
    assert set(drawn) == {0, 1, 2}
    assert [sides(batch) for batch in made] == [of_each[entry] for entry in drawn]
    for batch in made:
        patches = batch.global_crops.shape[2] * batch.global_crops.shape[3] // 64
        assert batch.masks.shape == (4, patches)
        assert len(batch.mask_indices) == masked_total(4, patches, MaskSettings())


def test_each_size_has_its_gram_crop() -> None:
    others = (CropSizes(0.5, 40, 16, 72), CropSizes(0.2, 40, 24, 80))
    drawn = batches(replace(CROPS, other_sizes=others), 12, gram=GramCrops(64))
    assert {batch.gram_crops.shape[-1] for batch in drawn} == {64, 72, 80}
    assert all(len(batch.gram_crops) == 4 for batch in drawn)


def test_images_below_the_crop_of_their_step_are_counted() -> None:
    """Scenes have 64 px."""
    crops = CropSettings(
        global_size=32, local_size=16, local_count=0, other_sizes=(CropSizes(0.5, 72, 16),)
    )
    for batch in batches(crops, 6):
        assert batch.upsampled == (2 if sides(batch)[0] == 72 else 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_sizes(workers: int) -> None:
    whole = batches(CROPS, 9, seed=5)
    resumed = batches(CROPS, 4, seed=5, start_step=5, workers=workers)
    for straight, again in zip(whole[5:], resumed, strict=True):
        assert all(map(torch.equal, straight.tensors().values(), again.tensors().values()))


def test_processes_agree_on_the_sizes() -> None:
    shares = [batches(CROPS, 8, rank=rank, world_size=3) for rank in range(3)]
    assert all(len({sides(batch) for batch in step}) == 1 for step in zip(*shares, strict=True))
    assert len({sides(batch) for batch in shares[0]}) == 3


# --- as text, and refusals


@pytest.mark.parametrize(
    "sizes",
    [
        CropSizes(0.3, 768, 112),
        CropSizes(0.05, (512, 768), 112, 1152),
        CropSizes(1 / 3, 64, (16, 32), (96, 128)),
    ],
)
def test_text_and_back(sizes: CropSizes) -> None:
    assert CropSizes.from_text(str(sizes)) == sizes


@pytest.mark.parametrize(
    "text", ["", "0.3", "0.3:768", "768/112", "a:768/112", "0.3:768/b", "0.3:1/2/3/4", ".3:1x2x3/4"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected sizes as SHARE:GLOBAL/LOCAL or") as caught:
        CropSizes.from_text(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"other_sizes": (CropSizes(0.3, 768, 168),)},
            "crops.other_sizes 0.3:768/168: local crop 168 is not a multiple of the patch 16; "
            "use 160 or 176",
        ),
        (
            {"other_sizes": (CropSizes(0.3, 760, 112),)},
            "global crop 760 is not a multiple of the patch 16; use 752 or 768",
        ),
        (
            {"other_sizes": (CropSizes(0.6, 256, 96), CropSizes(0.5, 288, 96))},
            "expected shares that add up to less than 1, as the other steps use "
            "crops.global_size, got 1.1 in all from 0.6:256/96 0.5:288/96",
        ),
        (
            {"other_sizes": (CropSizes(0.5, 256, 96), CropSizes(0.5, 288, 96))},
            "shares that add up to less than 1",
        ),
        (
            {"other_sizes": tuple(CropSizes(share, 256, 96) for share in (0.3, 0.3, 0.3, 0.1))},
            "shares that add up to less than 1, .*, got 1 in all",
        ),
        (
            {"other_sizes": (CropSizes(0.0, 256, 96),)},
            r"crops.other_sizes\[0\].share: expected above 0 and below 1, got 0.0",
        ),
        (
            {"local_inside_global": True, "other_sizes": (CropSizes(0.5, 96, 96),)},
            "crops.other_sizes 0.5:96/96: local_inside_global cuts 96 out of 96",
        ),
        ({"other_sizes": ((0.5, 256, 96),)}, "crops.other_sizes: expected"),
    ],
)
def test_sizes_that_cannot_work(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        replace(CropSettings(), **changes).validate(16)
    assert "\n" not in str(caught.value)


def test_the_published_sizes_pass() -> None:
    PUBLISHED.validate(16)
    validate_gram_crops(PUBLISHED, GramCrops(768), 16)


@pytest.mark.parametrize(
    ("gram", "other", "sentence"),
    [
        (None, CropSizes(0.5, 256, 96, 512), "0.5:256/96/512: there is no Gram teacher with crops"),
        (GramCrops(448), CropSizes(0.5, 256, 96), r"crops of its own at the other steps .448 px"),
        (GramCrops(448), CropSizes(0.5, 256, 96, 500), "Gram crop 500 .* use 496 or 512"),
    ],
)
def test_gram_crops_that_cannot_work(
    gram: GramCrops | None, other: CropSizes, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        validate_gram_crops(CropSettings(other_sizes=(other,)), gram, 16)
    assert "\n" not in str(caught.value)
