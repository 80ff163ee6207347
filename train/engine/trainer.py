"""One guarded training step: student, teacher, optimizer and objective of a run on this process.

Order of a step: teacher targets, student forward and backward, finite check on all processes,
clipping, AdamW, EMA, Gram teacher. A step whose loss or gradient norm is not finite on any process
changes nothing.

So a NaN or an Inf can reach the weights only where finite gradients become an update that is not
finite. Settings that allow that are refused when a run starts, by the bound in
`optim.unbounded_update`. Should weights hold one all the same (faulty memory, weights loaded so),
the next step is a bad one, and the loop then looks at the weights themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3core.checkpoints import load_weights
from dinov3core.models import ImageStatistics, ProjectionHead
from dinov3core.models.vit import VisionTransformer
from dinov3core.train.engine import optim, parallel
from dinov3core.train.engine.config import ConfigError, Pretrain, Resolved, building
from dinov3core.train.engine.objective import (
    Crops,
    Networks,
    Objective,
    Part,
    StepWeights,
    StudentOutput,
    Targets,
    split,
)
from dinov3core.train.engine.teacher import copy_parameters, frozen_copy, update_ema


@dataclass
class Counters:
    """What must survive a kill besides tensors; images are this process's alone."""

    bad_steps: int = 0
    bad_in_a_row: int = 0
    skipped_images: int = 0
    enlarged_images: int = 0
    gram_updates: int = 0
    seconds: float = 0.0
    knn_before: float | None = None

    @classmethod
    def continued(cls, state: Mapping[str, Any]) -> "Counters":
        """Of a checkpoint; bad steps in a row count anew, names of other versions are left out."""
        known = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        return cls(**known | {"bad_in_a_row": 0})


@dataclass(frozen=True)
class StepReport:
    """One step as numbers on the host."""

    finite: bool
    values: dict[str, float]
    stop: int = 0  # the signal by which some process was asked to stop, 0: none


def no_stop() -> int:
    """Nobody asked this process to stop."""
    return 0


def prepare(recipe: Pretrain, device: torch.device) -> Pretrain:
    """The recipe as `device` runs it: a CPU in fp32; on a GPU, fp32 matrix products use TF32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and recipe.run.precision == "bf16":
        return replace(recipe, run=replace(recipe.run, precision="fp32"))
    return recipe


def resolve(recipe: Pretrain, world_size: int) -> Resolved:
    """The numbers a run follows; none by which finite gradients could take weights to NaN or Inf.

    Raises:
        ConfigError: for a value that cannot work, naming it.
    """
    resolved = recipe.resolve(world_size)
    layer_decay, patch_embed_lr = recipe.optim.layer_decay, recipe.optim.patch_embed_lr
    multiplier = optim.largest_multiplier(recipe.backbone.depth, layer_decay, patch_embed_lr)
    clip, eps = recipe.optim.clip, recipe.optim.eps
    complaint = optim.unbounded_update(resolved.schedules, multiplier, clip, eps)
    if complaint:
        raise ConfigError(complaint)
    return resolved


def seed_for(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Make every draw of this step (stochastic depth, RoPE augmentation) a function of (seed, step,
    rank, part).
    """
    state = np.random.SeedSequence([seed, step, rank, part]).generate_state(2, np.uint32)
    torch.manual_seed((int(state[0]) << 31) ^ int(state[1]))


@building("a network")
def build_networks(recipe: Pretrain) -> Networks:
    """A freshly initialised student; the same on every process, as it depends on run.seed alone."""
    torch.manual_seed(recipe.run.seed)
    backbone = VisionTransformer(recipe.backbone)
    if recipe.run.init:
        load_backbone(backbone, recipe.run.init, "run.init")
    backbone.statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
    dino = ProjectionHead(backbone.width, recipe.dino)
    ibot = ProjectionHead(backbone.width, recipe.ibot)
    return Networks(backbone, dino, ibot)


