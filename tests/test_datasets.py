"""Data sets by path: every layout in a folder and in shards, splits, and what does not fit."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3core.data.datasets import (
    DataOptions,
    open_any,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import ImageSource
from dinov3core.data.labelled import (
    IGNORE,
    Labelled,
    PairSource,
    Segmented,
    VideoSource,
    check_labelled,
    split_by_class,
)
from dinov3core.data.videos import SceneVideos

DATA = Path(os.environ.get("DINOV3CORE_DATA", "/nonexistent"))
with_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="DINOV3CORE_DATA names no folder of image sets"
)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def photo(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A flat JPEG, height x width."""
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (value, value, value)).save(file, "JPEG", quality=95)
    return file.getvalue()


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_tar(root: Path, files: dict[str, bytes], name: str = "set.tar") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w") as tar:
        for member, content in files.items():
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return root / name


folder_and_tar = pytest.mark.parametrize("pack", [as_folder, as_tar])
Pack = Callable[[Path, dict[str, bytes]], Path]


def classes(*names: str, value: int = 0) -> dict[str, bytes]:
    return {name: photo(value + index) for index, name in enumerate(names)}


@folder_and_tar
@pytest.mark.parametrize(
    "words",
    [("train", "val"), ("train", "test"), ("training", "validation"), ("train2017", "val2017")],
)
def test_class_folders_with_splits(tmp_path: Path, pack: Pack, words: tuple[str, str]):
    train, test = words
    files = classes(
        f"{train}/cat/a.jpg", f"{train}/dog/b.jpg", f"{train}/dog/c.jpg", f"{test}/dog/d.jpg"
    )
    data = open_labelled(pack(tmp_path, files))
    assert list(data.class_names) == ["cat", "dog"]
    assert [data.train.label(i) for i in range(3)] == [0, 1, 1]
    assert len(data.test) == 1 and data.test.label(0) == 1
    assert data.test.load(0).getpixel((0, 0))[0] == pytest.approx(3, abs=1) and data.test.name(
        0
    ).endswith("dog/d.jpg")
    assert isinstance(data.train, ImageSource)


def test_test_images_without_labels_give_way_to_val(tmp_path: Path):
    spec = as_folder(
        tmp_path, classes("train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg", "test/4.jpg")
    )
    data = open_labelled(spec)
    assert len(data.test) == 1 and data.test.name(0).endswith("val/b/3.jpg")


@folder_and_tar
def test_one_folder_is_split_by_class_and_seed(tmp_path: Path, pack: Pack):
    files = classes(*(f"{name}/{i}.jpg" for name in ("a", "b") for i in range(10)))
    spec = pack(tmp_path, files)
    data = open_labelled(spec)
    names = [{source.name(i) for i in range(len(source))} for source in data[:2]]
    assert len(data.train) == 16 and not names[0] & names[1] and len(names[0] | names[1]) == 20
    assert [data.test.label(i) for i in range(4)] == [0, 0, 1, 1]
    again = open_labelled(spec)
    other = open_labelled(spec, DataOptions(seed=1))
    assert (
        {again.test.name(i) for i in range(4)} == names[1] != {other.test.name(i) for i in range(4)}
    )


def test_shards_with_a_split_in_their_name(tmp_path: Path):
    as_tar(tmp_path, classes("cat/1.jpg", "dog/2.jpg"), "pets-train-000.tar")
    as_tar(
        tmp_path, classes("dog/2.jpg", "dog/3.jpg", value=50), "pets-train-001.tar"
    )  # dog/2.jpg twice: both count
    as_tar(tmp_path, classes("dog/4.jpg"), "pets-test-000.tar")
    for spec in (tmp_path, tmp_path / "pets-*.tar"):
        data = open_labelled(spec)
        assert (
            [data.train.label(i) for i in range(4)].count(1) == 3
            and len(data.train) == 4
            and len(data.test) == 1
        )
        assert len({data.train.load(i).getpixel((0, 0)) for i in range(4)}) == 4


