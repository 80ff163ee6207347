"""Do features mean the same at every size of the image, after training at several sizes?

`python -m benchmarks.learning.high_resolution`. The high-resolution stage of DINOv3 in small: the
teacher of a quick start goes on at several sizes of crops, and a control goes on as long at the old
one. Each network sees the same scenes at 1, 2 and 3 times 64 pixels. Quick starts that are not in
the folder are trained first; a seed whose results are there is not trained again, so name another
`--out` for other settings.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.learning import results
from benchmarks.learning.course import Course, Trials, asked, pretrained
from dinov3core.checkpoints import load_model, save_weights
from dinov3core.data.datasets import DataOptions, open_labelled
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes
from dinov3core.evals.resolution import resolution
from dinov3core.models import VisionTransformer
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.schedules import CosineSchedule, constant
from dinov3core.writing import write_whole

SIDE = 64
SCALES = (1.0, 2.0, 3.0)
STATES = {"before": "quick start", "adapted": "adapted", "control": "trained on at 48 px"}
FINAL_LR = 3e-5
WARM_UP = 0.1  # of the stage
# Sides of global and local crops beside those of the quick start, 48 and 24. What couples sizes is
# that one image is seen at two of them within a step, by the teacher and in the local crops.
SIZES = ((48, 72), (48, 144), (96, 24))


@dataclass(frozen=True)
class Command(Trials):
    """What is trained, and where the results go."""

    out: Path = Path("runs/high_resolution")
    """folder of weights and results"""
    shares: tuple[float, float, float] = (0.4, 0.25, 0.2)
    """of the steps at SIZES; the others are as in the quick start"""
    lr: float = 3e-3
    """highest learning rate of both"""
    momentum: float = 0.95
    """of the EMA teacher, which has to follow within a short stage"""
    batch: int = 32
    """images a step"""
    bank: int = 600
    """scenes among which neighbours are sought"""
    queries: int = 300
    """scenes that are judged"""

    def stage(self, before: Pretrain) -> Pretrain:
        """The recipe before at its own size, with the stage's length and learning rate."""
        warm_up = WARM_UP * self.steps / before.run.epoch_steps
        lr = CosineSchedule(self.lr, FINAL_LR, warmup_epochs=warm_up)
        recipe = self.stage_of(before, lr, "teacher")
        return replace(
            recipe,
            teacher=replace(recipe.teacher, momentum=constant(self.momentum)),
            run=replace(recipe.run, batch_size=self.batch),
        )


def judged(command: Command, backbone: VisionTransformer) -> dict[str, Any]:
    """The scores of `dinov3core.evals.resolution` at 64, 128 and 192 px."""
    options = DataOptions(scenes_train=command.bank, scenes_test=command.queries, scene_size=SIDE)
    return resolution(
        backbone,
        open_labelled("scenes", options),
        side=SIDE,
        scales=SCALES,
        train_images=None,
        test_images=None,
    )


def trial(command: Command, seed: int) -> dict[str, Any]:
    """One seed: scores before, after adaptation and after the control."""
    folder = command.out / f"seed{seed}"
    done = folder / "results.json"
    if done.is_file():
        return json.loads(done.read_text())
    pretraining = pretrained(command.runs.absolute(), seed)
    scores = {"before": judged(command, load_model(pretraining.folder).model)}
    print(_in_words(scores["before"]), flush=True)

    control = command.stage(pretraining)
    sizes = tuple(CropSizes(share, *sides) for share, sides in zip(command.shares, SIZES))
    adapted = replace(control, crops=replace(control.crops, other_sizes=sizes))
    source = Scenes(pretraining.data.scenes, seed=seed, size=pretraining.data.scene_size)
    for name, recipe in (("adapted", adapted), ("control", control)):
        course = Course(recipe, source)
        course.run(lambda _: {}, max(command.steps // 4, 1))
        save_weights(course.teacher, folder / f"{name}.safetensors")
        scores[name] = judged(command, course.teacher)
        print(name, _in_words(scores[name]), flush=True)

    outcome = {"seed": seed, "scores": scores}
    write_whole(done, json.dumps(outcome, indent=1) + "\n")
    return outcome


def _in_words(scores: Mapping[str, Any]) -> str:
    names = ("cls_cosine", "patch_cosine", "patch_cosine_other", "knn", "knn_across")
    return "; ".join(f"{n} {', '.join(f'{v:.3g}' for v in scores[n])}" for n in names)


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Every score at 2 and 3 times the side, and the neighbours at all three."""
    lines = []
    for label, key, place, digits in ROWS:
        values = [[trial["scores"][name][key][place] for trial in trials] for name in STATES]
        lines.append([label, *(results.Spread.of(column).text(digits) for column in values)])
    return results.table(["", *STATES.values()], lines)


ROWS = (
    ("cosine of CLS, 128 and 64 px", "cls_cosine", 1, 2),
    ("cosine of CLS, 192 and 64 px", "cls_cosine", 2, 2),
    ("cosine of patches, 128 and 64 px", "patch_cosine", 1, 2),
    ("cosine of patches, 192 and 64 px", "patch_cosine", 2, 2),
    ("the same of another image", "patch_cosine_other", 2, 2),
    ("20-NN at 64 px", "knn", 0, 1),
    ("20-NN at 128 px", "knn", 1, 1),
    ("20-NN at 192 px", "knn", 2, 1),
    ("20-NN at 128 px, bank at 64 px", "knn_across", 1, 1),
    ("20-NN at 192 px, bank at 64 px", "knn_across", 2, 1),
)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    command = asked(Command, "high_resolution", __doc__ or "", argv)
    trials = [trial(command, seed) for seed in command.seeds]
    results.write(command.out / "results.json", command, trials)
    print(table(trials))


if __name__ == "__main__":
    main(sys.argv[1:])
