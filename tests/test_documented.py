"""Every command and every snippet of the pages does what it says: it is run, or read if it cannot.

`SUBSTITUTES` is all that a block is changed by before it runs.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from dinov3core.checkpoints import save_weights
from dinov3core.data.scenes import Scenes
from dinov3core.models import build
from tests.documents import (
    LANGUAGES,
    ROOT,
    RUN_ELSEWHERE,
    Block,
    Untrue,
    blocks_of,
    check_command,
    check_prose,
    check_snippet,
    commands_of,
    pages,
    reason_not_run,
)
from tests.test_architecture import MAY_IMPORT

SECONDS = 120  # for one block; the slowest takes about ten
SHOWN = ("train", "dinov3core", "kernels", "benchmarks", "constraints.txt")  # of the checkout


class Substitute(NamedTuple):
    """What a documented text is replaced by before it runs, and why."""

    pattern: str
    text: str
    reason: str


SMALL_HEADS = (
    "--dino.prototypes 32 --dino.hidden 32 --dino.bottleneck 16"
    " --ibot.prototypes 32 --ibot.hidden 32 --ibot.bottleneck 16"
)
SMALL_NETWORK = f"--backbone.width 24 --backbone.depth 1 --backbone.heads 1 {SMALL_HEADS}"
FEW_IMAGES = (
    "--crops.local-count 1 --data.scenes 64 --data.probe-bank 48 --data.probe-queries 24 "
    "--data.dense-images 24"
    " --run.steps 2 --run.batch-size 8"
)
FEW_SHARED = (
    "--global-batch 8 --data.scenes 64 --data.probe-bank 48 --data.probe-queries 24 "
    "--data.dense-images 24 --run.steps 2"
)
FEW_SCENES = (
    "--read.scenes-train 24 --read.scenes-test 4 --read.scene-videos 1"
    " --iterations 2 --penalties 2 --train-images 12 --test-images 2"
)
SUBSTITUTES = (
    Substitute(r"/path/to/images", "photos", "24 drawn scenes as PNG files"),
    Substitute(r"/data/imagenet", "classes", "24 drawn scenes in folders of three classes"),
    Substitute(r"/path/to/labelled", "classes", "the same: 18 to learn from, 6 to ask about"),
    Substitute(r"/path/to/masked", "masked", "the same with a mask each"),
    Substitute(
        r"(python train/pretrain\.py(?! adapt)(?!.*--help)(?:[^\n#\\]|\\\n)*)",
        rf"\1 {SMALL_NETWORK} {FEW_IMAGES}",
        "two steps of a smaller network instead of minutes",
    ),
    Substitute(
        r"(python train/pretrain\.py adapt(?:[^\n#\\]|\\\n)*)",
        rf"\1 {SMALL_HEADS} {FEW_IMAGES}",
        "two steps with smaller heads; the network is that of the weights",
    ),
    Substitute(
        r"(python train/distill\.py(?!.*--teacher features)(?:[^\n#\\]|\\\n)*)",
        rf"\1 {SMALL_HEADS} {FEW_SHARED}",
        "two steps with the heads of a smaller teacher",
    ),
    Substitute(
        r"(python train/distill\.py(?=.*--teacher features)(?:[^\n#\\]|\\\n)*)",
        rf"\1 {FEW_SHARED}",
        "two steps, without heads",
    ),
    Substitute(
        r"(python train/evaluate\.py(?!.*--table)(?:[^\n#\\]|\\\n)*)",
        rf"\1 {FEW_SCENES}",
        "a few scenes instead of thousands",
    ),
    Substitute(r"steps=500", "steps=2, batch_size=4, eval_every=0", "two steps instead of 500"),
    Substitute(r"scenes_train=600, scenes_test=200", "scenes_train=24, scenes_test=4", "few"),
    Substitute(r"scenes\(6, 256,", "scenes(2, 256,", "two pictures instead of six"),
    Substitute(r"scenes\(3600, 64,", "scenes(24, 64,", "24 neighbours instead of 3600"),
)

BLOCKS = [
    block
    for page in pages()
    for block in blocks_of(page.read_text("utf-8"), page.relative_to(ROOT).as_posix())
]
RUN = [block for block in BLOCKS if not block.mark]
NOT_RUN = [block for block in BLOCKS if block.mark]


def smaller(text: str) -> str:
    """A block as it is run here."""
    for substitute in SUBSTITUTES:
        text = re.sub(substitute.pattern, substitute.text, text)
    return text


# --- a place like a checkout, with what the pages name


class Workplace:
    """A folder that looks like a checkout after the quick start; the same text runs in it once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._done: set[str] = set()
        for name in SHOWN:
            (folder / name).symlink_to(ROOT / name)
        programs = folder / ".programs"
        programs.mkdir()
        for name, command in {"python": "", "dinov3core": " -m dinov3core"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
            program.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        self._environment.pop("TRITON_INTERPRET", None)

    def run(self, text: str) -> None:
        """Run a shell text to its end.

        Raises:
            Untrue: it fails.
        """
        text = smaller(text)
        if text in self._done:
            return
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if ended.returncode:
            raise Untrue(f"$ {text}\nended with {ended.returncode}\n{ended.stdout}{ended.stderr}")
        self._done.add(text)


def main_job() -> str:
    """The last command of the block that is marked so: the quick start."""
    (block,) = [block for block in BLOCKS if block.mark == "main job"]
    return block.text.rpartition("&&")[2].strip().replace(".venv/bin/python", "python")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a finished quick start, weights, and images, without more, with classes, with masks."""
    place = Workplace(tmp_path_factory.mktemp("documented"))
    scenes = Scenes(24, size=64)
    (place.folder / "photos").mkdir()
    for index in range(len(scenes)):
        image: Image.Image = scenes.load(index)
        image.save(place.folder / "photos" / f"{index:02}.png")
        split = "train" if index < 18 else "val"
        labelled = place.folder / "classes" / split / f"class{index % 3}"
        labelled.mkdir(parents=True, exist_ok=True)
        image.save(labelled / f"{index:02}.png")
        mask = Image.fromarray(scenes.scene(index).mask)
        for side, picture in (("images", image), ("masks", mask)):
            (place.folder / "masked" / side).mkdir(parents=True, exist_ok=True)
            picture.save(place.folder / "masked" / side / f"{index:02}.png")
    image.save(place.folder / "photo.jpg")
    torch.manual_seed(0)
    save_weights(build("vit_nano8"), place.folder / "weights.safetensors", "dinov3core")
    place.run(main_job())
    return place


# --- the pages


def place_of(block: Block) -> str:
    return block.place


def place_and_reason(block: Block) -> str:
    return f"{block.place}, {block.mark}"


def test_there_are_blocks_of_every_kind() -> None:
    assert {(block.language, bool(block.mark)) for block in BLOCKS} == {
        (language, marked) for language in LANGUAGES for marked in (False, True)
    }
    marks = [block.mark for block in BLOCKS if block.mark in RUN_ELSEWHERE]
    assert sorted(marks) == sorted(RUN_ELSEWHERE)


@pytest.mark.parametrize("block", BLOCKS, ids=place_of)
def test_a_block_is_a_program_and_its_mark_has_a_reason(block: Block) -> None:
    reason_not_run(block)


@pytest.mark.parametrize("block", RUN, ids=place_of)
def test_a_block_runs(block: Block, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "bash":
        workplace.run(block.text)
        return
    monkeypatch.chdir(workplace.folder)
    program = compile(smaller(block.text), block.place, "exec")
    exec(program, {"__name__": "__main__"})


@pytest.mark.parametrize("block", NOT_RUN, ids=place_and_reason)
def test_a_block_that_is_not_run_could_be(block: Block) -> None:
    if block.language == "python":
        check_snippet(block.text)
        return
    for command in commands_of(block.text):
        check_command(command)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_between_the_blocks_exist(page: Path) -> None:
    check_prose(page.read_text("utf-8"), page.parent)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_stands_in_fences(page: Path) -> None:
    """An indented block would be seen by nobody here."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    assert not re.search(r"\n\n {4,}\S", outside)


@pytest.mark.parametrize("substitute", SUBSTITUTES, ids=lambda substitute: substitute.reason)
def test_every_substitute_is_needed(substitute: Substitute) -> None:
    texts = [block.text for block in RUN] + [main_job()]
    assert any(re.search(substitute.pattern, text) for text in texts)


# --- each check can fail


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("python train/pretrain.py quickstart --run.stepz 5", "run.stepz"),
        ("python train/pretrain.py quickstrat", "did you mean quickstart"),
        ("python train/pretrain.py quickstart --run.steps many", "many"),
        ("torchrun --nproc-per-node 8 train/pretrain.py vitl16 --data.source x", "unknown recipe"),
        ("torchrun --processes 8 train/pretrain.py", "torchrun"),
        ("python train/pretain.py", "no such file"),
        ("python train/evaluate.py runs/x --taskz knn", "taskz"),
        ("python -m dinov3core.extrakt photos", "no such module"),
        ("python -m dinov3core.extract photos --modell x", "--modell"),
        ("dinov3core pretrian", "no such command"),
        ("dinov3core extract photos --modell x", "--modell"),
        ("python -c 'import dinov3core.opz'", "dinov3core.opz"),
        ("pip install -e '.[trian]'", "no extra 'trian'"),
        ("pip install -c constrains.txt torch", "constrains.txt"),
        ("pytest tests/test_nothing.py", "test_nothing"),
        ("ruff check . && ruf format", "ruf"),
        (".ci/walk", "no such command"),
    ],
)
def test_a_command_that_is_not_there_is_named(command: str, sentence: str) -> None:
    with pytest.raises(Untrue, match=re.escape(sentence)):
        for words in commands_of(command):
            check_command(words)


