"""The one cache of what rotation is computed from: tables of a grid, phases of tables.

All blocks of a model rotate by the same tables: at 41 tokens the phases took 40 of the 200 us of an
attention. An entry belongs to the tensors it was computed from: it goes when one of them does, and
is computed again when one of them has changed.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dinov3core.ops.dispatch import is_plain_eager

Value = TypeVar("Value")
LIMIT = 64  # entries: images of endless sizes (tiled extraction) must not fill the memory


class _Entry(NamedTuple):
    state: list[tuple[int, int]]  # (version, address) of every tensor when it was computed
    references: list[weakref.ref[Tensor]]  # kept alive for their callbacks
    value: Any


_entries: OrderedDict[Hashable, _Entry] = OrderedDict()


def while_unchanged(
    function: Callable[..., Value], tensors: tuple[Tensor, ...], *settings: Hashable
) -> Value:
    """function(*tensors, *settings), computed again only when one of the tensors has changed.

    Nothing is kept of tensors that cannot tell whether they have changed (those of inference mode),
    nor while a call is traced.
    """
    for tensor in tensors:
        if not is_plain_eager(tensor) or tensor.is_inference():
            return function(*tensors, *settings)
    key = (function, settings, *[id(tensor) for tensor in tensors])
    # The address too: `tensor.data = other` leaves the version as it was.
    state = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
    entry = _entries.get(key)
    if entry is None or entry.state != state:
        # What is computed in inference mode could not be saved for the backward of a later step.
        with torch.inference_mode(False), torch.no_grad():
            computed = function(*tensors, *settings)
        # A tensor that dies takes its entries along before another one can have its id.
        references = [weakref.ref(tensor, lambda _: _entries.pop(key, None)) for tensor in tensors]
        entry = _entries[key] = _Entry(state, references, computed)
        while len(_entries) > LIMIT:
            _entries.popitem(last=False)
    value: Value = entry.value
    return value