def test_shards_with_cls_members(tmp_path: Path):
    files = {f"train/{i}.jpg": photo(i) for i in range(4)} | {
        f"train/{i}.cls": str(i % 3).encode() for i in range(4)
    }
    files |= {"test/9.jpg": photo(9), "test/9.cls": b"2"}
    data = open_labelled(as_tar(tmp_path, files))
    assert [data.train.label(i) for i in range(4)] == [0, 1, 2, 0] and data.test.label(0) == 2


def test_an_npz_of_jpegs_and_of_bands(tmp_path: Path):
    jpegs = [photo(v) for v in (10, 20, 30)]
    labels = {
        "label": np.array([0, 1, 1]),
        "split": np.array([0, 0, 1]),
        "classes": np.array(["x", "y"]),
    }
    joined = np.frombuffer(b"".join(jpegs), np.uint8)
    np.savez(tmp_path / "a.npz", data=joined, offset=np.cumsum([0, *map(len, jpegs)]), **labels)
    data = open_labelled(tmp_path / "a.npz")
    assert data.test.load(0).getpixel((0, 0))[0] == pytest.approx(
        30, abs=1
    ) and data.class_names == ["x", "y"]

    values = np.random.default_rng(0).integers(0, 10_000, (3, 5, 4, 4)).astype(np.uint16)
    np.savez(
        tmp_path / "b.npz",
        hi=(values >> 8).astype(np.uint8),
        lo=(values & 255).astype(np.uint8),
        **labels,
    )
    data = open_labelled(tmp_path / "b.npz", DataOptions(channels=5, channel_scale=5000.0))
    expected = torch.from_numpy(values[1].astype(np.float32) / 5000).clamp(0, 1)
    torch.testing.assert_close(data.train.load(1), expected)
    assert data.train.scale == 5000  # part of what the feature cache knows it by


