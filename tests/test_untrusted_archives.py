"""Shards, .npz files, lists and patterns nobody vouches for."""

import csv
import io
import json
import os
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).parent))  # import-mode=importlib does not add it

import numpy as np
import pytest
from fuzzing import limited
from PIL import Image
from tiny_runs import tiny_recipe

from dinov3core.data import tars
from dinov3core.data.datasets import (
    open_any,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.decode import RGB_SUFFIXES
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import FileSource, open_readable, open_source
from dinov3core.data.scenes import SceneSet
from dinov3core.data.stored import expand
from dinov3core.data.tars import index_tars
from dinov3core.train.engine import loop

TERABYTE = 2**40


def picture(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- tar headers


def member(name: str, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """A ustar header and its data; `size` as written, for sizes that lie."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    if size is not None:
        block[124:136] = size
    return sealed(block) + content + bytes(-len(content) % 512)


def sealed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(value: int) -> bytes:
    return (value % 256**12 | (0x80 << 88 if value >= 0 else 0)).to_bytes(12)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += str(length).encode() + body
    return lines


def opened(path: Path, sentence: str | None = None) -> list[str]:
    """Names of the images of a shard, with a warning of that kind."""
    with limited(5, 64):
        if sentence is None:
            source = FileSource(index_tars([path], RGB_SUFFIXES))
        else:
            with pytest.warns(UserWarning, match=sentence):
                source = FileSource(index_tars([path], RGB_SUFFIXES))
    for index in range(len(source)):
        assert source.load(index).size == (8, 6)
    return [source.name(i).removeprefix(f"{path}/") for i in range(len(source))]


SOUND = member("a.png", picture())
END = bytes(1024)
LAST = member("z.png", picture())


@pytest.mark.parametrize("size", [base_256(-512), base_256(-1024), base_256(-1), b"-0000001000\0"])
def test_negative_sizes_end_the_shard(tmp_path: Path, size: bytes):
    """One of minus its own header made an endless loop that grew by 8 MB/s."""
    path = write(tmp_path / "a.tar", SOUND + member("b.png", size=size) + LAST + END)
    sentence = r"1 of 1 shards end early, such as .*a\.tar; their 1 whole images are used"
    assert opened(path, sentence) == ["a.png"]


@pytest.mark.parametrize("size", [base_256(TERABYTE), base_256(2**87), b"777777777777"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S"])
def test_sizes_beyond_the_end(tmp_path: Path, size: bytes, kind: bytes):
    """Long names of a terabyte were read into memory."""
    path = write(tmp_path / "a.tar", SOUND + member("b.png", kind=kind, size=size) + LAST + END)
    assert opened(path, r"end early.* their 1 whole images are used") == ["a.png"]


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_long_names_have_a_limit(tmp_path: Path, kind: bytes):
    """A sparse file may hold a terabyte of name without taking any space."""
    path = tmp_path / "a.tar"
    size = 10 * 2**30
    path.write_bytes(SOUND + member("././@LongLink", kind=kind, size=base_256(size)))
    with open(path, "r+b") as file:
        file.seek(size, os.SEEK_END)
        file.write(SOUND + LAST + END)
    sentence = r"1 members of the shards are left out, such as .*a\.png: a header of 10,737,418,240"
    assert opened(path, sentence) == ["a.png", "z.png"]


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.png"},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(TERABYTE), "path": "b.png"},
    ],
)
def test_sparse_members_are_left_out_and_counted(tmp_path: Path, records: dict[str, str]):
    body = member("x", pax(**records), b"x") + member("b", picture())
    path = write(tmp_path / "a.tar", SOUND + body + LAST + END)
    sentence = r"1 members of the shards are left out, such as .*a\.tar/b\.png: sparse"
    assert opened(path, sentence) == ["a.png", "z.png"]


def test_old_sparse_headers_go_on_for_blocks(tmp_path: Path):
    block = bytearray(member("b.png", picture(), b"S")[:512])
    block[482] = 1
    more = bytes(504) + b"\1" + bytes(7)
    content = picture() + bytes(-len(picture()) % 512)
    sparse = sealed(block) + more + bytes(512) + content
    path = write(tmp_path / "a.tar", SOUND + sparse + LAST + END)
    assert opened(path, r"b\.png: sparse") == ["a.png", "z.png"]
    endless = write(tmp_path / "b.tar", SOUND + sealed(block) + more * 40)
    assert opened(endless, "end early") == ["a.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"12 path=b.png\n",
        b"0 path=b\n",
        b"99999999999 path=b\n",
        b"path=b\n",
        b"\xb2 a=b\n",
        b"9 size=-1\n",
    ],
)
def test_broken_pax_headers_cost_their_member(tmp_path: Path, content: bytes):
    body = member("x", content, b"x") + member("b.png", picture())
    path = write(tmp_path / "a.tar", SOUND + body + LAST + END)
    assert opened(path, r"b\.png: a broken pax header") == ["a.png", "z.png"]


def test_a_pax_header_of_many_records_takes_linear_time(tmp_path: Path):
    records = b"6 a=b\n" * 170_000
    body = member("x", records, b"x") + member("b.png", picture())
    assert opened(write(tmp_path / "a.tar", body + END)) == ["b.png"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_other_programs_write_is_read_as_tarfile_does(tmp_path: Path, form: int):
    """Long, nested and foreign names, folders, links, times that need pax, odd owners."""
    names = ["a.png", f"{'d' * 80}/{'e' * 80}.png", "./b c.png", "folder/c.png", "\u00e9\u00df.png"]
    if form != tarfile.USTAR_FORMAT:
        names += [f"{'long/' * 60}name.png", "\udcff.png"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture())
            info.mtime = 1e9 + 0.5
            info.uname = "somebody"
            tar.addfile(info, io.BytesIO(picture()))
            link = tarfile.TarInfo(f"{number}.png")
            link.type = tarfile.SYMTYPE
            link.linkname = names[0]
            tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    shard = tars.read_shard(str(path))
    assert [tuple(one) for one in shard.members] == expected
    assert shard.complete and not shard.refused
    assert opened(path) == names


def test_prefixes_sizes_and_checksums_of_old_kinds(tmp_path: Path):
    block = bytearray(member("b\xe9.png", picture())[:512])
    block[345:351] = b"folder"
    block[257:265] = b"ustar\x0000"
    block[124:136] = base_256(len(picture()))
    content = picture() + bytes(-len(picture()) % 512)
    unsigned = sealed(block)
    signed = bytearray(unsigned)
    block[148:156] = b" " * 8
    signed[148:156] = b"%06o\0 " % (sum(block) - 256 * sum(byte > 127 for byte in block))
    path = write(tmp_path / "a.tar", unsigned + content + bytes(signed) + content + END)
    assert opened(path) == ["folder/b\u00e9.png"] * 2


def test_labels_of_shards_are_plain_numbers(tmp_path: Path):
    labels = [b"3", b"9" * 5000, b"\xb2", b"-1", b"99999999999999999999", b"", b" 4\n"]
    body = b""
    for number, text in enumerate(labels):
        body += member(f"{number}.png", picture()) + member(f"{number}.cls", text)
    source = FileSource(index_tars([write(tmp_path / "a.tar", body + END)], RGB_SUFFIXES))
    assert [source.label(i) for i in range(len(labels))] == [3, None, None, None, None, None, 4]


def test_class_numbers_of_shards_have_a_limit(tmp_path: Path):
    body = b"".join(
        member(f"{part}/{n}.png", picture()) + member(f"{part}/{n}.cls", b"999999999")
        for part in ("train", "val")
        for n in range(2)
    )
    path = write(tmp_path / "a.tar", body + END)
    sentence = "class numbers below 1,000,000, got 999,999,999"
    with limited(5, 64), pytest.raises(DataError, match=sentence):
        open_labelled(path)


def test_a_member_has_a_limit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER", 50)
    with pytest.raises(UnreadableImage, match=r"a\.png: \d+ bytes, more than the limit of 50"):
        FileSource(index_tars([write(tmp_path / "a.tar", SOUND + END)], RGB_SUFFIXES)).load(0)


def test_threads_read_the_shard_they_mean(tmp_path: Path, monkeypatch):
    """A descriptor must not be closed, and its number reused, below a thread that reads from it."""
    monkeypatch.setattr(tars, "OPEN_SHARDS", 1)
    paths = [write(tmp_path / f"{n}.tar", member("a.png", picture(n)) + END) for n in range(8)]
    source = FileSource(index_tars(paths, RGB_SUFFIXES))
    order = np.random.default_rng(0).integers(0, len(paths), 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda index: source.load(index).getpixel((0, 0))[0], order))
    assert values == order


def test_shards_that_are_pipes_or_folders(tmp_path: Path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    for pattern, reason in (("a*.tar", "not a regular file"), ("b*.tar", "is a directory")):
        with limited(5, 64), pytest.raises(DataError, match=f"cannot read the shard .*: {reason}"):
            open_source(tmp_path / pattern)


# --- npz


def sound(**changes: object) -> dict[str, object]:
    arrays = {
        "x": np.zeros((3, 4, 4, 3), np.uint8),
        "label": np.array([0, 1, 1]),
        "split": np.array([0, 0, 1]),
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


BYTES = np.frombuffer(picture() * 3, np.uint8)
EACH = len(BYTES) // 3
BYTE_PLANES = np.zeros((3, 1, 4, 4), np.uint8)


def joined(offset: object) -> dict[str, object]:
    return sound(x=None, data=BYTES, offset=offset)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (sound(label=np.array([0, 1, "x"], object)), "without pickles, got expected one array"),
        (sound(label=np.array([0.0, np.nan, 1.0])), r"label: .*integers \[N\], got float64 \[3\]"),
        (sound(label=np.array([[0], [1], [1]])), r"label: .*integers \[N\], got int64 \[3, 1\]"),
        (sound(label=np.array([0, 1, -1])), "expected class numbers from 0 to 999999, got -1 to 1"),
        (sound(label=np.array([0, 1, 2**63], np.uint64)), "999999, got 0 to 9223372036854775808"),
        (sound(label=np.array([0, 1, 10**12])), "from 0 to 999999, got 0 to 1000000000000"),
        (sound(label=np.array(["a", "b", "c"])), r"label: expected integers \[N\], got <U1 \[3\]"),
        (sound(split=np.array([0, np.nan, 1])), r"split: expected integers \[N\], got float64"),
        (sound(split=np.zeros((3, 2), int)), r"split: expected integers \[N\], got int64 \[3, 2\]"),
        (sound(x=np.zeros((3, 4), np.uint8)), r"x: expected numbers \[N, .*, got uint8 \[3, 4\]"),
        (sound(x=np.zeros((3, 4, 0, 0))), "expected images of at least one pixel, got none"),
        (sound(x=np.zeros((3, 4, 4, 3), complex)), "got expected one array of real numbers"),
        (sound(classes=np.array([1, 2])), r"classes: expected names \[K\], got int64 \[2\]"),
        (sound(name=np.array(["a"])), "expected a name for each of the 3 images, got 1"),
        (sound(x=None, hi=BYTE_PLANES), "the keys lo, found only label, split, hi"),
        (
            sound(x=None, hi=BYTE_PLANES, lo=np.zeros((3, 1, 4, 5), np.uint8)),
            r"expected hi and lo of one shape, got \[3, 1, 4, 4\] and \[3, 1, 4, 5\]",
        ),
        (
            sound(x=None, hi=np.zeros((3, 1, 4, 4), np.int16), lo=BYTE_PLANES),
            r"hi: expected bytes \[N, C, H, W\], got int16",
        ),
        (joined([0, EACH, EACH - 1, EACH]), "offset: expected ascending places in"),
        (joined([-5, EACH, 2 * EACH, 3 * EACH]), "offset: expected ascending places in"),
        (joined([0, EACH, 2 * EACH, 9 * EACH]), "offset: expected ascending places in"),
        (joined([0.0, 1.0, 2.0, 3.0]), r"offset: expected integers \[N \+ 1\], got float64"),
        (joined(np.zeros(0, int)), "each of the 0 images, got 3 and 3"),
        ({"other": np.zeros(3)}, "the keys label, split, data, x or hi, found only others"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, object], sentence: str):
    np.savez(tmp_path / "a.npz", **arrays)
    with limited(5, 64), pytest.raises(DataError, match=sentence):
        open_labelled(tmp_path / "a.npz")


def test_arrays_that_nobody_asked_for_are_left_alone(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **sound(notes=np.array([{"a": 1}], object)))
    assert len(open_labelled(tmp_path / "a.npz").train) == 2


def test_images_of_joined_files_that_are_none(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **joined([0, EACH // 2, EACH // 2, 3 * EACH]))
    data = open_labelled(tmp_path / "a.npz")
    for index in range(2):
        with pytest.raises(UnreadableImage):
            data.train.load(index)


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz_with_x(x: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    members = {"x.npy": x}
    for key in ("label", "split"):
        stream = io.BytesIO()
        np.save(stream, np.array([0, 1]))
        members[f"{key}.npy"] = stream.getvalue()
    return zip_of(members, method)


def test_archives_that_expand_too_far(tmp_path: Path):
    content = npz_with_x(npy_header("(2, 4, 4, 3)"))
    size = len(npy_header("(2, 4, 4, 3)"))
    bomb = content.replace(struct.pack("<I", size), struct.pack("<I", 3 * 2**30))
    path = write(tmp_path / "a.npz", bomb)
    sentence = r"bytes that expand to 3,221,225,\d+: expected at most 50 times as many"
    with limited(5, 64), pytest.raises(DataError, match=sentence):
        open_labelled(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (npz_with_x(npy_header("(2, 1000, 100000, 3)")), "an array of 0.6 GB and shape"),
        (npz_with_x(npy_header("(2, 4, 4, 3)")), "an array of 0.0 GB and shape"),
        (npz_with_x(npy_header(f"({10**15}, 4, 4, 3)")), "a broken .npy header"),
        (npz_with_x(npy_header("(2, 4, 4, 3)"), zipfile.ZIP_LZMA), "another method than deflate"),
        (npz_with_x(bytes(300)), "not a .npy file"),
        (npz_with_x(npy_header("(2, 4, 4, 3)") + bytes(96))[:-40], "File is not a zip file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_lie(tmp_path: Path, content: bytes, sentence: str):
    path = write(tmp_path / "a.npz", content)
    with limited(5, 64), pytest.raises(DataError, match=f"expected a readable .*{sentence}"):
        open_labelled(path)


# --- lists


def listed(folder: Path, name: str, content: str | bytes) -> tuple[list[str], list[int | None]]:
    """Paths below the folder, and labels."""
    for image in ("a.png", "b.png", "c.png", "#1.png"):
        write(folder / image, picture())
    path = write(folder / name, content if isinstance(content, bytes) else content.encode())
    with limited(5, 64):
        source = open_source(path)
    names = [os.path.relpath(source.name(i), folder) for i in range(len(source))]
    return names, [source.label(i) for i in range(len(source))]


def test_a_mark_of_byte_order_is_no_part_of_the_first_path(tmp_path: Path):
    assert listed(tmp_path, "l.csv", "\ufeffa.png,3\nb.png,4\n") == (["a.png", "b.png"], [3, 4])
    assert listed(tmp_path, "l.csv", "\ufeffpath,label\na.png,3\n") == (["a.png"], [3])
    assert listed(tmp_path, "l.txt", "\ufeffa.png\n") == (["a.png"], [None])


HEADS = ("path,label", "Image,class", "image_path,label", "id,label", "file.name,label", "name,")


@pytest.mark.parametrize("head", HEADS)
def test_a_header_is_no_image_and_shifts_no_label(tmp_path: Path, head: str):
    assert listed(tmp_path, "l.csv", f"{head}\na.png,3\nb.png,4\n") == (["a.png", "b.png"], [3, 4])


def test_a_header_above_names_without_suffix(tmp_path: Path):
    write(tmp_path / "one", picture())
    assert listed(tmp_path, "l.csv", "id,label\none,3\none,4\n") == (["one", "one"], [3, 4])


def test_a_first_image_that_is_missing_is_no_header(tmp_path: Path):
    assert listed(tmp_path, "l.csv", "gone.png,3\na.png,4\n") == (["gone.png", "a.png"], [3, 4])
    assert listed(tmp_path, "l.txt", "gone\nb.png\n")[0] == ["b.png"]
    with pytest.raises(DataError, match=r"line 1: expected a label .* got none for gone\.png"):
        listed(tmp_path, "l.csv", "gone.png\na.png,4\n")


def test_comments_and_empty_lines(tmp_path: Path):
    content = "# all photographs, of a.png\n\n   \na.png\t3\n#b.png\t9\n\t\n#1.png\t4\n"
    assert listed(tmp_path, "l.txt", content) == (["a.png", "#1.png"], [3, 4])
    assert listed(tmp_path, "l.csv", "# path, label\r\na.png,3\r\n") == (["a.png"], [3])


@pytest.mark.parametrize("name", ["l.txt", "l.csv"])
def test_mixed_ends_of_lines(tmp_path: Path, name: str):
    assert listed(tmp_path, name, "a.png\r\nb.png\nc.png\r")[0] == ["a.png", "b.png", "c.png"]


def test_numbers_that_are_none(tmp_path: Path):
    """The digit of a superscript counts as one for str.isdigit and as none for int."""
    assert listed(tmp_path, "l.csv", "a.png,\u00b2\nb.png,1\n") == (["a.png", "b.png"], [1, 0])
    assert listed(tmp_path, "l.csv", f"a.png,x{'9' * 5000}\nb.png,y\n")[1] == [0, 1]
    for wrong in ("-1", "1.5", "nan", "9" * 5000):
        with pytest.raises(DataError, match="expected class numbers from 0 on, or words, got"):
            listed(tmp_path, "l.csv", f"a.png,0\nb.png,{wrong}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a.png,3\nb.png\n", r"line 2: expected a label for every .* got none for b\.png"),
        ("a.png,3\n,4\n", "line 2: expected a path before the label, got none"),
        (f"a.png,{'x' * csv.field_size_limit()}y\n", r"line 1: .* field larger than field limit"),
        ('a.png,3\n"b.png,4\n' + "c.png,5\n" * 20_000, "a quotation mark that is not closed"),
        ("a.png\nb.png\n".encode("utf-16"), "expected UTF-8 text, got NUL bytes"),
        (b"a.png\n\0\n", "expected UTF-8 text, got NUL bytes"),
        ("# nothing\n", "lists no images"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 90 else "",
)
def test_lists_that_cannot_be_meant(tmp_path: Path, content: str | bytes, sentence: str):
    with pytest.raises(DataError, match=sentence):
        listed(tmp_path, "l.csv", content)


def test_class_names_of_other_bytes(tmp_path: Path):
    for name in (b"\xff", b"b"):
        write(tmp_path / os.fsdecode(name) / "1.png", picture())
        write(tmp_path / os.fsdecode(name) / "2.png", picture())
    assert open_source(tmp_path).class_names == ("b", "\udcff")
    assert len(open_labelled(tmp_path).class_names) == 2


# --- patterns


@pytest.mark.parametrize(
    "pattern", ["x-{0..99999999}.tar", "x-{0..99999999}-{0..99999999}.tar", "x-{0..99999999}-*.tar"]
)
def test_a_range_ends_at_the_first_shard_that_is_missing(tmp_path: Path, pattern: str):
    write(tmp_path / "x-0.tar", SOUND + END)
    for opener in (open_source, open_any):
        with limited(2, 32), pytest.raises(DataError, match="does not exist; give the range"):
            opener(tmp_path / pattern)


def test_ranges_from_high_to_low_and_too_many_of_them(tmp_path: Path):
    with pytest.raises(DataError, match=r"expected a range from low to high, got \{9\.\.0\}"):
        expand(f"{tmp_path}/x-{{9..0}}.tar")
    with limited(2, 32), pytest.raises(DataError, match="does not exist"):
        expand(f"{tmp_path}/{'{0..9}' * 5000}.tar")
    with pytest.raises(DataError, match="does not exist"):
        expand(f"{tmp_path}/x-{{0..{'9' * 5000}}}.tar")


def test_two_ranges_run_like_digits(tmp_path: Path):
    for first in "12":
        for last in ("08", "09", "10"):
            write(tmp_path / f"{first}-{last}.tar", SOUND)
    names = [Path(path).stem for path in expand(f"{tmp_path}/{{1..2}}-{{08..10}}.tar")]
    assert names == ["1-08", "1-09", "1-10", "2-08", "2-09", "2-10"]


# --- masks, depths, videos, texts


def pairs(
    folder: Path,
    mask: bytes,
    side: str = "masks",
    suffix: str = "png",
    **texts: bytes,
) -> Path:
    for number in range(2):
        write(folder / f"images/{number}.png", picture())
        write(folder / f"{side}/{number}.{suffix}", mask)
    for name, content in texts.items():
        write(folder / f"{name}.json", content)
    return folder


def as_tiff(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF")
    return stream.getvalue()


@pytest.mark.parametrize("value", [-1, 2**31 - 1, 70_000])
def test_class_numbers_of_masks(tmp_path: Path, value: int):
    spec = pairs(tmp_path, as_tiff(np.full((6, 8), value, np.int32)), suffix="tif")
    sentence = f"expected class numbers from 0 to 65535, got {value}"
    with limited(5, 64), pytest.raises(DataError, match=sentence):
        open_segmented(spec)


@pytest.mark.parametrize(
    "text",
    [
        b'{"classes": "cat"}',
        b'{"classes": [["a"], {}]}',
        b'{"classes": null}',
        b"[" * 100_000,
        b"[1e5]",
        b'"classes"',
        b"",
        b"9" * 5000,
    ],
    ids=range(8),
)
def test_names_of_classes_are_a_list_of_words(tmp_path: Path, text: bytes):
    with pytest.raises(DataError, match=r'classes\.json: expected \{"classes": \["name", .*, got'):
        open_segmented(pairs(tmp_path, picture(1, "L"), classes=text))


def test_texts_have_a_limit(tmp_path: Path):
    spec = pairs(tmp_path, picture(1, "L"), classes=json.dumps(["a" * 2**24]).encode())
    sentence = r"classes\.json: expected at most 16,777,216 bytes"
    with limited(5, 128), pytest.raises(DataError, match=sentence):
        open_segmented(spec)


def test_videos_of_very_many_objects(tmp_path: Path):
    numbers = np.arange(48 * 36).reshape(36, 48).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(numbers).save(stream, "PNG")
    for frame in range(2):
        write(tmp_path / f"bear/{frame}.jpg", picture(size=(48, 36)))
        write(tmp_path / f"bear/{frame}.png", stream.getvalue())
    with pytest.raises(DataError, match="bear: expected masks of up to 254 objects, got 1726"):
        open_videos(tmp_path).load(0)


def test_depths_that_lie(tmp_path: Path):
    spec = pairs(tmp_path / "a", npy_header("(100000, 100000)", "<f4"), "depth", "npy")
    sentence = r"an array of 40\.0 GB and shape \[100000, 100000\]"
    with limited(5, 64), pytest.raises(UnreadableImage, match=sentence):
        open_ranged(spec).train.load(0)
    spec = pairs(tmp_path / "b", npy_header("(0, 0)", "<f4"), "depth", "npy")
    with pytest.raises(UnreadableImage, match="0 x 0 pixels, expected at least one"):
        open_ranged(spec).train.load(0)


# --- a whole source


def test_a_source_of_which_nothing_can_be_read_says_so(tmp_path: Path):
    for number in range(5):
        write(tmp_path / f"{number}.png", b"no image")
    with pytest.raises(DataError) as caught:
        open_readable(tmp_path)
    reasons = "; ".join(f"{tmp_path}/{number}.png: not an image file" for number in range(3))
    start = f"none of the 5 images of {tmp_path} can be read, such as"
    assert str(caught.value) == f"{start} {reasons}; is this the right source?"
    for number in range(5, 100):
        write(tmp_path / f"{number:02}.png", b"no image")
    with pytest.raises(DataError, match=r"none of 64 tried of the 100 images of"):
        open_readable(tmp_path)


def test_what_was_found_and_how_long_it_took(tmp_path: Path):
    for number in range(5):
        write(tmp_path / f"{number}.png", picture() if number == 3 else b"no image")
    source, sentence = open_readable(tmp_path)
    assert len(source) == 5
    assert sentence == f"images: 5 in {tmp_path}, found in 0.0 s"
    assert open_readable("scenes", scenes=SceneSet(30))[1].startswith(
        "images: 30 in scenes, found in "
    )


def test_a_run_says_what_it_found_and_does_not_blame_its_probe(tmp_path: Path, monkeypatch, capsys):
    running = MagicMock()
    monkeypatch.setattr(loop, "Loop", running)
    for number in range(3):
        write(tmp_path / f"images/{number}.png", picture())
    recipe = tiny_recipe()
    data = replace(recipe.data, source=str(tmp_path / "images"), probe="none")
    recipe = replace(recipe, data=data)
    loop.pretrain(recipe)
    assert f"images: 3 in {tmp_path}/images, found in 0.0 s\n" in capsys.readouterr().err
    assert len(running.call_args.args[2]) == 3
    for number in range(3):
        write(tmp_path / f"images/{number}.png", b"no image")
    with pytest.raises(DataError, match=r"none of the 3 images of .*images can be read, such"):
        loop.pretrain(recipe)


def test_a_word_that_is_no_folder_is_shown_as_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_source("images")
    assert str(caught.value) == (
        f"images (that is {tmp_path}/images) does not exist; expected scenes, a folder, a .txt "
        "or .csv list, or .tar shards"
    )


@pytest.mark.parametrize("spec", ["~nobody-by-this-name/x", "a\0b", "a" * 5000, "x" + "/y" * 3000])
@pytest.mark.parametrize("opener", [open_source, open_any, open_segmented])
def test_names_that_cannot_be(spec: str, opener: Callable[[str], object]):
    with pytest.raises(DataError) as caught:
        opener(spec)
    assert str(caught.value).isprintable()
