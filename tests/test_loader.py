"""Batches: order, resumption, processes, collation, unreadable images, errors."""

import io
import pickle
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3core.data import loader as module
from dinov3core.data.batch import Batch, Crops
from dinov3core.data.crops import CropSettings, GramCrops, MultiCrop
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import DatasetSource, open_source
from dinov3core.data.loader import BatchLoader, BatchSettings, SampleOrder, ShareLoader, shares
from dinov3core.data.masks import MaskSettings, masked_total
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes

SETTINGS = CropSettings(global_size=32, local_size=16, local_count=3)


class Numbered:
    """Grey images whose value is their index; those in `broken` cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self.length, self.broken = length, set(broken)

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage(self.name(index), "is broken")
        return Image.new("RGB", (40, 40), (index, index, index))

    def label(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        return f"image {index}"


PLAIN = CropSettings(
    global_size=16, local_size=16, local_count=1,
    jitter_probability=0, grayscale=0, solarize=0, blur="off",
    mean=(0.0,) * 3, std=(1 / 255,) * 3,
)  # fmt: skip


def settings_of(crops=SETTINGS, *, batch_size=4, patch_size=8, seed=0, gram=None, views=0):
    return BatchSettings(crops, MaskSettings(), batch_size, patch_size, seed, gram, views)


def loader_of(source, crops=SETTINGS, *, start_step=0, workers=0, pin_memory=False, **options):
    place = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    settings = settings_of(crops, **options)
    return BatchLoader(
        source, settings, **place, start_step=start_step, workers=workers, pin_memory=pin_memory
    )


def batches(source, crops=SETTINGS, *, count=1, **options) -> list[Batch]:
    with loader_of(source, crops, **options) as loader:
        return [next(loader) for _ in range(count)]


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def indices(batch: Batch, crop: int = 0) -> list[int]:
    """Which `Numbered` images a `PLAIN` batch holds, read from its pixels."""
    views = batch.global_crops[crop * batch.images : (crop + 1) * batch.images]
    return views.mean((1, 2, 3)).round().int().tolist()


def test_shapes_and_types():
    (batch,) = batches(
        Scenes(50),
        CropSettings(global_size=(32, 48), local_size=16, local_count=3),
        gram=GramCrops((48, 64)),
    )
    assert batch.global_crops.shape == (8, 3, 32, 48) and batch.local_crops.shape == (12, 3, 16, 16)
    assert batch.gram_crops.shape == (8, 3, 48, 64) and batch.masks.shape == (8, 24)
    assert len(batch.mask_indices) == masked_total(8, 24, MaskSettings())
    assert batch.mask_weights.shape == batch.mask_indices.shape
    assert batch.positions == range(4)
    assert batch.skipped == [] and batch.upsampled == 0
    assert batches(Scenes(50), CropSettings(global_size=80, local_size=16))[0].upsampled == 4


def test_no_local_crops():
    (batch,) = batches(Scenes(20), CropSettings(global_size=32, local_size=16, local_count=0))
    assert batch.local_crops.shape == (0, 3, 16, 16)


def test_crops_are_crop_major():
    (batch,) = batches(Numbered(9), PLAIN)
    assert indices(batch, 0) == indices(batch, 1)
    assert batch.local_crops.mean((1, 2, 3)).round().int().tolist() == indices(batch)


def test_every_pass_is_another_permutation_and_a_batch_may_straddle_two():
    seen = [i for batch in batches(Numbered(10), PLAIN, count=10) for i in indices(batch)]
    passes = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_order_is_a_function_of_seed_and_position():
    order = SampleOrder(100, 3)
    there = [order[p] for p in (250, 0, 99, 1000, 250)]
    again = SampleOrder(100, 3)
    assert there == [again[p] for p in (250, 0, 99, 1000, 250)] and there[0] == there[4]
    assert [order[p] for p in range(100)] != [SampleOrder(100, 4)[p] for p in range(100)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_batches_an_uninterrupted_run_would_have_seen(workers):
    source = Scenes(13)
    whole = batches(source, count=5, seed=7)
    resumed = batches(source, count=2, seed=7, start_step=3, workers=workers)
    assert same(whole[3], resumed[0]) and same(whole[4], resumed[1])
    assert not same(whole[3], batches(source, seed=8, start_step=3)[0])


def test_global_order_and_views_do_not_depend_on_the_number_of_processes():
    source = Scenes(30)
    alone = batches(source, count=2, batch_size=6)
    for step in range(2):
        shares = [
            batches(source, batch_size=2, rank=r, world_size=3, start_step=step)[0]
            for r in range(3)
        ]
        places = [place for share in shares for place in share.positions]
        assert places == list(alone[step].positions)
        for name, crops in (("global_crops", 2), ("local_crops", 3)):
            parts = [getattr(share, name).unflatten(0, (crops, 2)) for share in shares]
            assert torch.equal(torch.cat(parts, 1).flatten(0, 1), getattr(alone[step], name))
        assert len({share.masks.numpy().tobytes() for share in shares}) == 3


def test_shares_are_contiguous_and_the_larger_ones_come_first():
    assert shares(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    assert shares(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert [len(share) for share in shares(1920, 296)] == [7] * 144 + [6] * 152  # as published
    assert [len(share) for share in shares(2, 4)] == [1, 1, 0, 0]


def loaded(source, settings: BatchSettings, parts: int, step: int, workers: int = 0) -> list[Crops]:
    """What each of `parts` processes loads of the batch of a step."""
    crops = []
    for share in shares(settings.batch_size, parts):
        options = {"start_step": step, "workers": workers}
        with ShareLoader(source, settings, share, **options) as loader:
            crops.append(next(loader))
    return crops


@pytest.mark.parametrize("parts, workers", [(1, 0), (4, 0), (3, 1)])
def test_uneven_shares_hold_the_images_of_every_other_split(parts, workers):
    """Nothing is dropped, and ranks of any student find exactly what they would have loaded."""
    source = Scenes(30)
    settings = settings_of(batch_size=10, seed=3)
    step = 4
    parts_of = loaded(source, settings, parts, step, workers)
    assert [place for part in parts_of for place in part.positions] == list(range(40, 50))
    assert sorted({part.images for part in parts_of}) == sorted({10 // parts, -(-10 // parts)})

    for ranks in (1, 2, 5):
        of_rank = settings_of(batch_size=10 // ranks, seed=3)
        for rank in range(ranks):
            place = {"rank": rank, "world_size": ranks, "start_step": step}
            (alone,) = batches(source, batch_size=10 // ranks, seed=3, **place)
            masks = of_rank.masks_at(step, rank)
            together = joined(parts_of, alone.positions).with_masks(masks)
            assert same(together, alone)


def joined(parts: list[Crops], positions: range) -> Crops:
    """The crops of some places, out of what several processes loaded."""
    tensors = []
    for name, count in (("global_crops", 2), ("local_crops", 3)):
        images = [getattr(part, name).unflatten(0, (count, part.images)) for part in parts]
        first = positions.start - parts[0].positions.start
        tensors.append(torch.cat(images, 1)[:, first : first + len(positions)].flatten(0, 1))
    return Crops(*tensors, None, positions=positions)


def test_a_share_has_no_masks_and_may_be_empty():
    one, nothing = loaded(Scenes(5), settings_of(batch_size=1), 2, 0)
    assert type(one) is Crops and one.tensors().keys() == {"global_crops", "local_crops"}
    assert nothing.images == 0 and nothing.positions == range(1, 1)
    assert nothing.global_crops.shape == (0, 3, 32, 32)
    assert nothing.local_crops.shape == (0, 3, 16, 16)


@pytest.mark.parametrize("share", [range(-1, 2), range(2, 5), range(0, 4, 2), range(3, 2)])
def test_shares_outside_of_the_batch_are_refused(share):
    with pytest.raises(ValueError, match="expected a share of the numbers 0 to 4, got range"):
        ShareLoader(Scenes(5), settings_of(), share)


def passes(length: int, count: int, crops=SETTINGS, source=None, **options) -> list[dict]:
    """The views of every image in each of some passes, loaded three at a time."""
    source = source or Scenes(length)
    order = SampleOrder(length, 0)
    seen: list[dict] = [{} for _ in range(count)]
    steps = -(-length * count // 3)
    for batch in batches(source, crops, count=steps, batch_size=3, **options):
        for place, position in enumerate(batch.positions):
            if position < length * count:
                views = (batch.global_crops[place::3], batch.local_crops[place::3])
                seen[position // length][order[position]] = views
    return seen


def equal(views: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(views, others, strict=True))


def test_fixed_views_repeat_and_are_as_many_as_asked_for():
    seen = passes(7, 5, views=2)
    for image in range(7):
        assert equal(seen[0][image], seen[2][image]) and equal(seen[1][image], seen[3][image])
        assert equal(seen[2][image], seen[4][image])
        assert not equal(seen[0][image], seen[1][image])
    fresh = passes(7, 2)
    assert not any(equal(fresh[0][image], fresh[1][image]) for image in range(7))


def test_fixed_views_of_two_images_and_of_two_seeds_differ():
    (views,) = passes(2, 1, source=DatasetSource([Scenes(1).load(0)] * 2), views=1)
    assert not equal(views[0], views[1])
    one, other = (batches(Scenes(3), views=1, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.global_crops, other.global_crops)


def test_fixed_views_at_another_size_are_the_same_region_in_other_pixels():
    """So they repeat, bit for bit, whenever a step has that size again."""
    sizes = CropSizes(0.5, 64, 16)
    crops = CropSettings(
        global_size=32, local_size=16, local_count=3, other_sizes=(sizes,),
        jitter_probability=0, grayscale=0, solarize=0, blur="off",
    )  # fmt: skip
    seen = passes(7, 12, crops, views=1)
    both = 0
    for image in range(7):
        by_side: dict[int, tuple] = {}
        for one in seen:
            side = one[image][0].shape[-1]
            assert equal(one[image], by_side.setdefault(side, one[image]))
        if len(by_side) == 2:
            both += 1
            large = torch.nn.functional.interpolate(by_side[64][0], 32, mode="area")
            alike = torch.nn.functional.cosine_similarity(
                large.flatten(1), by_side[32][0].flatten(1)
            )
            assert alike.min() > 0.9
    assert both > 3


def test_the_stand_in_of_an_unreadable_image_is_seen_in_the_views_of_its_place():
    class Broken(Scenes):
        def load(self, index: int) -> Image.Image:
            if index == 2:
                raise UnreadableImage("2", "is broken")
            return super().load(index)

    seen = passes(5, 2, source=Broken(5), views=1)
    assert equal(seen[0][2], seen[1][2])
    assert not equal(seen[0][2], seen[0][3])


def test_the_same_image_gets_new_views_in_every_pass():
    first, second = batches(DatasetSource([Scenes(1, size=40).load(0)]), count=2, batch_size=1)
    assert not torch.equal(first.global_crops, second.global_crops)


def test_views_are_those_of_the_position():
    source = Scenes(20)
    (batch,) = batches(source, seed=5, start_step=2)
    position = batch.positions[1]
    image = source.load(SampleOrder(20, 5)[position])
    views = MultiCrop(SETTINGS)(image, np.random.default_rng((5, module.VIEWS, position)))
    assert torch.equal(batch.global_crops[4 + 1], views.global_[1]) and torch.equal(
        batch.local_crops[1], views.local[0]
    )


def test_source_smaller_than_the_batch():
    (batch,) = batches(Numbered(3), PLAIN, batch_size=8)
    assert sorted(indices(batch)[:3]) == [0, 1, 2] and len(indices(batch)) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_by_the_next_and_listed(workers):
    broken = (3, 4, 7)
    found = batches(Numbered(10, broken), PLAIN, count=5, workers=workers)
    sound = batches(Numbered(10), PLAIN, count=5)
    stand_in = {3: 5, 4: 5, 7: 8}
    reasons = {
        3: ["image 3: is broken", "image 4: is broken"],
        4: ["image 4: is broken"],
        7: ["image 7: is broken"],
    }
    for batch, full in zip(found, sound):
        assert indices(batch) == [stand_in.get(i, i) for i in indices(full)]
        assert batch.skipped == [reason for i in indices(full) for reason in reasons.get(i, [])]
    assert sum(len(batch.skipped) for batch in found) == 8  # two passes


@pytest.mark.parametrize("workers", [0, 1])
def test_source_of_which_nothing_can_be_read(workers):
    with pytest.raises(DataError) as caught:
        batches(Numbered(200, tuple(range(200))), PLAIN, workers=workers)
    message = str(caught.value)
    assert message.startswith("64 of the first 64 images read cannot be used, such as image ")
    assert (
        message.count("is broken") == 3
        and message.endswith("is this the right source?")
        and "\n" not in message
    )
    with pytest.raises(DataError, match="2 of the first 2 images read cannot be used"):
        batches(Numbered(2, (0, 1)), PLAIN, workers=workers)


def test_one_readable_image_among_many_is_no_training_set():
    with pytest.raises(DataError, match=r"of the first .* images read cannot be used"):
        batches(Numbered(200, tuple(range(1, 200))), PLAIN, count=30, batch_size=2)
    assert len(batches(Numbered(200, tuple(range(0, 200, 2))), PLAIN, count=30)) == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_keep_their_message(workers):
    class Failing(Numbered):
        def load(self, index: int) -> Image.Image:
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="the disk is on fire"):
        batches(Failing(5), PLAIN, workers=workers)


def test_fewer_shards_than_workers(tmp_path):
    with tarfile.open(tmp_path / "only.tar", "w") as tar:
        for number in range(7):
            stream = io.BytesIO()
            Image.new("RGB", (20, 20), (number,) * 3).save(stream, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = stream.tell()
            stream.seek(0)
            tar.addfile(info, stream)
    source = open_source(tmp_path / "only.tar")
    seen = [
        i
        for batch in batches(source, PLAIN, count=7, batch_size=2, workers=2)
        for i in indices(batch)
    ]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))


def test_other_channel_counts():
    settings = CropSettings(global_size=32, local_size=16, mean=(0.5,) * 5, std=(0.2,) * 5)
    (batch,) = batches(DatasetSource([torch.rand(5, 30, 40)] * 6), settings)
    assert batch.global_crops.shape == (8, 5, 32, 32) and batch.upsampled == 4


def test_wrong_channel_count_is_one_sentence():
    with pytest.raises(ValueError, match="expected an image of 3 channels"):
        batches(DatasetSource([torch.rand(5, 30, 40)] * 6))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"start_step": -1}, "step -1"),
        ({"seed": -1}, "seed -1"),
        ({"views": -1}, "-1 views"),
        ({"patch_size": 7}, "global crop 32 is not a multiple of the patch 7; use 28 or 35"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        batches(Scenes(5), **options)


def test_empty_source_is_refused():
    with pytest.raises(DataError, match="the image source is empty"):
        loader_of(Scenes(0), batch_size=2)


def test_batches_are_made_ahead_but_not_without_bound():
    made = []

    class Counting(Numbered):
        def load(self, index: int) -> Image.Image:
            made.append(index)
            return super().load(index)

    with loader_of(Counting(50), PLAIN, batch_size=1) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) == 1 + module.AHEAD


def test_what_workers_run_survives_pickling():
    """As start methods other than fork need."""
    loader = loader_of(Scenes(20), batch_size=2)
    assert same(pickle.loads(pickle.dumps(loader._maker)).make(3), loader._maker.make(3))


def test_closing_ends_the_workers_and_a_closed_loader_starts_over():
    loader = loader_of(Scenes(20), batch_size=2, workers=1)
    first = next(loader)
    worker = loader._batches._workers[0]
    loader.close()
    worker.join(10)
    assert not worker.is_alive()
    assert same(first, next(loader))
    loader.close()


def test_batches_are_pinned_without_workers_too(monkeypatch):
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches(Numbered(9), PLAIN, pin_memory=True)
    assert not pinned  # there is no GPU to copy to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batches(Numbered(9), PLAIN)
    assert not pinned
    (batch,) = batches(Numbered(9), PLAIN, pin_memory=True)
    tensors = batch.tensors().values()
    assert len(tensors) == 5 and all(any(tensor is one for one in pinned) for tensor in tensors)
    with pytest.raises(DataError, match="cannot be used"):
        batches(Numbered(2, (0, 1)), PLAIN, pin_memory=True)
