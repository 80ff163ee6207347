"""The command `dinov3core`, and what a command line says: help, what differs, what is missing."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import tiny_command, tiny_recipe, with_run

from dinov3core import __main__ as console
from dinov3core import extras
from dinov3core.train.engine import calling, command_line, memory, parallel, provenance
from dinov3core.train.engine.building import build_networks, construction
from dinov3core.train.engine.command_line import Ending, RecipeParser
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.stopping import Interrupted, TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import parse
from dinov3core.train.recipes.quickstart import photos, quickstart
from dinov3core.train.recipes.registry import DISTILLATIONS, RECIPES, distillation

ROOT = Path(__file__).resolve().parents[1]
ALONE = parallel.World(0, 1, torch.device("cpu"))


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A process of its own, in which warnings are errors, too."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- help


DEFAULT = re.compile(r"\(default:.*?\)|\(required\)")


def options_without_text(said: str) -> list[str]:
    """Options of a help page, one column wide, of which it says nothing but the default."""
    texts: dict[str, str] = {}
    option = ""
    for line in said.splitlines():
        text = line.strip("\u2502 ")
        if re.match(r"--[a-z][\w.-]* +[A-Z{\[]", text):
            option, *rest = re.split(r"\s{2,}", text, maxsplit=1)
            texts[option] = "".join(rest)
        elif text and option and text[0] not in "\u256d\u2570":  # corners of a box
            texts[option] += f" {text}"
        else:
            option = ""
    assert texts
    return [name for name, text in texts.items() if not DEFAULT.sub("", text).strip()]


def test_an_option_without_text_is_noticed() -> None:
    page = """
\u256d\u2500 options \u2500\u256e
\u2502 --a INT   (default: 1) \u2502
\u2502 --b INT  \u2502
\u2502     Words. (default: 2) \u2502
\u2502 --c INT  (required) \u2502
\u2570\u2500\u2500\u2500\u2500\u256f
 other options
  --d INT
      (default: 3)

 more options
