"""What the pages of the project say: their blocks of code, and what in them cannot be true.

A fenced block is a program in bash or Python, and is run. A comment right above one that is not run
says why: `<!-- not run: REASON -->`, or a mark of `RUN_ELSEWHERE`. Such a block is read: commands
must exist and take their options, imports and keyword arguments must resolve.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.distributed.run import get_args_parser

from dinov3core import __main__ as console
from dinov3core.train import evaluate, pretrain
from dinov3core.train.recipes.registry import distillation

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("bash", "python")
NOT_RUN = "not run:"
RUN_ELSEWHERE = {
    "main job": "installs packages and trains for minutes; its last command is run, smaller",
    "tests": "installs packages and runs this suite; .ci/run runs it",
}
# Programs of others: what they are given must be files of the project or options of their own.
OTHERS = {".", "cd", "git", "mypy", "pytest", "ruff", "sphinx-build"}
PROGRAMS = {"python", "python3", "torchrun", "dinov3core", "pip", *OTHERS} - {".", "cd", "git"}
FOLDERS = ("benchmarks", "dinov3core", "docs", "kernels", "tests", "train", ".ci")
FENCE = re.compile(r"```(\S*)")
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->")
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Untrue(ValueError):
    """A sentence about something that a page says and that is not so."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str  # relative to the root
    line: int  # of the fence, from 1
    language: str
    text: str
    mark: str  # the comment right above the fence; empty: none

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


# --- reading pages


def pages() -> list[Path]:
    """Every page that is written for people."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        Untrue: a fence that is not closed.
    """
    lines = text.splitlines()
    blocks = []
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        above = COMMENT.fullmatch(lines[number - 1]) if number else None
        try:
            end = lines.index("```", number + 1)
        except ValueError:
            raise Untrue(f"{page}:{number + 1}: a fence that is not closed") from None
        body = "\n".join(lines[number + 1 : end])
        blocks.append(Block(page, number + 1, fence[1], body, above[1] if above else ""))
        number = end + 1
    return blocks


def prose_of(text: str) -> str:
    """A page without its fenced blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def reason_not_run(block: Block) -> str:
    """Why a block is not run; empty when it is.

    Raises:
        Untrue: a language that cannot be run, a mark that is unknown, or one without a reason.
    """
    if block.language not in LANGUAGES:
        raise Untrue(f"{block.place}: expected {' or '.join(LANGUAGES)}, got {block.language!r}")
    if not block.mark:
        return ""
    if block.mark in RUN_ELSEWHERE:
        return RUN_ELSEWHERE[block.mark]
    if not block.mark.startswith(NOT_RUN):
        raise Untrue(f"{block.place}: {block.mark!r} says nothing of the block below it")
    reason = block.mark.removeprefix(NOT_RUN).strip()
    if not reason:
        raise Untrue(f"{block.place}: not run, and no reason")
    return reason


# --- commands


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if word in ("&&", "||", "|", ";"):
                yield command
                command = []
            else:
                command.append(word)
        if command:
            yield command


def check_command(words: list[str]) -> None:
    """Whether a command exists and takes what it is given; nothing is run.

    Raises:
        Untrue: it does not.
    """
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):  # environment
        words = words[1:]
    program = words[0].rpartition("/")[2]
    arguments = words[1:]
    if program in ("python", "python3"):
        _check_python(arguments)
    elif program == "torchrun":
        _check_torchrun(arguments)
    elif program == "dinov3core":
        _check_module("dinov3core", arguments)
    elif program == "pip":
        _check_pip(arguments)
    elif program in OTHERS:
        _check_paths(arguments)
    elif not (ROOT / words[0]).is_file():
        raise Untrue(f"{words[0]}: no such command")


def _check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-c"]:
        check_snippet(arguments[1])
    elif arguments[:1] == ["-m"]:
        _check_module(arguments[1], arguments[2:])
    elif not (ROOT / arguments[0]).is_file():
        raise Untrue(f"{arguments[0]}: no such file in the project")
    elif arguments[0].startswith("train/"):
        _check_module(f"dinov3core.train.{Path(arguments[0]).stem}", arguments[1:])


def _check_torchrun(arguments: list[str]) -> None:
    with _spoken_as_untrue("torchrun"):
        options = get_args_parser().parse_args(arguments)
    script = ["-m"] if options.module else []
    _check_python([*script, options.training_script, *options.training_script_args])


def _check_module(module: str, arguments: list[str]) -> None:
    """A module that is run, with its arguments; `venv` and `pytest` are other people's."""
    if module == "dinov3core" and arguments:
        name = arguments[0]
        if name.startswith("-"):
            return _check_options(module, arguments)
        if name not in console.COMMANDS:
            raise Untrue(f"dinov3core {name}: no such command")
        return _check_module(f"dinov3core.{console.COMMANDS[name].module}", arguments[1:])
    if importlib.util.find_spec(module) is None:
        raise Untrue(f"{module}: no such module")
    if module == "dinov3core.train.pretrain":
        with _spoken_as_untrue(" ".join(arguments)):
            pretrain.parse(arguments)
    elif module == "dinov3core.train.distill":
        with _spoken_as_untrue(" ".join(arguments)):
            distillation(arguments)
    elif module == "dinov3core.train.evaluate":
        with _spoken_as_untrue(" ".join(arguments)):
            evaluate.parse(arguments)
    elif module.partition(".")[0] in ("dinov3core", "benchmarks"):
        _check_options(module, arguments)
    else:
        _check_paths(arguments)


