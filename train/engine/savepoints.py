"""The checkpoints of a run: continuing from the newest one, writing the next."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dinov3core.train.engine import changes, checkpoint, stages
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.image_tally import ImageTally, ImageTotals
from dinov3core.train.engine.stages import Beginning
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Counters, Trainer


class Savepoints:
    """What a run can be continued from.

    Attributes:
        newest: the newest checkpoint; None before the first.
        beginning: which run this one took over at its start; None: none.

    Args:
        recipe: the run.
        trainer, tally: whose state a checkpoint holds.
        identity: of the run, as `changes.identity` gives it.
    """

    def __init__(
        self,
        recipe: Pretrain,
        trainer: Trainer,
        tally: ImageTally,
        identity: dict[str, object],
    ):
        self.recipe = recipe
        self.trainer = trainer
        self.tally = tally
        self.identity = identity
        self.world = trainer.world
        self.folder = recipe.folder / "checkpoints"
        self.newest: Path | None = None
        self.beginning: Beginning | None = None

    def in_words(self) -> str:
        """What there is to continue from, for a sentence."""
        if self.newest is None:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is {self.newest}"

    def holds(self, done: int) -> bool:
        """Whether the newest checkpoint is the one after `done` steps."""
        return self.newest is not None and checkpoint.step_of(self.newest) == done

    def resume(self, say: Callable[[str], None]) -> int:
        """Continue from the newest checkpoint that is whole, when there is one.

        Without one, a stage takes over the run before it.

        Args:
            say: told from what, and what was passed over.

        Returns:
            The steps it has done; 0 without one.

        Raises:
            TrainingStopped: it is of another run.
            ConfigError: a stage cannot start from the run before it.
            checkpoint.CheckpointError: none is whole, or it does not fit.
        """
        resumed = checkpoint.newest_whole(self.folder, self.world)
        if resumed is None:
            self.beginning = stages.take_over(self.recipe, self.trainer)
            return 0
        self.newest = resumed.path
        state = resumed.state
        self.beginning = stages.beginning_of(state)
        self._compare(state.get("recipe", {}), state["step"], say)

        trainer = self.trainer
        checkpoint.load(resumed, self._contents(trainer.method.prototype_counts), self.world)
        if not self.world.is_main:  # what all processes counted goes on with the main one
            trainer.method.prototype_counts.zero_()

        counters = state["counters"]
        trainer.counters = Counters.continued(counters)
        skipped = counters.get("skipped_images", 0)
        enlarged = counters.get("enlarged_images", 0)
        self.tally.resume(ImageTotals(skipped, enlarged, state.get("skipped", [])))

        say(f"resuming after step {state['step']} from {self.recipe.folder}")
        for damage in resumed.passed_over:
            say(f"passed over a damaged checkpoint: {damage}")
        return state["step"]

    def _compare(self, before: Mapping[str, object], done: int, say: Callable[[str], None]) -> None:
        """Refuse to continue another run than this."""
        named = changes.differences(before, self.identity)
        if self.beginning is not None and stages.is_another(self.beginning):
            named.append(f"{self.beginning.run} holds another run than this stage took over")
        changed = "; ".join(named)
        if changed and not self.recipe.run.accept_changes:
            raise TrainingStopped(
                f"{self.newest} is of a run with another recipe: {changed}. Give the earlier "
                "values to continue that run, or give another --run.out to begin a new one, or "
                "--run.accept-changes True to go on with the new values"
            )
        steps = self.trainer.resolved.steps
        if done > steps:
            raise TrainingStopped(
                f"{self.newest} has done {done} steps, more than the {steps} of this "
                "recipe; train longer, or give another --run.out"
            )
        if changed:
            say(f"continuing with another recipe, as accepted: {changed}")

    def save(self, done: int) -> None:
        """Write the checkpoint after `done` steps.

        Raises:
            checkpoint.CheckpointNotWritten: the disk is full, read-only or gone.
        """
        trainer = self.trainer
        run = self.recipe.run
        self.newest = checkpoint.save(
            self.folder,
            done,
            self._contents(self.world.total(trainer.method.prototype_counts)),
            self._state(),
            self.world,
            checkpoint.Kept(run.keep_checkpoints, run.keep_every),
        )

    def _state(self) -> dict[str, object]:
        """What a checkpoint holds besides tensors; images are counted over all processes."""
        images = self.tally.totals()
        counters = asdict(self.trainer.counters)
        counters |= {"skipped_images": images.skipped, "enlarged_images": images.enlarged}
        return {
            "counters": counters,
            "skipped": images.names,
            "recipe": self.identity,
            "beginning": self.beginning and asdict(self.beginning),
        }

    def _contents(self, prototype_counts: Tensor) -> checkpoint.Contents:
        """Whose tensors a checkpoint holds."""
        buffers = {"prototype_counts": prototype_counts} if len(prototype_counts) else {}
        return checkpoint.Contents(self.trainer.modules(), self.trainer.optimizer, buffers)
