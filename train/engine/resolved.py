"""The numbers a run follows: its schedules at every step, made once from its recipe."""

from dataclasses import dataclass

import numpy as np

from dinov3core.bounds import fields_of
from dinov3core.train.engine.complaints import recipe_complaints
from dinov3core.train.engine.config import ConfigError, Ema, Pretrain, Snapshot
from dinov3core.train.engine.optim import backbone_shares, largest_multiplier, unbounded_update
from dinov3core.train.engine.schedules import Schedule, first_outside, lr_factor, scaled, values
from dinov3core.train.engine.teacher import Refreshes


@dataclass(frozen=True)
class Resolved:
    """The numbers a run follows."""

    steps: int
    frozen_steps: int
    """First steps, in which the heads train alone."""
    lr_factor: float
    schedules: dict[str, np.ndarray]
    refreshes: Refreshes | None  # of a Gram teacher of its own

    def at(self, step: int) -> dict[str, float]:
        """All scheduled scalars at one step."""
        return {name: float(series[step]) for name, series in self.schedules.items()}


def resolve(recipe: Pretrain, world_size: int) -> Resolved:
    """Every schedule as numbers, the learning rate after scaling.

    There are none by which finite gradients could take weights to NaN or Inf.

    Raises:
        ConfigError: for a value that cannot work, naming it.
    """
    for complaint in recipe_complaints(recipe, world_size):
        raise ConfigError(complaint)
    optim = recipe.optim
    factor = lr_factor(optim.lr_scaling, recipe.run.batch_size * world_size)
    steps = recipe.run.total_steps
    frozen = min(int(optim.freeze_backbone_epochs * recipe.run.epoch_length), steps)
    schedules = _schedules(recipe, factor, frozen)

    multiplier = largest_multiplier(recipe.backbone.depth, optim.layer_decay, optim.patch_embed_lr)
    complaint = unbounded_update(schedules, multiplier, optim.clip, optim.eps)
    if complaint:
        raise ConfigError(complaint)
    return Resolved(steps, frozen, factor, schedules, _refreshes(recipe))


def _schedules(recipe: Pretrain, factor: float, frozen: int) -> dict[str, np.ndarray]:
    """Every schedule by its name in metrics.jsonl.

    Args:
        factor: on the learning rate, by the batch.
        frozen: first steps, in which the heads train alone.
    """
    optim = recipe.optim
    epoch = recipe.run.epoch_length
    lr = _series(recipe, "optim.lr", scaled(optim.lr, factor))
    last_layer_lr = lr.copy()
    last_layer_lr[: int(optim.freeze_last_layer_epochs * epoch)] = 0.0
    schedules = {
        "lr": lr,
        "weight_decay": _series(recipe, "optim.weight_decay", optim.weight_decay),
        "momentum": _series(recipe, "teacher.momentum", recipe.teacher.momentum),
        "teacher_temperature": _series(recipe, "teacher.temperature", recipe.teacher.temperature),
        "local_weight": _series(recipe, "loss.local_weight", recipe.loss.local_weight),
        "gram_weight": _gram_weight(recipe),
        "last_layer_lr": last_layer_lr,
    }
    ramp = int(optim.unfreeze_epochs * epoch)
    if frozen or ramp:
        schedules["backbone_share"] = backbone_shares(recipe.run.total_steps, frozen, ramp)
    return schedules


def _gram_weight(recipe: Pretrain) -> np.ndarray:
    """Of the Gram term: 0 without an anchor, and before there is a first snapshot."""
    if recipe.gram is None:
        return np.zeros(recipe.run.total_steps)
    weight = _series(recipe, "gram.weight", recipe.gram.weight)
    refreshes = _refreshes(recipe)
    if refreshes is not None and refreshes.first is not None:
        weight[: refreshes.first] = 0.0
    return weight


def _refreshes(recipe: Pretrain) -> Refreshes | None:
    """When a Gram teacher of its own takes the EMA teacher's weights; None: there is none."""
    teacher = None if recipe.gram is None else recipe.gram.teacher
    if teacher is None or isinstance(teacher, Ema):
        return None
    first = recipe.run.stretched(teacher.first) if isinstance(teacher, Snapshot) else None
    return Refreshes(first, recipe.run.stretched(teacher.every), teacher.at_most)


def _series(recipe: Pretrain, name: str, schedule: Schedule) -> np.ndarray:
    """A schedule as one float64 per step, each within the bounds of its field."""
    part, field_name = name.split(".")
    owner = fields_of(type(getattr(recipe, part)))
    bounds = next(field.bounds for field in owner if field.name == field_name)
    try:
        series = values(schedule, recipe.run.total_steps, recipe.run.epoch_length)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    step = first_outside(series, bounds)
    if step is not None:
        raise ConfigError(
            f"{name}: expected {bounds} at every step, got {series[step]:g} at step {step} "
            f"of {len(series)}, from {schedule}"
        )
    return series
