"""Run a dumped step again: `python train/replay.py RUN/bad_steps/step_00000123_rank0.pt`.

Loads the weights and crops of a step whose loss or gradients were not finite, repeats forward and
backward on this machine, and says which values are not finite. Nothing is written.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import math
import pickle

import torch

from dinov3core.printable import printable
from dinov3core.train.engine import parallel
from dinov3core.train.engine.dump import dumped_batch
from dinov3core.train.engine.trainer import StepReport, Trainer, prepare
from dinov3core.train.pretrain import parse

FIELDS = {"argv", "crops", "modules", "step"}


def replay(path: Path) -> StepReport:
    """The report of the dumped step, computed again.

    Args:
        path: a dump; tensors and plain values only, so loading it runs no code.
    """
    dump = read_dump(path)
    recipe = parse(dump["argv"])
    with parallel.start(recipe.run.device, recipe.run.threads) as world:
        trainer = Trainer(prepare(recipe, world.device), world)
        for name, module in trainer.modules().items():
            module.load_state_dict(dump["modules"][name])
        batch = dumped_batch(dump["crops"], recipe.run.batch_size)
        return trainer.step(batch, dump["step"], observe=True)


def read_dump(path: Path) -> dict:
    """A dump as `dump.write_dump` wrote it; reading it runs no code.

    Raises:
        ValueError: a file that is cut, or something else.
    """
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
        if dump.keys() >= FIELDS:
            return dump
        reason = f"it lacks {', '.join(sorted(FIELDS - dump.keys()))}"
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
    raise ValueError(f"{path}: expected the dump of a bad step, got something else ({reason})")


def main(argv: list[str]) -> None:
    if len(argv) != 1 or not Path(argv[0]).is_file():
        sys.exit(
            "usage: python train/replay.py DUMP, where DUMP is a file under RUN/bad_steps; got "
            f"{argv}"
        )
    try:
        report = replay(Path(argv[0]))
    except ValueError as error:
        sys.exit(f"error: {printable(str(error))}")
    for name, value in report.values.items():
        print(f"{name:24} {value:.6g}{'' if math.isfinite(value) else '   <- not finite'}")


if __name__ == "__main__":
    main(sys.argv[1:])