def test_an_npz_with_channels_first_or_last(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    labels = {"label": np.array([0, 1, 0, 1]), "split": np.array([0, 0, 1, 1])}
    np.savez(tmp_path / "bytes.npz", x=values, **labels)
    assert np.array_equal(
        np.asarray(open_labelled(tmp_path / "bytes.npz").train.load(1)), values[1]
    )
    expected = torch.from_numpy(values[1]).permute(2, 0, 1) / 255
    np.savez(tmp_path / "floats.npz", x=values.astype(np.float64) / 255, **labels)
    torch.testing.assert_close(open_labelled(tmp_path / "floats.npz").train.load(1), expected)
    np.savez(tmp_path / "first.npz", x=values.transpose(0, 3, 1, 2), **labels)
    torch.testing.assert_close(open_labelled(tmp_path / "first.npz").train.load(1), expected)


def test_scenes_share_no_image_between_splits_and_with_training():
    data = open_labelled("scenes", DataOptions(scenes_train=24, scenes_test=12, scene_size=16))
    names = [data.train.name(i) for i in range(24)] + [data.test.name(i) for i in range(12)]
    numbers = {int(name.split()[1]) for name in names}
    assert (
        len(numbers) == 36 and min(numbers) >= 20_000_000
    )  # training starts at 0, its online evaluation at 10 million
    assert sorted(data.test.label(i) for i in range(12)) == list(range(12))


MASK = np.array([[0, 1, 255], [2, 2, 1]], np.uint8)
PAIR_LAYOUTS = {
    "beside": ("train/{}.jpg", "train/{}.png", "test/{}.jpg", "test/{}.png"),
    "kind first": (
        "images/train/{}.jpg",
        "masks/train/{}.png",
        "images/val/{}.jpg",
        "masks/val/{}.png",
    ),
    "annotations": (
        "images/training/{}.jpg",
        "annotations/training/{}.png",
        "images/validation/{}.jpg",
        "annotations/validation/{}.png",
    ),
    "split first": (
        "train/images/{}.png",
        "train/masks/{}.png",
        "val/images/{}.png",
        "val/masks/{}.png",
    ),
}


@folder_and_tar
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_masks_in_every_layout(tmp_path: Path, pack: Pack, layout: str):
    names = PAIR_LAYOUTS[layout]
    files: dict[str, bytes] = {}
    for i in range(3):
        image, mask = names[:2] if i < 2 else names[2:]
        flat = np.full((2, 3, 3), i, np.uint8)
        files |= {
            image.format(i): png(flat) if image.endswith("png") else photo(i, (2, 3)),
            mask.format(i): png(MASK),
        }
    data = open_segmented(pack(tmp_path, files))
    assert (len(data.train), len(data.test), len(data.class_names)) == (2, 1, 3)
    pair = data.test.load(0)
    assert pair.target.tolist() == MASK.tolist() and pair.target.dtype == torch.int64
    assert pair.image.size == (3, 2) and pair.image.getpixel((0, 0))[0] == pytest.approx(2, abs=1)
    assert isinstance(data.train, PairSource)


def test_masks_that_start_at_one_and_names_of_classes(tmp_path: Path):
    files = {f"images/{i}.jpg": photo(i, (2, 3)) for i in range(2)} | {
        f"masks/{i}.png": png(MASK) for i in range(2)
    }
    files["classes.json"] = json.dumps({"classes": ["one", "two"]}).encode()
    data = open_segmented(as_folder(tmp_path, files), DataOptions(first_class=1))
    assert list(data.class_names) == ["one", "two"] and (len(data.train), len(data.test)) == (1, 1)
    assert data.train.load(0).target.tolist() == [[IGNORE, 0, IGNORE], [1, 1, 0]]


def test_frames_of_one_film_stay_on_one_side(tmp_path: Path):
    files = {
        f"film{f}/{i}.{s}": c
        for f in range(5)
        for i in range(3)
        for s, c in (("jpg", photo(0, (2, 3))), ("png", png(MASK)))
    }
    data = open_segmented(as_folder(tmp_path, files))
    films = [{Path(source.name(i)).parent.name for i in range(len(source))} for source in data[:2]]
    assert len(films[0]) == 4 and len(films[1]) == 1 and not films[0] & films[1]


def test_depth_as_png_and_npy(tmp_path: Path):
    depth = np.array([[1000, 2500], [0, 65535]], np.uint16)
    file = io.BytesIO()
    np.save(file, np.float32([[1.5, np.nan], [0, 3]]))
    files = {f"images/{i}.jpg": photo(i, (2, 2)) for i in range(2)}
    data = open_ranged(
        as_folder(tmp_path, files | {"depth/0.png": png(depth), "depth/1.npy": file.getvalue()})
    )
    targets = {source.name(0)[-5]: source.load(0).target for source in data}
    assert targets["0"].tolist() == pytest.approx(np.float32([[1, 2.5], [0, 65.535]]))
    assert torch.equal(targets["1"].nan_to_num(-1), torch.tensor([[1.5, -1.0], [0.0, 3.0]]))


def test_scene_targets_belong_to_their_images():
    options = DataOptions(scenes_train=3, scenes_test=2, scene_size=24)
    segmented = open_segmented("scenes", options)
    ranged = open_ranged("scenes", options)
    scene = open_labelled("scenes", options).test.scene(1)
    pair = segmented.test.load(1)
    assert np.array_equal(np.asarray(pair.image), np.asarray(scene.image))
    assert np.array_equal(pair.target.numpy(), scene.mask) and len(segmented.class_names) == 13
    assert np.array_equal(ranged.test.load(1).target.numpy(), scene.depth)


@folder_and_tar
@pytest.mark.parametrize("davis", [False, True])
def test_videos(tmp_path: Path, pack: Pack, davis: bool):
    mask = np.array([[0, 255, 0], [0, 0, 255]], np.uint8)
    files = {}
    for sequence in ("bear", "camel"):
        for frame in range(3):
            image = (
                f"JPEGImages/480p/{sequence}/{frame:05}.jpg"
                if davis
                else f"{sequence}/{frame:05}.jpg"
            )
            target = (
                f"Annotations/480p/{sequence}/{frame:05}.png"
                if davis
                else f"{sequence}/{frame:05}.png"
            )
            files |= {image: photo(10 * frame, (2, 3)), target: png(mask)}
    if davis:
        files["ImageSets/2016/val.txt"] = b"camel\n"
    videos = open_videos(pack(tmp_path, files))
    assert len(videos) == (1 if davis else 2) and isinstance(videos, VideoSource)
    video = videos.load(len(videos) - 1)
    assert video.name.endswith("camel") and [
        f.getpixel((0, 0))[0] for f in video.frames
    ] == pytest.approx([0, 10, 20], abs=1)
    assert video.masks[2].tolist() == [
        [0, 1, 0],
        [0, 0, 1],
    ]  # 0 and 255 are background and one object


def test_among_numbered_objects_255_is_none(tmp_path: Path):
    masks = [[[0, 1, 2]], [[0, 255, 255]]]
    files = {f"bear/{i}.jpg": photo(0, (1, 3)) for i in range(2)}
    files |= {f"bear/{i}.png": png(np.array(mask, np.uint8)) for i, mask in enumerate(masks)}
    assert [
        mask.tolist() for mask in open_videos(as_folder(tmp_path, files)).load(0).masks
    ] == masks


def test_scene_videos_are_deterministic_and_move():
    videos = SceneVideos(3, size=48, frames=6)
    video = videos.load(1)
    again = SceneVideos(3, size=48, frames=6).load(1)
    assert all(np.array_equal(a, b) for a, b in zip(video.frames, again.frames))
    assert all(torch.equal(a, b) for a, b in zip(video.masks, again.masks))
    assert len(video.frames) == len(video.masks) == 6 and set(video.masks[0].unique().tolist()) == {
        0,
        1,
        2,
    }
    assert not torch.equal(video.masks[0], video.masks[5])
    front = video.masks[0] == 2
    assert (
        front.sum() > 30 and (np.asarray(video.frames[0])[front.numpy()].std(0) > 5).any()
    )  # it has a texture


def test_split_by_class_is_balanced_and_seeded():
    labels = np.repeat([0, 1, 2], [50, 10, 1])
    train, test = split_by_class(labels, 0.1, seed=3)
    assert sorted([*train, *test]) == list(range(61)) and np.bincount(
        labels[test], minlength=3
    ).tolist() == [5, 1, 0]
    assert np.array_equal(test, split_by_class(labels, 0.1, seed=3)[1])
    assert not np.array_equal(test, split_by_class(labels, 0.1, seed=4)[1])
    with pytest.raises(DataError, match="one of them to hold out, got 3 images of 3 classes"):
        split_by_class([0, 1, 2], 0.1)


# What does not fit gets one sentence.


class Images:
    def __init__(self, labels: list[int | None]):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def label(self, index: int) -> int | None:
        return self.labels[index]

    def name(self, index: int) -> str:
        return f"image {index}"


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ([0, 1], [], "test split is empty"),
        ([], [0, 1], "train split is empty"),
        ([1, 1], [1], "one class only"),
        ([0, 1], [2], "labels of the test split run from 2 to 2: expected 0 to 1"),
        ([0, None], [1], "image 1: expected a label"),
    ],
)
def test_labels_nothing_can_be_computed_on(train, test, sentence):
    with pytest.raises(DataError, match=sentence):
        check_labelled(Labelled(Images(train), Images(test), ["a", "b"]))


