"""The teachers: an exponential moving average of the student, and the anchor of the Gram term.

A teacher never trains: no gradients, eval mode, its own forward passes under no_grad.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def frozen_copy(module: nn.Module) -> nn.Module:
    """A teacher that starts as `module`: deep copy, buffers included, eval mode, no gradients."""
    teacher = copy.deepcopy(module).eval()
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only (buffers are
    constants here).
    """
    ours, theirs = _paired(teacher, student)
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


@torch.no_grad()
def copy_parameters(target: nn.Module, source: nn.Module) -> None:
    """Overwrite the parameters of `target` by those of `source`."""
    ours, theirs = _paired(target, source)
    torch._foreach_copy_(ours, theirs)


def _paired(a: nn.Module, b: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    return list(_data(a.parameters())), list(_data(b.parameters()))


def _data(parameters: Iterable[nn.Parameter]) -> Iterable[Tensor]:
    return (p.detach() for p in parameters)
