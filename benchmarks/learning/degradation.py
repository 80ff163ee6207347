"""Do patches degrade while the whole image is learned, and does Gram anchoring mend them?

`python -m benchmarks.learning.degradation`. Section 4 of the DINOv3 paper in small, on the built-in
scenes: a network is trained long at a constant learning rate and judged on the way; from its end
one stage goes on with the Gram term, anchored to the early teacher whose patches agreed best, and a
control goes on without it for as many steps. Everything else is the same. A seed whose results are
in the folder is not trained again.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from benchmarks.learning import results
from benchmarks.learning.course import Course
from benchmarks.learning.judging import SceneJudge
from benchmarks.learning.maps import cosine_sheet
from dinov3core.checkpoints import save_weights
from dinov3core.data.scenes import Scenes
from dinov3core.train.engine.config import File, GramAnchor, Pretrain
from dinov3core.train.engine.schedules import PhasedSchedule, constant
from dinov3core.train.recipes.quickstart import quickstart
from dinov3core.writing import write_whole

BEST = "cosine_auc"  # the score by which the Gram teacher is chosen
LABELS = {
    "pretraining": "pretrained",
    "gram": "then with Gram",
    "control": "then without",
}
SCORES = {
    "knn": "20-NN",
    "miou": "segmentation, mIoU",
    "object_iou": "object or not, mIoU",
    "cosine_auc": "patch cosines, AUC",
    "matches": "patches matched",
    "j_and_f": "tracking, J&F",
}
TITLE = "Held-out built-in scenes, EMA teacher, by training step"
STAGE_SEED = 1000  # added to the seed of the two stages: they see other crops than pretraining


@dataclass(frozen=True)
class Command:
    """What is trained, and where the results go."""

    out: Path = Path("runs/degradation")
    """folder of weights, results and pictures"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one trial each"""
    steps: int = 1000
    """of pretraining"""
    stage_steps: int = 200
    """of the Gram stage, and of its control"""
    every: int = 100
    """steps between two looks"""
    width: int = 64
    """of the network: 32 channels a head"""
    batch: int = 32
    """images a step"""
    lr: float = 3e-3
    """learning rate, constant after a warm-up"""
    ibot_weight: float = 0.0
    """weight of the masked-patch term throughout"""
    gram_weight: float = 2.0
    """weight of the Gram term, as published 2"""
    gram_ramp: float = 0.2
    """of the stage, in which that weight rises from 0"""
    bank: int = 2400
    """scenes among which neighbours are sought"""
    queries: int = 1200
    """scenes that are judged"""
    threads: int = 1
    """of the CPU"""


def pretraining(command: Command, seed: int) -> Pretrain:
    """The quick start with a constant learning rate and the command's few changes."""
    base = quickstart()
    return replace(
        base,
        backbone=replace(base.backbone, width=command.width, heads=command.width // 32),
        loss=replace(base.loss, ibot_weight=command.ibot_weight),
        optim=replace(
            base.optim, lr=PhasedSchedule(0.0, command.lr, command.lr, warmup_epochs=0.5)
        ),
        run=replace(base.run, seed=seed, batch_size=command.batch, epochs=command.steps / 100),
    )


def control(command: Command, seed: int) -> Pretrain:
    """As many steps as the Gram stage, of pretraining as before."""
    recipe = pretraining(command, seed)
    return replace(
        recipe,
        optim=replace(recipe.optim, lr=constant(command.lr)),
        run=replace(recipe.run, seed=STAGE_SEED + seed, epochs=command.stage_steps / 100),
    )


def anchored(command: Command, seed: int, weights: Path) -> Pretrain:
    """The same with the Gram term towards the backbone in that file."""
    recipe = control(command, seed)
    ramp = command.gram_ramp * recipe.run.epochs
    weight = PhasedSchedule(0.0, command.gram_weight, command.gram_weight, warmup_epochs=ramp)
    return replace(recipe, gram=GramAnchor(File(str(weights)), weight))


def trial(command: Command, seed: int) -> dict:
    """One seed through the three stages: the rows of each, and the step of the Gram teacher.

    Weights of the four teachers and a sheet of their cosine maps are written to the seed's folder.
    """
    folder = command.out / f"seed{seed}"
    done = folder / "results.json"
    if done.is_file():
        return json.loads(done.read_text())
    source = Scenes(8192, seed=seed)
    judge = SceneJudge(pretraining(command, seed).crops.global_size, command.bank, command.queries)

    first = Course(pretraining(command, seed), source)
    first.run(judge, command.every, say=_saying(f"seed {seed}, pretraining"))
    early = max(first.rows[1:], key=lambda row: row[BEST])["step"]
    save_weights(first.teachers[early], folder / "early.safetensors")
    save_weights(first.teacher, folder / "pretrained.safetensors")
    rows = {"pretraining": first.rows}
    teachers = {f"step {early}": first.teachers[early], f"step {command.steps}": first.teacher}
    recipes = {
        "gram": anchored(command, seed, folder / "early.safetensors"),
        "control": control(command, seed),
    }
    for name, recipe in recipes.items():
        stage = Course(recipe, source, first.trainer)
        rows[name] = stage.run(judge, command.every // 2, say=_saying(f"seed {seed}, {name}"))
        save_weights(stage.teacher, folder / f"{name}.safetensors")
        teachers[LABELS[name]] = stage.teacher

    cosine_sheet(judge.scenes.test, teachers).save(folder / "cosines.png")
    outcome = {"seed": seed, "early": early, "rows": rows}
    write_whole(done, json.dumps(outcome, indent=1) + "\n")
    return outcome


def _saying(words: str) -> Callable[[str], None]:
    return lambda text: print(f"{words}: {text}", flush=True)


def curves(trials: Sequence[Mapping], score: str) -> list[results.Curve]:
    """Pretraining, then both stages from its end."""
    drawn = []
    for name, label in LABELS.items():
        by_seed = [trial["rows"][name] for trial in trials]
        start = 0 if name == "pretraining" else trials[0]["rows"]["pretraining"][-1]["step"]
        steps = [start + row["step"] for row in by_seed[0]]
        spreads = [results.Spread.of([row[score] for row in rows]) for rows in zip(*by_seed)]
        drawn.append(results.Curve(label, steps, spreads))
    return drawn


def table(trials: Sequence[Mapping]) -> str:
    """Every score of the early teacher, after pretraining and after both stages."""
    lines = []
    for score, label in SCORES.items():
        early = [_row_at(trial, trial["early"])[score] for trial in trials]
        ends = [[trial["rows"][name][-1][score] for trial in trials] for name in LABELS]
        lines.append([label, *(results.Spread.of(values).text(1) for values in (early, *ends))])
    steps = ", ".join(str(trial["early"]) for trial in trials)
    return results.table(["", f"early (step {steps})", *LABELS.values()], lines)


def _row_at(trial: Mapping, step: int) -> Mapping:
    return next(row for row in trial["rows"]["pretraining"] if row["step"] == step)


def main(argv: Sequence[str]) -> None:
    """The command line; tyro exits with a sentence."""
    command = tyro.cli(
        Command,
        prog="python -m benchmarks.learning.degradation",
        description=__doc__,
        args=list(argv),
    )
    torch.set_num_threads(command.threads)
    trials = [trial(command, seed) for seed in command.seeds]
    results.write(command.out / "results.json", command, trials)
    panels = {label: curves(trials, score) for score, label in SCORES.items()}
    results.curves_picture(panels, command.out / "curves.png", TITLE)
    print(table(trials))


if __name__ == "__main__":
    main(sys.argv[1:])