def load_backbone(backbone: VisionTransformer, path: str, field: str) -> None:
    """Load weights of any known layout into a backbone.

    Raises:
        ConfigError: naming the configuration field, when they do not fit it.
    """
    try:
        load_weights(backbone, path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from error


class Trainer:
    """Student, teacher, optimizer and objective of one run on this process.

    Args:
        recipe: the run.
        world: this process among the others.
        initial: networks to start from; None builds fresh ones.
    """

    def __init__(self, recipe: Pretrain, world: parallel.World, initial: Networks | None = None):
        self.recipe, self.world = recipe, world
        self.resolved: Resolved = resolve(recipe, world.size)
        self.student = (initial or build_networks(recipe)).to(world.device).train()
        self.teacher = frozen_copy(self.student)
        self.gram_teacher = self._make_gram_teacher()
        if recipe.run.compile:
            self._compile()
        self.wrapped = parallel.wrap(self.student, world)
        groups = optim.param_groups(
            self.student, recipe.optim.layer_decay, recipe.optim.patch_embed_lr
        )
        self.optimizer = optim.make_adamw(
            groups, (recipe.optim.beta1, recipe.optim.beta2), recipe.optim.eps
        )
        self.objective = self._make_objective()
        self.counters = Counters()
        self.prototype_counts = torch.zeros(
            recipe.dino.prototypes, dtype=torch.int64, device=world.device
        )

    def _make_objective(self) -> Objective:
        loss, crops = self.recipe.loss, self.recipe.crops
        return Objective(
            global_crops=crops.global_count,
            local_crops=crops.local_count,
            student_temperature=loss.student_temperature,
            sinkhorn_iterations=loss.sinkhorn_iterations,
            skip_same_crop=loss.skip_same_crop,
            koleo_topk=loss.koleo_topk,
            koleo_group_size=loss.koleo_group_size or None,
            koleo_group=self.world.group if loss.koleo_distributed else None,
            sinkhorn_group=self.world.group,
            gram=self.recipe.gram.term(),
        )

    def _make_gram_teacher(self) -> nn.Module | None:
        gram = self.recipe.gram
        if not gram.separate:
            return None
        backbone = frozen_copy(self.student.backbone)
        if gram.teacher.startswith("file:"):
            load_backbone(backbone, gram.teacher.removeprefix("file:"), "gram.teacher")
        return backbone

    def _compile(self) -> None:
        """Block by block, as in the published training: one small graph, shared by all blocks of a
        network.
        """
        backbones = [self.student.backbone, self.teacher.backbone]
        if self.gram_teacher is not None:
            backbones.append(self.gram_teacher)
        for backbone in backbones:
            for block in backbone.blocks:
                block.compile()
        for networks in (self.student, self.teacher):
            networks.dino_head.compile()
            networks.ibot_head.compile()

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Whether all weights and the optimizer's state are, on every process."""
        tensors = [tensor for module in self.modules().values() for tensor in module.parameters()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        finite = [torch.isfinite(tensor).all().to(self.world.device) for tensor in tensors]
        return bool(self.world.all_true(torch.stack(finite).all()))

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights that a checkpoint holds."""
        found: dict[str, nn.Module] = {"student": self.student, "teacher": self.teacher}
        if self.gram_teacher is not None:
            found["gram_teacher"] = self.gram_teacher
        return found

    def autocast(self) -> torch.autocast:
        enabled = self.recipe.run.precision == "bf16" and self.world.device.type == "cuda"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def step(
        self,
        crops: Crops,
        step: int,
        observe: bool = False,
        stop: Callable[[], int] = no_stop,
    ) -> StepReport:
        """One optimizer step on this process's batch.

        Args:
            crops: on the training device.
            step: 0-based; schedules and seeds depend on it alone.
            observe: also compute entropies and prototype usage.
            stop: asked once gradients are there: the signal by which this process is to stop, or 0.
        """
        now = self.resolved.at(step)
        self._refresh_snapshot(step)
        report = self._gradients(crops, step, now, observe, stop)
        if report.finite:
            optim.set_rates(self.optimizer, now["lr"], now["last_layer_lr"], now["weight_decay"])
            self.optimizer.step()
            update_ema(self.teacher, self.student, now["momentum"])
            self._update_gram_teacher(step)
            self.counters.bad_in_a_row = 0
        else:
            self.counters.bad_steps += 1
            self.counters.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        return report

    def _gradients(
        self,
        crops: Crops,
        step: int,
        now: dict[str, float],
        observe: bool,
        stop: Callable[[], int],
    ) -> StepReport:
        """Forward and backward of all micro-batches, then the finite check and clipping: one host
        synchronisation.
        """
        run, batch = self.recipe.run, len(crops.global_crops) // self.objective.global_crops
        weights = StepWeights(
            self.recipe.loss.dino_weight, now["local_weight"], self.recipe.loss.ibot_weight,
            self.recipe.loss.koleo_weight, now["gram_weight"],
        )  # fmt: skip
        parts = split(crops, self.objective.global_crops, run.accumulation)
        with self.autocast():
            targets = self.objective.targets(
                self.teacher, parts, now["teacher_temperature"], self.gram_teacher
            )
        koleo, koleo_grad = self._koleo_of_all(parts, step) if len(parts) > 1 else (None, None)
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            seed_for(run.seed, step, self.world.rank, index)
            last = index == len(parts) - 1
            with parallel.defer_sync(self.wrapped, wait=not last):
                with self.autocast():
                    output = self.wrapped(part.crops, self.objective.gram is not None)
                    terms = self.objective.terms(output, targets, part, batch)
                    if koleo is None:
                        terms["koleo"] = self.objective.koleo(output.cls)
                    loss = self.objective.total(terms, weights)
                    if koleo_grad is not None:
                        rows = _rows(part.images, self.objective.global_crops, batch)
                        loss = loss + weights.koleo * (output.cls.float() * koleo_grad[rows]).sum()
                loss.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
        if koleo is not None:
            sums["koleo"] = koleo
        sums["loss"] = self.objective.total(sums, weights)
        sums["koleo"] = sums[
            "koleo"
        ].mean()  # reported as the mean over crops, optimised as their sum
        norms = optim.grad_norms(self.student)
        optim.clip_gradients(self.student, norms, self.recipe.optim.clip)
        extra = self._observations(output, targets, part) if observe else {}
        return self._report(sums, norms, extra, stop())

    def _koleo_of_all(self, parts: Sequence[Part], step: int) -> tuple[Tensor, Tensor]:
        """KoLeo over every micro-batch's CLS tokens and its gradient with respect to them; one
        extra student pass.
        """
        crops, found = self.objective.global_crops, []
        for index, part in enumerate(parts):
            seed_for(self.recipe.run.seed, step, self.world.rank, index)
            with torch.no_grad(), self.autocast():
                found.append(self.student(part.crops, all_patches=False).cls.float())
        cls = (
            torch.cat([f.unflatten(0, (crops, -1)) for f in found], dim=1)
            .flatten(0, 1)
            .requires_grad_()
        )
        value = self.objective.koleo(cls)
        (grad,) = torch.autograd.grad(value.sum(), cls)
        return value.detach(), grad

    def _report(
        self, sums: dict[str, Tensor], norms: dict[str, Tensor], extra: dict[str, Tensor], stop: int
    ) -> StepReport:
        """Means over processes, and what all of them agree on: one vote, one copy to the host."""
        named = {name: value.detach().float() for name, value in sums.items()}
        named |= {f"grad_norm_{name}": norm.float() for name, norm in norms.items()}
        named |= extra
        vector = torch.stack(list(named.values()))
        finite = torch.isfinite(vector).all().to(torch.int32)
        votes = self.world.minimum(torch.stack([finite, torch.full_like(finite, -stop)]))
        averaged = self.world.mean(vector)
        *numbers, flag, signal = torch.cat([averaged, votes.float()]).tolist()
        return StepReport(bool(flag), dict(zip(named, numbers, strict=True)), -int(signal))

    @torch.no_grad()
    def _observations(
        self, output: StudentOutput, targets: Targets, part: Part
    ) -> dict[str, Tensor]:
        """Entropies of the CLS assignment and of the student's prediction (last micro-batch),
        prototypes assigned.
        """
        probabilities = targets.cls.dense()
        self.prototype_counts += torch.bincount(
            probabilities.argmax(1), minlength=probabilities.shape[1]
        )
        rows = self.objective.global_crops * len(part.images)
        logits = output.cls_logits[:rows].float() / self.recipe.loss.student_temperature
        log_student = logits.log_softmax(1)
        return {
            "target_entropy": -torch.special.xlogy(probabilities, probabilities).sum(1).mean(),
            "student_entropy": -(log_student.exp() * log_student).sum(1).mean(),
        }

    def _refresh_snapshot(self, step: int) -> None:
        if self.gram_teacher is None or self.recipe.gram.teacher != "snapshot":
            return
        if step == self.resolved.gram_first_update:
            copy_parameters(self.gram_teacher, self.teacher.backbone)

    def _update_gram_teacher(self, step: int) -> None:
        """Published rule: after step s when s + 1 has reached the first update and is a multiple of
        the interval.
        """
        gram, done = self.recipe.gram, step + 1
        first, every = self.resolved.gram_first_update, self.resolved.gram_update_every
        if gram.teacher == "snapshot":  # already copied before that step
            first += 1
        if self.gram_teacher is None or not every or done < first or done % every:
            return
        if not gram.max_updates or self.counters.gram_updates < gram.max_updates:
            copy_parameters(self.gram_teacher, self.teacher.backbone)
            self.counters.gram_updates += 1


def _rows(images: Tensor, crops: int, batch: int) -> Tensor:
    return (torch.arange(crops, device=images.device)[:, None] * batch + images).flatten()
