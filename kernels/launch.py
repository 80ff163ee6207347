"""Launch tables: tiles, warps and stages per architecture, head width and length, as data.

Nothing is tuned inside a step. What runs is the tables below, or the entries of a file written by
`python -m dinov3core.tune` where one exists (`use_file`, else the user's cache folder), read once per process.

A `KernelBuild` describes one shipped configuration completely, so that `python -m dinov3core.kernel_report` can compile
it for a GPU that is not there. Register counts in comments are from such builds (triton 3.7.1, sm_90 unless said).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_WIDTHS = (32, 64, 128)


class KernelBuild(NamedTuple):
    """One kernel as it is launched: enough to compile it without a device.

    `signature` maps every argument to its Triton type ("*bf16", "i32", "fp32", "constexpr"), `attrs` names the
    arguments that a launcher would specialise as divisible by 16, `options` holds num_warps and num_stages.
    `targets` lists the architectures that use it. `tensor_cores` says that losing them would be a defect.
    """

    name: str
    fn: Callable
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: tuple[str, ...]
    options: Mapping[str, int]
    targets: tuple[str, ...] = ARCHITECTURES
    tensor_cores: bool = True


@dataclasses.dataclass(frozen=True)
class RopeAttentionLaunch:
    """How rope_attention runs on one architecture at one head width.

    Attributes:
        longest: longer sequences are left to torch's attention by backend="auto" (a prediction until measured).
        resident_keys: up to here all keys of a head stay on chip.
        resident_warps: warps of that kernel; its query tiles have 64 rows.
        stream: (query rows, keys, warps, stages) of the streaming forward.
        one_tile_warps: warps of the backward of sequences up to 64 tokens.
        two_pass: (dq rows, dq keys, dkv queries, dkv keys, warps, stages) of the backward of longer ones.
        rotate: (rows, warps) of the kernels that only rotate.
    """

    longest: int
    resident_keys: int
    resident_warps: int
    stream: tuple[int, int, int, int]
    one_tile_warps: int
    two_pass: tuple[int, int, int, int, int, int]
    rotate: tuple[int, int] = (32, 4)


ROPE_ATTENTION: dict[tuple[str, int], RopeAttentionLaunch] = {
    ("sm_90", 32): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 4, (128, 64, 64, 128, 8, 2)),
    ("sm_90", 64): RopeAttentionLaunch(640, 272, 4, (128, 64, 8, 2), 4, (128, 64, 64, 128, 8, 2)),
    ("sm_90", 128): RopeAttentionLaunch(640, 64, 4, (128, 64, 8, 2), 8, (128, 32, 32, 64, 8, 2)),
}


@functools.cache
def rope_attention(device: torch.device, width: int) -> RopeAttentionLaunch:
    """The entry of the table for a device and a head width."""
    return ROPE_ATTENTION[architecture(device), width]


def architecture(device: torch.device) -> str:
    """Which column of the tables a device reads: that of the newest listed architecture that is not newer than it."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any table is as good as another
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else f"sm_{major}0"