def write_pairs(root: Path, mask: np.ndarray, **extra: bytes) -> Path:
    files = {f"images/{i}.jpg": photo(i, (2, 3)) for i in range(2)} | {
        f"masks/{i}.png": png(mask) for i in range(2)
    }
    return as_folder(
        root, files | {name.replace("__", "."): content for name, content in extra.items()}
    )


def test_masks_that_do_not_fit(tmp_path: Path):
    with pytest.raises(DataError, match="expected the size of its image, 2 x 3, got 3 x 2"):
        open_segmented(write_pairs(tmp_path / "size", MASK.T.copy())).train.load(0)
    with pytest.raises(DataError, match="expected classes 0 to 1 and 255 for none, got 2"):
        open_segmented(
            write_pairs(tmp_path / "labels", MASK, classes__json=b'["a", "b"]')
        ).train.load(0)
    with pytest.raises(DataError, match="hold 1 classes; expected two or more"):
        open_segmented(write_pairs(tmp_path / "one", 0 * MASK))
    with pytest.raises(DataError, match="expected one class number per pixel, got mode RGB"):
        open_segmented(write_pairs(tmp_path / "rgb", np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(DataError, match="1 files have no partner, such as 0 "):
        spec = write_pairs(tmp_path / "alone", MASK)
        (spec / "masks/0.png").unlink()
        open_segmented(spec)
    with pytest.raises(DataError, match=r"classes\.json: expected"):
        open_segmented(write_pairs(tmp_path / "names", MASK, classes__json=b"7"))
    with pytest.raises(DataError, match=r"classes\.json: expected"):
        open_segmented(write_pairs(tmp_path / "bytes", MASK, classes__json=b"\xff\xfe"))
    with pytest.raises(DataError, match="expected at most 255 classes, as 255 means none, got 301"):
        open_segmented(write_pairs(tmp_path / "many", np.full((2, 3), 300, np.uint16)))
    with pytest.raises(DataError, match="expected 16-bit depth, got mode L"):
        spec = write_pairs(tmp_path / "depth", MASK)
        (spec / "masks").rename(spec / "depth")
        open_ranged(spec)


def test_a_broken_file_is_unreadable_and_not_fatal(tmp_path: Path):
    spec = write_pairs(tmp_path, MASK)
    data = open_segmented(spec)
    for name in ("masks/0.png", "images/1.jpg"):
        (spec / name).write_bytes(b"no image")
    for source in data[:2]:
        with pytest.raises(UnreadableImage):
            source.load(0)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: np.savez(file, depth=np.ones((2, 3))),  # an archive by the name of an array
        lambda file: np.save(file, np.full((2, 3), "a")),
        lambda file: np.save(file, np.ones((2, 3), complex)),
        lambda file: np.save(file, np.ones((2, 3, 3))),
    ],
)
def test_a_depth_file_of_something_else_is_unreadable(
    tmp_path: Path, write: Callable[[io.BytesIO], None]
):
    file = io.BytesIO()
    write(file)
    files = {f"images/{i}.jpg": photo(i, (2, 3)) for i in range(2)} | {
        f"depth/{i}.npy": file.getvalue() for i in range(2)
    }
    with pytest.raises(UnreadableImage, match="expected one"):
        open_ranged(as_folder(tmp_path, files)).train.load(0)


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("dinov3core.data.decode.MAX_PIXELS", 5)
    data = open_segmented(write_pairs(tmp_path, MASK, classes__json=b'["a", "b"]'))
    for load in (data.train.load, data.train.target):
        with pytest.raises(UnreadableImage, match="3 x 2 pixels, more than the limit of 5"):
            load(0)


