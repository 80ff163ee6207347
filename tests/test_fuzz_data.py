"""Damaged images, arrays, shards, .npz files, lists and data sets: a sound value, or a sentence."""

import csv
import io
import json
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # import-mode=importlib does not add it

import numpy as np
import pytest
import torch
from fuzzing import Outcome, campaign
from PIL import Image

from dinov3core.data.datasets import (
    DataOptions,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.decode import PixelFormat
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import FileSource, ImageSource, open_source
from dinov3core.data.labelled import IGNORE, PairSource
from dinov3core.data.stored import PathFiles

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow and the shards say what they left out

Reader = Callable[[Path], None]
REFUSALS = (DataError, UnreadableImage)
SIDE = 24
RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).resize((40, 30))
NUMBERS = Image.fromarray((np.arange(30 * 40) % 3).astype(np.uint8).reshape(30, 40))
DEPTH = Image.fromarray(RNG.integers(500, 9000, (30, 40)).astype(np.uint16))
BANDS = RNG.integers(0, 10_000, (4, 30, 40)).astype(np.uint16)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
CMYK = PHOTO.convert("CMYK")
RGBA = PHOTO.convert("RGBA")
PAGES = {"save_all": True, "append_images": [NUMBERS] * 3}
IMAGES = {
    "a.jpg": encoded(PHOTO, "JPEG", exif=TURNED),
    "b.jpg": encoded(CMYK, "JPEG", progressive=True),
    "a.png": encoded(RGBA, "PNG", exif=TURNED),
    "b.png": encoded(PHOTO.quantize(16), "PNG", transparency=3),
    "c.png": encoded(DEPTH, "PNG"),
    "a.webp": encoded(RGBA, "WEBP"),
    "a.bmp": encoded(PHOTO.convert("P"), "BMP"),
    "a.gif": encoded(PHOTO, "GIF", save_all=True, append_images=[RGBA]),
    "a.tif": encoded(RGBA, "TIFF", compression="tiff_adobe_deflate"),
    "b.tif": encoded(DEPTH, "TIFF"),
    "a.ppm": encoded(PHOTO, "PPM"),
    "a.jp2": encoded(PHOTO, "JPEG2000"),
}
ARRAYS = {
    "a.npy": as_npy(BANDS),
    "b.npy": as_npy(np.asfortranarray(BANDS.transpose(1, 2, 0) / 9999)),
    "a.png": encoded(RGBA, "PNG"),
    "a.tif": encoded(NUMBERS, "TIFF", compression="tiff_lzw", **PAGES),
}
NPY_WORDS = (b"'|O'", b"'<f8'", b"-1", b"(0, 0)", b"True", b"9" * 30, b"(" * 300, b"'<U9'", b"}")
LIST_WORDS = (b'"', b",", b"\t", b"\0", b"\r", b"\n#", b"\xef\xbb\xbf", b"\xb2", b"-1", b"9" * 5000)
TREE_WORDS = (b"[" * 5000, b"null", b'"', b"{}", b"9" * 5000, b"1e999", b"\xff\xfe")


def check_rgb(source: ImageSource, index: int) -> None:
    image = source.load(index)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    assert min(image.size) > 0 and np.asarray(image).shape == (*image.size[::-1], 3)


def skipping(check: Callable[[int], None], count: int) -> None:
    """As training does: images that cannot be read are refused one by one."""
    refused: list[UnreadableImage] = []
    for index in range(count):
        try:
            check(index)
        except UnreadableImage as error:
            refused.append(error)
    if count and len(refused) == count:
        raise refused[0]


def read_image(path: Path) -> None:
    check_rgb(FileSource(PathFiles([path])), 0)


def read_array(path: Path) -> None:
    planes = FileSource(PathFiles([path]), PixelFormat(4)).load(0)
    assert planes.dtype == torch.float32 and planes.ndim == 3
    assert planes.shape[0] == 4 and planes.numel()
    assert planes.isfinite().all() and 0 <= planes.min() and planes.max() <= 1


def read_source(path: Path) -> None:
    source = open_source(path)
    assert len(source)
    for index in range(len(source)):
        label = source.label(index)
        assert label is None or 0 <= label < 10**9
        assert "\n" not in str(UnreadableImage(source.name(index), ""))
    skipping(lambda index: check_rgb(source, index), min(len(source), 20))


