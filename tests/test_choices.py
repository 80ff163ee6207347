"""Fields that are one of several classes, or none: chosen by words on a command line, and shown."""

import itertools
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import with_run

from dinov3core.train.engine import provenance
from dinov3core.train.engine.choices import choose, in_words, with_everything
from dinov3core.train.engine.command_line import RecipeParser
from dinov3core.train.engine.config import ConfigError, Earlier, Ema, File, GramAnchor, Snapshot
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import constant
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.quickstart import quickstart

ALONE = World(0, 1, torch.device("cpu"))


def anchored() -> object:
    """A recipe with an anchor.

    Command: python train/play.py anchored
    """
    return replace(quickstart(), gram=GramAnchor(Snapshot(every=7), weight=constant(1.5)))


PLAY = RecipeParser("play", "Play.", {"anchored": anchored})


@pytest.mark.parametrize(
    ("options", "gram"),
    [
        ("", None),
        ("--gram none", None),
        ("--gram=none", None),
        ("--gram.teacher ema", GramAnchor()),
        ("--gram.tokens all", GramAnchor()),
        ("--gram.teacher snapshot", GramAnchor(Snapshot())),
        ("--gram.teacher.every 3 --gram.teacher snapshot", GramAnchor(Snapshot(every=3))),
        ("--gram.teacher=snapshot --gram.teacher.at_most=3", GramAnchor(Snapshot(at_most=3))),
        ("--gram.teacher file --gram.teacher.path a/b", GramAnchor(File("a/b"))),
        ("--gram.crop-size 32 48", GramAnchor(crop_size=(32, 48))),
        ("--gram.crop_size 32", GramAnchor(crop_size=32)),
        ("--gram.teacher ema --gram.teacher file", GramAnchor(File())),
    ],
)
def test_a_group_is_there_with_any_option_of_it(options: str, gram: GramAnchor | None) -> None:
    assert parse(["quickstart", *options.split()]) == replace(quickstart(), gram=gram)


@pytest.mark.parametrize(
    ("options", "gram"),
    [
        ("", GramAnchor(Snapshot(every=7), constant(1.5))),
        ("--gram.teacher.every 8", GramAnchor(Snapshot(every=8), constant(1.5))),
        ("--gram.teacher snapshot", GramAnchor(Snapshot(every=7), constant(1.5))),
        ("--gram.teacher ema", GramAnchor(Ema(), constant(1.5))),
        ("--gram none", None),
    ],
)
def test_a_group_of_a_recipe_is_changed_or_dropped(options: str, gram: GramAnchor | None) -> None:
    assert PLAY.parse(options.split()).recipe == replace(anchored(), gram=gram)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--gram", "--gram: expected none, or an option of it such as --gram.teacher, got ''"),
        ("--gram on", "--gram: expected none, or an option of it such as --gram.teacher, got 'on'"),
        ("--gram none --gram.teacher ema", "--gram none leaves no --gram.teacher; drop one of the"),
        (
            "--gram.teacher emma",
            "--gram.teacher: expected ema, snapshot, file or earlier, got 'emma'",
        ),
        (
            "--gram.teacher file:x",
            "--gram.teacher: expected ema, snapshot, file or earlier, got 'file:x'",
        ),
        (
            "--gram.teacher.path x",
            "--gram.teacher.path is an option of --gram.teacher file; give b",
        ),
        (
            "--gram.teacher file --gram.teacher.first 3",
            "--gram.teacher.first is an option of --gram.teacher snapshot; give both",
        ),
    ],
)
def test_wrong_words_get_one_sentence(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        parse(["quickstart", *options.split()])


def test_what_is_no_choice_is_left_to_be_read() -> None:
    arguments = ["--optim.lr.base", "1", "--crops.global-size", "32", "16"]
    assert choose(quickstart(), arguments) == (quickstart(), arguments)


def test_help_lists_every_word_with_its_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["quickstart", "--help"])
    page = capsys.readouterr().out
    for line in (
        "  --gram.*: Gram anchoring: similarities among patches are held near",
        "  --gram.teacher ema: The anchor is",
        "  --gram.teacher snapshot: The anchor is a frozen copy of the EMA teacher",
        "(--gram.teacher.path, --gram.teacher.every, --gram.teacher.at-most)",
        "--gram.negatives {keep,clip,clip_teacher}",
    ):
        assert line in page
    with pytest.raises(SystemExit):
        parse(["quickstart", "--gram.teacher", "snapshot", "--help"])
    assert "--gram.teacher.first INT" in capsys.readouterr().out


@dataclass(frozen=True)
class Red:
    """Warm."""

    depth: int = 1


@dataclass(frozen=True)
class Blue:
    """Cold."""


@dataclass(frozen=True)
class Paint:
    """A toy."""

    colour: Red | Blue = field(default_factory=Blue)
    number: int | None = None


def test_any_dataclass_may_have_choices() -> None:
    assert choose(Paint(), ["--colour", "red", "--colour.depth", "2"]) == (
        Paint(Red()),
        ["--colour.depth", "2"],
    )
    assert list(in_words(Paint())) == [
        "  --colour red: Warm. (--colour.depth)",
        "  --colour blue: Cold.",
    ]
    assert with_everything(Paint()) == Paint()


# --- what is kept and said of them


def test_what_differs_is_said_of_a_group_that_the_recipe_lacks() -> None:
    recipe = replace(quickstart(), gram=GramAnchor(Snapshot(every=3), crop_size=96))
    lines = [line.strip() for line in provenance.deviations(recipe, quickstart())]
    assert "gram = GramAnchor (recipe: None)" in lines
    assert "gram.teacher = snapshot (recipe: ema)" in lines
    assert "gram.crop_size = 96 (recipe: None)" in lines
    assert not any(line.startswith("gram.negatives") for line in lines)  # as by default
    (line,) = provenance.deviations(quickstart(), anchored())
    assert line == "  gram = None (recipe: GramAnchor)"


def test_the_class_of_a_choice_is_shown_and_kept(tmp_path: Path) -> None:
    """Ema has no fields of its own by which it could be told."""
    words = {Ema(): "ema", Snapshot(): "snapshot", File("x"): "file", Earlier(5): "earlier"}
    for teacher, word in words.items():
        anchored = replace(quickstart(), gram=GramAnchor(teacher))
        recipe = with_run(anchored, out=str(tmp_path), from_="a/run")
        resolved = resolve(recipe, 1)
        assert f"gram.teacher = {word}" in provenance.config_text(recipe, resolved, ALONE)
        provenance.announce(recipe, resolved, ALONE, Origin(), "")
        saved = json.loads((tmp_path / "config.json").read_text())["recipe"]
        assert saved["gram"]["teacher"]["kind"] == word
        assert saved["crops"]["global_size"] == 48 and saved["backbone"]["rope"]["base"] == 100.0


def test_every_choice_has_a_name_of_its_own() -> None:
    kinds = [
        dict(provenance.dotted(replace(quickstart(), gram=gram), kinds=True))
        for gram in (None, GramAnchor(), GramAnchor(Snapshot()), GramAnchor(File("x")))
    ]
    assert all(one != other for one, other in itertools.combinations(kinds, 2))
