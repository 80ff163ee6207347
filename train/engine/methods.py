"""How a student learns: what it sees, what it is compared with, and what of that is optimised.

A `Trainer` does what every way of learning shares: seeds, micro-batches, backward, the finite
check, clipping, AdamW, and the average of the student that is evaluated and exported. What differs
is a `Method`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dinov3core.models.networks import NetworkOutput, Networks
from dinov3core.models.presets import Backbone
from dinov3core.ops.sinkhorn import ALONE
from dinov3core.train.engine.accumulation import MicroBatch, WholeKoleo, in_batch_order
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.objective import Objective, StepWeights, Targets
from dinov3core.train.engine.parallel import World

Now = Mapping[str, float]  # all scheduled scalars at one step


class Teachers(NamedTuple):
    """The teachers that a trainer has at a step."""

    ema: nn.Module  # the running average of the student, of its shape
    gram: nn.Module | None  # a backbone that holds the anchor of the Gram term; None: there is none


class Method(Protocol):
    """A way of learning; `Trainer.step` asks in the order in which its members stand here.

    What a student's pass gives and what it is compared with is known to the method alone.

    Attributes:
        prototype_counts: int64 [K], how often each prototype was a target's largest on this process
            since it was last set to zero; [0] where there are no prototypes.
    """

    prototype_counts: Tensor

    def networks(self) -> nn.Module:
        """The student, freshly made, alike on every process.

        Its child `backbone` is what is evaluated and exported; each of its children is clipped by
        itself.
        """
        ...

    def targets(self, parts: Sequence[MicroBatch], teachers: Teachers, now: Now) -> Any:
        """What the student is compared with, for the whole batch, where no targets are given.

        Raises:
            ValueError: they can only be given.
        """
        ...

    def whole_terms(
        self,
        student: nn.Module,
        parts: Sequence[MicroBatch],
        rehearsal: Callable[[MicroBatch], AbstractContextManager[None]],
    ) -> Mapping[str, WholeKoleo]:
        """Terms that no micro-batch has by itself, by name; asked where there are several.

        Args:
            rehearsal: within, a pass over a micro-batch has no gradients, and the random draws of
                the one that is back-propagated later.
        """
        ...

    def student_pass(self, student: nn.Module, part: MicroBatch) -> Any:
        """The student's output for a micro-batch; `student` is called once."""
        ...

    def terms(
        self, output: Any, targets: Any, part: MicroBatch, whole: Mapping[str, WholeKoleo]
    ) -> dict[str, Tensor]:
        """The terms of a micro-batch by name; over all of them each adds up to the batch's.

        Args:
            output: of `student_pass`.
            targets: of `targets`, or given to the step.
            whole: of `whole_terms`; empty where the batch is one micro-batch.
        """
        ...

    def total(self, terms: Mapping[str, Tensor], now: Now) -> Tensor:
        """What is optimised: the weighted sum of the terms."""
        ...

    def observations(self, output: Any, targets: Any, part: MicroBatch) -> dict[str, Tensor]:
        """Further figures of the last micro-batch, each 0-d, for the log."""
        ...


