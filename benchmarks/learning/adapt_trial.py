"""Continuing from weights, with and without care: `python -m benchmarks.learning.adapt_trial`.

Takes a backbone (the quick start's, say) to images it has not seen, once by the recipe `adapt` and
once naively: everything trained at once with new heads, at the rate of the quick start, without a
Gram loss. Writes trial.html with both curves of k-NN and trial.json with the figures, and prints
the table. What is finished in the folder of runs is not done again, so a stopped command continues.
"""

import json
import statistics
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from dinov3core.pictures import page
from dinov3core.pictures.charts import Series, figure
from dinov3core.train.engine.config import Data, Pretrain, Teacher
from dinov3core.train.engine.guard import Guard
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.metrics import read_rows
from dinov3core.train.engine.schedules import PhasedSchedule, constant
from dinov3core.train.recipes.adapt import adapt
from dinov3core.train.recipes.imagenet import vits16_1gpu
from dinov3core.train.recipes.quickstart import quickstart

STYLE = """
.charts { display:grid; gap:24px; grid-template-columns:repeat(auto-fit, minmax(300px, 1fr)) }
.charts figure { margin:0 } .chart { width:100%; font-size:11.5px; color:var(--soft) }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px; list-style:none; margin:0; padding:0 }
"""


@dataclass(frozen=True)
class Arguments:
    """What to adapt to what."""

    init: str
    """Weights to start from, such as the folder of a finished quick start."""
    scenes: bool = False
    """Also the built-in scenes, which the quick start has seen: nothing new, much to lose."""
    clothing: str = ""
    """A folder with clothing10-*.tar: members CLASS/NAME.jpg."""
    eurosat: str = ""
    """A file eurosat_ms270.npz: 13 bands, 10 classes."""
    out: str = "runs/adapt_trial"
    """Where images are unpacked and runs are kept."""
    steps: int = 240
    """Length of every run."""
    batch_size: int = 32
    """Images of a step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pair of runs each."""


class Images(NamedTuple):
    """An unpacked data set."""

    name: str
    folder: str
    train: Path | str  # trained on, without labels, and the bank of k-NN
    probe: Path | str  # with train/CLASS/ and val/CLASS/
    mean: tuple[float, ...] = ()  # of other channels than RGB
    std: tuple[float, ...] = ()
    scale: float = 0.0


# --- data


def clothing(tars: Path, folder: Path) -> Images:
    """clothing10 as a tree of class folders; its val and test splits are both asked about."""
    splits = {"train": "train", "val": "val", "test": "val"}
    for tar in sorted(tars.glob("clothing10-*.tar")):
        split = splits[tar.name.split("-")[1]]
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    place = folder / split / member.name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(members.extractfile(member).read())
    return Images("clothing10", folder.name, folder / "train", folder)


def eurosat(file: Path, folder: Path) -> Images:
    """EuroSAT's 13 bands as a tree of class folders of .npy files."""
    stored = np.load(file)
    bands = stored["hi"].astype(np.uint16) << 8 | stored["lo"]  # [N, 13, H, W] reflectance * 10,000
    images = bands.transpose(0, 2, 3, 1)
    for index, image in enumerate(images):
        split = ("train", "val")[int(stored["split"][index])]
        place = folder / split / str(stored["classes"][stored["label"][index]])
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{index:04}.npy", image)
    pixels = images.reshape(-1, images.shape[-1]) / 1e4
    mean = tuple(pixels.mean(0).round(4).tolist())
    std = tuple(pixels.std(0).round(4).tolist())
    return Images("EuroSAT, 13 bands", folder.name, folder / "train", folder, mean, std, 1e4)


# --- recipes


def guarded(arguments: Arguments, images: Images) -> Pretrain:
    """The recipe `adapt` in a sixteenth of its steps.

    So that as much happens in them, the constant rate is ten times as high, and the horizon of the
    EMA teacher a sixteenth.
    """
    recipe = adapt(arguments.init)
    lr = replace(recipe.optim.lr, end=5e-4)
    momentum = PhasedSchedule(0.99, 0.992, 0.992, warmup_epochs=1.0)
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, lr=lr),
        teacher=replace(recipe.teacher, momentum=momentum),
    )
    return _sized(recipe, arguments, images)


def naive(arguments: Arguments, images: Images) -> Pretrain:
    """All weights at once, new heads, the quick start's rates, no Gram loss; adapt's crops."""
    recipe = guarded(arguments, images)
    quick = quickstart()
    return replace(
        recipe,
        name="naive",
        dino=quick.dino,
        ibot=quick.ibot,
        loss=quick.loss,
        gram=quick.gram,
        optim=quick.optim,
        teacher=quick.teacher,
        run=replace(recipe.run, epochs=quick.run.epochs),
        guard=Guard(),
    )


def published(arguments: Arguments, images: Images) -> Pretrain:
    """Naive with the heads, terms and teacher of the published recipe instead of the quick start's.

    Its heads start near the uniform point, where targets are noise.
    """
    recipe = naive(arguments, images)
    usual = vits16_1gpu()
    head = replace(usual.dino, prototypes=1024, hidden=256, bottleneck=64)
    return replace(
        recipe,
        name="published",
        dino=head,
        ibot=head,
        loss=usual.loss,
        teacher=Teacher(momentum=constant(0.98), temperature=constant(0.04)),
    )


ARMS: dict[str, Callable[[Arguments, Images], Pretrain]] = {
    "naive": naive,
    "published": published,
    "adapt": guarded,
}


