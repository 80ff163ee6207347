"""The rooms of the project and which of them may import which, read from the source.

kernels <- ops <- models, losses <- evals <- pictures <- train        data imports none of them
train: engine <- recipes <- the commands
checkpoints -> models        integrations -> ops, models        nothing imports tests or benchmarks
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dinov3core"

# Files beside the rooms that any room may import and that import no room: what to install when a
# package is missing, bounds and pixel statistics that settings state, how to show a name, how to
# write a file.
LEAVES = {"bounds", "extras", "image_statistics", "printable", "writing"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "ops": {"ops", "kernels"},
    "models": {"models", "ops"},
    "losses": {"losses", "ops"},
    "data": {"data"},
    "evals": {"evals", "data", "losses", "models", "ops"},
    "pictures": {"pictures", "data", "evals", "models", "ops"},
    "checkpoints": {"checkpoints", "models"},
    "integrations": {"integrations", "models", "ops"},
    "train": {"train", "checkpoints", "data", "evals", "losses", "models", "ops", "pictures"},
    "testing": {"testing", "ops"},
    "package": {"checkpoints", "evals", "models"},  # inside dinov3core.load alone
    **{name: set() for name in LEAVES},
}
# Inside train/: a command is a file of the folder itself, and imports no other command.
INSIDE_TRAIN = {
    "engine": {"engine"},
    "recipes": {"recipes", "engine"},
    "command": {"recipes", "engine"},
}
# python -m dinov3core.NAME: may use every room
COMMANDS = {"__main__", "convert", "export", "extract", "kernel_report", "plan", "tune"}
ASKS_FOR_TRITON = {"dinov3core/ops/dispatch.py"}  # whether it can be imported, inside functions
COLLECTIVES = {
    "dinov3core/ops/sinkhorn.py",
    "dinov3core/ops/koleo.py",
    "dinov3core/losses/koleo.py",
}
# Their few flags need no package: where kernels are measured, often nothing can be installed.
WITHOUT_TYRO = {"dinov3core/tune.py", "dinov3core/kernel_report.py", "benchmarks/gpu.py"}
FORBIDDEN_NAMES = ("util", "helper", "common", "misc")


class Import(NamedTuple):
    module: str
    lazy: bool  # inside a function


def imports_of(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every imported module; `from a import b` counts as a.b, which may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                Import(f"{'.' * node.level}{node.module or ''}.{alias.name}", lazy)
                for alias in node.names
            )
        else:
            yield from imports_of(
                node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )


def room_of(path: Path) -> str:
    """The room a source file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != PACKAGE:
        return parts[0]
    if len(parts) > 2:
        return parts[1]
    return parts[1] if parts[1] in COMMANDS | LEAVES | {"testing"} else "package"


def room_named(module: str) -> str | None:
    """The room an imported module belongs to, None when it is somebody else's."""
    parts = module.split(".")
    if parts[0] in ("tests", "benchmarks"):
        return parts[0]
    if parts[0] != PACKAGE or len(parts) < 2:
        return None
    return parts[1] if parts[1] in MAY_IMPORT.keys() | COMMANDS else "package"


def source_files() -> list[Path]:
    return sorted(
        path for room in (PACKAGE, "kernels", "train") for path in (ROOT / room).rglob("*.py")
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


FILES = source_files()
every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_every_room_was_found() -> None:
    assert {"kernels", "ops", "models", "losses", "data", "evals", "pictures", "train"} <= {
        room_of(path) for path in FILES
    }


def test_imports_are_read_wherever_they_stand() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n  from e import g\n"
    source += "if x:\n  import h\nfrom . import i"
    imports = set(imports_of(ast.parse(source)))
    assert imports == {Import(n, False) for n in ("a.b", "c.d", "h", "..i")} | {Import("e.g", True)}


@every_file
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    allowed = set(MAY_IMPORT) if room in COMMANDS else MAY_IMPORT[room]
    for imported in imports_of(tree_of(path)):
        assert not imported.module.startswith("."), (
            f"{name_of(path)}: relative import; name the room"
        )
        target = room_named(imported.module)
        if target in LEAVES:
            continue
        assert target is None or target in allowed, (
            f"{name_of(path)} ({room}) may not import {imported.module}"
        )


def part_of_train(path: Path) -> str:
    """engine, recipes, or command."""
    folders = path.relative_to(ROOT / "train").parts[:-1]
    return folders[0] if folders else "command"


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=name_of)
def test_train_is_an_engine_then_recipes_then_commands(path: Path) -> None:
    part = part_of_train(path)
    for imported in imports_of(tree_of(path)):
        _, inside, module = imported.module.partition(f"{PACKAGE}.train.")
        if inside:
            target = module.split(".")[0]
            assert target in INSIDE_TRAIN[part], f"{name_of(path)} may not import {imported.module}"