@pytest.mark.parametrize(
    ("snippet", "sentence"),
    [
        ("def f(:", "line 1"),
        ("import dinov3core.opz", "opz"),
        ("from dinov3core.ops import gram_los", "gram_los"),
        ("from dinov3core.ops import gram_loss\ngram_loss(1, 2, clip=True)", "takes no 'clip'"),
        ("from dinov3core import ops\nops.gram_loss(1, 2, clip=True)", "takes no 'clip'"),
        ("import dinov3core\ndinov3core.lode('x')", "lode"),
        ("from dinov3core.integrations import tim", "tim"),
    ],
)
def test_a_snippet_that_cannot_run_is_named(snippet: str, sentence: str) -> None:
    with pytest.raises(Untrue, match=re.escape(sentence)):
        check_snippet(snippet)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Give `--run.stepz 5`.", "--run.stepz"),
        ("Give `--run.steps many`.", "many"),
        ("Give `--patches True`.", "takes no value"),
        ("Say `dinov3core\npretrian`.", "pretrian"),
        ("See `dinov3core.ops.gram_los`.", "gram_los"),
        ("See `tests/test_nothing.py`.", "test_nothing"),
        ("Say `dinov3core pretrian`.", "pretrian"),
        ("See [there](docs/nowhere.md).", "nowhere"),
    ],
)
def test_a_name_that_is_not_there_is_named(text: str, sentence: str) -> None:
    with pytest.raises(Untrue, match=re.escape(sentence)):
        check_prose(text, ROOT)