def _check_options(module: str, arguments: list[str]) -> None:
    """Every option must stand in the help of the module."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        if option not in options_of(module):
            raise Untrue(f"{module} {option}: its help knows no such option")


@functools.cache
def options_of(module: str, *arguments: str) -> frozenset[str]:
    """The options in the help of a module."""
    said = io.StringIO()
    with (
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # it is imported already
        patch.object(sys, "argv", [module, *arguments, "--help"]),
        patch.dict("os.environ", COLUMNS="200"),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w.-]*", said.getvalue()))


def _check_pip(arguments: list[str]) -> None:
    """Extras must be those of setup.py, and a file of constraints must be there."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before in ("-c", "-r"):
            _check_paths([word])
        extras = re.search(r"\[([\w,]+)\]$", word)
        for extra in extras[1].split(",") if extras else ():
            if f'"{extra}": [' not in setup:
                raise Untrue(f"{word}: setup.py has no extra {extra!r}")


def _check_paths(words: list[str]) -> None:
    """Words that look like files of the project must be some."""
    for word in words:
        ours = word.split("/")[0] in FOLDERS or re.fullmatch(r"[\w-]+\.(txt|toml|py|md)", word)
        if ours and not list(ROOT.glob(word.rstrip("/"))):
            raise Untrue(f"{word}: no such file in the project")


@contextlib.contextmanager
def _spoken_as_untrue(what: str) -> Iterator[None]:
    """What a parser says as it refuses, as an error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except ValueError as error:
        raise Untrue(f"{what}: {error}") from error
    except SystemExit as left:
        if left.code:
            raise Untrue(f"{what}: {said.getvalue() or left.code}") from left


# --- Python


def check_snippet(source: str) -> None:
    """Whether a program compiles, and its imports and the keywords of what it imports resolve.

    Raises:
        Untrue: they do not.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Untrue(f"line {error.lineno}: {error.msg}") from error
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _import(alias.name)
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = _import(alias.name if alias.asname else top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = _import(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _check_call(node, names)


class Absent(NamedTuple):
    """Something of a package that is not installed here, or of a module that needs one."""

    name: str


def _import(path: str) -> Any:
    """The module or the member of a module of that name.

    Raises:
        Untrue: there is none.
    """
    module, _, member = path.rpartition(".")
    try:
        if importlib.util.find_spec(path) is not None:
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        return _not_installed(path, error)
    if importlib.util.find_spec(path.partition(".")[0]) is None:
        return _not_installed(path, ModuleNotFoundError(name=path))
    try:
        return getattr(importlib.import_module(module), member)
    except (AttributeError, ValueError) as error:
        raise Untrue(f"{path}: {error}") from error


def _not_installed(path: str, error: ModuleNotFoundError) -> Absent:
    if str(error.name).partition(".")[0] in ("dinov3core", "benchmarks", "tests"):
        raise Untrue(f"{path}: {error}") from error
    return Absent(path)


def _check_call(node: ast.Call, names: dict[str, Any]) -> None:
    """The callee must exist, and take the keywords, where it was imported."""
    function = _value_of(node.func, names)
    if function is None or isinstance(function, Absent):
        return
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C code
        return
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in parameters:
            raise Untrue(f"{ast.unparse(node.func)}: takes no {keyword.arg!r}")


def _value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name or a chain of attributes of an imported name stands for; None: not known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _value_of(node.value, names)
    if owner is None or isinstance(owner, Absent):
        return owner
    try:
        return getattr(owner, node.attr)
    except AttributeError as error:
        raise Untrue(f"{ast.unparse(node)}: {error}") from error


# --- between the blocks


def check_prose(text: str, folder: Path) -> None:
    """Whether commands, options, names, files and links in a page's sentences exist.

    Args:
        folder: of the page.

    Raises:
        Untrue: one does not.
    """
    prose = prose_of(text)
    for span in SPAN.findall(re.sub(r"(?<=\S)\n(?=\S)", " ", prose)):  # spans run over line ends
        _check_span(span)
    for link in LINK.findall(prose):
        path = link.partition("#")[0]
        if path and "://" not in link and not (folder / path).exists():
            raise Untrue(f"({link}): no such file")


def _check_span(span: str) -> None:
    word = span.split()[0]
    if (word in PROGRAMS and word != span) or span.startswith(".ci/"):
        for command in commands_of(span):
            check_command(command)
    elif word.startswith("--"):
        _check_option_alone(shlex.split(span))
    elif re.fullmatch(r"dinov3core(\.\w+)+", word.partition("(")[0]):
        _import(word.partition("(")[0])
    elif re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", span):
        _check_paths([span])


def _check_option_alone(words: list[str]) -> None:
    """An option without its command must be one of pretraining, or of another command."""
    if words[0] in options_of("dinov3core.train.pretrain", "quickstart"):
        if len(words) > 1:
            with _spoken_as_untrue(" ".join(words)):
                pretrain.parse(["quickstart", *words])
        return
    known = frozenset().union(*map(options_of, _modules_with_options()))
    distilling = options_of("dinov3core.train.distill", "quickstart_distill")
    if words[0] not in known | distilling and len(words) > 1:  # maybe of one student
        with _spoken_as_untrue(" ".join(words)):
            distillation(["quickstart_distill", *words])
        return
    if words[0] not in known | distilling:
        raise Untrue(f"{words[0]}: no command has such an option")
    if f"--no-{words[0][2:]}" in known and not all(word.startswith("--") for word in words):
        raise Untrue(f"{' '.join(words)}: {words[0]} takes no value")


def _modules_with_options() -> list[str]:
    names = ("evaluate", "extract", "convert", "export", "kernel-report", "tune")
    return [f"dinov3core.{console.COMMANDS[name].module}" for name in names]
