"""One guarded training step: student, teacher, optimizer and objective of a run on this process.

Order of a step: teacher targets, student forward and backward, finite check on all processes,
clipping, AdamW, EMA, Gram teacher. A step whose loss or gradient norm is not finite on any process
changes nothing.

So a NaN or an Inf can reach the weights only where finite gradients become an update that is not
finite. Settings that allow that are refused when a run starts, by the bound in
`optim.unbounded_update`. Should weights hold one all the same (faulty memory, weights loaded so),
the next step is a bad one, and the loop then looks at the weights themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov3core.data.batch import Batch
from dinov3core.train.engine import optim, parallel
from dinov3core.train.engine.accumulation import MicroBatch, WholeKoleo, micro_batches
from dinov3core.train.engine.building import load_backbone, seed_for
from dinov3core.train.engine.config import File, Pretrain
from dinov3core.train.engine.methods import Method, SelfDistillation, Teachers
from dinov3core.train.engine.resolved import Resolved, resolve
from dinov3core.train.engine.teacher import copy_parameters, frozen_copy, update_ema


@dataclass
class Counters:
    """What must survive a kill besides tensors."""

    bad_steps: int = 0
    bad_in_a_row: int = 0
    gram_updates: int = 0
    seconds: float = 0.0
    knn_before: float | None = None
    rankme_before: float | None = None

    @classmethod
    def continued(cls, state: Mapping[str, Any]) -> "Counters":
        """Of a checkpoint; bad steps in a row count anew, names of other versions are left out."""
        known = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        return cls(**known | {"bad_in_a_row": 0})

    def count_step(self, finite: bool) -> None:
        """A good step ends a series of bad ones."""
        self.bad_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1


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


class Trainer:
    """Student, its running average, optimizer and method of one run on this process.

    Args:
        recipe: the run.
        world: this process among the others.
        initial: networks to start from; None: the method makes fresh ones.
        method: how the student learns, of this recipe and world; None: by self-distillation.

    Attributes:
        student, teacher: the networks that train, and their running average (EMA).
    """

    def __init__(
        self,
        recipe: Pretrain,
        world: parallel.World,
        initial: nn.Module | None = None,
        method: Method | None = None,
    ):
        self.recipe = recipe
        self.world = world
        self.resolved: Resolved = resolve(recipe, world.size)
        self.method = method or SelfDistillation(recipe, world)
        self.student: Any = (initial or self.method.networks()).to(world.device).train()
        self.teacher = frozen_copy(self.student)
        self.gram_teacher = self._make_gram_teacher()
        if recipe.run.compile:
            self._compile()
        self._hold_backbone(self.resolved.frozen_steps > 0)
        groups = optim.param_groups(
            self.student, recipe.optim.layer_decay, recipe.optim.patch_embed_lr
        )
        self.optimizer = optim.make_adamw(
            groups, (recipe.optim.beta1, recipe.optim.beta2), recipe.optim.eps
        )
        self.counters = Counters()
        # Freed after `wrapped`. Were that the last to hold the group, torch would end the group's
        # threads while it has Python's lock, for which they wait.
        self._group = world.group

    def _make_gram_teacher(self) -> nn.Module | None:
        """A backbone of its own that holds the anchor; None where the EMA teacher does."""
        if self.resolved.refreshes is None:
            return None
        backbone = frozen_copy(self.student.backbone)
        if isinstance(self.recipe.gram.teacher, File):
            load_backbone(backbone, self.recipe.gram.teacher.path, "gram.teacher.path")
        return backbone

    def _hold_backbone(self, still: bool) -> None:
        """Begin the phase in which heads train alone, or the one in which everything does.

        A backbone held still takes no gradients: none of its activations is kept, and AdamW passes
        it over with its decay and its state. Processes average the gradients of what trains, so
        the student is wrapped anew.
        """
        self.still = still
        self.student.backbone.requires_grad_(not still)
        self.wrapped = parallel.wrap(self.student, self.world)

    def _compile(self) -> None:
        """Compile part by part, as published: equal parts of a network share one small graph.

        There is one for each size of crops. Beyond its limit of graphs torch would go on without
        compiling.
        """
        graphs_of_a_size = self.student.backbone.graphs_of_a_size
        limit = graphs_of_a_size * len(self.recipe.crops.of_each_size)
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, limit)

        # Every micro-batch has another number of masked patches.
        varying_rows = self.recipe.run.accumulation > 1
        backbones = [self.student.backbone, self.teacher.backbone]
        if self.gram_teacher is not None:
            backbones.append(self.gram_teacher)
        for backbone in backbones:
            backbone.compile_parts(varying_rows)
        for networks in (self.student, self.teacher):
            for head in _heads(networks):
                head.compile()

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Whether all weights and the optimizer's state are, on every process."""
        tensors = [tensor for module in self.modules().values() for tensor in module.parameters()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        finite = [torch.isfinite(tensor).all().to(self.world.device) for tensor in tensors]
        return bool(self.world.all_true(torch.stack(finite).all()))

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights that a checkpoint holds."""
        modules: dict[str, nn.Module] = {"student": self.student, "teacher": self.teacher}
        if self.gram_teacher is not None:
            modules["gram_teacher"] = self.gram_teacher
        return modules

    def autocast(self) -> torch.autocast:
        """Within, networks and terms compute in the run's precision."""
        enabled = self.recipe.run.precision == "bf16" and self.world.device.type == "cuda"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def step(
        self,
        batch: Batch,
        step: int,
        observe: bool = False,
        stop: Callable[[], int] = no_stop,
        targets: Any = None,
    ) -> StepReport:
        """One optimizer step on this process's batch, with one host synchronisation.

        Args:
            batch: of the loader, in host memory, or on the training device already.
            step: 0-based; schedules and seeds depend on it alone.
            observe: also compute entropies and prototype usage.
            stop: asked once gradients are there: the signal by which this process is to stop, or 0.
            targets: for this batch, of a teacher elsewhere; None: the method makes them.
        """
        now = self.resolved.at(step)
        self._begin_gram_teacher(step)
        if self.still != (step < self.resolved.frozen_steps):
            self._hold_backbone(not self.still)

        # The teacher sees the whole batch before the student trains on any part of it.
        parts = micro_batches(batch, self.recipe.run.accumulation, self.world.device)
        if targets is None:
            with self.autocast():
                teachers = Teachers(self.teacher, self.gram_teacher)
                targets = self.method.targets(parts, teachers, now)
        whole: Mapping[str, WholeKoleo] = {}
        if len(parts) > 1:
            rehearsal = partial(self._rehearsal, step)
            whole = self.method.whole_terms(self.student, parts, rehearsal)

        # Student, terms, total, backward. Gradients add up over micro-batches; processes average
        # them after the last one.
        sums: dict[str, Tensor] = {}
        for part in parts:
            self._seed(step, part)
            with parallel.defer_sync(self.wrapped, wait=part is not parts[-1]):
                with self.autocast():
                    output = self.method.student_pass(self.wrapped, part)
                    terms = self.method.terms(output, targets, part, whole)
                    loss = self.method.total(terms, now)
                loss.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
        sums |= {name: term.value for name, term in whole.items()}
        sums["loss"] = self.method.total(sums, now)

        # Clipped before the host waits for the finite check, so that a GPU has work meanwhile.
        norms = optim.gradient_norms(self.student)
        optim.clip_gradients(self.student, norms, self.recipe.optim.clip)
        observations = self.method.observations(output, targets, part) if observe else {}
        report = self._report(sums, norms, observations, stop())

        if report.finite:
            self._update(now, step)
        self.counters.count_step(report.finite)
        self.optimizer.zero_grad(set_to_none=True)
        return report

    def _seed(self, step: int, part: MicroBatch) -> None:
        seed_for(self.recipe.run.seed, step, self.world.rank, part.index)

    @contextmanager
    def _rehearsal(self, step: int, part: MicroBatch) -> Iterator[None]:
        """Within, no gradients, and the draws of the pass over `part` that is back-propagated."""
        self._seed(step, part)
        with torch.no_grad(), self.autocast():
            yield

    def _update(self, now: Mapping[str, float], step: int) -> None:
        """AdamW on the student, then the teachers that follow it."""
        optim.set_rates(
            self.optimizer,
            now["lr"],
            now["last_layer_lr"],
            now["weight_decay"],
            now.get("backbone_share", 1.0),  # a run that holds nothing still has no such schedule
        )
        self.optimizer.step()
        for teacher, student in zip(self._moving(self.teacher), self._moving(self.student)):
            update_ema(teacher, student, now["momentum"])
        self._update_gram_teacher(step)

    def _moving(self, networks: nn.Module) -> list[nn.Module]:
        """What a step changes: the heads alone while the backbone is held still."""
        return _heads(networks) if self.still else [networks]

    def _report(
        self,
        sums: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        observations: Mapping[str, Tensor],
        stop: int,
    ) -> StepReport:
        """Means over processes, and what all of them agree on: one vote, one copy to the host.

        A term with a value for each global crop (KoLeo) is reported as their mean; optimised is
        their sum.
        """
        values = {name: value.float().mean() for name, value in sums.items()}
        values |= {f"grad_norm_{name}": norm.float() for name, norm in norms.items()}
        values |= observations
        vector = torch.stack(list(values.values()))
        finite = torch.isfinite(vector).all().to(torch.int32)
        # the smallest: 0 where any process is not finite, minus the largest signal
        votes = self.world.minimum(torch.stack([finite, torch.full_like(finite, -stop)]))
        averaged = self.world.mean(vector)
        *numbers, flag, signal = torch.cat([averaged, votes.float()]).tolist()
        return StepReport(bool(flag), dict(zip(values, numbers, strict=True)), -int(signal))

    def _begin_gram_teacher(self, step: int) -> None:
        refreshes = self.resolved.refreshes
        if refreshes is not None and refreshes.begins_before(step):
            copy_parameters(self.gram_teacher, self.teacher.backbone)

    def _update_gram_teacher(self, step: int) -> None:
        refreshes = self.resolved.refreshes
        if refreshes is not None and refreshes.due_after(step, self.counters.gram_updates):
            copy_parameters(self.gram_teacher, self.teacher.backbone)
            self.counters.gram_updates += 1


def _heads(networks: nn.Module) -> list[nn.Module]:
    """All but the backbone."""
    return [child for name, child in networks.named_children() if name != "backbone"]
