"""A ViT of 16-px patches and a ConvNeXt of stride 32 at twice its size speak of the same places."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings, batch_masks
from dinov3core.models import ConvNeXt, ConvNeXtSettings, VisionTransformer, VitSettings
from dinov3core.models.outputs import hide_patches
from dinov3core.train.engine.distillation.frozen_teacher import patch_grid, teacher_input
from dinov3core.train.engine.distillation.heads import as_seen_by

SHARED = CropSettings(global_size=256, local_size=112, local_count=1)
OF_CONVNEXT = CropSettings(global_size=512, local_size=224, local_count=1)
GRID = (16, 16)


def teacher() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VitSettings(width=32, depth=1, heads=2, registers=2)).eval()


def student() -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(ConvNeXtSettings((1, 1, 1, 1), (8, 12, 16, 32))).eval()


def texture(count: int, side: int) -> Tensor:
    """Images of noise: on an even ground, norms would make as much of a trace as of the light."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def batch_of(crops: Tensor) -> Batch:
    masks = batch_masks(2, GRID, MaskSettings(probability=1.0), np.random.default_rng(0))
    return Batch(crops, torch.zeros(2, 3, 112, 112), None, *masks, positions=range(2))


def with_a_bright_cell(crops: Tensor, crop: int, place: int) -> Tensor:
    """Crops of which one is bright where patch `place` of the shared grid is."""
    cell = crops.shape[2] // GRID[0]
    row, column = divmod(place, GRID[1])
    rows, columns = slice(cell * row, cell * (row + 1)), slice(cell * column, cell * (column + 1))
    bright = crops.clone()
    bright[crop, :, rows, columns] += 3.0
    return bright


def seen_by_student(crops: Tensor) -> Batch:
    return as_seen_by(batch_of(crops), OF_CONVNEXT, seed=0, step=0)


def brightest(patches: Tensor, dark: Tensor) -> int:
    """The row [n * P] that is farthest from that of the dark images."""
    return int((patches - dark).norm(dim=2).flatten().argmax())


@torch.no_grad()
@pytest.mark.parametrize(("crop", "place"), [(0, 0), (1, 15), (0, 16 * 7 + 3), (1, 255)])
def test_a_bright_cell_is_the_same_row_of_both(crop: int, place: int) -> None:
    dark = texture(2, 256)
    bright = with_a_bright_cell(dark, crop, place)
    seen = seen_by_student(bright)
    assert seen.global_crops.shape[2:] == (512, 512) and seen.local_crops.shape[2:] == (224, 224)
    assert patch_grid(seen.global_crops, 32) == patch_grid(bright, 16) == GRID
    assert torch.equal(seen.masks, batch_of(bright).masks)

    embed, convnext = teacher().patch_embed, student()  # before attention spreads the light
    row = crop * 256 + place
    assert brightest(embed(bright), embed(dark)) == row
    of_dark = convnext.forward_features(seen_by_student(dark).global_crops).patches
    assert brightest(convnext.forward_features(seen.global_crops).patches, of_dark) == row


@torch.no_grad()
def test_every_masked_row_is_the_same_region() -> None:
    """Light up the k-th masked patch of the shared views: it is the k-th row read of the student.

    Hidden from a student of the ordinary objective, its light is gone.
    """
    dark = texture(2, 256)
    seen = seen_by_student(dark)
    rows = seen.mask_indices
    convnext = student()
    whole = convnext.forward_chosen([seen.global_crops], [None], rows).patches
    assert len(rows) > 100
    for k in range(0, len(rows), len(rows) // 6):
        crop, place = divmod(int(rows[k]), 256)
        crops = seen_by_student(with_a_bright_cell(dark, crop, place)).global_crops
        light = convnext.forward_chosen([crops], [None], rows).patches - whole
        assert light.norm(dim=1).argmax() == k

        change = crops - seen.global_crops
        left = hide_patches(change, seen.masks, 32)  # what resizing spread over the border
        assert left.abs().sum() < 0.1 * change.abs().sum()


@torch.no_grad()
def test_only_the_teacher_sees_other_crops_where_the_shared_ones_are_the_students() -> None:
    """Views of 512 px for a ConvNeXt: the ViT is given them at 256, and the rows agree."""
    dark = texture(1, 512)
    place = 16 * 9 + 4
    bright = with_a_bright_cell(dark, 0, place)
    grid = patch_grid(dark, 32)
    smaller = [teacher_input(crops, grid, 16) for crops in (bright, dark)]
    assert smaller[0].shape[2:] == (256, 256)
    embed, convnext = teacher().patch_embed, student()
    assert brightest(*map(embed, smaller)) == place
    of_student = [convnext.forward_features(crops).patches for crops in (bright, dark)]
    assert brightest(*of_student) == place


def test_crops_of_the_same_sizes_are_the_same_tensors() -> None:
    batch = batch_of(texture(2, 256))
    seen = as_seen_by(batch, SHARED, seed=0, step=0)
    assert seen.global_crops is batch.global_crops and seen.local_crops is batch.local_crops
