"""Image files nobody vouches for: other formats, pipes, loops of links, bombs, arrays that lie."""

import io
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # import-mode=importlib does not add it

import numpy as np
import pytest
import torch
from fuzzing import limited
from PIL import Image

from dinov3core import extract
from dinov3core.data import decode
from dinov3core.data.datasets import open_any, open_labelled, open_segmented
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import DatasetSource, FileSource, open_source
from dinov3core.evals.cache import Embedded, identity, read_embedded, write_embedded
from dinov3core.evals.feature_file import FeatureFile

BIG = 8940  # a side: as many pixels as are allowed
SIDE = 3000  # of images whose memory is measured
NOBODY = 65_534


def refusal(path: Path, channels: int = 3, seconds: float = 5.0, megabytes: int = 64) -> str:
    """Why a file is not read."""
    with limited(seconds, megabytes), pytest.raises(UnreadableImage) as caught:
        FileSource([path], channels=channels).load(0)
    assert str(caught.value).isprintable()
    return caught.value.reason


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black PNG; colour 0 grey, 2 RGB, 3 palette, 6 RGBA."""
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = bytes(1 + (width * depth * samples + 7) // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


# --- formats


OUR_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "MPO")
OTHER_FORMATS = ("EPS", "ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "MSP", "SPIDER", "XBM")


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats_are_not_even_tried(tmp_path: Path, kind: str):
    """An EPS would start Ghostscript."""
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    content = encoded(Image.new(mode, (16, 16)), kind)
    for name, channels in (("a.jpg", 3), ("a.png", 1)):
        assert refusal(write(tmp_path / name, content), channels) == "not an image file"
    write(tmp_path / "set/images/a.jpg", content)
    for number in range(2):
        write(tmp_path / f"set/masks/{'ab'[number]}.png", content)
        write(tmp_path / f"set/images/{'ab'[number]}.jpg", content)
    write(tmp_path / "set/classes.json", b'["a", "b"]')
    data = open_segmented(tmp_path / "set")
    for read in (data.train.load, data.train.target):
        with pytest.raises(UnreadableImage, match="not an image file"):
            read(0)


@pytest.mark.parametrize("kind", OUR_FORMATS)
def test_every_format_by_any_of_our_suffixes(tmp_path: Path, kind: str):
    path = write(tmp_path / "a.png", encoded(Image.new("RGB", (20, 10), "teal"), kind))
    assert FileSource([path]).load(0).size == (20, 10)


# --- what is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{place}/{path.name}")  # paths of sockets are short
    os.close(place)


@pytest.mark.parametrize("make", [pipe, endless_device, listening_socket])
@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_what_is_no_regular_file_is_not_opened(
    tmp_path: Path,
    make: Callable[[Path], None],
    name: str,
):
    make(tmp_path / name)
    assert refusal(tmp_path / name, 1) in ("not a regular file", "no such device or address")


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "shard.tar", "set.npz"])
def test_lists_and_archives_are_regular_files_too(tmp_path: Path, name: str):
    pipe(tmp_path / name)
    with limited(5, 64), pytest.raises(DataError, match="not a regular file"):
        open_any(tmp_path / name)


def test_a_pipe_among_the_images_and_texts_of_a_data_set(tmp_path: Path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        write(tmp_path / name, encoded(Image.new("RGB", (4, 4)), "PNG"))
    pipe(tmp_path / "a/0.png")
    with limited(5, 64):
        data = open_labelled(tmp_path)
        assert sum(map(len, data[:2])) == 5
    for name in ("images/1.png", "masks/1.png", "images/2.png", "masks/2.png"):
        write(tmp_path / "pairs" / name, encoded(Image.new("L", (4, 4)), "PNG"))
    pipe(tmp_path / "pairs/classes.json")
    sentence = r"cannot read classes\.json: not a regular file"
    with limited(5, 64), pytest.raises(DataError, match=sentence):
        open_segmented(tmp_path / "pairs")


# --- folders


def test_a_loop_of_links_adds_no_image(tmp_path: Path):
    write(tmp_path / "set/cat/a.png", encoded(Image.new("RGB", (4, 4)), "PNG"))
    write(tmp_path / "set/dog/b.png", encoded(Image.new("RGB", (4, 4)), "PNG"))
    (tmp_path / "set/cat/up").symlink_to("..")
    (tmp_path / "set/dog/self").symlink_to("self")
    source = open_source(tmp_path / "set")
    assert len(source) == 2 and source.class_names == ("cat", "dog")
    assert len(open_any(tmp_path / "set")) == 2


def test_a_folder_by_two_names_counts_twice(tmp_path: Path):
    for name in ("cat/a.png", "dog/b.png"):
        write(tmp_path / "train" / name, encoded(Image.new("RGB", (4, 4)), "PNG"))
    (tmp_path / "val").symlink_to("train")
    assert len(open_source(tmp_path)) == 4
    assert [len(part) for part in open_labelled(tmp_path)[:2]] == [2, 2]


def test_links_that_double_at_every_level_end(tmp_path: Path):
    for level in range(30):
        (tmp_path / f"{level}").mkdir()
        for side in "ab":
            (tmp_path / f"{level}" / side).symlink_to(tmp_path / f"{level + 1}")
    write(tmp_path / "30/a.png", encoded(Image.new("RGB", (4, 4)), "PNG"))
    sentence = r"cannot be read, such as .*: linked more than 8 times; what they hold is left out"
    with limited(10, 64), pytest.warns(UserWarning, match=sentence):
        assert 1 <= len(open_source(tmp_path / "0")) <= 8


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, whom no permission stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that everybody may enter, as the parents of tmp_path are private."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("opener", [open_source, open_any])
def test_a_folder_without_permission_is_named(open_folder: Path, opener):
    (open_folder / "private").mkdir(mode=0o700)
    write(open_folder / "private/below/a.png", encoded(Image.new("RGB", (4, 4)), "PNG"))
    os.chmod(open_folder / "private", 0)
    with as_nobody():
        with pytest.raises(DataError, match=r"cannot read the folder .*private: permission denied"):
            opener(open_folder / "private")
        with pytest.raises(DataError, match=r"cannot look at .*below: permission denied"):
            opener(open_folder / "private/below")


@pytest.mark.parametrize("opener", [open_source, open_any])
def test_a_folder_below_without_permission_is_counted(open_folder: Path, opener):
    for name in ("a/1.png", "private/2.png"):
        write(open_folder / name, encoded(Image.new("RGB", (4, 4)), "PNG"))
    os.chmod(open_folder / "private", 0)
    sentence = r"1 folders below .* cannot be read, such as .*private: permission denied; what they"
    with as_nobody(), pytest.warns(UserWarning, match=sentence):
        assert len(opener(open_folder)) == 1


def test_names_that_would_break_a_line_are_shown_escaped(tmp_path: Path):
    path = write(tmp_path / "a\nb\x1b[31m\udcff.png", b"no image")
    with pytest.raises(UnreadableImage) as caught:
        open_source(tmp_path).load(0)
    assert str(caught.value) == f"{tmp_path}/a\\nb\\x1b[31m\\xff.png: not an image file"
    assert caught.value.name == str(path)
    with pytest.raises(DataError) as refused:
        open_source(tmp_path / "no\nwhere")
    assert str(refused.value).isprintable()


# --- bombs


@pytest.mark.parametrize(
    ("depth", "colour", "channels", "gigabytes"),
    [(16, 6, 4, "1.92"), (8, 6, 4, "1.92"), (8, 2, 3, "")],
)
def test_memory_is_counted_before_it_is_taken(
    tmp_path: Path,
    depth: int,
    colour: int,
    channels: int,
    gigabytes: str,
):
    """616 KB of RGBA at 16 bits took 4.2 GB."""
    content = png(1, 1, depth, colour)
    header = struct.pack(">II", BIG, BIG) + content[24:29]
    bomb = content[:8] + chunk(b"IHDR", header) + content[33:]
    why = refusal(write(tmp_path / "a.png", bomb), channels, megabytes=400)
    if gigabytes:
        assert why.startswith(f"takes {gigabytes} GB to decode, more than the limit of 1.07 GB")
    else:
        assert "GB" not in why  # as many pixels as RGB may have


def tiff_with_a_tile_of(side: int) -> bytes:
    """8 x 8 pixels in one tile of side x side, deflated."""
    packer = zlib.compressobj(1)
    row = bytes(4 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    bits, after = 8 + 2 + 12 * 12 + 4, 8 + 2 + 12 * 12 + 4 + 8
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 4, bits), (259, 3, 1, 8), (262, 3, 1, 2)]
    tags += [(277, 3, 1, 4), (284, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side)]
    tags += [(324, 4, 1, after), (325, 4, 1, len(data)), (338, 3, 1, 2)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return start + entries + bytes(4) + struct.pack("<4H", 8, 8, 8, 8) + data


def test_a_tile_may_not_be_much_larger_than_its_image(tmp_path: Path):
    assert FileSource([write(tmp_path / "a.tif", tiff_with_a_tile_of(16))]).load(0).size == (8, 8)
    path = write(tmp_path / "b.tif", tiff_with_a_tile_of(12_000))
    assert refusal(path).startswith("takes 1.15 GB to decode")


def progressive_jpeg_with(scans: int) -> bytes:
    content = encoded(Image.new("RGB", (64, 64), "teal"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def test_scans_of_a_jpeg_are_counted(tmp_path: Path):
    """2,000 scans of 94 bytes each took 13 s at 177 million pixels."""
    path = write(tmp_path / "a.jpg", progressive_jpeg_with(20))
    assert FileSource([path]).load(0).size == (64, 64)
    path = write(tmp_path / "b.jpg", progressive_jpeg_with(300))
    assert refusal(path) == "a JPEG of 309 scans, more than the limit of 100"


def test_text_of_a_png_is_not_expanded_without_bound(tmp_path: Path):
    text = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1)
    bomb = png(8, 8, 8, 2, (b"zTXt", text), (b"iCCP", text))
    path = write(tmp_path / "a.png", bomb)
    with limited(5, 64):
        try:
            FileSource([path]).load(0)
        except UnreadableImage as error:
            assert "too large" in error.reason


def black(mode: str, kind: str, **options) -> Callable[[], bytes]:
    return lambda: encoded(Image.new(mode, (SIDE, SIDE)), kind, **options)


TURNED = Image.Exif()
TURNED[0x0112] = 6
GREEDY = {
    "rgb.png": black("RGB", "PNG", exif=TURNED),
    "rgba.png": black("RGBA", "PNG", exif=TURNED),
    "rgba16.png": lambda: png(SIDE, SIDE, 16, 6),
    "grey16.png": lambda: png(SIDE, SIDE, 16, 0),
    "palette.png": lambda: png(SIDE, SIDE, 8, 3, (b"PLTE", bytes(768)), (b"tRNS", bytes(256))),
    "alpha.webp": black("RGBA", "WEBP", lossless=True, method=0),
    "rgb.jp2": black("RGB", "JPEG2000"),
    "int.tif": black("I", "TIFF", compression="tiff_adobe_deflate"),
    "cmyk.jpg": black("CMYK", "JPEG", progressive=True),
}


@pytest.mark.parametrize("name", GREEDY)
def test_no_more_memory_is_taken_than_was_counted(tmp_path: Path, name: str, monkeypatch):
    path = write(tmp_path / name, GREEDY[name]())
    counted: list[int] = []
    monkeypatch.setattr(decode, "MAX_BYTES", _Recorder(counted))
    band = 30 * decode.BAND_PIXELS / 1e6
    FileSource([path]).load(0)  # once, so that the decoder is loaded
    with limited(30, int(max(counted) / 1e6 + band)):
        FileSource([path]).load(0)
    assert max(counted) <= 30 * SIDE * SIDE


class _Recorder(int):
    """A limit nothing exceeds, that notes what it is compared with."""

    def __new__(cls, counted: list[int]):
        return super().__new__(cls, 2**62)

    def __init__(self, counted: list[int]):
        self.counted = counted

    def __lt__(self, size: int) -> bool:
        self.counted.append(size)
        return False


def test_conversion_in_bands_changes_no_pixel(monkeypatch):
    """Also where a band ends within a row of values below 256 in an image that goes beyond."""
    values = np.arange(37 * 23).reshape(23, 37)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (23, 37, 4), dtype=np.uint8))
    images = [noise, noise.convert("LA"), noise.convert("RGB").quantize(16), noise.convert("CMYK")]
    images += [Image.fromarray((values * top).astype(np.int32)) for top in (1, 40)]
    images += [Image.fromarray((values * 70).astype(np.uint16))]
    images[2].info["transparency"] = 3
    whole = [np.asarray(decode.to_rgb(image, "")) for image in images]
    monkeypatch.setattr(decode, "BAND_PIXELS", 100)
    for image, expected in zip(images, whole):
        assert np.array_equal(np.asarray(decode.to_rgb(image, "")), expected)


def test_sixteen_bits_are_rounded_to_the_nearest():
    values = np.arange(65536).astype(np.uint16)[None]
    rgb = np.asarray(decode.to_rgb(Image.fromarray(values), ""))[0, :, 0]
    assert np.array_equal(rgb, np.rint(np.arange(65536) / 257))


def test_frames_are_of_one_size_and_of_the_number_asked_for(tmp_path: Path):
    small, large = (Image.new("L", (side, side)) for side in (8, 30))
    small.save(tmp_path / "a.tif", save_all=True, append_images=[small, large])
    assert refusal(tmp_path / "a.tif", 4) == "expected 4 channels, got an array of shape [8, 8]"
    small.save(tmp_path / "b.tif", save_all=True, append_images=[small, small, large])
    assert refusal(tmp_path / "b.tif", 4) == "frames of different sizes, (8, 8) and (30, 30)"


# --- arrays


def npy(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(1, 4, 4)") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def test_suffixes_in_capitals(tmp_path: Path):
    np.save(write(tmp_path / "a.npy", b""), np.ones((4, 2, 3)))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert open_source(tmp_path, channels=4).load(0).shape == (4, 2, 3)


@pytest.mark.parametrize("shape", [(4, 0, 0), (4, 0, 7), (4, 7, 0), (0, 7, 4)])
def test_arrays_without_pixels(tmp_path: Path, shape: tuple[int, ...]):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert "pixel" in refusal(tmp_path / "a.npy", 4)


def test_items_of_a_dataset_without_pixels():
    with pytest.raises(UnreadableImage, match="at least one pixel"):
        DatasetSource([np.zeros((0, 4, 3), np.uint8)]).load(0)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy(header().replace(b"}", b"")), "a broken .npy header"),  # tokenize.TokenError
        (npy(b"(" * 5000), "a broken .npy header"),
        (npy(b"{'descr': '<f4'}"), "a broken .npy header"),
        (npy(b"[" * 60_000), "a .npy header of 60,000 bytes"),
        (npy(header(shape="(1, -4, -4)")), "a broken .npy header"),
        (npy(header(shape="(1, 4.0, 4)")), "a broken .npy header"),
        (npy(header(shape="(True, 4, 4)")), "a broken .npy header"),
        (npy(header(shape="4")), "a broken .npy header"),
        (npy(header(descr="'no type'")), "a broken .npy header"),
        (npy(header(descr="[('a', '<f4')]")), "a broken .npy header"),
        (npy(header(order="1")), "a broken .npy header"),
        (npy(header(shape="(1, 1000000, 1000000)")), "an array of 4000.0 GB"),
        (npy(header(shape=f"({10**30}, 4, 4)")), "a broken .npy header"),
        (npy(header(shape="(1, 11000, 11000)")), "the file ends after 0 of the 484000000 bytes"),
        (npy(header(descr="'|O'")), "expected one array of real numbers, got a pickle"),
        (npy(header(descr="'<c8'"), bytes(128)), "expected one array of real numbers, got complex"),
        (npy(header(descr="'<U0'")), "expected one array of real numbers"),
        (npy(header(), bytes(63)), "the file ends after 63 of the 64 bytes"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4, "a .npy header of 4,294,967,295 bytes"),
        (b"\x93NUMPY\x09\x00" + bytes(200), "not a .npy file"),
        (b"\x93NUM", "not a .npy file"),
        (b"", "not a .npy file"),
        (npy(header(), struct.pack("<f", np.nan) * 16), "the array holds NaN or Inf"),
        (npy(header("'<f8'"), struct.pack("<d", 1e300) * 16), "the array holds NaN or Inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_lie(tmp_path: Path, content: bytes, why: str):
    assert refusal(write(tmp_path / "a.npy", content), 1).startswith(why)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<u2", ">u2", "|u1", "|b1", "<f8", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_sound_arrays_of_any_type_and_order(
    tmp_path: Path,
    dtype: str,
    order: str,
    version: tuple[int, int],
):
    values = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 5, 4)), dtype, order=order)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, values, version=version)
    read = FileSource([tmp_path / "a.npy"], channels=4, scale=1).load(0)
    assert np.array_equal(read.permute(1, 2, 0).numpy(), values.astype(np.float32))


def test_the_feature_cache_knows_images_it_cannot_read(tmp_path: Path):
    pipe(tmp_path / "a.png")
    with limited(5, 64):
        assert len(identity(open_source(tmp_path))) == 64


def test_images_read_in_tiles_are_of_our_formats_and_regular_too(tmp_path: Path):
    write(tmp_path / "a.jpg", encoded(Image.new("RGB", (16, 16)), "EPS"))
    pipe(tmp_path / "b.jpg")
    settings = extract.Extraction(str(tmp_path), "weights", tmp_path / "out", tile=16)
    for name, why in (("a.jpg", "not an image file"), ("b.jpg", "not a regular file")):
        with limited(5, 64), pytest.raises(UnreadableImage, match=why):
            extract._planes(FileSource([tmp_path / name]), 0, settings)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"work": 1}', "\xff"])
def test_damaged_progress_of_an_extraction_is_one_sentence(tmp_path: Path, text: str):
    write(tmp_path / "a.progress", text.encode("latin1"))
    write(tmp_path / "a.partial", b"")
    with pytest.raises(ValueError, match="expected an unfinished file of the same images"):
        FeatureFile(tmp_path / "a", {"x": (torch.float32, [1, 1])}, {})


def test_a_damaged_cache_of_features_is_computed_again(tmp_path: Path):
    columns = (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), torch.arange(2))
    write_embedded(Embedded(*columns, ["a: broken"]), tmp_path / "a.safetensors")
    assert read_embedded(tmp_path / "a.safetensors").unreadable == ["a: broken"]
    content = (tmp_path / "a.safetensors").read_bytes()
    damaged = content.replace(b'[\\"a: broken\\"]', b'[\\"a: broken\\",')
    assert damaged != content
    assert read_embedded(write(tmp_path / "b.safetensors", damaged)) is None
