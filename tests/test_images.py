"""Image sources: every way to name images, to break a file, and any number of channels."""

import ast
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3core.data import decode
from dinov3core.data.decode import RGB_SUFFIXES, PixelFormat
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import (
    DatasetSource,
    FileSource,
    ImageSource,
    open_source,
)
from dinov3core.data.packed import PackedStrings
from dinov3core.data.scenes import Scenes, SceneSet
from dinov3core.data.stored import PathFiles, expand
from dinov3core.data.tars import TarIndex, index_tars


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def load(path: Path) -> Image.Image:
    return FileSource(PathFiles([path])).load(0)


def refusal(path: Path) -> str:
    """The reason a file is not read; its name comes first."""
    with pytest.raises(UnreadableImage) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}" and caught.value.name == str(path)
    assert "\n" not in caught.value.reason
    return caught.value.reason


# --- odd but good files


def test_plain_rgb_is_exact(tmp_path):
    assert np.array_equal(
        pixels(load(write(tmp_path / "a.png", encoded(picture())))), pixels(picture())
    )


def test_grey_palette_and_one_bit(tmp_path):
    grey = picture().convert("L")
    assert np.array_equal(
        pixels(load(write(tmp_path / "l.png", encoded(grey)))), pixels(grey.convert("RGB"))
    )
    palette = picture().quantize(16)
    assert np.array_equal(
        pixels(load(write(tmp_path / "p.png", encoded(palette)))), pixels(palette.convert("RGB"))
    )
    bit = picture().convert("1")
    assert set(np.unique(pixels(load(write(tmp_path / "b.png", encoded(bit)))))) == {0, 255}


def test_transparency_is_laid_over_white(tmp_path):
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.uint8([0, 128, 255, 64] * 6), (16, 1))))
    alpha = pixels(rgba)[..., 3:] / 255
    expected = pixels(rgba)[..., :3] * alpha + 255 * (1 - alpha)
    image = load(write(tmp_path / "a.png", encoded(rgba)))
    assert image.mode == "RGB" and np.abs(pixels(image) - expected).max() <= 1
    grey = Image.merge("LA", (picture().convert("L"), Image.new("L", (24, 16), 0)))
    assert (pixels(load(write(tmp_path / "la.png", encoded(grey)))) == 255).all()
    palette = picture().quantize(8)
    clear = load(write(tmp_path / "p.png", encoded(palette, transparency=0)))
    assert (pixels(clear)[np.asarray(palette) == 0] == 255).all()


def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path):
    values = np.linspace(0, 65535, 24 * 16).astype(np.uint16).reshape(16, 24)
    for name in ("a.png", "a.tif"):
        path = tmp_path / name
        Image.fromarray(values).save(path)
        assert np.abs(pixels(load(path))[..., 0] - values / 257).max() <= 0.5 + 1e-6


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (24, 16), (0, 255, 255, 0))
    image = pixels(load(write(tmp_path / "c.jpg", encoded(cmyk, "JPEG", quality=95)))).mean((0, 1))
    assert image[0] > 200 and image[1] < 60 and image[2] < 60, (
        "no cyan, all magenta and yellow: red"
    )


