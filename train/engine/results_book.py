"""OUT/results.json of an evaluation, written after every task, and what is said of failed tasks."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dinov3core.evals.results import VERSION, earlier_results, set_aside, write_results
from dinov3core.train.engine.environment import environment
from dinov3core.train.engine.named_models import Opened
from dinov3core.train.engine.parallel import World


class ResultsBook:
    """Earlier results that still hold, and those of this call as they come.

    Args:
        folder: of results.json.
        model: as the command line names it.
        opened: that model.
        data: what it is judged on.
        argv: the command line, kept with each result.
        world: this process among the others.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        opened: Opened,
        data: str,
        argv: Sequence[str],
        world: World,
    ):
        self.folder = folder
        self.backbone = opened.backbone
        self.head = {"version": VERSION, "model": model, "data": data, "report": opened.report}
        self.argv = list(argv)
        self.world = world
        self.call: dict[str, Any] = {}  # what is written beside each result
        self.earlier: dict[str, dict] = {}
        self.tasks: dict[str, dict] = {}

    def open(self, judged: Callable[[str], dict]) -> None:
        """See which earlier results hold; of a file with others there is a copy first.

        Args:
            judged: what a task is judged with, by its name.
        """
        self.call = {"command": self.argv, "environment": environment(self.world.device)}
        self.earlier, dropped = earlier_results(self.folder, judged)
        self.tasks = dict(self.earlier)
        if dropped:
            reasons = "; ".join(f"{', '.join(tasks)} ({why})" for why, tasks in dropped.items())
            print(
                f"warning: {self.folder / 'results.json'} holds results that are not of this call: "
                f"{reasons}; they stay in {set_aside(self.folder)}",
                file=sys.stderr,
            )

    def enter(self, outcomes: Mapping[str, dict]) -> None:
        """Write the file with the results of more tasks."""
        digest = ""
        for task, outcome in outcomes.items():
            digest = outcome["judged"]["weights"]
            succeeded = task in self.earlier and "error" not in self.earlier[task]
            if "error" in outcome and succeeded:  # what once worked is worth more
                continue
            self.tasks[task] = outcome | self.call
        backbone = {**_described(self.backbone), "digest": digest}
        write_results(
            {**self.head, "backbone": backbone, "tasks": self.tasks}, self.folder / "results.json"
        )


def _described(backbone: nn.Module) -> dict[str, Any]:
    return {
        "class": type(backbone).__name__,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "statistics": backbone.statistics,
    }


def remarks(outcomes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why tasks failed and how many images were left out, each once with all tasks it is about."""
    tasks_of: dict[str, list[str]] = {}
    for task, outcome in outcomes.items():
        if "error" in outcome:
            tasks_of.setdefault(outcome["error"], []).append(task)
        elif count := outcome.get("unreadable"):
            examples = outcome.get("unreadable_names")
            example = f", such as {examples[0]}" if examples else ""
            tasks_of.setdefault(f"unreadable and left out: {count}{example}", []).append(task)
    return [f"{', '.join(tasks)}: {sentence}" for sentence, tasks in tasks_of.items()]
