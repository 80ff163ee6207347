"""Stages one after the other, each from the run before it, by processes that meet once."""

import gc
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinov3core.printable import printable
from dinov3core.train.engine import changes, checkpoint, parallel, stages
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.loop import started, train
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.engine.resolved import resolve


class Stage(NamedTuple):
    """A run of a chain; from the second on, its `run.from_` is the folder of the one before it."""

    recipe: Pretrain
    origin: Origin


Summary = dict[str, Any]


class Outcome(NamedTuple):
    """What a stage came to."""

    folder: Path
    summary: Summary  # empty on other than the main process, for a stage that was run
    was_finished: bool  # before


def pretrain_chain(chain: Sequence[Stage]) -> Iterator[Outcome]:
    """Run stages in order and say what came of each.

    Those that are finished are passed over, and an unfinished one is continued. So the same call
    goes on where a killed one stopped.

    Raises:
        ConfigError: before anything is computed, for any stage that cannot work.
        Interrupted: by SIGINT or SIGTERM, with what is saved.
    """
    for stage in chain:
        resolve(stage.recipe, parallel.processes())
    for before, stage in itertools.pairwise(chain):
        stages.check_fit(stage.recipe, changes.stated(before.recipe, parallel.processes()))

    # Decided once, before any process begins to write: all of them see the same.
    summaries = _of_finished(chain)
    for number, (stage, summary) in enumerate(zip(chain, summaries), 1):
        folder = stage.recipe.folder
        _say(f"stage {number} of {len(chain)}, {stage.recipe.name}: finished in {folder}")
        yield Outcome(folder, summary, was_finished=True)
    rest = chain[len(summaries) :]
    if not rest:
        return

    stages.check(rest[0].recipe, rest[0].origin.standard)
    with started(rest[0].recipe.run) as here:
        for number, stage in enumerate(rest, len(summaries) + 1):
            _say(f"stage {number} of {len(chain)}, {stage.recipe.name}")
            summary = train(stage.recipe, here, stage.origin)
            gc.collect()  # the networks of a stage are gone before the next one's are made
            torch.cuda.empty_cache()
            yield Outcome(stage.recipe.folder, summary, was_finished=False)


def _of_finished(chain: Sequence[Stage]) -> list[Summary]:
    """The summaries of the stages, from the first one on, that are finished."""
    summaries: list[Summary] = []
    for stage in chain:
        summary = _summary_if_finished(stage.recipe)
        if summary is None:
            break
        summaries.append(summary)
    return summaries


def _summary_if_finished(recipe: Pretrain) -> Summary | None:
    """The summary of the run in a recipe's folder, if it is that recipe's and over.

    A stage must also have taken over the run that its `run.from_` holds now, if that is still
    there.
    """
    last = checkpoint.newest_stated(recipe.folder / "checkpoints")
    if last is None or not recipe.run.resume or last.state["step"] != recipe.run.total_steps:
        return None
    if changes.differences(last.state["recipe"], changes.stated(recipe, parallel.processes())):
        return None
    beginning = stages.beginning_of(last.state)
    if beginning is not None and stages.is_another(beginning):
        return None
    try:
        return json.loads((recipe.folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None


def _say(text: str) -> None:
    if parallel.is_first():
        print(printable(text), file=sys.stderr, flush=True)
