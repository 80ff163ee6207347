"""What makes two recipes the same run: which fields may differ when a checkpoint is continued.

The rule: a field is free when it changes neither a single update of the weights, but for rounding,
nor what the numbers of metrics.jsonl mean; that is where a run works, how fast, and how often it
writes. Everything else makes another run, new fields included until they are listed here.
"""

import json
from collections.abc import Mapping

from dinov3core.data.images import ImageSource
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import dotted

FREE = frozenset(
    {
        "name",
        "data.workers",
        "guard.drift",
        "guard.margin",
        "guard.rank_share",
        "run.accept_changes",
        "run.accumulation",
        "run.batch_size",  # counts for all processes together, as "images per step"
        "run.checkpoint_every",
        "run.compile",
        "run.device",
        "run.eval_every",
        "run.keep_best",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.log_every",
        "run.max_bad_steps",
        "run.out",
        "run.requeue",
        "run.resume",
        "run.threads",
        "run.timeout_minutes",
    }
)


def identity(recipe: Pretrain, source: ImageSource, world: World) -> dict[str, object]:
    """What a run is, as JSON values by dotted name: fields that are not free, and the images."""
    named = stated(recipe, world.size)
    if world.device.type == "cpu":
        del named["run.precision"]  # a CPU runs fp32 whatever the recipe says
    named["images in data.source"] = len(source)
    return named


def stated(recipe: Pretrain, processes: int) -> dict[str, object]:
    """`identity` as far as it can be said before the images are opened."""
    named = {name: value for name, value in dotted(recipe, kinds=True) if name not in FREE}
    named["run.from"] = str(recipe.earlier or "")  # a name and its folder are the same run
    named["images per step"] = recipe.run.batch_size * processes
    return json.loads(json.dumps(named))


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """ "name before -> now" of what differs; a name that only one of them has is no difference."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} {before[name]} -> {now[name]}" for name in changed]
