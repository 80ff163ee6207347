"""Every file that this project replaces is written whole or not at all, whatever writes it."""

import ast
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks.gpu import Ledger
from dinov3core.checkpoints import files, save_weights
from dinov3core.evals.cache import Embedded, write_embedded
from dinov3core.evals.feature_file import FeatureFile
from dinov3core.evals.results import write_results
from dinov3core.models import build
from dinov3core.pictures import page
from dinov3core.train.engine.snapshot import Snapshot
from dinov3core.writing import write_whole, written_whole

ROOT = Path(__file__).resolve().parents[1]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """Stands for the end of the process: what follows in it does not happen."""


def write_ledger(path: Path, version: int) -> None:
    ledger = Ledger(path, {"version": version}, deadline=float("inf"))
    ledger.entries.clear()
    ledger.enter("case", lambda: {"value": version})


def write_snapshot(path: Path, version: int) -> None:
    image = np.full((1, 2, 2, 3), version, np.uint8)
    zeros = np.zeros((1, 2), np.int64)
    Snapshot(image, image, image[..., 0], zeros, image, image[None], zeros, {}).save(path)


def write_features(path: Path, version: int) -> None:
    empty = torch.empty(2, 0)
    labels, rows = torch.arange(4).chunk(2)
    write_embedded(Embedded(empty, empty.clone(), labels, rows.clone(), [str(version)]), path)


def write_progress(path: Path, version: int) -> None:
    """The file beside an unfinished one that says how far it goes."""
    with FeatureFile(path.with_suffix(""), {"x": (torch.float32, (9, 1))}, {}) as file:
        file.commit(version)


class Writer(NamedTuple):
    """How some part of the project writes a file of a version."""

    name: str
    write: Callable[[Path, int], None]


TENSORS = {"x": torch.zeros(3)}
WRITERS = {
    "text": Writer("metrics.jsonl", lambda path, version: write_whole(path, f"{version}\n")),
    "bytes": Writer("patches.pt", lambda path, version: write_whole(path, bytes([version]))),
    "page": Writer("page.html", lambda path, version: page.write(path, f"\udcff{version}")),
    "JSON": Writer("config.json", lambda path, version: files.write_json(path, {"v": version})),
    "results": Writer("results.json", lambda path, v: write_results({"version": v}, path)),
    "ledger": Writer("train.json", write_ledger),
    "snapshot": Writer("before.npz", write_snapshot),
    "features": Writer("cache.safetensors", write_features),
    "progress": Writer("features.progress", write_progress),
    "safetensors": Writer(
        "a.safetensors", lambda path, v: files.write_safetensors(TENSORS, path, {"v": str(v)})
    ),
    "torch": Writer("a.pth", lambda path, version: save_official(path, version)),
}
every_writer = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)


def save_official(path: Path, version: int) -> None:
    torch.manual_seed(0)
    model = build("convnext_tiny", depths=(1, 1, 1, 1), widths=(4, 4, 4, 4))
    torch.nn.init.constant_(model.norm.weight, version)
    save_weights(model, path, "official")


@contextmanager
def interrupted(name: str, error: BaseException) -> Iterator[None]:
    """A function of `os` raises; after a kill nothing is tidied up either."""
    with patch.object(os, name, side_effect=error):
        if isinstance(error, Killed):
            with patch.object(os, "unlink", side_effect=error):
                yield
        else:
            yield


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@every_writer
@pytest.mark.parametrize("error", [FULL, Killed()], ids=["full", "killed"])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_write_that_ends_early_leaves_the_file_of_before(
    tmp_path: Path, writer: Writer, place: str, error: BaseException
) -> None:
    path = tmp_path / writer.name
    writer.write(path, 1)
    before = path.read_bytes()
    names = names_in(tmp_path)

    with interrupted(place, error), pytest.raises(type(error)):
        writer.write(path, 2)
    assert path.read_bytes() == before
    if error is FULL:
        assert names_in(tmp_path) == names

    writer.write(path, 2)
    assert path.read_bytes() != before


