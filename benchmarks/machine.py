"""Which machine this is and what it can do.

Names and versions are asked for; copy bandwidth and matrix rate are measured on the spot.
"""

import contextlib
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.measure import Timer, device_timer
from dinov3core.train.engine.environment import cpu_name, git_commit, versions

PACKAGES = ("torch", "triton", "numpy", "xformers", "flash-attn", "transformers")


@dataclass(frozen=True)
class Limits:
    """What the roofline is drawn from."""

    copy_bytes_per_second: float  # read plus written
    flops_per_second: float  # matrix product in the benchmark's dtype

    def bound(self, moved: float, flops: float) -> float:
        """The least seconds in which `moved` bytes can be moved and `flops` operations be done."""
        return max(moved / self.copy_bytes_per_second, flops / self.flops_per_second)


def probe(
    device: torch.device,
    dtype: torch.dtype,
    small: bool = False,
    timer: Timer = device_timer,
) -> Limits:
    """Measure both limits with a plain copy and a square matrix product.

    Args:
        small: tiny sizes, for trying the benchmarks themselves.
        timer: the clock of the benchmarks.
    """
    on_gpu = device.type == "cuda"
    count = 2**20 if small else 2**30 if on_gpu else 2**27
    side = 128 if small else 8192 if on_gpu else 1536

    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)

    copy_seconds = _median_seconds(lambda: target.copy_(source), timer)
    matmul_seconds = _median_seconds(lambda: torch.mm(a, b, out=out), timer)
    return Limits(2 * count / copy_seconds, 2 * side**3 / matmul_seconds)


def _median_seconds(run: Callable[[], object], timer: Timer, rounds: int = 7) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        began = timer()
        run()
        seconds.append(timer() - began)
    return statistics.median(seconds)


def describe(device: torch.device, limits: Limits | None = None) -> dict[str, Any]:
    """Machine, versions and commit of a result file."""
    on_gpu = device.type == "cuda"
    description = {
        "machine_class": "gpu" if on_gpu else "cpu",
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": git_commit(),
    }
    if on_gpu:
        description["gpu"] = gpu_state(device)
    if limits is not None:
        description["limits"] = asdict(limits)
    return description


def slug(description: dict[str, Any]) -> str:
    """The machine's name as part of a file name."""
    name = description["device"]
    letters = "".join(c if c.isalnum() else "_" for c in name.lower())
    return "_".join(part for part in letters.split("_") if part)


def load() -> float:
    """Processes that wanted a core in the last minute; above the number of cores it was busy."""
    return round(os.getloadavg()[0], 2)


def gpu_state(device: torch.device) -> dict[str, Any]:
    """What a GPU is, and its clocks."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability(device)),
        **clocks(device),
    }


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks, power, temperature and driver; nothing without NVIDIA's management library."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    except pynvml.NVMLError:
        return {}
    questions: dict[str, Callable[[], Any]] = {
        "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "watts_limit": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
    }
    answers = {}
    for name, ask in questions.items():
        with contextlib.suppress(pynvml.NVMLError):  # not every card reports everything
            answers[name] = ask()
    return answers