def block(text: str) -> Block:
    (only,) = blocks_of(text, "page.md")
    return only


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("```\nls\n```", "expected bash or python, got ''"),
        ("<!-- not run: -->\n```bash\nls\n```", "no reason"),
        ("<!-- slow -->\n```bash\nls\n```", "'slow' says nothing"),
        ("```bash\nls", "not closed"),
    ],
)
def test_a_block_or_mark_that_says_nothing_is_named(text: str, sentence: str) -> None:
    with pytest.raises(Untrue, match=re.escape(sentence)):
        reason_not_run(block(text))


def test_a_mark_is_read_right_above_its_block_only() -> None:
    marked = block("text\n<!-- not run: needs a GPU -->\n```bash\nls\n```")
    assert (marked.line, reason_not_run(marked)) == (3, "needs a GPU")
    assert reason_not_run(block("<!-- not run: x -->\n\n```bash\nls\n```")) == ""


def test_a_command_that_fails_is_told(workplace: Workplace) -> None:
    with pytest.raises(Untrue, match=r"(?s)train/pretain\.py.*ended with 2.*No such file"):
        workplace.run("python train/pretain.py")


# --- what docs/ makes of the source


def module_of_docs(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def room_of_box(box: str) -> str:
    return "train" if box in ("engine", "recipes", "commands") else box


def test_the_picture_of_the_rooms_is_true() -> None:
    rooms = module_of_docs("rooms")
    assert rooms.drawing() == rooms.PICTURE.read_text("utf-8"), "run python docs/rooms.py"
    for importer, imported in rooms.ARROWS:
        assert room_of_box(imported) in MAY_IMPORT[room_of_box(importer)]
    folders = {room for room in MAY_IMPORT if (ROOT / "dinov3core" / room).is_dir()}
    assert set(map(room_of_box, rooms.ROOMS)) == folders | {"kernels", "train"}


REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_every_page_of_the_reference_can_be_made(page: Path) -> None:
    pytest.importorskip("griffe", reason="needs griffelib (extra dev or docs)")
    filled = module_of_docs("docstrings").filled(page.read_text("utf-8"))
    assert "<!-- reference" not in filled
    assert page.stem == "index" or "\n## " in filled


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def f(a):\n    '''F.\n\n    Args:\n        b: what.\n    '''", "tells of b"),
        ("def g(a): ...", "not in the source"),
    ],
)
def test_a_reference_to_what_is_not_there_is_named(
    source: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("griffe", reason="needs griffelib (extra dev or docs)")
    docstrings = module_of_docs("docstrings")
    (tmp_path / "dinov3core").mkdir()
    (tmp_path / "dinov3core" / "__init__.py").write_text(source)
    monkeypatch.setattr(docstrings, "ROOT", tmp_path)
    with pytest.raises(docstrings.NoSuchName, match=sentence):
        docstrings.filled("<!-- reference: dinov3core.f -->")
