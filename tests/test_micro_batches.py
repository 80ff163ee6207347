"""Cutting a batch into micro-batches: which masked patches go where, and that no GPU is asked."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import made_up_batch, tiny_recipe

from dinov3core.data.batch import Batch
from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.scenes import Scenes
from dinov3core.train.engine.accumulation import (
    in_batch_order,
    masked_in_batch_order,
    micro_batches,
)

CPU, META = torch.device("cpu"), torch.device("meta")
IMAGES = 8


@pytest.fixture(scope="module")
def batch() -> Batch:
    return made_up_batch(tiny_recipe(), IMAGES)


@pytest.mark.parametrize("count", [2, 4])
def test_masked_patches_stay_with_their_image(batch: Batch, count: int) -> None:
    parts = micro_batches(batch, count, CPU)
    rows = torch.cat([part.masked_rows for part in parts]).sort().values
    assert torch.equal(rows, torch.arange(len(batch.mask_indices)))
    for part in parts:
        positions = torch.nonzero(part.batch.masks.flatten()).squeeze(1)
        assert torch.equal(part.batch.mask_indices, positions)
        assert torch.equal(part.batch.mask_weights, batch.mask_weights[part.masked_rows])
        patches = part.batch.masks.shape[1]
        owners = batch.mask_indices[part.masked_rows] // patches % IMAGES
        assert torch.equal(part.places[positions // patches % len(part.places)], owners)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_the_parts_hold_is_the_batch(batch: Batch, count: int) -> None:
    parts = micro_batches(batch, count, CPU)
    assert [part.index for part in parts] == list(range(count))
    assert [place for part in parts for place in part.batch.positions] == list(batch.positions)
    assert {part.whole for part in parts} == {IMAGES}
    for part in parts:
        assert torch.equal(part.batch.global_crops, batch.global_crops[part.rows()])
        assert part.batch.local_count == batch.local_count == 3
        assert part.batch.global_count == batch.global_count == 2
    masks = in_batch_order([part.batch.masks for part in parts], parts)
    assert torch.equal(masks, batch.masks)
    weights = masked_in_batch_order([part.batch.mask_weights for part in parts], parts)
    assert torch.equal(weights, batch.mask_weights)


def test_images_that_do_not_divide_are_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="8 images per process do not divide into 3 micro-batches"):
        micro_batches(batch, 3, CPU)


@pytest.mark.parametrize("count", [1, 2])
def test_no_gpu_is_asked_how_many_patches_are_masked(count: int) -> None:
    """Meta tensors hold no numbers: whatever would wait for a GPU's cannot be answered by them."""
    recipe = tiny_recipe()
    scenes = Scenes(8, size=24, seed=0)
    settings = BatchSettings(recipe.crops, recipe.masks, batch_size=4, patch_size=8)
    with BatchLoader(scenes, settings) as loader:
        batch = next(loader)
    away, here = micro_batches(batch, count, META), micro_batches(batch, count, CPU)
    for part, want in zip(away, here, strict=True):
        for name, tensor in want.batch.tensors().items():
            there = getattr(part.batch, name)
            assert there.is_meta and there.shape == tensor.shape, name
        assert part.masked_rows.is_meta and part.masked_rows.shape == want.masked_rows.shape
        assert part.places.is_meta
