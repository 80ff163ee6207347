"""Cutting a batch into micro-batches: which masked patches go where, and that no GPU is asked."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import made_up_crops, tiny_recipe

from dinov3core.data.loader import BatchLoader, BatchSettings
from dinov3core.data.scenes import Scenes
from dinov3core.train.engine.loop import to_crops
from dinov3core.train.engine.objective import Crops, split


@pytest.mark.parametrize("parts", [2, 4])
def test_masked_patches_stay_with_their_image(parts: int) -> None:
    recipe = tiny_recipe()
    crops = made_up_crops(recipe, 8)
    made = split(crops, 2, parts)
    rows = torch.cat([part.masked_rows for part in made]).sort().values
    assert torch.equal(rows, torch.arange(len(crops.mask_indices)))
    for part in made:
        positions = torch.nonzero(part.crops.masks.flatten()).squeeze(1)
        assert torch.equal(part.crops.mask_indices, positions)
        assert torch.equal(part.crops.mask_weights, crops.mask_weights[part.masked_rows])
        patches = part.crops.masks.shape[1]
        owners = crops.mask_indices[part.masked_rows] // patches % 8
        assert torch.equal(part.images[positions // patches % len(part.images)], owners)


def test_no_gpu_is_asked_how_many_patches_are_masked() -> None:
    """Meta tensors hold no numbers: whatever would wait for a GPU's cannot be answered by them."""
    crops = made_up_crops(tiny_recipe(), 4)
    away = Crops(*(None if x is None else x.to("meta") for x in crops[:6]), crops.mask_indices)
    for part, want in zip(split(away, 2, 2), split(crops, 2, 2), strict=True):
        assert part.crops.mask_indices.shape == want.crops.mask_indices.shape
        assert part.crops.global_crops.shape == want.crops.global_crops.shape
        assert part.crops.host_indices is None  # for DistributedDataParallel moves what it is given


def test_the_loop_keeps_the_indices_on_the_host() -> None:
    recipe = tiny_recipe()
    scenes = Scenes(8, size=24, seed=0)
    settings = BatchSettings(recipe.crops, recipe.masks, batch_size=2, patch_size=8)
    with BatchLoader(scenes, settings) as loader:
        batch = next(iter(loader))
    crops = to_crops(batch, torch.device("meta"))
    assert crops.mask_indices.is_meta
    assert torch.equal(crops.host_indices, batch.mask_indices)
