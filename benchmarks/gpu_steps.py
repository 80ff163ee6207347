"""Where the time of a training step goes on a GPU."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks import steps
from dinov3core.train.engine.config import Pretrain

STEPS = 3


def profiled(recipe: Pretrain, kind: str, device: torch.device, path: Path) -> dict:
    """Steps under the profiler: a table by operator goes to `path`, its first rows are returned.

    Args:
        kind: "ours" or "plain".
    """
    batch = steps.random_batch(recipe, device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        recipe = replace(recipe, run=replace(recipe.run, compile=False))
    run = {"ours": steps.ours, "plain": steps.plain}[kind](recipe, device, batch)
    for _ in range(STEPS):
        run()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()

    averages = profiler.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(averages.table(sort_by=key, row_limit=60))
    total = max(sum(getattr(row, key) for row in averages), 1)
    top = [
        {"name": row.key[:120], "share": getattr(row, key) / total, "calls": row.count / STEPS}
        for row in sorted(averages, key=lambda row: getattr(row, key), reverse=True)[:25]
    ]
    said = f"{top[0]['name']} {100 * top[0]['share']:.0f} %"
    return {"op": "profile", "table": path.name, "top": top, "said": said}
