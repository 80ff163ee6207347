"""What a run says when it is over: how long it took, what it learned, where its report is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov3core.printable import printable
from dinov3core.train.engine.best import Best

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
        *_scores(summary, "knn"),
        *_dense(summary),
        *_best(summary, folder),
        summary["collapse_sentence"],
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


def _scores(summary: Mapping[str, Any], kind: str) -> list[str]:
    """The scores of a kind (knn, dense) that were measured, in one line; no line without any."""
    cells = []
    named = ("pixels", "untrained", "trained")
    if summary["began"]:
        named = ("pixels", "at its start", "at its end")
    for name, key in zip(named, SCORES):
        percent = summary.get(f"{kind}_{key}")
        error = summary.get(f"{kind}_{key}_error")
        if percent is not None:
            spread = "" if error is None else f" +- {error:.1f}"
            cells.append(f"{name} {percent:.1f}{spread} %")
    return [f"  {', '.join(cells)} (+- one standard error)"] if cells else []


def _dense(summary: Mapping[str, Any]) -> list[str]:
    """The dense score, where it was measured."""
    scores = _scores(summary, "dense")
    return [f"dense score: {summary['images']['dense']}", *scores] if scores else []


def _best(summary: Mapping[str, Any], folder: Path) -> list[str]:
    best = summary["best"]
    return [Best(**best).sentence(folder, summary["steps"])] if best else []


def _enlarged(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} times an image smaller than a crop of it was enlarged; a smaller "
        "--crops.global-size, or --gram.crop-size, avoids it"
    ]
