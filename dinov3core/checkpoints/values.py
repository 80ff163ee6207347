"""Which tensors can be weights: dense floats with memory of their own, of sizes training gives."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov3core.checkpoints.errors import WeightsError

# The largest float16, in which weights are stored too. Trained ones stay far below (order 10); the
# flipped top bit of an exponent gives 1e36 and more.
LARGEST = 65504.0
SHORTEST_PERIOD = 1e-6  # positions are divided by it


def check(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no weight.

    Kinds and sizes come first: arithmetic on a tensor that is only declared may need any amount of
    memory.

    Raises:
        WeightsError: names the first such tensor.
    """
    for key, tensor in tensors.items():
        _check_kind(path, key, tensor)
    declared = sum(tensor.nbytes for tensor in tensors.values())
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if declared > 2 * stored:  # the final norm of a ConvNeXt is stored once and named twice
        raise WeightsError(
            path,
            f"expected tensors with memory of their own, got {declared} bytes of tensors that "
            f"share {stored}; save them with .clone()",
        )
    for key, tensor in tensors.items():
        _check_range(path, key, tensor)


def check_periods(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Refuse periods of the rotation, in official names, that are not positive."""
    periods = tensors.get("rope_embed.periods")
    if periods is not None and not (periods >= SHORTEST_PERIOD).all():
        raise WeightsError(
            path,
            f"expected rope_embed.periods of at least {SHORTEST_PERIOD:g}, "
            f"got {periods.min().item():g}; take an earlier checkpoint",
        )


def _check_kind(path: str | os.PathLike, key: str, tensor: Tensor) -> None:
    kind = _unusual(tensor)
    if kind:
        raise WeightsError(
            path,
            f"expected plain tensors, got {kind} in {key}; save it as a dense one",
        )
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise WeightsError(
            path,
            f"expected floating-point weights, got {tensor.dtype} in {key}; dequantise them",
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.nbytes > stored:
        raise WeightsError(
            path,
            f"expected a value for each element, got {key} of shape {list(tensor.shape)} "
            f"expanded from {stored} bytes; save it with .clone()",
        )


def _unusual(tensor: Tensor) -> str:
    """What a tensor is that has no value of its own at every place; "" for a plain one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "one without values (meta device)"
    if tensor.is_nested:
        return "a nested one"
    if tensor.is_quantized:
        return f"a quantised one ({tensor.dtype})"
    return "" if tensor.layout == torch.strided else f"a sparse one ({tensor.layout})"


def _check_range(path: str | os.PathLike, key: str, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    low, high = (value.item() for value in tensor.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise WeightsError(
            path,
            f"expected finite values, got NaN or Inf in {key}; take an earlier checkpoint",
        )
    largest = max(-low, high)
    if largest > LARGEST:
        raise WeightsError(
            path,
            f"expected values up to {LARGEST:g}, the largest of float16, got {largest:g} in {key}; "
            "the file is damaged, or take an earlier checkpoint",
        )