@every_writer
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_that_open_gives(tmp_path: Path, writer: Writer, umask: int) -> None:
    """Of the libraries inside, some ask for less (safetensors: nobody else may read)."""
    earlier = os.umask(umask)
    try:
        writer.write(tmp_path / writer.name, 1)
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / writer.name).stat().st_mode) == 0o666 & ~umask


@every_writer
def test_a_file_of_one_content_has_one_form(tmp_path: Path, writer: Writer) -> None:
    """The passing name beside the file gets into none of them."""
    forms = set()
    for folder in ("first", "second"):
        path = tmp_path / folder / writer.name
        path.parent.mkdir()
        writer.write(path, 1)
        forms.add(path.read_bytes())
    assert len(forms) == 1


def test_an_error_inside_leaves_nothing_and_passes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), written_whole(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert not names_in(tmp_path)


def test_what_a_writer_raises_for_a_full_disk_becomes_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"file: could not be written: I/O error: no space"):
        with written_whole(path, SafetensorError):
            raise SafetensorError("I/O error: no space")
    assert not names_in(tmp_path)


def test_errors_name_the_file_and_not_the_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(FileNotFoundError) as error:
        write_whole(path, "text")
    assert error.value.filename == str(path)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second and not path.exists()
    assert path.read_text() == "first" and names_in(tmp_path) == {"file"}


def test_killed_in_the_middle_of_the_bytes(tmp_path: Path) -> None:
    """A process that ends for good, no exception that stands for it."""
    path = tmp_path / "file"
    write_whole(path, "whole")
    program = (
        "import os, pathlib, sys\n"
        "from dinov3core.writing import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('ha')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, timeout=100)
    assert ran.returncode == -9 and path.read_text() == "whole"


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_feature_file_has_its_name_when_it_is_whole(tmp_path: Path, place: str) -> None:
    """What was written before the kill is continued."""
    path = tmp_path / "features.safetensors"
    arguments = (path, {"x": (torch.float32, (2, 1))}, {})
    with FeatureFile(*arguments) as file:
        file.write("x", 0, torch.ones(2, 1))
        file.commit(2)
        with interrupted(place, Killed()), pytest.raises(Killed):
            file.finish()
    assert not path.exists()
    with FeatureFile(*arguments) as file:
        assert file.done == 2
        file.finish()
    assert names_in(tmp_path) == {path.name}
    assert load_file(path)["x"].tolist() == [[1], [1]]


def test_a_file_too_large_for_the_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    """Whichever way safetensors and torch say that they could not write."""
    model = build("convnext_tiny", depths=(1, 1, 1, 1), widths=(16, 16, 16, 16))
    for name, layout in (("a.safetensors", "dinov3core"), ("a.pth", "official")):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError, match=f"{name}|too large"):
                save_weights(model, tmp_path / name, layout)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not names_in(tmp_path)


# Where files get their names

REASONS = {
    "dinov3core/writing.py": "the one place for files",
    "train/engine/checkpoint.py": "a checkpoint is a folder, which becomes whole under its name",
}


def renames_in(tree: ast.AST) -> list[str]:
    """Calls that give a file another name, as os.replace(a, b), Path(a).replace(b), a.rename(b)."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute)]
    return [
        ast.unparse(call)
        for call in named
        if ast.unparse(call.func) in ("os.replace", "os.rename", "os.renames", "os.link")
        or call.func.attr in ("rename", "hardlink_to")
        or (call.func.attr == "replace" and len(call.args) == 1 and not call.keywords)
    ]


def test_renames_are_seen_in_every_spelling() -> None:
    renames = ("os.replace(a, b)", "os.rename(a, b)", "a.rename(b)", "a.replace(b)")
    others = ("'a'.replace('b', 'c')", "replace(recipe, a=1)", "dataclasses.replace(recipe, a=1)")
    assert all(renames_in(ast.parse(line)) for line in renames)
    assert not any(renames_in(ast.parse(line)) for line in others)


def test_files_get_their_names_in_one_place() -> None:
    rooms = ("dinov3core", "train", "kernels", "benchmarks")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    renaming = {
        path.relative_to(ROOT).as_posix(): renames_in(ast.parse(path.read_text(encoding="utf-8")))
        for path in paths
    }
    assert {name for name, calls in renaming.items() if calls} == REASONS.keys(), renaming
