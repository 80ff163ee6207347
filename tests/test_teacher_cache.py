"""Cached outputs of a frozen teacher: exact, shared, resumable, and never in the way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3core.data.crops import CropSettings
from dinov3core.data.loader import BatchSettings, ShareLoader, shares
from dinov3core.data.masks import MaskSettings
from dinov3core.data.scenes import Scenes
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation import cache as module
from dinov3core.train.engine.distillation.cache import CachedHeads, CachedTeacher
from dinov3core.train.engine.distillation.frozen_teacher import TeacherRows

PATCH = 8
WIDTH = 5
ROOT = Path(__file__).resolve().parents[1]


class Teacher:
    """Says something of every pixel; a crop's rows do not depend on the batch it comes in."""

    name = "a small teacher"
    patch_size = PATCH

    def __init__(self, fingerprint: str = "abc", dtype: torch.dtype = torch.float32):
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.seen: list[int] = []  # crops in each call

    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        self.seen.append(len(crops))
        cells = F.unfold(crops, PATCH, stride=PATCH).transpose(1, 2)  # [n, P, C * 8 * 8]
        weights = torch.arange(cells.shape[2]) + 1
        parts = [(cells * (weights * (7 + k)).sin()).sum(2).sin() for k in range(WIDTH)]
        patches = torch.stack(parts, 2)
        cls = torch.cat([patches.mean(1), patches.amax(1)], 1)
        flat = patches.flatten(0, 1)
        chosen = flat if rows is None else flat[rows]
        return TeacherRows(cls.to(self.dtype), chosen.to(self.dtype))


def some_crops(count: int, seed: int = 0, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, teacher: Teacher | None = None) -> tuple[CachedTeacher, list[str]]:
    """A cached teacher and what it says to people."""
    said: list[str] = []
    return CachedTeacher(teacher or Teacher(), folder, said.append), said


def asked(cached: CachedTeacher) -> list[int]:
    """How many crops the teacher has seen in each pass, but for the one that shows its widths."""
    return cached.teacher.seen[1:]


def same(a: TeacherRows, b: TeacherRows) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files_of(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{ending}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_are_computed_once_and_come_back_bit_for_bit(tmp_path, dtype):
    crops = some_crops(6)
    truth = Teacher(dtype=dtype)(crops)
    first, _ = opened(tmp_path / "cache", Teacher(dtype=dtype))
    assert same(first(crops), truth) and asked(first) == [6]
    assert same(first(crops), truth) and asked(first) == [6]

    later, said = opened(tmp_path / "cache", Teacher(dtype=dtype))
    assert same(later(crops), truth) and asked(later) == [] and not said
    assert (later.hits, later.misses) == (6, 0) and (first.hits, first.misses) == (6, 6)
    record = (2 * WIDTH + 4 * WIDTH) * dtype.itemsize
    assert later.bytes_read == 6 * (record + 4) and later.bytes_written == 0
    assert first.bytes_written == 6 * (record + 24)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.suffix != ".json") == (
        first.bytes_written
    )
    assert later.in_words().startswith("6 of 6 views of a small teacher came from the cache (100.0")


def test_what_is_missing_is_computed_in_one_pass_and_comes_in_order(tmp_path):
    crops = some_crops(8)
    cached, _ = opened(tmp_path)
    cached(crops[[1, 4, 5]])
    assert same(cached(crops), Teacher()(crops))
    assert asked(cached) == [3, 5] and (cached.hits, cached.misses) == (3, 8)


def test_a_view_that_is_there_twice_is_computed_once(tmp_path):
    crops = some_crops(3)[[0, 1, 0, 2, 1, 0]]
    cached, _ = opened(tmp_path)
    assert same(cached(crops), Teacher()(crops)) and asked(cached) == [3]


def test_chosen_patches_and_no_crops(tmp_path):
    crops = some_crops(4)
    rows = torch.tensor([3, 2, 15, 7, 7])
    truth = Teacher()(crops, rows)
    cached, _ = opened(tmp_path)
    assert same(cached(crops, rows), truth) and same(cached(crops, rows), truth)
    assert same(cached(crops), Teacher()(crops)) and asked(cached) == [4]
    nothing = cached(crops[:0])
    assert nothing.cls.shape == (0, 2 * WIDTH) and nothing.patches.shape == (0, WIDTH)


