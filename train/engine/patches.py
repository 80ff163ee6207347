"""What a run says of its patches: whether they have degraded, and what is to be done about it."""

import shlex
from pathlib import Path

from dinov3core.evals.degradation import Rows, degradation
from dinov3core.printable import printable
from dinov3core.train.engine.best import Best
from dinov3core.train.engine.config import FROM_PYTHON, Pretrain
from dinov3core.train.engine.probe import command_of


def patches_summary(rows: Rows, recipe: Pretrain, best: Best | None) -> dict[str, str]:
    """The part of summary.json: kind of the verdict, its sentence, the command that mends them.

    Args:
        rows: of metrics.jsonl.
        best: what is kept as the best teacher.
    """
    verdict = degradation(rows)
    sentence = f"{verdict.sentence}."
    command = ""
    if verdict.since is not None and verdict.kind == "degraded":
        advice, command = _remedy(recipe, verdict.since, best)
        sentence = f"{sentence} {advice}"
    return {
        "patches": verdict.kind,
        "patches_sentence": sentence,
        "patches_command": command,
    }


def _remedy(recipe: Pretrain, since: int, best: Best | None) -> tuple[str, str]:
    """Gram anchoring to the teacher of that step, where it is still there: advice and command."""
    teacher = recipe.folder / "best"
    if best is None or best.step != since:
        teacher = recipe.folder / "checkpoints" / f"step_{since:08d}"
    if not teacher.is_dir():
        return (
            f"Gram anchoring is for this, but the teacher of step {since} is not kept: train with "
            "--run.keep-best dense, or with --run.keep-every STEPS, to have one to anchor to."
        ), ""
    if recipe.data.source.startswith(FROM_PYTHON):
        anchor = f'GramAnchor(File("{_shown(teacher)}"))'
        return f"Gram anchoring is for this: gram={anchor} in the recipe.", ""
    folder = shlex.quote(_shown(recipe.folder))
    anchor = f"--gram.teacher file --gram.teacher.path {shlex.quote(_shown(teacher))}"
    out = shlex.quote(f"{_shown(recipe.folder)}-gram")
    command = f"{command_of(recipe)} --run.from {folder} {anchor} --run.out {out}"
    return "Gram anchoring is for this:", command


def _shown(path: Path) -> str:
    return printable(str(path))
