"""The command `dinov3core`, also `python -m dinov3core`: `dinov3core COMMAND [ARGUMENTS]`.

Every command is a module of its own; `dinov3core COMMAND --help` lists its options. With several
processes: torchrun --nproc-per-node 8 -m dinov3core pretrain [ARGUMENTS].
"""

import runpy
import sys
from difflib import get_close_matches
from typing import NamedTuple

from dinov3core import __version__


class Command(NamedTuple):
    """A module that runs as a program, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "pretrain": Command("train.pretrain", "pretrain a backbone on built-in or on your images"),
    "distill": Command("train.distill", "train small models from a large one, together"),
    "evaluate": Command("train.evaluate", "judge any backbone, draw what it sees, compare several"),
    "extract": Command("extract", "write the features of images to a file"),
    "convert": Command("convert", "write weights in another layout"),
    "export": Command("export", "write a backbone as ONNX or torch.export"),
    "replay": Command("train.replay", "run a dumped training step again"),
    "kernel-report": Command("kernel_report", "compile every kernel for GPUs that are not there"),
    "tune": Command("tune", "measure launch choices of the kernels on this GPU"),
}


def overview() -> str:
    """All commands, one a line."""
    rows = [f"  {name:14} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", "commands:", *rows])


def main(arguments: list[str] | None = None) -> None:
    """Run a command as `python -m` runs its module, with the arguments that follow its name.

    Args:
        arguments: without the name of the program; None: those of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(overview())
        return
    if name == "--version":
        print(f"dinov3core {__version__}")
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"error: unknown command {name!r}{hint} Known: {', '.join(COMMANDS)}.")
    sys.argv[1:] = rest
    runpy.run_module(f"dinov3core.{COMMANDS[name].module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
