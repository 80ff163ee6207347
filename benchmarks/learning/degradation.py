"""Do patches degrade while the whole image is learned, and does Gram anchoring mend them?

`python -m benchmarks.learning.degradation`. Section 4 of the DINOv3 paper in small: the teachers in
the checkpoints of a quick start are judged; from its end one stage goes on with the Gram term,
anchored to the early teacher whose patch cosines were best, and a control goes on without it for as
many steps. Everything else is the same. Quick starts that are not in the folder are trained first;
a seed whose results are there is not trained again, so name another `--out` for other settings.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.learning import results
from benchmarks.learning.course import (
    Course,
    Trials,
    asked,
    in_words,
    kept_teachers,
    pretrained,
)
from benchmarks.learning.judging import SceneJudge
from benchmarks.learning.maps import cosine_sheet
from dinov3core.checkpoints import save_weights
from dinov3core.data.scenes import Scenes
from dinov3core.train.engine.config import File, GramAnchor, Pretrain
from dinov3core.train.engine.schedules import PhasedSchedule, constant
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


@dataclass(frozen=True)
class Command(Trials):
    """What is trained, and where the results go."""

    out: Path = Path("runs/degradation")
    """folder of weights, results and pictures"""
    every: int = 50
    """steps between two looks at a stage"""
    lr: float = 1e-3
    """constant learning rate of both stages"""
    gram_weight: float = 20.0
    """weight of the Gram term"""
    gram_ramp: float = 0.2
    """of the stage, in which that weight rises from 0"""
    bank: int = 2400
    """scenes among which neighbours are sought"""
    queries: int = 1200
    """scenes that are judged"""

    def control(self, before: Pretrain) -> Pretrain:
        """As many steps as the Gram stage, of the recipe before."""
        return self.stage_of(before, constant(self.lr))

    def anchored(self, before: Pretrain, weights: Path) -> Pretrain:
        """The same with the Gram term towards the backbone in that file."""
        recipe = self.control(before)
        ramp = self.gram_ramp * recipe.run.epochs
        weight = PhasedSchedule(0.0, self.gram_weight, self.gram_weight, warmup_epochs=ramp)
        return replace(recipe, gram=GramAnchor(File(str(weights)), weight))


def trial(command: Command, seed: int) -> dict[str, Any]:
    """One seed through the three stages: the rows of each, and the step of the Gram teacher.

    Weights of the teachers and a sheet of their cosine maps are written to the seed's folder.
    """
    folder = command.out / f"seed{seed}"
    done = folder / "results.json"
    if done.is_file():
        return json.loads(done.read_text())
    recipe = pretrained(command.runs.absolute(), seed)
    judge = SceneJudge(recipe.crops.global_size, command.bank, command.queries)

    kept = kept_teachers(recipe)
    rows = {"pretraining": [{"step": step, **judge(teacher)} for step, teacher in kept.items()]}
    for row in rows["pretraining"]:
        print(f"seed {seed}, pretraining: {in_words(row)}", flush=True)
    early = int(max(rows["pretraining"][1:], key=lambda row: row[BEST])["step"])
    weights = folder / "early.safetensors"
    save_weights(kept[early], weights)
    teachers = {f"step {early}": kept[early], f"step {max(kept)}": kept[max(kept)]}

    source = Scenes(recipe.data.scenes, seed=seed, size=recipe.data.scene_size)
    stages = {
        "gram": command.anchored(recipe, weights),
        "control": command.control(recipe),
    }
    for name, stage in stages.items():
        course = Course(stage, source)
        rows[name] = course.run(judge, command.every, say=_saying(f"seed {seed}, {name}"))
        save_weights(course.teacher, folder / f"{name}.safetensors")
        teachers[LABELS[name]] = course.teacher

    cosine_sheet(judge.scenes, teachers).save(folder / "cosines.png")
    outcome = {"seed": seed, "early": early, "rows": rows}
    write_whole(done, json.dumps(outcome, indent=1) + "\n")
    return outcome


def _saying(words: str) -> Callable[[str], None]:
    return lambda text: print(f"{words}: {text}", flush=True)


def curves(trials: Sequence[Mapping[str, Any]], score: str) -> list[results.Curve]:
    """Pretraining, then both stages from its end."""
    drawn = []
    for name, label in LABELS.items():
        by_seed = [trial["rows"][name] for trial in trials]
        start = 0 if name == "pretraining" else trials[0]["rows"]["pretraining"][-1]["step"]
        steps = [start + row["step"] for row in by_seed[0]]
        spreads = [results.Spread.of([row[score] for row in rows]) for rows in zip(*by_seed)]
        drawn.append(results.Curve(label, steps, spreads))
    return drawn


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Every score of the early teacher, after pretraining and after both stages."""
    lines = []
    for score, label in SCORES.items():
        early = [_row_at(trial, trial["early"])[score] for trial in trials]
        ends = [[trial["rows"][name][-1][score] for trial in trials] for name in LABELS]
        lines.append([label, *(results.Spread.of(values).text(1) for values in (early, *ends))])
    steps = ", ".join(str(trial["early"]) for trial in trials)
    return results.table(["", f"early (step {steps})", *LABELS.values()], lines)


def _row_at(trial: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    return next(row for row in trial["rows"]["pretraining"] if row["step"] == step)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    command = asked(Command, "degradation", __doc__ or "", argv)
    trials = [trial(command, seed) for seed in command.seeds]
    results.write(command.out / "results.json", command, trials)
    panels = {label: curves(trials, score) for score, label in SCORES.items()}
    results.curves_picture(panels, command.out / "curves.png", TITLE)
    print(table(trials))


if __name__ == "__main__":
    main(sys.argv[1:])
