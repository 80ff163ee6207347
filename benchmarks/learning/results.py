"""Results of several seeds as one file, a table and curves."""

import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from dinov3core.writing import write_whole

PLUS_MINUS = "\u00b1"
ACROSS = 3  # panels side by side
COLOURS = ("#444444", "#2a7f9e", "#c0573f")


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; the latter is 0 for a single one."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value per seed."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation)

    def text(self, digits: int) -> str:
        """Such as 54.3 +- 1.2."""
        return f"{self.mean:.{digits}f} {PLUS_MINUS} {self.deviation:.{digits}f}"


class Curve(NamedTuple):
    """One stage over seeds: a spread at every step."""

    name: str
    steps: Sequence[int]
    spreads: Sequence[Spread]


def write(path: Path, command: Any, trials: Sequence[Mapping[str, Any]]) -> None:
    """The trials with their settings but the folders, the machine, versions and commit."""
    content = {
        "date": datetime.date.today().isoformat(),
        **machine.describe(torch.device("cpu")),
        "load": machine.load(),
        "settings": {k: v for k, v in asdict(command).items() if not isinstance(v, Path)},
        "trials": list(trials),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(rows + [f"| {' | '.join(line)} |" for line in lines])


def curves_picture(panels: Mapping[str, Sequence[Curve]], path: Path, title: str) -> None:
    """A panel for every score, with the mean over seeds and a band of one standard deviation."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / ACROSS)
    figure = Figure(figsize=(3.4 * ACROSS, 2.7 * rows), layout="constrained")
    all_axes = figure.subplots(rows, ACROSS, squeeze=False).flatten()
    for axes, (label, curves) in zip(all_axes, panels.items()):
        for curve, colour in zip(curves, COLOURS):
            means = [spread.mean for spread in curve.spreads]
            low = [spread.mean - spread.deviation for spread in curve.spreads]
            high = [spread.mean + spread.deviation for spread in curve.spreads]
            axes.plot(curve.steps, means, color=colour, label=curve.name)
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    all_axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
