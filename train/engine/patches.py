"""What a run says of its patches: whether they have degraded, and what is to be done about it."""

import shlex
from pathlib import Path

from dinov3core.evals.degradation import Rows, degradation
from dinov3core.printable import printable
from dinov3core.train.engine.best import Best, first_trained
from dinov3core.train.engine.config import FROM_PYTHON, Pretrain
from dinov3core.train.engine.probe import command_of

ANCHORED = (
    "This run has a Gram term, which did not hold them: a larger weight (--gram.weight.peak and "
    "--gram.weight.end) or a teacher whose patches are better may, another stage like it would not."
)


def patches_summary(rows: Rows, recipe: Pretrain, best: Best | None) -> dict[str, object]:
    """The part of summary.json: the verdict, since which step, and the command that mends them.

    Args:
        rows: of metrics.jsonl.
        best: what is kept as the best teacher.
    """
    verdict = degradation(rows, first_trained(recipe))
    sentence = f"{verdict.sentence}."
    command = ""
    degraded = verdict.kind == "degraded"
    if degraded and recipe.gram is not None:
        sentence = f"{sentence} {ANCHORED}"
    elif degraded and verdict.since is not None:
        advice, command = _remedy(recipe, verdict.since, best)
        sentence = f"{sentence} {advice}"
    return {
        "patches": verdict.kind,
        "patches_since": verdict.since if degraded else None,
        "patches_sentence": sentence,
        "patches_command": command,
    }


def _remedy(recipe: Pretrain, since: int, best: Best | None) -> tuple[str, str]:
    """Gram anchoring to the teacher of that step, where it is still there: advice and command."""
    teacher = _teacher(recipe, since, best)
    if teacher is None:
        return (
            f"Gram anchoring is for this, but the teacher of step {since} is not kept: train with "
            "--run.keep-best dense, or with --run.keep-every STEPS, to have one to anchor to."
        ), ""
    if recipe.data.source.startswith(FROM_PYTHON):
        anchor = f'GramAnchor(File("{_shown(teacher)}"))'
        return f"Gram anchoring is for this: gram={anchor} in the recipe.", ""
    words = ["--run.from", _shown(recipe.folder)]
    advice = "Gram anchoring is for this:"
    if since == 0:  # this run has gained its patches nothing: once more, with them held
        words = [f"--run.{'from' if recipe.earlier else 'init'}", _shown(teacher)]
        advice = "Gram anchoring is for this, in this run made once more:"
    words += ["--gram.teacher", "file", "--gram.teacher.path", _shown(teacher)]
    words += ["--run.out", f"{_shown(recipe.folder)}-gram"]
    return advice, f"{command_of(recipe)} {shlex.join(words)}"


def _teacher(recipe: Pretrain, since: int, best: Best | None) -> Path | None:
    """Where the teacher of a step is; None: it is not kept."""
    if since == 0:  # what the run began with
        return recipe.earlier or Path(recipe.run.init)
    teacher = recipe.folder / "checkpoints" / f"step_{since:08d}"
    if best is not None and best.step == since:
        teacher = recipe.folder / "best"
    return teacher if teacher.is_dir() else None


def _shown(path: Path) -> str:
    return printable(str(path))
