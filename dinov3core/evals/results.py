"""Results of evaluations as JSON and as tables for people."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Floating-point numbers a task returns besides its metrics.
NOT_METRICS = {"train_loss", "learning_rate", "c", "seconds"}


def write_results(result: Mapping[str, Any], path: Path) -> None:
    """Write `result` as JSON; NaN and infinity become null, as JSON has neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(_plain(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote; `path` may also be the folder of a results.json.

    Raises:
        ValueError: nothing there, or something else.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"model": found["model"], "data": found["data"], "tasks": dict(found["tasks"]), **found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results.json of an evaluation or its folder, got {type(error).__name__}: {error}"
        ) from error


def metrics_of(task: str, found: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of one task by a short name: its floats, `top1` by number of neighbours, lists by side in pixels."""
    metrics: dict[str, float | None] = {}
    sides = found.get("sides", [])
    for key, value in found.items():
        if isinstance(value, Mapping) and key == "top1":
            metrics |= {f"{task} {key} k={inner}": number for inner, number in value.items()}
        elif isinstance(value, Sequence) and len(value) == len(sides) and key != "sides":
            metrics |= {f"{task} {key} {side} px": number for side, number in zip(sides, value)}
        elif isinstance(value, float) and key not in NOT_METRICS:
            metrics[f"{task} {key}"] = value
    return metrics


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results side by side as aligned Markdown: a column per model, a row per metric, "-" for what was not measured.

    Settings that differ between the results have a row each.
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
    """Models without the folders that lead to them (a file with its own), unless two would look the same then."""
    short = [str(Path(*Path(name).parts[-2 if Path(name).suffix else -1 :])) for name in models]
    return short if len(set(short)) == len(set(models)) else list(models)


def _settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """By the names they have on the command line."""
    read = {f"read.{name}": value for name, value in result.get("read", {}).items()}
    return {**result.get("settings", {}), **read}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for every setting that does not have the same value everywhere."""
    names = dict.fromkeys(name for one in settings for name in one)
    rows = ([name, *(str(one.get(name, "-")) for one in settings)] for name in names)
    return [row for row in rows if len(set(row[1:])) > 1]


def _column(result: Mapping[str, Any]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for task, found in result["tasks"].items():
        if "error" in found:
            cells[task] = "failed"
            continue
        cells |= {name: _number(value) for name, value in metrics_of(task, found).items()}
    return cells


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths))]


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