@pytest.mark.parametrize(
    "opener", [open_labelled, open_segmented, open_ranged, open_videos, open_any]
)
def test_nothing_there(tmp_path: Path, opener):
    with pytest.raises(DataError, match="found nothing of the kind"):
        opener(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("no images")
    with pytest.raises(DataError, match="found none"):
        opener(tmp_path)


def test_layouts_of_other_tasks_are_named(tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs", MASK)
    pets = as_folder(tmp_path / "pets", classes("a/1.jpg", "b/2.jpg", "b/3.jpg", "a/4.jpg"))
    with pytest.raises(
        DataError, match="holds images with masks; expected images in class folders"
    ):
        open_labelled(pairs)
    with pytest.raises(DataError, match="expected images/ and masks/"):
        open_segmented(pets)
    with pytest.raises(DataError, match="tracking expects <sequence>"):
        open_videos(pets)
    with pytest.raises(DataError, match=r"an \.npz holds classes of images only"):
        open_segmented(tmp_path / "x.npz")
    assert isinstance(open_any(pairs), Segmented) and isinstance(open_any(pets), Labelled)
    assert isinstance(open_any("scenes"), Labelled)
    with pytest.raises(DataError, match="train split without test or val"):
        open_labelled(as_folder(tmp_path / "half", classes("train/a/1.jpg", "train/b/2.jpg")))
    with pytest.raises(DataError, match="class c is in the test split and not in train"):
        open_labelled(
            as_folder(tmp_path / "other", classes("train/a/1.jpg", "train/b/2.jpg", "val/c/3.jpg"))
        )
    with pytest.raises(DataError, match=r"1\.jpg is in no class folder"):
        open_labelled(as_folder(tmp_path / "flat", classes("1.jpg", "2.jpg")))


@folder_and_tar
def test_images_without_labels_will_do_where_none_are_needed(tmp_path: Path, pack: Pack):
    data = open_any(pack(tmp_path / "photos", classes("1.jpg", "trip/2.jpg", "trip/3.jpg")))
    assert isinstance(data, ImageSource) and len(data) == 3 and data.label(0) is None
    assert data.load(2).getpixel((0, 0))[0] == pytest.approx(2, abs=1)
    one_class = open_any(pack(tmp_path / "one", classes("cat/1.jpg", "cat/2.jpg")))
    assert len(one_class) == 2
    alone = {
        "images/1.jpg": photo(1),
        "images/2.jpg": photo(2),
        "masks/1.png": png(MASK),
        "depth/3.png": png(MASK),
    }
    spec = pack(tmp_path / "rest", alone)
    with pytest.raises(DataError, match="holds images with masks"):
        open_labelled(spec)
    rest = open_any(spec)
    assert [Path(rest.name(i)).name for i in range(len(rest))] == [
        "1.jpg",
        "2.jpg",
    ]  # masks are no images


def test_a_list_of_images_and_what_is_no_image(tmp_path: Path):
    as_folder(tmp_path, classes("a.jpg", "b.jpg") | {"list.txt": b"b.jpg\na.jpg\n"})
    assert open_any(tmp_path / "list.txt").name(0).endswith("b.jpg")
    with pytest.raises(DataError, match="expected images of 5 channels, found none"):
        open_any(tmp_path, DataOptions(channels=5))
    with pytest.raises(DataError, match=r"expected a readable \.npz"):
        (tmp_path / "x.npz").write_bytes(b"no zip")
        open_any(tmp_path / "x.npz")


def test_a_foreign_npz(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="expected the keys label, split, found only x"):
        open_labelled(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 4, 4, 3), np.uint8), label=[0], split=[0, 1])
    with pytest.raises(
        DataError, match="one label and one split for each of the 2 images, got 1 and 2"
    ):
        open_labelled(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=np.array([object()]), label=[0], split=[0])
    with pytest.raises(DataError, match="without pickles"):
        open_labelled(tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", np.zeros(3))
    for content in (b"", (tmp_path / "d.npy").read_bytes()):  # empty; an .npy by another name
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(DataError, match="expected a readable"):
            open_labelled(tmp_path / "d.npz")


@with_data
@pytest.mark.parametrize(
    ("opener", "spec", "sizes"),
    [
        (open_labelled, "cls/clothing10-*.tar", (3068, 372, 10)),
        (open_labelled, "cls/imagenette128.npz", (9469, 3925, 10)),
        (open_labelled, "ms/eurosat_ms270.npz", (216, 54, 10)),
        (open_segmented, "seg/camvid11_480x360.tar", (367, 233, 11)),
    ],
)
def test_real_sets(opener, spec: str, sizes: tuple[int, int, int]):
    data = opener(DATA / spec, DataOptions(channels=13 if "eurosat" in spec else 3))
    assert (len(data.train), len(data.test), len(data.class_names)) == sizes
    data.test.load(0)


@with_data
def test_real_videos():
    videos = open_videos(DATA / "seg/davis16val_20x32_240p.tar")
    assert (
        len(videos) == 20
        and len(videos.load(0).frames) == 32
        and videos.load(0).masks[0].max() == 1
    )