"""
    assert options_without_text(page) == ["--a INT", "--c INT", "--d INT"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_has_a_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        parse([name, "--help"])
    assert left.value.code == 0
    assert options_without_text(capsys.readouterr().out) == []


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_every_option_of_a_distillation_has_a_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for options in ([], ["--teacher", "features"]):
        with pytest.raises(SystemExit) as left:
            distillation([name, *options, "--help"])
        assert left.value.code == 0
        assert options_without_text(capsys.readouterr().out) == []


@pytest.mark.parametrize("name", ["evaluate", "extract", "convert", "export"])
def test_every_option_of_a_command_has_a_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["dinov3core", name, "--help"])
    module = f"dinov3core.{console.COMMANDS[name].module}"
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that is there
    with pytest.raises(SystemExit) as left:
        console.main([name, "--help"])
    assert left.value.code in (0, None)
    assert options_without_text(capsys.readouterr().out) == []


# --- the console command


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        console.main(arguments)
        said = capsys.readouterr().out
        for name, command in console.COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(command.summary)}$", said, re.M)


def test_the_version_is_said(capsys: pytest.CaptureFixture) -> None:
    console.main(["--version"])
    assert capsys.readouterr().out == "dinov3core 0.1.0\n"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pretrian", "error: unknown command 'pretrian'; did you mean pretrain? Known: pretra"),
        ("zzz", "error: unknown command 'zzz' Known: pretrain, distill, evaluate"),
    ],
)
def test_an_unknown_command_is_named(name: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as left:
        console.main([name])
    assert str(left.value.code).startswith(sentence)


def test_a_command_gets_what_follows_its_name_and_its_status_comes_back(tmp_path: Path) -> None:
    argv = ("quickstart", "--run.epochs=0")
    by_name = run_python("-m", "dinov3core", "pretrain", *argv, cwd=tmp_path)
    by_module = run_python("-m", "dinov3core.train.pretrain", *argv, cwd=tmp_path)
    assert by_name.returncode == by_module.returncode == 1
    assert by_name.stderr == by_module.stderr
    assert by_name.stderr.startswith("error: run.epochs: expected above 0")


def test_a_run_by_the_console_command(tmp_path: Path) -> None:
    argv = tiny_command(tmp_path / "run", "--run.steps", "2", "--data.workers", "1")
    done = run_python("-m", "dinov3core", "pretrain", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


def test_every_command_is_a_module() -> None:
    for command in console.COMMANDS.values():
        room, _, name = command.module.rpartition(".")
        assert (ROOT / (room or "dinov3core") / f"{name}.py").is_file()


# --- what the commands of train/ share


TRAIN_COMMANDS = [name for name, command in console.COMMANDS.items() if "train." in command.module]


@pytest.mark.parametrize("name", TRAIN_COMMANDS)
def test_help_names_a_command_as_it_was_called(name: str) -> None:
    by_file = run_python(f"train/{name}.py", "--help")
    by_name = run_python("-m", "dinov3core", name, "--help")
    assert by_file.returncode == by_name.returncode == 0, by_file.stderr + by_name.stderr
    assert f"`python train/{name}.py " in by_file.stdout
    assert f"`dinov3core {name} " in by_name.stdout
    assert "python train/" not in by_name.stdout
    assert f"dinov3core {name}" not in by_file.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run python train/replay.py DUMP", "run dinov3core replay DUMP"),
        ("torchrun --nnodes 4 train/pretrain.py x", "torchrun --nnodes 4 -m dinov3core pretrain x"),
        ("/data/train/pretrain.py: no image", "/data/train/pretrain.py: no image"),
    ],
)
def test_texts_name_commands_as_this_process_was_called(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calling.as_called(text) == said
    monkeypatch.setattr(calling, "runs_as_file", lambda: True)
    assert calling.as_called(text) == text


def test_a_hint_names_the_command_as_it_was_called() -> None:
    """The sentence comes from a room that knows nothing of commands."""
    for argv, command in (
        (["train/evaluate.py"], "python train/evaluate.py"),
        (["-m", "dinov3core", "evaluate"], "dinov3core evaluate"),
    ):
        done = run_python(*argv, "--table", "docs")
        assert done.returncode == 1
        assert done.stderr.endswith(f"without one; {command} MODEL --out docs makes it\n")


@dataclass(frozen=True)
class Toy:
    """A recipe of a command that is not there yet."""

    size: int = 1
    """how large"""


def toy() -> Toy:
    """A toy.

    Command: python train/play.py toy
    """
    return Toy()


def large() -> Toy:
    """A large one."""
    return Toy(9)


PLAY = RecipeParser("play", "Play: `python train/play.py [recipe]`.", {"toy": toy, "large": large})


def test_any_dataclass_is_a_recipe(capsys: pytest.CaptureFixture) -> None:
    assert PLAY.parse([]) == (Toy(1), Toy(1))
    assert PLAY.parse(["--size", "3"]) == (Toy(3), Toy(1))
    assert PLAY.parse(["large", "--size", "3"]) == (Toy(3), Toy(9))
    with pytest.raises(ConfigError, match="unknown recipe 'larg'; did you mean large"):
        PLAY.parse(["larg"])
    with pytest.raises(SystemExit):
        PLAY.parse(["--help"])
    assert capsys.readouterr().out.splitlines() == [
        "Play: `dinov3core play [recipe]`.",
        "",
        "recipes:",
        "  toy            A toy.",
        "  large          A large one.",
        "",
        "Every field: dinov3core play <recipe> --help",
    ]
    with pytest.raises(SystemExit):
        PLAY.parse(["toy", "--help"])
    page = capsys.readouterr().out
    assert page.startswith("usage: dinov3core play toy [-h] [--size INT]")
    assert "Command: dinov3core play toy" in page


WORDS = Ending((KeyError,), "playing", "go on", "interrupted", 7)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ConfigError("a"), 1, "error: a"),
        (TrainingStopped("use python train/play.py"), 1, "error: use dinov3core play"),
        (parallel.WorldError("\x1b"), 1, "error: \\x1b"),
        (KeyError("k"), 1, "error: 'k'"),
        (OSError(28, "full", "/a"), 1, "error: /a: full; go on"),
        (OSError(28, "full"), 1, "error: playing: full; go on"),
        (Interrupted(15, "asked"), 143, "asked"),
        (Interrupted(15, "asked", 0), 0, "asked"),
        (KeyboardInterrupt(), 7, "interrupted"),
    ],
)
def test_every_end_has_its_sentence_and_status(
    end: BaseException | int | None,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture,
) -> None:
    def main(argv: list[str]) -> int | None:
        if isinstance(end, BaseException):
            raise end
        return end

    assert command_line.exit_status(main, [], WORDS) == status
    assert capsys.readouterr().err == (f"{said}\n" if said else "")


def test_what_is_true_of_all_processes_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    ends = {ConfigError("a"): "", Interrupted(2, "b"): "", parallel.WorldError("c"): "error: c\n"}
    for end, said in ends.items():
        command_line.exit_status(Mock(side_effect=end), [], WORDS)
        assert capsys.readouterr().err == said


def test_a_bug_is_no_sentence() -> None:
    with pytest.raises(ValueError, match="a bug"):
        command_line.exit_status(Mock(side_effect=ValueError("a bug")), [], WORDS)


# --- packages that are missing

BLOCK = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = {argv!r}
{run}
"""
OPTIONAL = {"PIL", "safetensors", "tqdm", "tyro", "triton"}
WITHOUT_PACKAGES = {
    "train/pretrain.py": "runpy.run_path('train/pretrain.py', run_name='__main__')",
    "train/evaluate.py": "runpy.run_path('train/evaluate.py', run_name='__main__')",
    "train/replay.py": "runpy.run_path('train/replay.py', run_name='__main__')",
    "extract": "runpy.run_module('dinov3core.extract', run_name='__main__', alter_sys=True)",
    "convert": "runpy.run_module('dinov3core.convert', run_name='__main__', alter_sys=True)",
    "export": "runpy.run_module('dinov3core.export', run_name='__main__', alter_sys=True)",
    "kernel_report": "runpy.run_module('dinov3core.kernel_report', run_name='__main__')",
    "tune": "runpy.run_module('dinov3core.tune', run_name='__main__', alter_sys=True)",
    "dinov3core pretrain": "import dinov3core.__main__ as c; c.main(['pretrain'])",
}


