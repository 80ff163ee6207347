"""Where a stage begins: what it takes over from the run before it, and whether it can.

As published (DINOv3 paper, sections 4 and 5, and its configurations): the Gram stage is the
pretraining run continued, with teacher, heads and optimizer; the high-resolution stage is a run of
its own whose student and teacher both begin as the teacher of the Gram stage. Here both count their
steps from 0.

The earlier run is read once, before the first step. From then on a stage has checkpoints of its own
and needs it no more.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinov3core.train.engine import changes, checkpoint
from dinov3core.train.engine.building import IN_TRAINING_ALONE, load_backbone
from dinov3core.train.engine.checkpoint import Candidate, CheckpointError, Contents
from dinov3core.train.engine.config import RUNS, ConfigError, Earlier, Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

# Fields that begin so say what a network computes, even where its tensors have the same shapes;
# of them, what acts in training alone may differ between stages.
ARCHITECTURE = ("backbone", "dino.", "ibot.")
MAY_DIFFER = {f"backbone.{name}" for name in IN_TRAINING_ALONE}


@dataclass(frozen=True)
class Beginning:
    """What a stage took over before its first step.

    Args:
        run: folder of the earlier run.
        step: the steps that run had done.
        take: what of it was taken, as in `Run.take`.
        weights: `checkpoint.fingerprint` of the checkpoint it was taken from.
        anchor: the steps that run had done when its teacher was the one patches are held to; None:
            they are held to no earlier one.
    """

    run: str
    step: int
    take: Literal["run", "teacher"]
    weights: str
    anchor: int | None = None

    def in_words(self) -> str:
        """For a sentence: "continues runs/quickstart after step 600"."""
        begins = "continues" if self.take == "run" else "begins as the teacher of"
        held = (
            "" if self.anchor is None else f", its patches held to those after step {self.anchor}"
        )
        return f"{begins} {self.run} after step {self.step}{held}"


def in_words(recipe: Pretrain, beginning: Beginning | None) -> str:
    """What a run began as, for its summary and report; empty for an untrained network."""
    if beginning is not None:
        return beginning.in_words()
    return f"begins with the weights in {recipe.run.init}" if recipe.run.init else ""


# --- before anything is computed


def check(recipe: Pretrain, standard: Pretrain | None = None) -> None:
    """Whether a stage that has to begin anew can start from the run it names.

    Args:
        recipe: of the stage.
        standard: the recipe of its name without changes; its `run.from_` names the recipe by which
            the earlier run is made, for the sentence.

    Raises:
        ConfigError: it cannot; the message says which command makes or ends the earlier run.
    """
    earlier = recipe.earlier
    if earlier is None:
        return
    if earlier.resolve() == recipe.folder.resolve():
        raise ConfigError(
            f"run.from: the stage would write into {recipe.folder}, the folder of the run it "
            "starts from; give it another one with --run.out"
        )
    if not goes_on(recipe):
        check_fit(recipe, _finished(recipe, _making(recipe, standard)).state["recipe"])


def goes_on(recipe: Pretrain) -> bool:
    """Whether a run has checkpoints of its own to continue from, so that it does not begin anew."""
    if not recipe.run.resume or (recipe.folder / "summary.json").exists():
        return False
    return any(recipe.folder.glob("checkpoints/step_*"))


def check_fit(recipe: Pretrain, before: Mapping[str, object]) -> None:
    """Whether the networks of a stage are those of the run before it.

    Args:
        before: of that run, as `changes.stated` gives it.

    Raises:
        ConfigError: naming the first field that differs.
    """
    now = changes.stated(recipe, processes=1)
    for name in now:
        if not name.startswith(ARCHITECTURE) or name in MAY_DIFFER or name not in before:
            continue
        if now[name] != before[name]:
            option = name.replace("_", "-")
            raise ConfigError(
                f"run.from: {recipe.earlier} was trained with {name} {before[name]} and this stage "
                f"has {now[name]}; give it --{option} {before[name]}, or another run to start from"
            )


def _finished(recipe: Pretrain, making: str) -> Candidate:
    """The last checkpoint of the run a stage starts from, by what its state.json says.

    Args:
        making: the command that makes such a run.

    Raises:
        ConfigError: there is no such run, or it is not finished.
    """
    earlier = recipe.earlier
    assert earlier is not None
    record = _json(earlier / "config.json")
    summary = _json(earlier / "summary.json")
    last = checkpoint.newest_stated(earlier / "checkpoints")
    if not record and not summary and last is None:
        raise ConfigError(f"run.from: there is no run in {earlier}; make it first: {making}")

    done = _steps(summary)
    if not done or done < _steps(record.get("resolved")):
        finishing = _finishing(record, earlier) or making
        so_far = f" (it is saved after step {last.state['step']})" if last else ""
        raise ConfigError(
            f"run.from: the run in {earlier} is not finished{so_far}; finish it first: {finishing}"
        )
    if last is None or last.state["step"] != done:
        raise ConfigError(
            f"run.from: the run in {earlier} has no checkpoint of its last step {done} that can be "
            f"read; restore it from a copy, or make the run again: {making}"
        )
    return last


def _steps(said: object) -> int:
    """How many steps a file of a run speaks of; 0 when it does not."""
    steps = said.get("steps") if isinstance(said, dict) else None
    return steps if isinstance(steps, int) else 0


def _finishing(record: Mapping[str, Any], folder: Path) -> str:
    """The command that continues the run of a config.json; empty when it states none."""
    try:
        words = ["python", "train/pretrain.py", *record["argv"]]
        recipe = record["recipe"]
        if Path(recipe["run"]["out"] or RUNS / recipe["name"]) != folder:
            words += ["--run.out", str(folder)]  # it was moved
        return shlex.join(words) if record["argv"] else ""
    except (LookupError, TypeError):
        return ""


def _making(recipe: Pretrain, standard: Pretrain | None) -> str:
    """The command that makes the run a stage starts from."""
    name = (standard or recipe).run.from_ or "RECIPE"
    if "/" in name:
        name = "RECIPE"
    words = ["python", "train/pretrain.py", name]
    if standard is not None and recipe.data.source != standard.data.source:
        words += ["--data.source", recipe.data.source]
    if recipe.earlier != RUNS / name:
        words += ["--run.out", str(recipe.earlier)]
    return shlex.join(words)


def _json(path: Path) -> dict[str, Any]:
    """What a file of a run says; empty when it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# --- taking over


