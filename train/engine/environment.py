"""What code runs on: versions, commit, processor; the same words in every file of results."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = ("dinov3core", "torch", "triton", "numpy", "pillow", "safetensors", "xformers")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, commit and device, as a run and an evaluation record them."""
    return {
        **versions(PACKAGES),
        "python": platform.python_version(),
        "commit": git_commit(),
        "device": device_name(device),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed, by name."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in packages:
        installed["torch"] = str(torch.__version__)  # with the build, which the metadata may lack
    return installed


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def git_commit() -> str:
    """The commit of the checkout this code runs from, 12 digits; "unknown" outside one.

    "+changes" is appended when a file that git knows differs from the commit.
    """
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    answer = subprocess.run(
        ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()