@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_a_command_without_its_packages_says_what_to_install(name: str) -> None:
    program = BLOCK.format(blocked=OPTIONAL, argv=[name], run=WITHOUT_PACKAGES[name])
    done = run_python("-c", program)
    extra = "triton" if name in ("kernel_report", "tune") else "train"
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: not installed: ")
    assert f"pip install 'dinov3core[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "from dinov3core.evals import knn",
        "import dinov3core.data.images",
        "import dinov3core.checkpoints",
    ],
)
def test_an_import_without_its_packages_says_what_to_install(statement: str) -> None:
    done = run_python("-c", BLOCK.format(blocked=OPTIONAL, argv=[""], run=statement))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: not installed: ")
    assert "pip install 'dinov3core[train]'" in last


def test_extras_are_those_of_the_installation() -> None:
    """setup.py lists packages by the names of the index, extras.py modules by theirs."""
    text = (ROOT / "setup.py").read_text()
    for module, extra in extras.EXTRA_OF.items():
        package = {"PIL": "pillow"}.get(module, module)
        section = text[text.index(f'"{extra}": [') :]
        assert f'"{package}>=' in section.split("]")[0], module


# --- what a run says before its first step


def opening(recipe: Pretrain, standard: Pretrain | None, size: int = 1) -> list[str]:
    world = parallel.World(0, size, torch.device("cpu"))
    return provenance.opening(recipe, resolve(recipe, size), world, standard).splitlines()


def test_a_recipe_as_it_is_opens_with_its_numbers_alone() -> None:
    first, last = opening(quickstart(), quickstart())
    assert first.startswith("quickstart: 600 steps of 64 images, learning rate up to 0.003, CPU, ")
    assert last == "every value: runs/quickstart/config.json"


def test_only_what_differs_from_the_recipe_is_listed() -> None:
    changes = ["--run.seed", "3", "--optim.lr.base=2e-3", "--data.source", "/a\nb"]
    recipe = parse(["vits16_1gpu", *changes, "--run.out", "here"])
    first, *changed, _ = opening(recipe, RECIPES["vits16_1gpu"](), size=4)
    assert first.startswith("vits16_1gpu: 125000 steps of 256 images by 4 processes, learning rate")
    assert " up to 0.004, " in first
    assert changed == [
        "  data.source = '/a\\nb' (recipe: images)",
        "  optim.lr.base = 0.002 (recipe: 0.001)",
        "  run.seed = 3 (recipe: 0)",
        "  run.out = here (recipe: '')",
    ]


def test_a_recipe_of_ones_own_opens_without_a_comparison() -> None:
    assert len(opening(tiny_recipe(), None)) == 2


def test_the_report_has_every_value() -> None:
    recipe = with_run(tiny_recipe(), out="\udcff")
    text = provenance.config_text(recipe, resolve(recipe, 1), ALONE)
    assert all(f"{name} = " in text for name, _ in provenance.dotted(recipe))
    assert text.encode()  # whatever bytes a name holds


