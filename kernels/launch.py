"""Launch tables: tiles, warps and stages per architecture, head width and length, as data.

Nothing is tuned inside a step: the tables below are what runs, unless a file written by `python -m dinov3core.tune`
replaces entries of them. A `KernelBuild` describes one shipped configuration completely, so that
`python -m dinov3core.kernel_report` can compile it for a GPU that is not there.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


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