def test_exif_rotation_is_applied(tmp_path):
    wide = Image.new("RGB", (32, 16), "black")
    wide.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image = load(write(tmp_path / "r.jpg", encoded(wide, "JPEG", exif=exif)))
    assert image.size == (16, 32)
    assert pixels(image)[:12].mean() > 240 and pixels(image)[20:].mean() < 15


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(load(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_large_jpeg_is_decoded_small_enough_and_large_enough(tmp_path):
    path = write(tmp_path / "big.jpg", encoded(Image.new("RGB", (8000, 4200), "teal"), "JPEG"))
    assert load(path).size == (2000, 1050)


# --- bad files


def test_broken_files_are_refused_with_a_reason(tmp_path):
    jpeg = encoded(picture(size=(200, 200)), "JPEG")
    assert "truncated" in refusal(write(tmp_path / "cut.jpg", jpeg[: len(jpeg) // 2]))
    assert refusal(write(tmp_path / "empty.jpg", b"")) == "not an image file"
    assert refusal(write(tmp_path / "text.jpg", b"this is a text file\n")) == "not an image file"
    assert refusal(tmp_path / "missing.jpg") == "no such file"
    png = bytearray(encoded(picture(size=(200, 200))))
    png[60:400] = bytes(340)
    assert refusal(write(tmp_path / "broken.png", bytes(png)))
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert refusal(folder) == "is a directory"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [
        encoded(picture(size=(40, 40)), kind)
        for kind in ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
    ]
    for trial in range(120):
        content = bytearray(kinds[trial % len(kinds)])
        for position in rng.integers(0, len(content), 12):
            content[position] = rng.integers(256)
        path = write(tmp_path / "x", bytes(content[: rng.integers(1, len(content) + 1)]))
        try:
            assert load(path).mode == "RGB"
        except UnreadableImage as error:
            assert error.reason


def test_enormous_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    path = write(tmp_path / "big.png", encoded(picture(size=(200, 100))))
    assert refusal(path) == "200 x 100 pixels, more than the limit of 10,000"


def test_decompression_bombs_are_refused(tmp_path):
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = struct.pack(
        ">II", 20_000, 20_000
    )  # width and height of the header, then its checksum
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    assert "400000000 pixels" in refusal(write(tmp_path / "bomb.png", bytes(content)))


def test_float_pixels_have_no_range(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    assert "float pixels have no fixed range" in refusal(tmp_path / "f.tif")


# --- other channel counts


def test_arrays_of_any_channel_count(tmp_path):
    values = np.random.default_rng(0).integers(0, 10_000, (5, 6, 7)).astype(np.uint16)
    np.save(tmp_path / "chw.npy", values)
    np.save(tmp_path / "hwc.npy", values.transpose(1, 2, 0))
    source = open_source(tmp_path, PixelFormat(5, 10_000))
    assert len(source) == 2
    for index in range(2):
        image = source.load(index)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, torch.from_numpy(values.astype(np.float32)) / 10_000)
    full = open_source(tmp_path, PixelFormat(5)).load(0)
    torch.testing.assert_close(full, torch.from_numpy(values.astype(np.float32)) / 65535)


def test_channels_of_image_files(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (6, 5)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "one.png")
    image = open_source(tmp_path, PixelFormat(1)).load(0)
    torch.testing.assert_close(image, torch.from_numpy(grey.astype(np.float32) / 65535)[None])
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 51, 255, 102, 153)]
    frames[0].save(write(tmp_path / "many" / "f.tif", b""), save_all=True, append_images=frames[1:])
    bands = open_source(tmp_path / "many", PixelFormat(5)).load(0)
    torch.testing.assert_close(bands[:, 0, 0], torch.tensor([0, 0.2, 1.0, 0.4, 0.6]))
    write(tmp_path / "rgba" / "a.png", encoded(picture().convert("RGBA")))
    assert open_source(tmp_path / "rgba", PixelFormat(4)).load(0).shape == (4, 16, 24)


def test_arrays_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 6, 7)))
    np.save(tmp_path / "b.npy", np.full((2, 4, 4), np.nan))
    (tmp_path / "c.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:200])
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    source = open_source(tmp_path, PixelFormat(2))
    reasons = []
    for index in range(4):
        with pytest.raises(UnreadableImage) as caught:
            source.load(index)
        reasons.append(caught.value.reason)
    assert reasons[0] == "expected 2 channels, got an array of shape [5, 6, 7]"
    assert reasons[1] == "the array holds NaN or Inf"
    assert reasons[2] and "pickle" in reasons[3]


# --- folders and lists


def test_folder_tree_with_classes(tmp_path):
    for number, name in enumerate(["cat/b.png", "cat/deep/a.JPG", "dog/c.webp", "dog/notes.txt"]):
        write(tmp_path / name, encoded(picture(number), "JPEG" if name.endswith("JPG") else "PNG"))
    source = open_source(tmp_path)
    assert (
        isinstance(source, ImageSource)
        and len(source) == 3
        and source.class_names == ("cat", "dog")
    )
    assert [Path(source.name(i)).name for i in range(3)] == ["b.png", "a.JPG", "c.webp"]
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    assert np.array_equal(pixels(source.load(0)), pixels(picture(0)))
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(source)).load(2)), pixels(picture(2)))


def test_folder_without_classes_has_no_labels(tmp_path):
    write(tmp_path / "a.png", encoded(picture()))
    write(tmp_path / "sub" / "b.png", encoded(picture(1)))
    source = open_source(str(tmp_path))
    assert [source.label(i) for i in range(2)] == [None, None]


