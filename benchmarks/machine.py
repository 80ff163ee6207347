"""Which machine this is and what it can do: names and versions, copy bandwidth and matrix rate
measured on the spot.
"""

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.measure import Timer, device_timer

PACKAGES = ("torch", "triton", "numpy", "xformers", "flash-attn", "transformers")


@dataclass(frozen=True)
class Limits:
    """What the roofline is drawn from."""

    copy_bytes_per_second: float  # read plus written
    flops_per_second: float  # matrix product in the benchmark's dtype

    def bound(self, moved: float, flops: float) -> float:
        """The seconds below which this machine cannot move `moved` bytes and do `flops` operations."""
        return max(moved / self.copy_bytes_per_second, flops / self.flops_per_second)


def probe(
    device: torch.device, dtype: torch.dtype, small: bool = False, timer: Timer = device_timer
) -> Limits:
    """Measure both limits with a plain copy and a square matrix product.

    Args:
        small: tiny sizes, for trying the benchmarks themselves.
        timer: the clock of the benchmarks.
    """
    on_gpu = device.type == "cuda"
    count = 2**20 if small else 2**30 if on_gpu else 2**27
    side = 128 if small else 8192 if on_gpu else 1536
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    copy_seconds = _median_seconds(lambda: target.copy_(source), timer)
    matmul_seconds = _median_seconds(lambda: torch.mm(a, b, out=out), timer)
    return Limits(2 * count / copy_seconds, 2 * side**3 / matmul_seconds)


def _median_seconds(run: Callable[[], object], timer: Timer, rounds: int = 7) -> float:
    run()
    found = []
    for _ in range(rounds):
        began = timer()
        run()
        found.append(timer() - began)
    return statistics.median(found)


def describe(device: torch.device, limits: Limits | None = None) -> dict:
    """Machine, versions and commit of a result file."""
    found = {
        "machine_class": "gpu" if device.type == "cuda" else "cpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "commit": commit(),
    }
    if device.type == "cuda":
        found["gpu"] = gpu_state(device)
    if limits is not None:
        found["limits"] = asdict(limits)
    return found


def slug(description: dict) -> str:
    """The machine's name as part of a file name."""
    name = description["device"]
    letters = "".join(c if c.isalnum() else "_" for c in name.lower())
    return "_".join(part for part in letters.split("_") if part)


def gpu_state(device: torch.device) -> dict:
    """What a GPU is, and its clocks."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability(device)),
        **clocks(device),
    }


def clocks(device: torch.device) -> dict:
    """Clocks, power, temperature and driver by NVIDIA's management library; nothing where it is not
    installed.
    """
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    except pynvml.NVMLError:
        return {}
    readings = {
        "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "watts_limit": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
    }
    found = {}
    for name, read in readings.items():
        with contextlib.suppress(pynvml.NVMLError):  # not every card reports everything
            found[name] = read()
    return found


def commit() -> str:
    """The commit of this checkout, with "+changes" when it is not clean; "unknown" outside one."""
    run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], **run
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+changes" if dirty else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The model name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        names[0]
        if names
        else f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
    )