def mended_png(content: bytes) -> bytes:
    """With checksums for the chunks as they are now; other files as they are."""
    if content[:8] != IMAGES["a.png"][:8]:
        return content
    parts = [content[:8]]
    position = 8
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4])
        body = content[position + 4 : position + 8 + length]
        if position + 12 + length > len(content):
            break
        parts.append(content[position : position + 4] + body + struct.pack(">I", zlib.crc32(body)))
        position += 12 + length
    return b"".join(parts) + content[position:]


def assert_both(outcome: Outcome) -> None:
    assert outcome.accepted and outcome.refused, f"a campaign that tells nothing: {outcome}"


def test_images(tmp_path: Path):
    outcome = campaign(IMAGES, read_image, UnreadableImage, tmp_path, files=360, seal=mended_png)
    assert_both(outcome)


def test_arrays(tmp_path: Path):
    options = {"words": NPY_WORDS, "seal": mended_png}
    assert_both(campaign(ARRAYS, read_array, UnreadableImage, tmp_path, files=200, **options))


# --- shards


def tar_of(members: dict[str, bytes], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1e9 + 0.5
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue().rstrip(b"\0") + bytes(2048)  # without the padding of tapes


def mended_tar(content: bytes) -> bytes:
    """With an extreme size or kind in one header, which damage seldom meets, and its checksum."""
    draw = zlib.crc32(content)
    blocks = [bytearray(content[i : i + 512]) for i in range(0, len(content), 512)]
    headers = [block for block in blocks if block[257:262] == b"ustar" and len(block) == 512]
    if headers:
        chosen = headers[draw % len(headers)]
        chosen[124:136] = SIZES[draw // 8 % len(SIZES)]
        chosen[156:157] = KINDS[draw // 64 % len(KINDS)]
    for block in headers:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


SIZES = (
    b"\xff" * 10 + b"\xfe\0",  # -512 in base 256
    b"\xff" * 12,
    b"\x80" + bytes(5) + b"\1" + bytes(5),  # a terabyte
    b"77777777777\0",
    b"00000000000\0",
    b"-0000001000\0",
)
KINDS = (b"0", b"0", b"L", b"K", b"x", b"g", b"S", b"5")


def test_shards(tmp_path: Path):
    small = encoded(PHOTO.resize((8, 6)), "PNG")
    members = {"a.png": small, "a.cls": b"3", f"{'long/' * 40}b.png": small, "b.cls": b"1"}
    samples = {f"{form}.tar": tar_of(members, form) for form in (0, 1, 2)}
    options = {"words": [*SIZES, b"GNU.sparse."], "seal": mended_tar, "seconds": 2}
    assert_both(campaign(samples, read_source, REFUSALS, tmp_path, files=300, **options))


# --- npz


def npz_of(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def mended_zip(content: bytes) -> bytes:
    """With checksums for the members as they are now."""
    patched = bytearray(content)
    position = content.find(b"PK\1\2")
    while position >= 0 and position + 46 <= len(content):
        length = int.from_bytes(content[position + 20 : position + 24], "little")
        local = int.from_bytes(content[position + 42 : position + 46], "little")
        names = struct.unpack("<HH", content[local + 26 : local + 30].ljust(4, b"\0"))
        start = local + 30 + sum(names)
        checksum = struct.pack("<I", zlib.crc32(content[start : start + length]))
        patched[position + 16 : position + 20] = checksum
        if local + 18 <= len(content):
            patched[local + 14 : local + 18] = checksum
        position = content.find(b"PK\1\2", position + 4)
    return bytes(patched)


def read_npz(path: Path) -> None:
    data = open_labelled(path, DataOptions(channels=4))
    for source in data[:2]:
        for index in range(len(source)):
            assert 0 <= source.label(index) < len(data.class_names)
            assert source.name(index)
        skipping(lambda index, source=source: check_any(source.load(index)), len(source))


def check_any(image: Image.Image | torch.Tensor) -> None:
    if isinstance(image, Image.Image):
        assert image.mode == "RGB" and min(image.size) > 0
    else:
        assert image.ndim == 3 and image.numel() and image.isfinite().all()


def test_npz(tmp_path: Path):
    tags = {
        "label": np.array([0, 1, 1, 0]),
        "split": np.array([0, 0, 1, 1]),
        "classes": np.array(["a", "b"]),
    }
    small = encoded(PHOTO.resize((8, 6)), "JPEG")
    joined = np.frombuffer(small * 4, np.uint8)
    planes = RNG.integers(0, 256, (2, 4, 4, 6, 8)).astype(np.uint8)
    samples = {
        "data.npz": npz_of({"data": joined, "offset": np.arange(5) * len(small), **tags}),
        "x.npz": npz_of({"x": RNG.random((4, 4, 6, 8), np.float32), **tags}),
        "hi.npz": npz_of({"hi": planes[0], "lo": planes[1], **tags}),
    }
    assert zipfile.ZipFile(io.BytesIO(mended_zip(samples["x.npz"]))).testzip() is None
    options = {"words": NPY_WORDS, "seal": mended_zip}
    assert_both(campaign(samples, read_npz, REFUSALS, tmp_path, files=240, **options))


# --- lists and data sets


def test_lists(tmp_path: Path):
    for name in ("a.png", "b.png", "c, d.png", "#1.png"):
        (tmp_path / name).write_bytes(encoded(PHOTO.resize((8, 6)), "PNG"))
    samples = {
        "words.csv": b'path,label\na.png,cat\n"c, d.png",dog\nb.png,cat\n',
        "numbers.csv": b"\xef\xbb\xbfa.png,3\r\nb.png,2\r\n",
        "plain.txt": b"# two images\na.png\n#1.png\nb.png\n",
        "tabs.txt": b"a.png\t3\nc, d.png\t1\n",
    }
    words = (*LIST_WORDS, b"x" * csv.field_size_limit())
    assert_both(campaign(samples, read_source, REFUSALS, tmp_path, files=400, words=words))


DATA_SET = {
    "images/0.jpg": encoded(PHOTO, "JPEG"),
    "images/1.jpg": encoded(PHOTO, "JPEG"),
    "masks/0.png": encoded(NUMBERS, "PNG"),
    "masks/1.png": encoded(NUMBERS.convert("P"), "PNG"),
    "depth/0.png": encoded(DEPTH, "PNG"),
    "depth/1.npy": as_npy(np.asarray(DEPTH, np.float32) / 1000),
    "classes.json": json.dumps({"classes": ["a", "b", "c"]}).encode(),
}


def check_pairs(source: PairSource, index: int, classes: int | None) -> None:
    image, target = source.load(index)
    assert image.mode == "RGB" and tuple(target.shape) == (image.height, image.width)
    if classes is None:
        assert target.dtype == torch.float32
    else:
        assert target.dtype == torch.int64
        assert ((target >= 0) & (target < classes) | (target == IGNORE)).all()


def in_data_set(root: Path, read: Reader, names: list[str]) -> Reader:
    """Put a damaged file, by its name with __ for slashes, into a sound data set and read that."""

    def put_and_read(path: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(DATA_SET[name])
        shutil.copy(path, root / path.name.replace("__", "/"))
        read(root)

    return put_and_read


def read_segmented(root: Path) -> None:
    data = open_segmented(root)
    for source in data[:2]:
        check_pairs(source, 0, len(data.class_names))


def read_ranged(root: Path) -> None:
    for source in open_ranged(root)[:2]:
        check_pairs(source, 0, None)


def read_videos(root: Path) -> None:
    videos = open_videos(root)
    for index in range(len(videos)):
        video = videos.load(index)
        assert len(video.frames) == len(video.masks) > 0
        assert all(mask.min() >= 0 for mask in video.masks)


@pytest.mark.parametrize(
    ("read", "side"),
    [(read_segmented, "masks"), (read_ranged, "depth"), (read_videos, "masks")],
)
def test_data_sets(tmp_path: Path, read: Reader, side: str):
    names = [name for name in DATA_SET if name.startswith(("images", side, "classes"))]
    samples = {name.replace("/", "__"): DATA_SET[name] for name in names}
    reader = in_data_set(tmp_path / "set", read, names)
    options = {"words": TREE_WORDS, "seal": mended_png}
    assert_both(campaign(samples, reader, REFUSALS, tmp_path, files=100, **options))