def test_places_with_nothing_to_train_on(tmp_path):
    with pytest.raises(
        DataError, match=r"no images in .*: expected files ending in .*found no files at all"
    ):
        open_source(tmp_path)
    write(tmp_path / "a.mp4", b"")
    with pytest.raises(DataError, match=r"found 1 other files, such as a\.mp4"):
        open_source(tmp_path)
    with pytest.raises(
        DataError, match=r"does not exist; expected scenes, a folder, a \.txt or \.csv list"
    ):
        open_source(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"got a file ending in '\.mp4'"):
        open_source(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        open_source(tmp_path / "list.txt")


def test_list_of_paths(tmp_path):
    for number in range(3):
        write(tmp_path / "images" / f"{number}, a.png", encoded(picture(number)))
    (tmp_path / "list.txt").write_text(
        "images/0, a.png\nimages/gone.png\n\n" + f"{tmp_path}/images/2, a.png\n"
    )
    source = open_source(tmp_path / "list.txt")
    assert len(source) == 3 and source.label(0) is None
    assert np.array_equal(pixels(source.load(2)), pixels(picture(2)))
    with pytest.raises(UnreadableImage, match=r"gone\.png: no such file"):
        source.load(1)


def test_list_with_quotes_and_odd_bytes_in_its_names(tmp_path):
    names = ['say "a".png', "\u00e9\udcff.png"]
    for number, name in enumerate(names):
        write(tmp_path / name, encoded(picture(number)))
    (tmp_path / "list.txt").write_bytes(
        b"\n".join(name.encode("utf-8", "surrogateescape") for name in names)
    )
    source = open_source(tmp_path / "list.txt")
    assert [np.array_equal(pixels(source.load(i)), pixels(picture(i))) for i in range(2)] == [
        True,
        True,
    ]


def test_list_with_labels(tmp_path):
    write(tmp_path / "a.png", encoded(picture()))
    (tmp_path / "l.csv").write_text("path,label\na.png,zebra\na.png,ant\n")
    named = open_source(tmp_path / "l.csv")
    assert [named.label(i) for i in range(2)] == [1, 0] and named.class_names == ("ant", "zebra")
    (tmp_path / "l.csv").write_text("a.png,10\na.png,9\n")
    assert [open_source(tmp_path / "l.csv").label(i) for i in range(2)] == [10, 9]
    (tmp_path / "l.txt").write_text("a.png\t3\n")
    assert open_source(tmp_path / "l.txt").label(0) == 3


def test_list_of_missing_files_is_refused_at_once(tmp_path):
    (tmp_path / "l.txt").write_text("x.png\ny.png\n")
    with pytest.raises(DataError, match=r"none of the first 2 paths exists, such as .*x\.png"):
        open_source(tmp_path / "l.txt")


def test_impossible_channels_and_scales(tmp_path):
    with pytest.raises(ValueError, match="at least 1 channel and a positive scale, got 2 and 0"):
        open_source(tmp_path, PixelFormat(2, 0))


def test_names_survive_packing():
    names = ["", "a", "b/" * 50, "\u00e9t\u00e9.png", "broken\udcff"]
    packed = PackedStrings(names)
    assert [packed[i] for i in range(len(packed))] == names


# --- tar shards


def shard(path: Path, start: int, count: int, labels: bool = False) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(start, start + count):
            members = {f"{number:04d}.png": encoded(picture(number)), f"{number:04d}.json": b"{}"}
            if labels:
                members[f"{number:04d}.cls"] = str(number % 3).encode()
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_give_random_access(tmp_path):
    for number in range(3):
        shard(tmp_path / f"a-{number:03d}.tar", 4 * number, 4, labels=number != 1)
    for spec in ("a-{000..002}.tar", "a-*.tar", "a-00?.tar", ""):
        source = open_source(tmp_path / spec)
        assert isinstance(source._files, TarIndex) and len(source) == 12
        assert [np.array_equal(pixels(source.load(i)), pixels(picture(i))) for i in (11, 0, 5)] == [
            True
        ] * 3
    assert [source.label(i) for i in (0, 2, 5, 10)] == [0, 2, None, 1]
    assert source.name(5).endswith("a-001.tar/0005.png")
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(pixels(copy.load(7)), pixels(picture(7)))


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
    from dinov3core.data import tars

    monkeypatch.setattr(tars, "OPEN_SHARDS", 2)
    source = FileSource(
        index_tars(
            [shard(tmp_path / f"{number}.tar", number, 1) for number in range(5)], RGB_SUFFIXES
        )
    )
    assert [
        np.array_equal(pixels(source.load(i)), pixels(picture(i))) for i in (0, 1, 2, 3, 4, 0)
    ] == [True] * 6
    assert len(source._files._open) == 2


@pytest.mark.parametrize("at_header", [False, True])
def test_shard_that_ends_early(tmp_path, at_header):
    whole = shard(tmp_path / "b.tar", 0, 6)
    with tarfile.open(whole) as tar:
        member = tar.getmember("0003.png")
        cut = member.offset + 100 if at_header else member.offset_data + 200
    content = whole.read_bytes()
    broken = write(tmp_path / "a.tar", content[:cut])
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 shards end early, such as .*a\.tar; their 3 whole images are used",
    ):
        source = FileSource(index_tars([broken, whole], RGB_SUFFIXES))
    assert len(source) == 9
    assert [
        np.array_equal(pixels(source.load(i)), pixels(picture(n))) for i, n in ((2, 2), (3, 0))
    ] == [True, True]


