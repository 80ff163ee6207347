"""What a run says when it is over: how long it took, what it learned, where its report is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov3core.evals.degradation import DENSE
from dinov3core.evals.differences import WITHIN, Measured, differ
from dinov3core.printable import printable


def closing(summary: Mapping[str, Any], folder: Path) -> str:
    """The lines after the last step.

    Args:
        summary: of the run, as in its summary.json.
        folder: of the run.
    """
    images = summary["images"]
    lines = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:.0f} images/s",
        *([f"this run {summary['began']}"] if summary["began"] else []),
        f"trained on: {images['trained']}",
        f"pictures, RankMe, drift: {images['shown']}",
        f"k-NN: {images['knn']}",
        *_accuracies(summary),
        *_dense(summary),
        *([summary["best_sentence"]] if summary["best"] else []),
        summary["collapse_sentence"],
        *_patches(summary),
        *([summary["stopped"]] if summary["stopped"] else []),
        f"skipped images: {summary['skipped_images']}, bad steps: {summary['bad_steps']}",
        *(f"  skipped {name}" for name in summary["skipped"]),
        *_enlarged(summary["enlarged_images"]),
        f"report: {folder / 'report.html'}",
    ]
    return "\n".join(printable(line) for line in lines)


def closing_of_chain(runs: Sequence[tuple[Mapping[str, Any], Path]]) -> str:
    """The last lines of a chain of stages: what each came to, and where its report is.

    Args:
        runs: summary and folder of each, in order.
    """
    lines = [f"all {len(runs)} stages are finished:"]
    for summary, folder in runs:
        said = [f"  {summary['recipe']}: {summary['steps']} steps in {summary['seconds']:.0f} s"]
        said += _changes(summary)
        lines.append(f"{', '.join(said)}; {folder / 'report.html'}")
    return "\n".join(printable(line) for line in lines)


def _changes(summary: Mapping[str, Any]) -> list[str]:
    """k-NN and patch agreement before and after, where they were measured."""
    changes = []
    for name, key in (("k-NN", "knn"), (DENSE["dense_agreement"], "dense_agreement")):
        before = _score(summary, f"{key}_before")
        after = _score(summary, f"{key}_after")
        if before is not None and after is not None:
            level = "" if differ(before, after) else f" ({WITHIN})"
            changes.append(f"{name} {before.value:.1f} -> {after.value:.1f} %{level}")
    return changes


def _accuracies(summary: Mapping[str, Any]) -> list[str]:
    """The k-NN accuracies that were measured, in one line; no line without any."""
    names = dict(zip(("pixels", "before", "after"), ("pixels", *_ends(summary))))
    cells = _cells(summary, "knn", names)
    return [f"  {cells} (+- one standard error)"] if cells else []


def _ends(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What the network is called before and after the run."""
    return ("at its start", "at its end") if summary["began"] else ("untrained", "trained")


def _dense(summary: Mapping[str, Any]) -> list[str]:
    """The dense scores before and after, where they were measured."""
    names = dict(zip(("before", "after"), _ends(summary)))
    lines = [(label, _cells(summary, key, names)) for key, label in DENSE.items()]
    lines = [f"  {label}: {cells}" for label, cells in lines if cells]
    return [f"dense scores: {summary['images']['dense']}", *lines] if lines else []


def _cells(summary: Mapping[str, Any], key: str, names: Mapping[str, str]) -> str:
    """A score at several times with its errors; empty where it was never measured.

    Args:
        names: what to call the network at each time.
    """
    cells = []
    for when, name in names.items():
        score = _score(summary, f"{key}_{when}")
        if score is not None:
            spread = "" if score.error is None else f" +- {score.error:.1f}"
            cells.append(f"{name} {score.value:.1f}{spread} %")
    return ", ".join(cells)


def _score(summary: Mapping[str, Any], key: str) -> Measured | None:
    value = summary.get(key)
    return None if value is None else Measured(value, summary.get(f"{key}_error"))


def _patches(summary: Mapping[str, Any]) -> list[str]:
    """Whether they have degraded, where there is something to judge by, and what mends them."""
    if summary["patches"] == "not_judged":
        return []
    command = summary["patches_command"]
    return [summary["patches_sentence"], *([f"  {command}"] if command else [])]


def _enlarged(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image smaller than a crop of it was enlarged; a smaller "
        "--crops.global-size, or --gram.crop-size, avoids it"
    ]
