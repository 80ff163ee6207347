"""Run a dumped step again: `python train/replay.py RUN/bad_steps/step_00000123_rank0.pt`.

Loads the weights and crops of a step whose loss or gradients were not finite, repeats forward and
backward on this machine, and says which values are not finite. Nothing is written.
"""

import math
import sys
from pathlib import Path

if not __package__:  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

from dinov3core.train.engine import command_line, parallel
from dinov3core.train.engine.calling import as_called
from dinov3core.train.engine.command_line import Ending
from dinov3core.train.engine.dump import dumped_batch, read_dump
from dinov3core.train.engine.trainer import StepReport, Trainer, prepare
from dinov3core.train.recipes.registry import chosen

USAGE = "usage: python train/replay.py DUMP, where DUMP is a file under RUN/bad_steps"


def replay(path: Path) -> StepReport:
    """The report of the dumped step, computed again.

    Args:
        path: a dump; tensors and plain values only, so loading it runs no code.
    """
    dump = read_dump(path)
    recipe = chosen(dump["argv"]).recipe
    with parallel.start(recipe.run.device, recipe.run.threads) as world:
        trainer = Trainer(prepare(recipe, world.device), world)
        for name, module in trainer.modules().items():
            module.load_state_dict(dump["modules"][name])
        batch = dumped_batch(dump["crops"], recipe.run.batch_size)
        return trainer.step(batch, dump["step"], observe=True)


def main(argv: list[str]) -> None:
    """Replay the dump, say each value and which of them are not finite."""
    if argv in (["--help"], ["-h"]):
        print(as_called(f"{USAGE}\n\n{__doc__}"))
        return
    if len(argv) != 1 or not Path(argv[0]).is_file():
        raise SystemExit(as_called(f"{USAGE}; got {argv}"))
    report = replay(Path(argv[0]))
    for name, value in report.values.items():
        print(f"{name:24} {value:.6g}{'' if math.isfinite(value) else '   <- not finite'}")


if __name__ == "__main__":
    command_line.run(main, Ending(explained=(ValueError,)))