def test_shard_shortened_after_it_was_indexed(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    source = FileSource(index_tars([path], RGB_SUFFIXES))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match="the shard ends after"):
        source.load(2)


def test_bad_shards(tmp_path):
    with pytest.raises(DataError, match=r"not an uncompressed tar file; unpack compressed shards"):
        open_source(write(tmp_path / "z.tar", b"\x1f\x8b" + bytes(600)))
    with pytest.raises(DataError, match="no images in the shards"):
        with tarfile.open(tmp_path / "e.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
        open_source(tmp_path / "e.tar")
    with pytest.raises(DataError, match=r"m-3\.tar does not exist; give the range"):
        shard(tmp_path / "m-2.tar", 0, 1)
        open_source(tmp_path / "m-{2..3}.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_source(tmp_path / "q-*.tar")


def test_patterns_expand_in_order(tmp_path):
    for name in ("x-08-a.tar", "x-09-a.tar", "x-09-b.tar", "x-10-a.tar"):
        (tmp_path / name).touch()
    paths = expand(f"{tmp_path}/x-{{08..10}}-*.tar")
    assert [Path(path).name for path in paths] == [
        "x-08-a.tar",
        "x-09-a.tar",
        "x-09-b.tar",
        "x-10-a.tar",
    ]


# --- one way each


WAYS = {  # calls that open something, and the files of the room that may make them
    "os.walk": set(),
    "os.scandir": {"files"},
    "files_below": {"stored"},
    "glob.glob": {"stored"},
    "look_into": {"images", "trees"},
    "read_list": {"images"},
    "read_shard": {"tars"},
    "index_tars": {"images", "trees"},
    "tarfile.open": set(),
    "Image.open": {"decode"},
    "decode_rgb": {"decode", "arrays"},
    "decode_channels": {"decode"},
}


def test_folders_lists_shards_and_images_are_opened_in_one_way():
    callers = {name: set() for name in WAYS}
    for path in Path(decode.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in callers:
                callers[called].add(path.stem)
    assert callers == WAYS


# --- scenes and datasets


def test_scenes_by_name():
    source = open_source("scenes", scenes=SceneSet(30, 32, 4))
    assert isinstance(source, Scenes) and len(source) == 30 and source.load(29).size == (32, 32)
    assert isinstance(source, ImageSource)


@pytest.mark.parametrize("kind", ["pillow", "array", "uint8 tensor", "float tensor"])
@pytest.mark.parametrize("labelled", [False, True])
def test_any_dataset(kind, labelled):
    array = np.array(picture())
    planes = torch.from_numpy(array).permute(2, 0, 1)
    image = {
        "pillow": picture(),
        "array": array,
        "uint8 tensor": planes,
        "float tensor": planes / 255,
    }[kind]
    source = DatasetSource([(image, 7, "more") if labelled else image] * 4)
    assert len(source) == 4 and source.label(2) == (7 if labelled else None)
    assert source.load(3).mode == "RGB" and np.array_equal(
        pixels(source.load(3)), pixels(picture())
    )


def test_dataset_of_other_channels_and_wrong_items():
    assert DatasetSource([torch.full((5, 4, 4), 51, dtype=torch.uint8)]).load(
        0
    ).mean() == pytest.approx(0.2)
    with pytest.raises(
        DataError, match=r"item 0: expected a Pillow image, .* got ndarray of shape \[4, 4, 7\]"
    ):
        DatasetSource([np.zeros((4, 4, 7), np.uint8)]).load(0)
    with pytest.raises(DataError, match="a dataset with a length"):
        DatasetSource(iter([]))


def test_broken_file_below_a_dataset_is_skipped():
    class Broken:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            raise OSError("image file is truncated")

    with pytest.raises(UnreadableImage, match="item 0: image file is truncated"):
        DatasetSource(Broken()).load(0)
