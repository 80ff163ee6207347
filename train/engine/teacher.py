"""The teachers: an exponential moving average of the student, and the anchor of the Gram term.

A teacher never trains: no gradients, eval mode, its own forward passes under no_grad.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def frozen_copy(module: nn.Module) -> nn.Module:
    """A teacher that starts as `module`: deep copy, buffers included, eval mode, no gradients."""
    teacher = copy.deepcopy(module).eval()
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters.

    Buffers are left alone: they are constants here.
    """
    torch._foreach_lerp_(_weights(teacher), _weights(student), 1 - momentum)


@torch.no_grad()
def copy_parameters(target: nn.Module, source: nn.Module) -> None:
    """Overwrite the parameters of `target` by those of `source`."""
    torch._foreach_copy_(_weights(target), _weights(source))


def _weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


@dataclass(frozen=True)
class GramUpdates:
    """When a Gram teacher of its own takes the weights of the EMA teacher (0-based steps).

    Args:
        from_snapshot: it begins as the EMA teacher at step `first`; else with weights of its own.
        first: see `begins_before` and `due_after`.
        every: steps between further updates; 0: none.
        most: number of further updates; 0: no limit.
    """

    from_snapshot: bool
    first: int
    every: int
    most: int

    def begins_before(self, step: int) -> bool:
        """Whether the first copy is made before this step."""
        return self.from_snapshot and step == self.first

    def due_after(self, step: int, updates: int) -> bool:
        """Whether an update follows this step, after `updates` earlier ones.

        Published rule: after step s when s + 1 has reached the first update and is a multiple of
        the interval. A snapshot has just been copied before that step, so it waits for the next.
        """
        done = step + 1
        first = self.first + 1 if self.from_snapshot else self.first
        if not self.every or done < first or done % self.every:
            return False
        return not self.most or updates < self.most
