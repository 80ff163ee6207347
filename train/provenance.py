"""What a run is made of, said before it starts and kept beside it: configuration, versions, commit, machine."""

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import torch

from dinov3core.data.names import printable
from dinov3core.train.config import Pretrain, Resolved
from dinov3core.train.parallel import World

PACKAGES = ("dinov3core", "torch", "triton", "numpy", "pillow", "safetensors", "xformers")


def announce(recipe: Pretrain, resolved: Resolved, world: World, folder: Path, argv: list[str]) -> None:
    """Print the resolved configuration on the main process and save it as `config.json`."""
    if not world.is_main:
        return
    record = {
        "recipe": asdict(recipe),
        "resolved": resolved_values(recipe, resolved, world),
        "environment": environment(world),
        "argv": argv,
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(config_text(recipe, resolved, world), flush=True)


def config_text(recipe: Pretrain, resolved: Resolved, world: World) -> str:
    """Every field of the recipe by its dotted name, then what follows from them."""
    lines = [f"{name} = {value}" for name, value in dotted(recipe)]
    lines += [f"# {name}: {value}" for name, value in resolved_values(recipe, resolved, world).items()]
    lines += [f"# {name}: {value}" for name, value in environment(world).items()]
    return "\n".join(printable(line) for line in lines)


def dotted(value: object, prefix: str = "") -> list[tuple[str, object]]:
    """The leaves of a dataclass tree as (dotted name, value)."""
    found: list[tuple[str, object]] = []
    for item in fields(value):
        inner, name = getattr(value, item.name), prefix + item.name
        found += dotted(inner, name + ".") if is_dataclass(inner) else [(name, inner)]
    return found


def resolved_values(recipe: Pretrain, resolved: Resolved, world: World) -> dict[str, object]:
    """Numbers a reader would otherwise have to work out."""
    lr = resolved.schedules["lr"]
    return {
        "processes": world.size,
        "global batch": recipe.run.batch_size * world.size,
        "steps": resolved.steps,
        "learning rate factor": round(resolved.lr_factor, 6),
        "learning rate, highest": f"{lr.max():.4g}",
        "learning rate, last": f"{lr[-1]:.4g}",
        "images seen": resolved.steps * recipe.run.batch_size * world.size,
    }


def environment(world: World) -> dict[str, str]:
    """Versions, commit and machine."""
    found = {package: version for package in PACKAGES if (version := _version(package))}
    found["torch"] = str(torch.__version__)  # with the build, which the metadata may lack
    found["python"] = platform.python_version()
    found["commit"] = git_commit()
    if world.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(world.device)
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    return found


def git_commit() -> str:
    """The commit of the checkout this code runs from, with "+changes" when it is not clean; "unknown" outside one."""
    here = Path(__file__).resolve().parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if dirty else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