def take_over(recipe: Pretrain, trainer: Trainer) -> Beginning | None:
    """Fill the networks of a stage, and its optimizer, from the run before it; None: no stage.

    Works on any number of processes, whatever that run had.

    Raises:
        ConfigError: the earlier run is not finished, or its last checkpoint is not whole.
        CheckpointError: it does not fit, or cannot be loaded.
    """
    if recipe.earlier is None:
        return None
    earlier = recipe.earlier
    _check_on_main(recipe, trainer.world)
    try:
        whole = checkpoint.newest_whole(earlier / "checkpoints", trainer.world)
    except CheckpointError as error:
        raise ConfigError(f"run.from: {error}") from error
    if whole is None or whole.passed_over:
        damaged = "; ".join(whole.passed_over) if whole else "it is gone"
        raise ConfigError(
            f"run.from: the last checkpoint of {earlier} is damaged ({damaged}); restore it from a "
            "copy, or make the run again"
        )
    check_fit(recipe, whole.state["recipe"])
    _fill(trainer, whole, recipe.run.take)
    anchor = _fill_anchor(recipe, trainer)
    weights = checkpoint.fingerprint(whole.state)
    return Beginning(str(earlier), whole.state["step"], recipe.run.take, weights, anchor)


def _check_on_main(recipe: Pretrain, world: World) -> None:
    """Whether the earlier run is finished, as the main process sees it: all go on, or none."""
    problem = ""
    if world.is_main:
        try:
            _finished(recipe, _making(recipe, None))
        except ConfigError as error:
            problem = str(error)
    problem = world.from_main(problem)
    if problem:
        raise ConfigError(problem)


def _fill(trainer: Trainer, whole: Candidate, take: Literal["run", "teacher"]) -> None:
    contents = Contents({"teacher": trainer.teacher}, None, {})
    if take == "run":
        both = {"student": trainer.student, "teacher": trainer.teacher}
        contents = Contents(both, trainer.optimizer, {})
    checkpoint.load_part(whole, contents, trainer.world)
    if take == "teacher":
        trainer.student.load_state_dict(trainer.teacher.state_dict())


def _fill_anchor(recipe: Pretrain, trainer: Trainer) -> int | None:
    """Give the Gram teacher the weights of an earlier teacher; its steps, None: no such anchor."""
    if recipe.gram is None or not isinstance(recipe.gram.teacher, Earlier):
        return None
    assert recipe.earlier is not None and trainer.gram_teacher is not None
    early = checkpoint.early(recipe.earlier / "checkpoints", recipe.gram.teacher.step)
    path = Path(trainer.world.from_main(str(early)))  # one answer for all processes
    load_backbone(trainer.gram_teacher, str(path), "gram.teacher")
    return checkpoint.step_of(path)


def beginning_of(state: Mapping[str, Any]) -> Beginning | None:
    """What the run of a checkpoint took over, by its state.json."""
    recorded = state.get("beginning")
    return Beginning(**recorded) if recorded else None


def is_another(beginning: Beginning) -> bool:
    """Whether the folder of the earlier run holds, by now, another run; False when it is gone."""
    last = checkpoint.newest_stated(Path(beginning.run) / "checkpoints")
    return last is not None and checkpoint.fingerprint(last.state) != beginning.weights
