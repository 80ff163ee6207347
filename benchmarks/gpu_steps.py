"""Around the training step on a GPU: where its time goes, and what our ops give to a model of
transformers.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks import steps
from benchmarks.comparison import Setting
from benchmarks.measure import Interleaved, loop, plan, repeated
from dinov3core.train.engine.config import Pretrain


def profiled(recipe: Pretrain, kind: str, device: torch.device, path: Path) -> dict:
    """Three steps under the profiler: the table by operator goes to `path`, its first rows into the
    entry.

    Args:
        kind: "ours" or "plain".
    """
    crops = steps.random_crops(recipe, device)
    if device.type == "cpu":
        recipe = replace(recipe, run=replace(recipe.run, compile=False))
    run = {"ours": steps.ours, "plain": steps.plain}[kind](recipe, device, crops)
    for _ in range(3):
        run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by=key, row_limit=60))
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)[:25]
    total = sum(getattr(row, key) for row in averages)
    top = [
        {"name": r.key[:120], "share": getattr(r, key) / max(total, 1), "calls": r.count / 3}
        for r in rows
    ]
    return {
        "op": "profile",
        "table": path.name,
        "top": top,
        "said": f"{top[0]['name']} {100 * top[0]['share']:.0f} %",
    }


def accelerated(setting: Setting, small: bool) -> dict:
    """A DINOv3 of the transformers library, as it is and with our ops: time of forward and forward
    + backward.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"said": "skipped, transformers is not installed"}
    if importlib.util.find_spec("dinov3core.integrations.transformers") is None:
        return {"said": "skipped, dinov3core.integrations.transformers is not there"}
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    from dinov3core.integrations.transformers import accelerate

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    config = DINOv3ViTConfig(image_size=32, **sizes) if small else DINOv3ViTConfig(
        image_size=224, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = DINOv3ViTModel(config).to(setting.device, setting.dtype).eval()
    ours = DINOv3ViTModel(config).to(setting.device, setting.dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    accelerate(ours)
    count, side = (2, 32) if small else (64, 224)
    images = torch.randn(count, 3, side, side, device=setting.device, dtype=setting.dtype)

    def both(model: torch.nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad()
            output = model(pixel_values=images).last_hidden_state
            output.float().square().mean().backward()
            return output

        return run

    runs = {"ours": both(ours), "transformers": both(theirs)}
    got, want = (run().detach().float() for run in runs.values())
    error = float((got - want).norm() / want.norm())
    assert error < 3e-2, f"accelerate() changes the output by {error:.2g}"
    rounds, repeats = plan(runs, setting.seconds, setting.shortest)
    timed = Interleaved({name: repeated(run, repeats) for name, run in runs.items()}, repeats)
    loop(timed, rounds)
    ratio = timed.ratios()
    said = f"forward + backward {ratio['transformers']:.2f}x, outputs {error:.1e} apart"
    return {
        "op": "accelerate",
        "seconds": timed.medians(),
        "said": said,
        "error": error,
        "speedup": ratio,
    }
