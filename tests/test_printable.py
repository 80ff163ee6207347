"""Names with line breaks, terminal escapes and other bytes than UTF-8 in whole runs and pages."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

from test_report import Page
from tiny_runs import tiny_command

from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.pictures.page import write
from dinov3core.printable import printable
from dinov3core.train.engine.report import write_report

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "",
    "PYTHONIOENCODING": "utf-8:strict",
}

NAMES = {
    b"plain": "plain",
    "caf\xe9 \u65e5\u672c".encode(): "caf\xe9 \u65e5\u672c",
    b"latin \xff\xe9": r"latin \xff\xe9",
    b"two\nlines": r"two\nlines",
    b"\x1b[31mred\x07": r"\x1b[31mred\x07",
    "turned \u202e round".encode(): r"turned \u202e round",
    b"<script>alert(1)</script>".replace(b"/", b"|"): "<script>alert(1)<|script>",
}


@pytest.mark.parametrize(("raw", "shown"), NAMES.items(), ids=range(len(NAMES)))
def test_printable(raw: bytes, shown: str) -> None:
    text = printable(os.fsdecode(raw))
    assert text == shown and text.isprintable() and text.encode()
    for error in (DataError(f"{os.fsdecode(raw)}: bad"), UnreadableImage(os.fsdecode(raw), "bad")):
        assert str(error) == f"{shown}: bad"


def test_pages_survive_what_cannot_be_encoded(tmp_path: Path) -> None:
    write(tmp_path / "page.html", "a\udcffb")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == r"a\udcffb"
    summary = {
        "recipe": "x\udcff",
        "skipped": ["a\udcff\n.png: bad"],
        "environment": {"device": "\udcfe"},
    }
    page = Page(
        write_report(tmp_path, None, None, [], summary, "width: \udcff").read_text(encoding="utf-8")
    )
    assert r"a\xff\n.png: bad" in page.texts


def _image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run over a folder of such names in a folder of such a name, every second image broken."""
    root = tmp_path_factory.mktemp("names")
    folder = os.fsencode(root) + b"/photos \xfe\n"
    os.mkdir(folder)
    for index, name in enumerate(NAMES):
        for kind, content in (
            ("broken", b"no image"),
            ("good", _image(index)),
            ("fine", _image(index + 99)),
        ):
            with open(folder + b"/" + name + f" {kind}.png".encode(), "wb") as file:
                file.write(content)
    source = ("--data.source", os.fsdecode(folder), "--run.epoch-steps", "8")
    command = [sys.executable, "train/pretrain.py", *tiny_command(root / "run", *source)]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=300)
    return root / "run", ran


def test_a_run_over_such_names_ends_with_its_report(
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    run, ran = finished
    assert ran.returncode == 0, ran.stderr.decode(errors="replace")[-2000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_images"] >= len(NAMES)
    expected = {f"{shown} broken.png: not an image file" for shown in NAMES.values()}
    assert {Path(name).name for name in summary["skipped"]} == expected
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert expected <= {said.rpartition("/")[2] for said in page.texts}
    assert "<script" not in text and r"photos \xfe\n" in text


def test_such_names_are_printed_as_text(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    _, ran = finished
    out = ran.stdout.decode("utf-8")  # strict: raw bytes of a name would fail here
    lines = out.splitlines()
    for shown in NAMES.values():
        assert any(line.endswith(f"{shown} broken.png: not an image file") for line in lines), shown
    assert all(line.isprintable() for line in lines)
    assert b"\x1b[31m" not in ran.stderr and b"\x07" not in ran.stderr


def test_an_error_about_such_a_name_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "train/pretrain.py",
        "quickstart",
        "--data.source",
        str(tmp_path / "no\n\x1bc\udcff"),
    ]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120)
    (line,) = ran.stderr.decode("utf-8").splitlines()
    assert ran.returncode == 1 and r"no\n\x1bc\xff does not exist" in line