def _sized(recipe: Pretrain, arguments: Arguments, images: Images) -> Pretrain:
    every = max(arguments.steps // 8, 1)
    data = Data(
        source=str(images.train),
        probe=str(images.probe),
        probe_bank=4000,
        channel_scale=images.scale,
        workers=0,
    )
    run = replace(
        recipe.run,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        device="cpu",
        threads=1,
        eval_every=every,
        checkpoint_every=every,
        keep_checkpoints=1,
    )
    if images.mean:
        channels = len(images.mean)
        recipe = replace(
            recipe,
            backbone=replace(recipe.backbone, in_channels=channels),
            crops=replace(recipe.crops, mean=images.mean, std=images.std),
        )
    # two local crops as in the quick start: a CPU step takes half as long
    crops = replace(recipe.crops, local_count=2)
    return replace(recipe, crops=crops, data=data, run=run)


# --- runs


class Curve(NamedTuple):
    """The scores of one run."""

    arm: str
    seed: int
    steps: list[int]
    knn: list[float]
    error: float
    rankme: list[float]
    drift: list[float]
    stopped: str

    @property
    def lowest(self) -> float:
        """The largest fall below the start, in points; negative: it never was below."""
        return self.knn[0] - min(self.knn[1:])


def curves(arguments: Arguments, images: Images) -> Iterator[Curve]:
    """Train what is not trained yet; the scores of every run."""
    for seed in arguments.seeds:
        for arm, recipe_of in ARMS.items():
            folder = Path(arguments.out) / images.folder / f"{arm}-{seed}"
            recipe = recipe_of(arguments, images)
            run = replace(recipe.run, seed=seed, out=str(folder))
            if not (folder / "summary.json").is_file():
                pretrain(replace(recipe, run=run))
            summary = json.loads((folder / "summary.json").read_text())
            yield _curve(arm, seed, read_rows(folder / "metrics.jsonl"), summary["stopped"])


def _curve(arm: str, seed: int, rows: Sequence[dict[str, Any]], stopped: str) -> Curve:
    judged = [row for row in rows if row.get("event") == "eval"]
    return Curve(
        arm,
        seed,
        [row["step"] for row in judged],
        [row["knn"] for row in judged],
        judged[0]["knn_error"],
        [row["rankme"] for row in judged],
        [row["patch_drift"] for row in judged],
        stopped,
    )


# --- words and pictures


def table(images: Images, runs: Sequence[Curve]) -> str:
    """One line for each arm: mean and spread over seeds."""
    lines = [
        f"{images.name}, {len({run.seed for run in runs})} seeds, one standard error of k-NN "
        f"{runs[0].error:.1f} points",
        "| recipe | start | lowest | end | largest fall | RankMe | patch drift | stopped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = [run for run in runs if run.arm == arm]
        cells = [
            _over(run.knn[0] for run in of_arm),
            _over(min(run.knn[1:]) for run in of_arm),
            _over(run.knn[-1] for run in of_arm),
            _over(run.lowest for run in of_arm),
            " to ".join(_over(run.rankme[place] for run in of_arm) for place in (0, -1)),
            _over((run.drift[-1] for run in of_arm), digits=3),
            f"{sum(bool(run.stopped) for run in of_arm)} of {len(of_arm)}",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(values: Iterator[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    all_of = list(values)
    spread = f" ({statistics.stdev(all_of):.{digits}f})" if len(all_of) > 1 else ""
    return f"{statistics.mean(all_of):.{digits}f}{spread}"


CHARTS = (
    ("k-NN accuracy", "Percent; mean over seeds, the band is one standard deviation.", "knn"),
    ("RankMe", "Effective number of feature directions in use.", "rankme"),
    ("Patch drift", "How far patch similarities moved from the start.", "drift"),
)


def section(images: Images, runs: Sequence[Curve]) -> page.Section:
    """k-NN, RankMe and patch drift, one curve for each recipe."""
    figures = [
        figure(title, note, [_mean_curve(arm, runs, key) for arm in ARMS])
        for title, note, key in CHARTS
    ]
    return page.Section(images.name, "", f'<div class="charts">{"".join(figures)}</div>')


def _mean_curve(arm: str, runs: Sequence[Curve], key: str) -> Series:
    """Over seeds, as far as all of them went."""
    of_arm = [run for run in runs if run.arm == arm]
    steps = min((run.steps for run in of_arm), key=len)
    columns = list(zip(*(getattr(run, key) for run in of_arm)))  # the shortest run ends them
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return Series(arm, steps, [statistics.mean(column) for column in columns], spread)


def main(arguments: Arguments) -> None:
    """Run the trial on whatever images are named."""
    out = Path(arguments.out)
    asked: list[Images] = []
    if arguments.scenes:
        asked.append(Images("built-in scenes", "scenes", "scenes", "scenes"))
    if arguments.clothing:
        asked.append(clothing(Path(arguments.clothing), out / "clothing"))
    if arguments.eurosat:
        asked.append(eurosat(Path(arguments.eurosat), out / "eurosat"))

    sections = []
    figures: dict[str, Any] = {}
    for images in asked:
        runs = list(curves(arguments, images))
        print(table(images, runs), end="\n\n")
        sections.append(section(images, runs))
        figures[images.name] = [run._asdict() for run in runs]
    header = "<header><h1>Continuing from weights, with and without care</h1></header>"
    page.write(out / "trial.html", page.document("Adaptation trial", header, sections, STYLE))
    (out / "trial.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
