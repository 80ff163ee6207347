"""Results of evaluations as JSON and as tables for people."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov3core.evals.knn import standard_error
from dinov3core.writing import write_whole

VERSION = 2  # counts changes of the layout: since 2 every task says what it was judged with
# Floating-point numbers a task returns besides its metrics.
NOT_METRICS = {"train_loss", "learning_rate", "c", "seconds"}
# Metrics that are shares of single test images which were classified right.
ACCURACIES = {"knn": ("top1", "top5"), "linear": ("top1", "top5"), "logreg": ("top1",)}


class Earlier(NamedTuple):
    """Results of earlier calls in a folder: those that still hold, and why the others do not."""

    same: dict[str, dict]
    dropped: dict[str, list[str]]  # tasks by reason


def write_results(result: Mapping[str, Any], path: Path) -> None:
    """Write `result` as JSON; NaN and infinity become null, as JSON has neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_plain(result), indent=2, allow_nan=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote; `path` may also be the folder of a results.json.

    Raises:
        ValueError: nothing there, or something else.
    """
    expected = f"{path}: expected results.json of an evaluation or its folder"
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{expected}, got {_nothing_in(path)}")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bytes that are no text are a ValueError too
        raise ValueError(f"{expected}, got a file that cannot be read: {error}") from error
    tasks = result.get("tasks") if isinstance(result, dict) else None
    whole = isinstance(tasks, dict) and all(isinstance(outcome, dict) for outcome in tasks.values())
    if not whole or not {"model", "data"} <= result.keys():
        raise ValueError(f"{expected}, got JSON of something else")
    return result


def _nothing_in(path: Path) -> str:
    """What a path is that holds no results, and what to do."""
    if not path.is_dir():
        return "nothing there"
    below = sorted(inner.parent.name for inner in path.glob("*/results.json"))
    if below:
        return f"a folder without one; there is one in its {', '.join(below)}"
    return f"a folder without one; python train/evaluate.py MODEL --out {path} makes it"


def earlier_results(folder: Path, judged: Callable[[str], dict]) -> Earlier:
    """Which results in a folder would come out again with the same weights, data and settings.

    Args:
        judged: what a task would be judged with now; KeyError for a task that is unknown.
    """
    if not (folder / "results.json").exists():
        return Earlier({}, {})
    try:
        result = read_results(folder)
    except ValueError:
        return Earlier({}, {"it is no results.json of an evaluation": ["all of it"]})
    same: dict[str, dict] = {}
    dropped: dict[str, list[str]] = {}
    for task, outcome in result["tasks"].items():
        difference = _difference(outcome.get("judged"), task, judged)
        if not difference:
            same[task] = outcome
        elif "error" not in outcome:
            dropped.setdefault(difference, []).append(task)
    return Earlier(same, dropped)


def set_aside(folder: Path) -> Path:
    """A copy of the folder's results.json as results.N.json, with the first N that is free."""
    numbers = itertools.count(1)
    copy = next(path for n in numbers if not (path := folder / f"results.{n}.json").exists())
    shutil.copyfile(folder / "results.json", copy)
    return copy


def _difference(before: Any, task: str, judged: Callable[[str], dict]) -> str:
    """In words, why an earlier result does not stand for the present call; empty when it does."""
    if before is None:
        return "written before tasks recorded their own settings"
    try:
        now = _plain(judged(task))
    except KeyError:
        return "a task that is unknown here"
    if before["weights"] != now["weights"]:
        return "other weights"
    if before["data"]["digest"] != now["data"]["digest"]:
        moved = before["data"]["path"] != now["data"]["path"]
        return f"of {before['data']['path']}" if moved else "its data have changed since"
    pairs = [
        (name, before[part].get(name), now[part].get(name))
        for part in ("settings", "read")
        for name in before[part] | now[part]
    ]
    changed = [f"{name} {old}, now {new}" for name, old, new in pairs if old != new]
    return ", ".join(changed)


def metrics_of(task: str, outcome: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of one task by a short name.

    They are its floats, `top1` by number of neighbours, and lists by side in pixels.
    """
    metrics: dict[str, float | None] = {}
    sides = outcome.get("sides", [])
    for key, value in outcome.items():
        if isinstance(value, Mapping) and key == "top1":
            metrics |= {f"{task} {key} k={inner}": number for inner, number in value.items()}
        elif isinstance(value, Sequence) and len(value) == len(sides) and key != "sides":
            metrics |= {f"{task} {key} {side} px": number for side, number in zip(sides, value)}
        elif isinstance(value, float) and key not in NOT_METRICS:
            metrics[f"{task} {key}"] = value
    return metrics


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results side by side as aligned Markdown: a column per model, a row per metric.

    Settings that differ between the results have a row each. "-": not measured. +-: one standard
    error, of accuracies.
    """
    columns = [_column(result) for result in results]
    rows = list(dict.fromkeys(name for column in columns for name in column))
    cells = [["", *short_names([str(result["model"]) for result in results])]]
    cells += [["data", *(Path(str(result["data"])).name for result in results)]]
    cells += _differing([_settings_of(result) for result in results])
    cells += [[row, *(column.get(row, "-") for column in columns)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(_aligned(line, widths)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def short_names(models: Sequence[str]) -> list[str]:
    """Models without the folders that lead to them, unless two would look the same then.

    Of a file its own folder stays.
    """
    short = [str(Path(*Path(name).parts[-2 if Path(name).suffix else -1 :])) for name in models]
    return short if len(set(short)) == len(set(models)) else list(models)


def _settings_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the names they have on the command line, for every task that uses them."""
    values: dict[str, dict[str, Any]] = {}
    for task, outcome in result["tasks"].items():
        used = outcome.get("judged", result)  # until version 2 there was one record for all tasks
        reading = {f"read.{name}": value for name, value in used.get("read", {}).items()}
        for name, value in {**used.get("settings", {}), **reading}.items():
            values.setdefault(name, {})[task] = value
    return values


def _differing(columns: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """A row for every setting that differs; one per task where a column has several values."""
    rows: list[list[str]] = []
    for name in dict.fromkeys(name for column in columns for name in column):
        by_task = [_texts(column.get(name, {})) for column in columns]
        if all(len(set(values.values())) <= 1 for values in by_task):
            rows.append([name, *(next(iter(values.values()), "-") for values in by_task)])
        else:
            for task in dict.fromkeys(task for values in by_task for task in values):
                rows.append([f"{task} {name}", *(values.get(task, "-") for values in by_task)])
    return [row for row in rows if len(set(row[1:]) - {"-"}) > 1]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _column(result: Mapping[str, Any]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for task, outcome in result["tasks"].items():
        if "error" in outcome:
            cells[task] = "failed"
            continue
        for name, value in metrics_of(task, outcome).items():
            cells[name] = _number(value) + _error_bar(task, name, value, outcome)
    return cells


def _error_bar(task: str, name: str, value: float | None, outcome: Mapping[str, Any]) -> str:
    """One standard error, where the metric is the share of test images that are right."""
    metric = name.removeprefix(f"{task} ").split()[0]
    if value is None or metric not in ACCURACIES.get(task, ()) or "test_images" not in outcome:
        return ""
    return f" +- {standard_error(value, outcome['test_images']):.1f}"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        text.rjust(width) if i else text.ljust(width)
        for i, (text, width) in enumerate(zip(line, widths))
    ]


def _plain(value: Any) -> Any:
    """Only what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return str(value)