# --- groups, folders


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--optim.lr 1e-3",
            r"--optim.lr is a schedule: give --optim.lr.base 1e-3 at its top; others: --optim",
        ),
        ("--optim.lr=1e-3", r"--optim.lr is a schedule: give --optim.lr.base 1e-3"),
        (
            "--teacher.momentum .9",
            r"--teacher.momentum is a schedule: give --teacher.momentum.start .9 "
            r"--teacher.momentum.peak .9 --teacher.momentum.end .9 to hold it",
        ),
        ("--loss.local-weight 1", r"--loss.local-weight is a schedule: give --loss.local-"),
        ("--backbone.rope 3", r"--backbone.rope is a group of fields, give one of them: "),
        ("--run 3", r"--run is a group of fields, give one of them: --run.epochs, --run.epoch-st"),
    ],
)
def test_a_group_given_a_value_is_answered_by_its_fields(argument: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        parse(["quickstart", *argument.split()])


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        (["quickstart"], "runs/quickstart"),
        (["quickstart", "--data.source", "/pictures/My flowers/"], "runs/quickstart-My-flowers"),
        (["quickstart", "--data.source", "a/../b.txt"], "runs/quickstart-b.txt"),
        (["quickstart", "--data.source", "a/b-{00..14}.tar"], "runs/quickstart-b--00..14-.tar"),
        (["quickstart", "--data.source", "/"], "runs/quickstart-images"),
        (["quickstart", "--data.source", "/a", "--run.out", "here"], "here"),
        (["photos", "--data.source", "/a"], "runs/photos"),
        (["vits16_1gpu", "--data.source", "/a"], "runs/vits16_1gpu"),
    ],
)
def test_the_quick_start_on_other_images_has_its_own_folder(argv: list[str], folder: str) -> None:
    assert str(parse(argv).folder) == folder


def test_photos_is_the_trial_of_the_log() -> None:
    recipe = photos()
    crops = recipe.crops
    assert (crops.global_size, crops.local_size, crops.blur) == (64, 32, "executed")
    assert (crops.brightness, crops.contrast, crops.saturation, crops.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (recipe.backbone.width, recipe.dino.prototypes) == (128, 1024)
    assert recipe.loss.ibot_weight == 0.5
    schedules = resolve(recipe, 1).schedules
    assert (schedules["lr"].max(), set(schedules["momentum"])) == (2e-3, {0.99})
    assert (recipe.run.total_steps, recipe.run.batch_size) == (1500, 64)


# --- machines that are too small


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: False)
    for built, reason in ((None, "is built without CUDA"), ("13.0", "finds none")):
        monkeypatch.setattr(parallel.torch.version, "cuda", built)
        with pytest.raises(parallel.WorldError, match=rf"a GPU, but torch \S+ {reason}; use cpu"):
            with parallel.start("cuda"):
                pass


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--backbone.width 65536 --backbone.heads 64", "backbone 2.06e[+]11, .* 3.84e[+]03 GiB"),
        ("--ibot.prototypes 16777216 --ibot.bottleneck 65536", ".* iBOT head 1.1e[+]12 weights"),
        ("--run.batch-size 1048576", "run.batch_size 1048576: the crops of a batch need 67.5 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_allocated(
    argv: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 32 * memory.GIB)
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        memory.check(parse(["quickstart", *argv.split()]), torch.device("cpu"))


def test_the_weights_counted_are_those_built() -> None:
    recipe = tiny_recipe()
    built = build_networks(recipe)
    counted = memory.weights_of(recipe)
    modules = (built.backbone, built.dino_head, built.ibot_head)
    sizes = [sum(weights.numel() for weights in module.parameters()) for module in modules]
    assert [*counted.values()] == sizes


def test_running_out_of_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, cpu = tiny_recipe(), torch.device("cpu")
    words = "DefaultCPUAllocator: can't allocate memory: 9 bytes"
    for error in (MemoryError(), RuntimeError(words)):
        with pytest.raises(ConfigError, match=r"^out of memory .cpu. with run.batch_size 4"):
            with memory.explained(recipe, cpu):
                raise error
    with pytest.raises(RuntimeError, match="a bug"):
        with memory.explained(recipe, cpu):
            raise RuntimeError("a bug")


def test_an_error_of_building_is_one_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a\nb"), TypeError("a"), OverflowError("a"), AssertionError("a")):
        with pytest.raises(ConfigError, match=r"^a network of this recipe cannot be built: a$"):
            with construction("a network"):
                raise error
    # calling it is a TypeError
    monkeypatch.setattr("dinov3core.train.engine.building.ProjectionHead", None)
    with pytest.raises(ConfigError, match=r"^a network of this recipe cannot be built: "):
        Trainer(tiny_recipe(), ALONE)