@every_file
def test_kernels_are_imported_inside_functions(path: Path) -> None:
    if room_of(path) in COMMANDS | {"kernels"}:
        return
    kernels = [
        imported
        for imported in imports_of(tree_of(path))
        if room_named(imported.module) == "kernels"
    ]
    eager = [imported.module for imported in kernels if not imported.lazy]
    assert not eager, (
        f"{name_of(path)} imports {eager} at import time; importing dinov3core needs torch alone"
    )


@every_file
def test_triton_stays_in_kernels(path: Path) -> None:
    if room_of(path) in {"kernels", "kernel_report", "tune"}:
        return
    imports = [one for one in imports_of(tree_of(path)) if one.module.split(".")[0] == "triton"]
    asks = name_of(path) in ASKS_FOR_TRITON and all(one.lazy for one in imports)
    assert not imports or asks, (name_of(path), imports)


@every_file
def test_processes_are_known_to_train_and_the_two_batch_statistics(path: Path) -> None:
    if room_of(path) == "train" or name_of(path) in COLLECTIVES:
        return
    modules = [
        imported.module
        for imported in imports_of(tree_of(path))
        if imported.module.startswith("torch.distributed")
    ]
    assert not modules, f"{name_of(path)} imports {modules}"


@every_file
def test_command_line_and_environment_are_read_by_train_and_commands(path: Path) -> None:
    if room_of(path) in COMMANDS | {"train"}:
        return
    sources = {
        ast.unparse(node)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in {"os.environ", "os.getenv", "sys.argv"}
    }
    sources |= {
        imported.module
        for imported in imports_of(tree_of(path))
        if imported.module.split(".")[0] in {"argparse", "tyro"}
    }
    assert not sources, f"{name_of(path)} reads {sources}"


def test_command_lines_are_read_in_one_way() -> None:
    """By tyro, but for tools of machines that have torch, Triton and numpy and nothing else."""
    files = [*FILES, *(ROOT / "benchmarks").glob("*.py")]
    readers: dict[str, set[str]] = {"argparse": set(), "tyro": set(), "optparse": set()}
    for path in files:
        for name in {found.module.split(".")[0] for found in imports_of(tree_of(path))}:
            if name in readers:
                readers[name].add(name_of(path))
    assert readers["argparse"] == WITHOUT_TYRO and not readers["optparse"]
    assert not readers["tyro"] & WITHOUT_TYRO


@every_file
def test_no_exception_is_caught_blindly(path: Path) -> None:
    caught = [node.type for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    blind = [
        kind
        for kind in caught
        if kind is None or ast.unparse(kind) in {"Exception", "BaseException"}
    ]
    assert not blind, f"{name_of(path)} catches everything; name the errors"


@every_file
def test_names_and_characters(path: Path) -> None:
    assert not any(word in path.stem for word in FORBIDDEN_NAMES), (
        f"{name_of(path)}: name the question it answers"
    )
    assert path.read_text(encoding="utf-8").isascii(), f"{name_of(path)} is not ASCII"


def test_top_level_rooms_are_without_init() -> None:
    """With an __init__.py the folder's bare name would be a package and shadow another one."""
    for room in ("kernels", "train"):
        assert not list((ROOT / room).rglob("__init__.py"))


def test_every_folder_of_a_top_level_room_is_packaged() -> None:
    """Folders without an __init__.py are listed by name in setup.py."""
    listed = (ROOT / "setup.py").read_text(encoding="utf-8")
    for room in ("kernels", "train"):
        for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
            assert f'"{PACKAGE}.{".".join(folder.relative_to(ROOT).parts)}"' in listed


def test_train_shadows_no_standard_module() -> None:
    """`python train/x.py` puts train/ on the path: train/profile.py would break cProfile."""
    shadowing = {path.stem for path in (ROOT / "train").glob("*.py")} & sys.stdlib_module_names
    assert not shadowing


def test_importing_needs_torch_alone() -> None:
    """Without Triton, numpy, and everything the extras install; and the ops run."""
    blocked = ("triton", "numpy", "PIL", "tyro", "safetensors", "tqdm", "matplotlib", "xformers")
    program = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import torch
from {PACKAGE}.ops import gram_loss, rope_attention, rope_table
sin, cos = rope_table(2, 3, 8)
out = rope_attention(torch.randn(1, 7, 3, 2, 8), sin, cos, prefix_tokens=1)
assert out.isfinite().all() and gram_loss(out[0].flatten(1)[None], out[0].flatten(1)[None]) == 0
import {PACKAGE}.models, {PACKAGE}.losses
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
