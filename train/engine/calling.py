"""How a command of this project is called: by its file in a checkout, or by the console command.

Help, hints and errors name commands by their files (`python train/replay.py DUMP`), which is how a
checkout runs them. Where this process was started in another way there may be no such file, and
`as_called` turns the text into what works there (`dinov3core replay DUMP`).
"""

import re
import sys
from pathlib import Path

COMMANDS = Path(__file__).resolve().parents[1]  # the folder train/

_BY_TORCHRUN = re.compile(r"(\btorchrun\b[^`\n]*?) train/(\w+)\.py")
_BY_PYTHON = re.compile(r"\bpython train/(\w+)\.py")


def program(command: str) -> str:
    """The name of a command at the head of its help: train/NAME.py or dinov3core NAME."""
    return as_called(f"python train/{command}.py").removeprefix("python ")


def as_called(text: str) -> str:
    """A text that names commands by their files, with the names that work for whoever reads it."""
    if runs_as_file():
        return text
    text = _BY_TORCHRUN.sub(r"\1 -m dinov3core \2", text)
    return _BY_PYTHON.sub(r"dinov3core \1", text)


def runs_as_file() -> bool:
    """Whether this process is `python train/NAME.py`, alone or as one of torchrun's."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__package__", None):  # interactive, or run as a module
        return False
    return Path(file).resolve().parent == COMMANDS
