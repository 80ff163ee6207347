"""Distil students from a frozen teacher: `python train/distill.py [recipe] [--field value ...]`.

With several processes: `torchrun --nproc-per-node 3 train/distill.py [recipe] ...`. Without
arguments three small students learn from the quick start's teacher. The teacher looks once at every
image, whoever trains on it. `--help` lists the recipes, and `<recipe> --help` every field.

A student that fails is named, the others go on to their ends, and the exit status is 1. The same
command goes on where a stopped one was.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

from dinov3core.printable import printable
from dinov3core.train.engine import command_line
from dinov3core.train.engine.command_line import Ending
from dinov3core.train.engine.distillation.session import distill
from dinov3core.train.recipes.registry import RECIPES, distillation

ENDING = Ending(
    writing="writing into the run folder",
    remains="the same command continues the run",
    interrupted="stopped before the run began",
)


def main(argv: list[str]) -> int:
    """Parse, train all students, and say what came of them; 1 when one of them failed."""
    asked = distillation(argv, __doc__ or "")
    ended = distill(asked.distill, argv, asked.standard, RECIPES)
    if ended.summary:  # the main process
        print(closing(ended.summary, asked.distill.folder))
    return int(bool(ended.failures))


def closing(summary: Mapping[str, Any], folder: Path) -> str:
    """The lines after the last step.

    Args:
        summary: of the whole, as in its summary.json.
    """
    lines = []
    for name, student in summary["students"].items():
        score = student["knn"]
        said = "k-NN not measured" if score is None else f"k-NN {score:.1f} %"
        if student["failure"]:
            said = f"failed: {student['failure']}"
        lines.append(f"student {name}: {said}, {student['folder']}")
    lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(printable(line) for line in lines)


def exit_status(argv: list[str]) -> int:
    """`main`, with every other end as a sentence; see `command_line.exit_status`."""
    return command_line.exit_status(main, argv, ENDING)


if __name__ == "__main__":
    command_line.run(main, ENDING)
