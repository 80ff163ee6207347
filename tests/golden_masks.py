"""Runners of golden cases: block masks in distribution, and the bookkeeping of a batch exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from golden_cases import Case, compare
from torch import Tensor

from dinov3core.data import masks, sizes
from dinov3core.data.crops import CropSettings, GramCrops, MultiCrop, Views
from dinov3core.data.loader import BatchMaker, BatchSettings

DRAWS = 2000


class RecordingMask(np.ndarray):
    """A mask that remembers the last region somebody looked at: the block that was accepted, if one
    was.
    """

    looked_at: tuple[slice, slice]

    def __getitem__(self, key):
        self.looked_at = key
        return np.asarray(self)[key]


def run_masking_statistics(case: Case) -> None:
    """Means agree within four standard errors of the difference; the count of masked patches is
    exact in every draw.
    """
    entries = case.json()
    assert entries
    for entry in entries:
        settings = entry["settings"]
        drawn = draw_masks(settings)
        assert set(drawn.pop("masked_patches_per_draw")) == {settings["target"]}
        # of empty masks nothing else is recorded
        assert drawn.keys() <= entry.keys() or settings["target"] == 0
        for name in drawn.keys() & entry.keys():
            what = f"{case.name} {settings}: {name}"
            compare_means(what, drawn[name], entry[name], settings["draws"])


def draw_masks(settings: dict) -> dict[str, np.ndarray]:
    """Our masks in numbers, named as recorded; rows and columns as [draws, length]."""
    grid, rng = (settings["H"], settings["W"]), np.random.default_rng(0)
    drawn: list[np.ndarray] = []
    blocks_of: list[int] = []
    with recording_blocks(settings) as blocks:
        for _ in range(DRAWS):
            drawn.append(masks.block_mask(grid, settings["target"], rng))
            blocks_of.append(len(blocks))
    mask_NHW = np.stack(drawn)
    pairs = (mask_NHW[:, 1:] & mask_NHW[:, :-1]).sum((1, 2)) + (
        mask_NHW[:, :, 1:] & mask_NHW[:, :, :-1]
    ).sum((1, 2))
    numbers = {
        "masked_patches_per_draw": mask_NHW.sum((1, 2)),
        "adjacent_masked_pairs_per_draw": pairs,
        "fraction_masked_per_cell_by_row": mask_NHW.mean(2),
        "fraction_masked_per_cell_by_column": mask_NHW.mean(1),
    }
    if not blocks:
        return numbers
    height, width, new = np.array(blocks).T
    per_draw = np.split(new, blocks_of[:-1])
    by_blocks = np.array([added.sum() for added in per_draw])
    return numbers | {
        "accepted_blocks_per_draw": np.array([len(added) for added in per_draw]),
        "block_height": height,
        "block_width": width,
        "block_area": height * width,
        "log_block_aspect_ratio": np.log(height / width),
        "newly_masked_per_block": new,
        "masked_by_blocks_per_draw": by_blocks,
        "filled_at_random_per_draw": settings["target"] - by_blocks,
    }


@contextmanager
def recording_blocks(settings: dict) -> Iterator[list[tuple[int, int, int]]]:
    """(height, width, newly masked) of every accepted block, drawn with the recorded limits."""
    blocks: list[tuple[int, int, int]] = []
    add_block = masks._add_block

    def recording(mask: np.ndarray, cap: float, rng: np.random.Generator) -> int:
        view = mask.view(RecordingMask)
        added = add_block(view, cap, rng)
        if added:
            rows, columns = view.looked_at
            blocks.append((rows.stop - rows.start, columns.stop - columns.start, added))
        return added

    limits = {
        "MIN_BLOCK": settings["min_num_patches"],
        "MAX_BLOCK_SHARE": settings["max_num_patches"] / (settings["H"] * settings["W"]),
        "BLOCK_ASPECT": tuple(settings["aspect_ratio_range"]),
    }
    with patch.multiple(masks, _add_block=recording, **limits):
        yield blocks


def compare_means(what: str, ours: np.ndarray, recorded: dict | list, draws: int) -> None:
    wanted = np.array(recorded["mean"] if isinstance(recorded, dict) else recorded)
    standard_error = ours.std(0) * np.sqrt(
        1 / DRAWS + 1 / draws
    )  # blocks of a draw depend on each other: count draws
    off = np.abs(ours.mean(0) - wanted) - 4 * standard_error - 5e-6  # recorded to five decimals
    assert np.all(off <= 0), (
        f"{what}: {ours.mean(0)}, recorded {wanted}, standard error {standard_error}"
    )


class Numbered:
    """A source whose images are the samples' numbers, in order."""

    def __init__(self, samples: int):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def loads(self, indices: list[int]) -> list[int]:
        return list(range(len(indices)))


