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
class Refreshes:
    """When a Gram teacher of its own takes over the weights of the EMA teacher (0-based steps).

    Args:
        first: the step before which it is copied for the first time; None: it has weights of its
            own from the beginning.
        every: steps between further copies; 0: none.
        at_most: number of further copies; 0: no limit.
    """

    first: int | None
    every: int
    at_most: int

    def begins_before(self, step: int) -> bool:
        """Whether the first copy is made before this step."""
        return step == self.first

    def due_after(self, step: int, refreshes: int) -> bool:
        """Whether another copy is made after this step, given how many there were.

        As published, after steps whose number, counted from 1, is a multiple of `every`.
        """
        done = step + 1
        if not self.every or done % self.every:
            return False
        if self.first is not None and step < self.first:
            return False
        return not self.at_most or refreshes < self.at_most