class _AgainstPrototypes:
    """DINO, iBOT and KoLeo on a backbone with two heads: all but where targets come from.

    Args:
        recipe: the run.
        world: this process among the others.
    """

    def __init__(self, recipe: Pretrain, world: World):
        self.recipe = recipe
        self.objective = _objective(recipe, world)
        self.prototype_counts = torch.zeros(
            recipe.dino.prototypes, dtype=torch.int64, device=world.device
        )

    def networks(self) -> Networks:
        return build_networks(self.recipe)

    def whole_terms(
        self,
        student: nn.Module,
        parts: Sequence[MicroBatch],
        rehearsal: Callable[[MicroBatch], AbstractContextManager[None]],
    ) -> dict[str, WholeKoleo]:
        """KoLeo over the CLS tokens of all micro-batches: one more student pass over each."""
        cls_of = []
        for part in parts:
            with rehearsal(part):
                cls_of.append(self._pass(student, part, all_patches=False).cls.float())
        return {"koleo": WholeKoleo.of(in_batch_order(cls_of, parts), self.objective.koleo)}

    def student_pass(self, student: nn.Module, part: MicroBatch) -> NetworkOutput:
        return self._pass(student, part, all_patches=self.objective.gram is not None)

    def _pass(self, student: nn.Module, part: MicroBatch, all_patches: bool) -> NetworkOutput:
        batch = part.batch
        return student(
            batch.global_crops,
            batch.mask_indices,
            masks=self._hidden(part),
            local_crops=batch.local_crops,
            all_patches=all_patches,
        )

    def _hidden(self, part: MicroBatch) -> Tensor | None:
        """Which patches are hidden from the student; None: it sees all."""
        return part.batch.masks

    def terms(
        self,
        output: NetworkOutput,
        targets: Targets,
        part: MicroBatch,
        whole: Mapping[str, WholeKoleo],
    ) -> dict[str, Tensor]:
        return self.objective.terms(output, targets, part, whole.get("koleo"))

    def total(self, terms: Mapping[str, Tensor], now: Now) -> Tensor:
        loss = self.recipe.loss
        weights = StepWeights(
            dino=loss.dino_weight,
            local=now["local_weight"],
            ibot=loss.ibot_weight,
            koleo=loss.koleo_weight,
            gram=now["gram_weight"],
        )
        return self.objective.total(terms, weights)

    @torch.no_grad()
    def observations(
        self, output: NetworkOutput, targets: Targets, part: MicroBatch
    ) -> dict[str, Tensor]:
        """Entropies of the CLS targets and of the student's prediction.

        Prototypes assigned are counted on the way.
        """
        probabilities = targets.cls.dense()
        self.prototype_counts += torch.bincount(
            probabilities.argmax(1), minlength=probabilities.shape[1]
        )
        rows = len(part.batch.global_crops)
        logits = output.cls_logits[:rows].float() / self.recipe.loss.student_temperature
        log_student = logits.log_softmax(1)
        return {
            "target_entropy": -torch.special.xlogy(probabilities, probabilities).sum(1).mean(),
            "student_entropy": -(log_student.exp() * log_student).sum(1).mean(),
        }


class SelfDistillation(_AgainstPrototypes):
    """DINOv3 pretraining: targets of the running average of the student, masked patches hidden."""

    def targets(self, parts: Sequence[MicroBatch], teachers: Teachers, now: Now) -> Targets:
        return self.objective.targets(
            teachers.ema, parts, now["teacher_temperature"], teachers.gram
        )


class HeadDistillation(_AgainstPrototypes):
    """Distillation from a frozen teacher with heads: its targets are given to every step.

    As published (recipe of the distilled models), the student sees its crops whole; the masks only
    say at which patches the iBOT term compares. So its mask token gets a gradient of zero.

    Args:
        recipe, world: as above.
        begin: done to a fresh backbone, such as to fill it; None: nothing.

    Raises:
        ValueError: the recipe has a Gram term.
    """

    def __init__(
        self,
        recipe: Pretrain,
        world: World,
        begin: Callable[[Backbone], None] | None = None,
    ):
        if recipe.gram is not None:
            raise ValueError(
                "distillation has no Gram term: its teacher is frozen already; leave gram out"
            )
        super().__init__(recipe, world)
        self.begin = begin

    def networks(self) -> Networks:
        networks = super().networks()
        if self.begin is not None:
            self.begin(networks.backbone)
        return networks

    def targets(self, parts: Sequence[MicroBatch], teachers: Teachers, now: Now) -> Targets:
        raise ValueError("expected the targets of a frozen teacher with the batch, got none")

    def _hidden(self, part: MicroBatch) -> None:
        return None


def _objective(recipe: Pretrain, world: World) -> Objective:
    loss = recipe.loss
    crops = recipe.crops
    # A process alone holds the whole of every group.
    koleo_group = world.group if loss.koleo_distributed else None
    koleo_group_size = loss.koleo_group_size if koleo_group is not None else 0
    return Objective(
        global_crops=crops.global_count,
        local_crops=crops.local_count,
        student_temperature=loss.student_temperature,
        sinkhorn_iterations=loss.sinkhorn_iterations,
        skip_same_crop=loss.skip_same_crop,
        koleo_topk=loss.koleo_topk,
        koleo_group_size=koleo_group_size or None,
        koleo_group=koleo_group,
        sinkhorn_group=ALONE if world.group is None else world.group,
        gram=recipe.gram,
    )