def run_collate(case: Case) -> None:
    """Crop-major stacks and the bookkeeping of given masks, exactly; M from the settings alone."""
    s, recorded = case.settings, case["in.masks"]
    settings = masks.MaskSettings(s["mask_probability"], s["mask_ratio_min"], s["mask_ratio_max"])
    crops = s["global_crops"] * s["samples"]
    assert (
        masks.mask_counts(crops, s["tokens"], settings)
        == s["patch_counts_asked_from_the_generator_in_order"]
    )
    side = s["gram_teacher_size"]
    gram = None if side is None else GramCrops(side)
    batches = BatchSettings(sizes_of(s), settings, s["samples"], patch_size=1, gram=gram)
    maker = BatchMaker(Numbered(s["samples"]), batches, rank=0, world_size=1)
    maker.multi_crops = [NumberedCrops(batches, s)]
    with patch.object(BatchSettings, "masks_at", lambda *_: masks.locate(recorded)):
        batch = maker.make(0)
    total = masks.masked_total(crops, s["tokens"], settings)
    got = {
        "global_crop_ids": number_of(batch.global_crops, s, "collated_global_crops"),
        "local_crop_ids": number_of(batch.local_crops, s, "collated_local_crops"),
        "mask_indices_list": batch.mask_indices,
        "masks_weight": batch.mask_weights,
        "n_masked_patches": torch.tensor([total]),
        "upperbound": torch.tensor(total),
    }
    if batch.gram_crops is not None:
        got["gram_teacher_crop_ids"] = number_of(batch.gram_crops, s, "collated_gram_teacher_crops")
    assert batch.masks.sum(1).tolist() == s["masks_per_row"]
    assert batch.mask_indices.dtype == torch.int64 and batch.mask_weights.dtype == torch.float32
    compare(case, {f"out.{name}": value for name, value in got.items()})


def sizes_of(settings: dict) -> CropSettings:
    return CropSettings(
        global_size=settings["global_size"],
        local_size=settings["local_size"],
        global_count=settings["global_crops"],
        local_count=settings["local_crops"],
    )


class NumberedCrops(MultiCrop):
    """Gives `numbered_views` of samples that are numbers."""

    def __init__(self, settings: BatchSettings, recorded: dict):
        super().__init__(settings.crops, settings.gram)
        self.recorded = recorded

    def __call__(self, image: int, rng: np.random.Generator) -> Views:
        return numbered_views(image, self.recorded)


def numbered_views(sample: int, settings: dict) -> Views:
    """Views whose every pixel tells the sample, the kind of crop and its number, as recorded."""
    kinds = {"global": (0, 0.25), "local": (0, 0.0625), "gram_teacher": (100, 0.25)}
    counts = {
        "global": settings["global_crops"],
        "local": settings["local_crops"],
        "gram_teacher": 0,
    }
    if settings["gram_teacher_size"]:
        counts["gram_teacher"] = settings["global_crops"]
    views = {
        kind: [
            torch.full((3, *[settings[f"{kind}_size"]] * 2), base + sample + step * crop)
            for crop in range(counts[kind])
        ]
        for kind, (base, step) in kinds.items()
    }
    return Views(views["global"], views["local"], views["gram_teacher"] or None, False)


def number_of(stack: Tensor, settings: dict, key: str) -> Tensor:
    """The number each crop of a stack holds, in the dtype of the recorded stack."""
    assert list(stack.shape) == settings["result_keys"][key]["shape"]
    numbers = stack.flatten(1)
    assert torch.equal(numbers.amin(1), numbers.amax(1))
    return numbers[:, 0].to(getattr(torch, settings["result_keys"][key]["dtype"]))


def run_multires_schedule(case: Case) -> None:
    """The size of every step, exactly, asked for in any order: forwards and backwards here."""
    tables = case.json()
    assert case.settings["seed"] == sizes.PUBLISHED_SEED
    for name in ("published_high_resolution_stage", "other_ratios"):
        shares = tables[name]["ratios"]
        picks = tables[name]["table"][str(sizes.PUBLISHED_SEED)]["picks"]
        assert picks
        steps = range(len(picks))
        assert [sizes.size_at(0, step, shares) for step in steps] == picks
        assert [sizes.size_at(0, step, shares) for step in reversed(steps)] == picks[::-1]


RUNNERS = {
    "collate": run_collate,
    "masking_statistics": run_masking_statistics,
    "multires_schedule": run_multires_schedule,
}
