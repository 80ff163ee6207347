"""What a run is made of, said before it starts and kept beside it.

That is every value of its recipe, what follows from them, versions, commit, machine.
"""

import json
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, NamedTuple

from dinov3core.bounds import fields_of
from dinov3core.printable import printable
from dinov3core.train.engine.choices import with_everything, word_of
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.environment import device_name, environment
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import Resolved


class Origin(NamedTuple):
    """Where a recipe comes from."""

    argv: list[str] | None = None  # the command line that asked for it
    standard: Pretrain | None = None  # the recipe of its name, before anything was changed


def announce(
    recipe: Pretrain,
    resolved: Resolved,
    world: World,
    origin: Origin,
    began: str,
) -> None:
    """Save the resolved configuration as `config.json` and print its essence (main process).

    Args:
        began: what the run began as, in words; empty for an untrained network.
    """
    if not world.is_main:
        return
    record = {
        "recipe": as_tree(recipe),
        "resolved": resolved_values(recipe, resolved, world),
        "environment": environment(world.device),
        "argv": origin.argv or [],
        "began": began,
    }
    (recipe.folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(opening(recipe, resolved, world, origin.standard), flush=True)
    if began:
        print(f"{recipe.name} {_shown(began)}", flush=True)


def opening(
    recipe: Pretrain,
    resolved: Resolved,
    world: World,
    standard: Pretrain | None = None,
) -> str:
    """What to know before the first step: the size of a run, and what is not as in its recipe."""
    images = recipe.run.batch_size * world.size
    processes = f" by {world.size} processes" if world.size > 1 else ""
    highest = resolved.schedules["lr"].max()
    lines = [
        f"{recipe.name}: {resolved.steps} steps of {images} images{processes}, "
        f"learning rate up to {highest:.4g}, {device_name(world.device)}",
        *phases(resolved),
        *deviations(recipe, standard),
        f"every value: {_shown(str(recipe.folder / 'config.json'))}",
    ]
    return "\n".join(lines)


def phases(resolved: Resolved) -> list[str]:
    """A line on the phases of a run whose heads train alone at first."""
    frozen = resolved.frozen_steps
    if not frozen:
        return []
    shares = resolved.schedules["backbone_share"]
    ramp = int((shares[frozen:] < 1).sum()) + 1
    full = max(len(shares) - frozen - ramp, 0)
    alone = f"heads alone for {frozen:,} steps"
    if frozen == len(shares):
        return [f"{alone}, which is all of them: the backbone stays as it is"]
    then = f"then the backbone as well: its rate grows over {ramp:,} steps"
    return [f"{alone}, {then}, and {full:,} follow at the full rate"]


def deviations(recipe: Pretrain, standard: Pretrain | None) -> list[str]:
    """A line for every field that differs from the standard recipe, where there is one."""
    if standard is None:
        return []
    # A group that the standard lacks, as Gram anchoring, is compared with its defaults.
    values = dict(dotted(with_everything(standard), kinds=True)) | dict(
        dotted(standard, kinds=True)
    )
    lines = []
    for name, value in dotted(recipe, kinds=True):
        standard_value = values.get(name, "no such field")
        if value != standard_value:
            lines.append(f"  {name} = {_shown(value)} (recipe: {_shown(standard_value)})")
    return lines


def config_text(recipe: Pretrain, resolved: Resolved, world: World) -> str:
    """Every field of the recipe by its dotted name, then what follows from them."""
    remarks = {**resolved_values(recipe, resolved, world), **environment(world.device)}
    lines = [f"{name} = {_shown(value)}" for name, value in dotted(recipe)]
    lines += [f"# {name}: {value}" for name, value in remarks.items()]
    return "\n".join(printable(line) for line in lines)


def _shown(value: object) -> object:
    """A value that keeps to its line and to UTF-8: names of files may hold any bytes."""
    plain = not isinstance(value, str) or (value and value.isprintable())
    return value if plain else ascii(value)


def dotted(value: Any, prefix: str = "", *, kinds: bool = False) -> list[tuple[str, object]]:
    """The leaves of a dataclass tree as (dotted name, value).

    Of a tuple of dataclasses, the value is how a command line gives them.

    Args:
        kinds: before the leaves of an inner dataclass that may be of several classes, also its name
            with its class: it tells schedules of different shapes apart. Where a command line
            chooses the class by a word, that word is always there.
    """
    leaves: list[tuple[str, object]] = []
    for item in fields_of(type(value)):
        name = prefix + item.word
        inner = getattr(value, item.name)
        if isinstance(inner, tuple) and any(map(is_dataclass, inner)):
            inner = tuple(map(str, inner))
        if not is_dataclass(inner):
            leaves.append((name, inner))
            continue
        word = word_of(item.kind, inner)
        if word is not None:
            leaves.append((name, word))
        elif kinds and isinstance(item.kind, UnionType):
            leaves.append((name, type(inner).__name__))
        leaves += dotted(inner, f"{name}.", kinds=kinds)
    return leaves


def as_tree(value: Any) -> dict[str, Any]:
    """A dataclass tree as dictionaries; where a word chooses a class, it stands there as "kind"."""
    tree: dict[str, Any] = {}
    for item in fields_of(type(value)):
        inner = getattr(value, item.name)
        tree[item.word] = _branch(inner)
        word = word_of(item.kind, inner)
        if word is not None:
            tree[item.word] = {"kind": word, **tree[item.word]}
    return tree


def _branch(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_branch(member) for member in value]
    return as_tree(value) if is_dataclass(value) else value


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
