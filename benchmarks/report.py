"""Turn results files into tables and pictures: `python -m benchmarks.report [results.json ...]`.

Without an argument the newest file of each machine class in benchmarks/results/ is taken. The
tables go into docs/ops.md between `<!-- benchmarks -->` and `<!-- /benchmarks -->` and hold the
cases with a goal; the picture beside a results file holds all of them.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import RESULTS, Floors, Goal, best_ratio, memory_ratio

PAGE = Path(__file__).parents[1] / "docs" / "ops.md"
INK, FASTER, SLOWER, LEANER = "#444444", "#2a7f9e", "#c0573f", "#8a9a5b"


def newest() -> list[Path]:
    """The latest results file of every machine class, GPUs first.

    Raises:
        SystemExit: when there is none.
    """
    latest: dict[str, tuple[str, Path]] = {}  # by machine class: date, file
    for path in RESULTS.glob("*_????-??-??.json"):
        results = json.loads(path.read_text())
        kind = results["machine_class"]
        latest[kind] = max(latest.get(kind, ("", path)), (results["date"], path))
    if not latest:
        raise SystemExit("no results yet: run pytest benchmarks/ --record")
    return [latest[kind][1] for kind in sorted(latest, reverse=True)]


def table(results: Mapping) -> str:
    """The headline cases as a Markdown table, the goals met and missed, and the machine."""
    floors = Floors.load(results["machine_class"])
    records = {record["case"]: record for record in results["records"]}
    lines = [
        "| what | time, best of torch / ours | peak memory, theirs / ours | goal |",
        "|---" * 4 + "|",
    ]
    for record in records.values():
        if floors.entries.get(record["case"], {}).get("headline"):
            best = min(record["ratio"], key=record["ratio"].get)
            goals = "; ".join(_goal(goal) for goal in floors.goals(record, records))
            lines.append(
                f"| {_readable(record)} | {best_ratio(record):.2f}x ({best}) | "
                f"{memory_ratio(record):.2f}x | {goals} |"
            )
    return "\n".join([*lines, "", _standing(floors, records), _machine(results)])


def _standing(floors: Floors, records: Mapping[str, Mapping]) -> str:
    """How many goals are met, and every missed one by name."""
    goals = [
        (case, goal) for case, record in records.items() for goal in floors.goals(record, records)
    ]
    missed = [f"`{case}` {_goal(goal)}" for case, goal in goals if not goal.met]
    standing = f"Goals met: {len(goals) - len(missed)} of {len(goals)}."
    return f"{standing} Missed: {'; '.join(missed)}." if missed else standing


def _readable(record: Mapping) -> str:
    return f"`{record['op']}` {record['shape']}, {record['direction']}"


def _goal(goal: Goal) -> str:
    return f"{goal.name} {goal.measured:.2f} of {goal.wanted:g}{'' if goal.met else ' missed'}"


def _machine(results: Mapping) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [results["device"], f"{results['threads']} threads"]
    if "clock" in results:
        parts += [
            f"{results['clock']} time",
            f"load {results['load_before']} to {results['load_after']}",
        ]
    return (
        "Ratios above 1 favour ours: medians of paired ratios, all variants in turn in one "
        f"process. {', '.join(parts)}; {versions}; commit {results['commit']}, {results['date']}."
    )


def picture(results: Mapping, path: Path) -> None:
    """All cases: time and peak memory of the best of torch over ours, on logarithmic axes."""
    from matplotlib.figure import Figure

    records: Sequence[Mapping] = results["records"]
    figure = Figure(figsize=(11, 0.32 * len(records) + 1.8), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2, sharey=True)
    places = range(len(records))
    times = [best_ratio(record) for record in records]
    peaks = [memory_ratio(record) for record in records]
    _bars(time_axis, times, FASTER, "time, best of torch / ours")
    _bars(memory_axis, peaks, LEANER, "peak memory, best of torch / ours")

    time_axis.set_yticks(places, [record["case"] for record in records], fontsize=8)
    time_axis.invert_yaxis()
    figure.suptitle(f"{results['device']}, {results['date']}", fontsize=10, color=INK)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, ratios: Sequence[float], good: str, title: str) -> None:
    """Bars that start at 1: to the right is better, and of the colour `good`."""
    from matplotlib.ticker import LogLocator, NullLocator

    colours = [good if ratio >= 1 else SLOWER for ratio in ratios]
    lengths = [ratio - 1 for ratio in ratios]
    axis.set_xscale("log")
    axis.barh(range(len(ratios)), lengths, left=1, color=colours, height=0.62)
    for place, ratio in enumerate(ratios):
        side, x = ("left", ratio * 1.04) if ratio >= 1 else ("right", ratio / 1.04)
        axis.text(x, place, f"{ratio:.2f}x", ha=side, va="center", fontsize=7, color=INK)

    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_xlim(min(0.4, min(ratios) / 1.6), max(ratios) * 2)
    axis.margins(y=0.01)
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_title(title, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def update(page: str, text: str, mark: str = "benchmarks") -> str:
    """A page with a new text between its two marks of that name.

    Raises:
        SystemExit: when the marks are not there.
    """
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    if not marked.search(page):
        marks = f"<!-- {mark} --> ... <!-- /{mark} -->"
        raise SystemExit(f"the page has no {marks} to fill; add the two marks")
    return marked.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def main(arguments: Sequence[str]) -> None:
    tables = []
    for path in [Path(argument) for argument in arguments] or newest():
        results = json.loads(path.read_text())
        picture(results, path.with_suffix(".png"))
        tables.append(table(results))
        print(f"{path.with_suffix('.png').name} and its table in {PAGE.name}")
    page = update(PAGE.read_text(encoding="utf-8"), "\n\n".join(tables))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
