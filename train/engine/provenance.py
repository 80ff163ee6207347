"""What a run is made of, said before it starts and kept beside it: configuration, versions, commit,
machine.
"""

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType

import torch

from dinov3core.bounds import fields_of
from dinov3core.printable import printable
from dinov3core.train.engine.config import Pretrain, Resolved
from dinov3core.train.engine.parallel import World
from dinov3core.train.recipes.registry import RECIPES

PACKAGES = ("dinov3core", "torch", "triton", "numpy", "pillow", "safetensors", "xformers")


def announce(
    recipe: Pretrain,
    resolved: Resolved,
    world: World,
    folder: Path,
    argv: list[str],
) -> None:
    """Save the resolved configuration as `config.json` and print its essence (main process)."""
    if not world.is_main:
        return
    record = {
        "recipe": asdict(recipe),
        "resolved": resolved_values(recipe, resolved, world),
        "environment": environment(world),
        "argv": argv,
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(opening(recipe, resolved, world, folder), flush=True)


def opening(recipe: Pretrain, resolved: Resolved, world: World, folder: Path) -> str:
    """What to know before the first step: the size of a run, and what is not as in its recipe."""
    images = recipe.run.batch_size * world.size
    processes = f" by {world.size} processes" if world.size > 1 else ""
    highest = resolved.schedules["lr"].max()
    where = device_name(world)
    lines = [
        f"{recipe.name}: {resolved.steps} steps of {images} images{processes}, "
        f"learning rate up to {highest:.4g}, {where}",
        *deviations(recipe),
        f"every value: {_shown(str(folder / 'config.json'))}",
    ]
    return "\n".join(lines)


def deviations(recipe: Pretrain) -> list[str]:
    """A line for every field that differs from the recipe of that name, where there is one."""
    if recipe.name not in RECIPES:
        return []
    original = dict(dotted(RECIPES[recipe.name]()))
    lines = []
    for name, value in dotted(recipe):
        standard = original.get(name, "no such field")
        if value != standard:
            lines.append(f"  {name} = {_shown(value)} (recipe: {_shown(standard)})")
    return lines


def config_text(recipe: Pretrain, resolved: Resolved, world: World) -> str:
    """Every field of the recipe by its dotted name, then what follows from them."""
    lines = [f"{name} = {_shown(value)}" for name, value in dotted(recipe)]
    lines += [
        f"# {name}: {value}" for name, value in resolved_values(recipe, resolved, world).items()
    ]
    lines += [f"# {name}: {value}" for name, value in environment(world).items()]
    return "\n".join(printable(line) for line in lines)


def _shown(value: object) -> object:
    """A value that keeps to its line and to UTF-8: names of files may hold any bytes."""
    plain = not isinstance(value, str) or (value and value.isprintable())
    return value if plain else ascii(value)


def dotted(value: object, prefix: str = "", *, kinds: bool = False) -> list[tuple[str, object]]:
    """The leaves of a dataclass tree as (dotted name, value).

    Args:
        kinds: before the leaves of an inner dataclass that may be of several classes, also its name
            with its class: it tells schedules of different shapes apart.
    """
    leaves: list[tuple[str, object]] = []
    for item in fields_of(type(value)):
        name = prefix + item.name
        inner = getattr(value, item.name)
        if not is_dataclass(inner):
            leaves.append((name, inner))
            continue
        if kinds and isinstance(item.kind, UnionType):
            leaves.append((name, type(inner).__name__))
        leaves += dotted(inner, f"{name}.", kinds=kinds)
    return leaves


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
    found["device"] = device_name(world)
    return found


def device_name(world: World) -> str:
    """The GPU, or the CPU with its threads."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {torch.get_num_threads()} threads"


def git_commit() -> str:
    """The commit of the checkout this code runs from, with "+changes" when it is not clean;
    "unknown" outside one.
    """
    here = Path(__file__).resolve().parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], **run
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if dirty else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