def test_a_mirrored_view_is_another_view(tmp_path):
    """What would be returned if it were taken for the same, mirrored: something else."""
    crops = some_crops(4)
    cached, _ = opened(tmp_path)
    plain = cached(crops)
    mirrored = cached(crops.flip(-1))
    assert cached.misses == 8 and same(mirrored, Teacher()(crops.flip(-1)))

    grid = plain.patches.view(4, 2, 2, WIDTH)
    guessed = grid.flip(2).reshape(-1, WIDTH)
    cosine = F.cosine_similarity(guessed.flatten(), mirrored.patches.flatten(), 0)
    assert cosine < 0.9, "the test cannot tell: mirrored outputs are nearly the outputs"
    assert not torch.equal(guessed, mirrored.patches)


CHANGES = {
    "a pixel": lambda x: x.index_put((torch.tensor(0),) * 4, torch.tensor(0.5)),
    "the last bit of a pixel": lambda x: torch.where(
        torch.arange(x.numel()).view_as(x) == 7, torch.nextafter(x, torch.tensor(9.0)), x
    ),
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "shifted by a pixel": lambda x: x.roll(1, -1),
    "other channels": lambda x: x.flip(1),
    "turned": lambda x: x.transpose(-1, -2),
    "another shape": lambda x: x.reshape(1, 3, 8, 32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_differs_in_the_pixels_is_another_view(tmp_path, change: Callable):
    crops = some_crops(1)
    cached, _ = opened(tmp_path)
    cached(crops)
    other = change(crops)
    assert same(cached(other), Teacher()(other)) and cached.misses == 2


def test_precisions_and_kinds_of_outputs_are_kept_apart(tmp_path):
    crops = some_crops(2)
    cached, _ = opened(tmp_path)
    cached(crops)
    with torch.autocast("cpu", torch.bfloat16):
        cached(crops)
    assert cached.misses == 4
    half, _ = opened(tmp_path, Teacher(dtype=torch.bfloat16))
    assert same(half(crops), Teacher(dtype=torch.bfloat16)(crops)) and half.misses == 2

    class Other(Teacher):
        """Other rows of the same weights."""

    other, _ = opened(tmp_path, Other())
    other(crops)
    assert other.misses == 2


def test_a_folder_of_other_weights_is_said_and_left_alone(tmp_path):
    crops = some_crops(3)
    one, said = opened(tmp_path / "cache", Teacher("one"))
    one(crops)
    assert not said
    other, said = opened(tmp_path / "cache", Teacher("other"))
    assert said == [
        f"the cache {tmp_path / 'cache'} has outputs of other teachers only (a small teacher): "
        "those of a small teacher are computed and added"
    ]
    assert other(crops) and other.misses == 3
    for fingerprint in ("one", "other"):
        again, said = opened(tmp_path / "cache", Teacher(fingerprint))
        assert again(crops) and again.misses == 0 and not said


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"")


def a_file(folder: Path) -> None:
    folder.write_text("notes")


def of_another_version(folder: Path) -> None:
    folder.mkdir()
    contents = module.CONTENTS | {"version": module.VERSION + 1}
    (folder / module.MARK).write_text(json.dumps(contents))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (foreign, "holds something else, such as holiday.jpg; give another folder"),
        (a_file, r"can be made or read, got \S+ \(File exists\); give another one"),
        (of_another_version, "a cache of version 1, got .* such as cache.json"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_a_sentence(tmp_path, spoil, words):
    folder = tmp_path / "cache"
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"cache: expected a .*{words}") as refused:
        opened(folder)
    assert "\n" not in str(refused.value) and sorted(tmp_path.rglob("*")) == before


def test_a_kill_at_any_byte_leaves_whole_entries(tmp_path):
    crops = some_crops(3)
    truth = Teacher()(crops)
    first, _ = opened(tmp_path)
    first(crops)
    ((data,), (index,)) = (files_of(tmp_path, ending) for ending in ("data", "index"))
    records = data.read_bytes()
    entries = index.read_bytes()
    stride = len(records) // 3

    def survivors() -> int:
        cached, said = opened(tmp_path)
        assert same(cached(crops), truth) and not said
        for path in set(files_of(tmp_path, "data") + files_of(tmp_path, "index")) - {data, index}:
            path.unlink()
        return cached.hits

    # Records are written before their entries, so data may be ahead and never behind.
    for end in range(len(entries) + 1):
        index.write_bytes(entries[:end])
        assert survivors() == end // module.ENTRY.size
    index.write_bytes(entries[: 2 * module.ENTRY.size])
    for end in range(2 * stride, 3 * stride + 1, 7):
        data.write_bytes(records[:end])
        assert survivors() == 2


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_teacher_cache import Teacher, opened, some_crops
cached, _ = opened(Path(sys.argv[1]))
for seed in range(10**6):
    cached(some_crops(5, seed))
    print(seed, flush=True)
"""


def start_writer(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=settings)


def test_processes_that_are_killed_leave_what_others_read(tmp_path):
    """Two writers in one folder, killed in mid-write; a third process reads as they write."""
    folder = tmp_path / "cache"
    writers = [start_writer(folder) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"0\n"
        reader, said = opened(folder)
        deadline = time.monotonic() + 10
        seed = 0
        while reader.hits < 50 and time.monotonic() < deadline:
            crops = some_crops(5, seed)
            assert same(reader(crops), Teacher()(crops))
            seed += 1
        assert reader.hits >= 50 and not said
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()

    later, said = opened(folder)
    for seed in range(20):
        crops = some_crops(5, seed)
        assert same(later(crops), Teacher()(crops))
    assert later.hits >= 50 and not said


def test_processes_find_what_others_wrote_meanwhile(tmp_path):
    crops = some_crops(6)
    one, other = (opened(tmp_path)[0] for _ in range(2))
    one(crops[:2])
    other(crops[:4])
    assert (other.hits, other.misses) == (2, 2)
    one(crops)
    assert (one.hits, one.misses) == (4, 4)
    other(crops)
    assert (other.hits, other.misses) == (8, 2)


def test_nobody_looks_into_the_folder_while_everything_is_known(tmp_path, monkeypatch):
    crops = some_crops(6)
    cached, _ = opened(tmp_path)
    cached(crops)
    monkeypatch.setattr(os, "scandir", None)
    cached(crops)


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    crops = some_crops(9)
    truth = Teacher()(crops)
    cached, said = opened(tmp_path)
    cached(crops[:3])
    whole = module._append

    def full(path: Path, content: bytes) -> None:
        whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_append", full)
    for count in (6, 9, 9):
        assert same(cached(crops[:count]), Teacher()(crops[:count]))
    (sentence,) = said
    assert "cannot be written (No space left on device): it is read, and training" in sentence
    monkeypatch.undo()
    assert same(cached(crops), truth)  # its files end in half a record: nothing is added to them

    later, said = opened(tmp_path)
    assert same(later(crops), truth) and later.hits == 3 and not said


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    crops = some_crops(4)
    opened(tmp_path)[0](crops[:2])

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "_append", refused)
    cached, said = opened(tmp_path)
    assert same(cached(crops), Teacher()(crops)) and cached.hits == 2
    assert len(said) == 1 and "cannot be written (Permission denied)" in said[0]


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of a record": lambda data, index: flipped(data, 5),
    "a bit of a key": lambda data, index: flipped(index, 5),
    "a bit of a checksum": lambda data, index: flipped(index, 17),
    "a file cut short": lambda data, index: data.write_bytes(data.read_bytes()[:-1]),
    "records in another order": lambda data, index: data.write_bytes(
        data.read_bytes()[-len(data.read_bytes()) // 3 :] * 3
    ),
    "no data": lambda data, index: data.unlink(),
    "nothing but zeros": lambda data, index: data.write_bytes(bytes(len(data.read_bytes()))),
    "zeros for keys": lambda data, index: index.write_bytes(bytes(len(index.read_bytes()))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_said_once_and_computed_again(tmp_path, damage: Callable):
    crops = some_crops(3)
    truth = Teacher()(crops)
    opened(tmp_path)[0](crops)
    damage(*files_of(tmp_path, "data"), *files_of(tmp_path, "index"))
    cached, said = opened(tmp_path)
    for _ in range(2):
        assert same(cached(crops), truth)
    assert cached.misses in (1, 2, 3) and len(said) == 1 and "is damaged" in said[0]
    again, _ = opened(tmp_path)
    assert same(again(crops), truth) and again.misses == 0


def test_a_file_that_is_cut_while_it_is_read_is_a_miss_and_no_signal(tmp_path):
    crops = some_crops(3)
    cached, _ = opened(tmp_path)
    cached(crops)
    (data,) = files_of(tmp_path, "data")
    os.truncate(data, 10)
    assert same(cached(crops), Teacher()(crops)) and cached.misses == 6


def test_foreign_files_beside_the_entries_are_passed_over(tmp_path):
    crops = some_crops(3)
    opened(tmp_path)[0](crops)
    (folder,) = {path.parent for path in files_of(tmp_path, "data")}
    (folder / "notes.index").write_bytes(b"what I had for lunch" * 3)
    (folder / "a folder.index").mkdir()
    (folder / "holiday.jpg").write_bytes(b"")
    (folder.parent / module.TEACHER).write_text("[1, 2")
    cached, _ = opened(tmp_path)
    assert same(cached(crops), Teacher()(crops)) and cached.misses == 0


def test_outputs_that_are_not_finite_are_not_stored(tmp_path):
    """A fault of the machine must not come back in every epoch."""
    crops = some_crops(4)

    class Faulty(Teacher):
        def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
            given = super().__call__(crops, rows)
            if len(crops) == 4:
                given.patches[5, 0] = torch.nan  # of the second one
            return given

    cached = CachedTeacher(Faulty(), tmp_path, lambda _: None)
    assert cached(crops).patches[5, 0].isnan()
    cached(crops)
    assert cached.hits == 3 and asked(cached) == [4, 1]


def test_heads_compute_their_last_layers_from_what_is_stored(tmp_path):
    class Heads(Teacher):
        def cls_logits(self, bottlenecks: Tensor) -> Tensor:
            return 2 * bottlenecks

        def patch_logits(self, bottlenecks: Tensor) -> Tensor:
            return 3 * bottlenecks

    crops = some_crops(2)
    cached = CachedHeads(Heads(), tmp_path, lambda _: None)
    for _ in range(2):
        rows = cached(crops)
        assert torch.equal(cached.cls_logits(rows.cls), 2 * Teacher()(crops).cls)
        assert torch.equal(cached.patch_logits(rows.patches), 3 * Teacher()(crops).patches)
    assert cached.misses == 2


@pytest.mark.parametrize("views", [0, 1, 2])
def test_views_that_repeat_hit_from_the_pass_on_in_which_they_come_again(tmp_path, views):
    """Three processes load uneven shares in an order that changes; new views never hit."""
    length = 7
    passes = 4
    crops = CropSettings(global_size=16, local_size=16, local_count=0)
    settings = BatchSettings(crops, MaskSettings(), length, PATCH, views=views)
    teachers = [opened(tmp_path)[0] for _ in range(3)]
    loaders = [ShareLoader(Scenes(length), settings, share) for share in shares(length, 3)]
    hits: list[int] = []
    for _ in range(passes):
        before = sum(cached.hits for cached in teachers)
        for cached, loader in zip(teachers, loaders):
            loaded = next(loader).global_crops
            assert same(cached(loaded), Teacher()(loaded))
        hits.append(sum(cached.hits for cached in teachers) - before)
    for loader in loaders:
        loader.close()
    new = passes if not views else views
    assert hits == [0] * new + [2 * length] * (passes - new)
