"""What a run says when it is over: how long it took, what it learned, where its report is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov3core.printable import printable

SCORES = ("pixels", "before", "after")  # keys of the summary


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
        for name, key in (("k-NN", "knn"), ("dense", "dense")):
            before = summary.get(f"{key}_before")
            after = summary.get(f"{key}_after")
            if None not in (before, after):
                said.append(f"{name} {before:.1f} -> {after:.1f} %")
        lines.append(f"{', '.join(said)}; {folder / 'report.html'}")
    return "\n".join(printable(line) for line in lines)


def _accuracies(summary: Mapping[str, Any]) -> list[str]:
    """The k-NN accuracies that were measured, in one line; no line without any."""
    cells = []
    for name, key in zip(("pixels", *_ends(summary)), SCORES):
        accuracy = summary[f"knn_{key}"]
        if accuracy is not None:
            cells.append(f"{name} {accuracy:.1f} +- {summary[f'knn_{key}_error']:.1f} %")
    return [f"  {', '.join(cells)} (+- one standard error)"] if cells else []


def _ends(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What the network is called before and after the run."""
    return ("at its start", "at its end") if summary["began"] else ("untrained", "trained")


def _dense(summary: Mapping[str, Any]) -> list[str]:
    """The dense score before and after, where it was measured."""
    cells = []
    for name, key in zip(_ends(summary), SCORES[1:]):
        score = summary[f"dense_{key}"]
        error = summary[f"dense_{key}_error"]
        spread = "" if error is None else f" +- {error:.1f}"
        if score is not None:
            cells.append(f"{name} {score:.1f}{spread} %")
    return [f"dense score: {summary['images']['dense']}", f"  {', '.join(cells)}"] if cells else []


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
