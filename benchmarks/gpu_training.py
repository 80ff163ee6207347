"""Pretraining on imagenette at 128 px as far as the visits' minutes carry it, judged by k-NN as
others report it.

`python -m benchmarks.gpu_training NAME IMAGES OUT [--dry-run]` is one of its runs, which
`benchmarks.gpu` starts and interrupts.
"""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

NEIGHBOURS, TEMPERATURE = 200, 0.1  # k-NN as the published table for this split reports it
EPOCHS, BATCH = 150, 256
CLOSING_SECONDS = 60.0  # kept for the last checkpoint and k-NN


def unpack(archive: Path, folder: Path) -> Path:
    """Write the JPEGs of an npz (data, offset, label, split, classes) as
    folder/{train,val}/<class>/<row>.jpg.
    """
    if (folder / "complete").is_file():
        return folder
    found = np.load(archive)
    data, offset, classes = found["data"], found["offset"], found["classes"]
    for row, (label, split) in enumerate(zip(found["label"], found["split"], strict=True)):
        path = (
            folder
            / ("val" if split else "train")
            / str(classes[label]).replace(" ", "_")
            / f"{row:05d}.jpg"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[offset[row] : offset[row + 1]].tobytes())
    (folder / "complete").touch()
    return folder


def recipe(name: str, images: Path, out: Path, small: bool):
    """ViT-S/8 at 112 px for "imagenette"; "imagenette_gram" anchors patches to a snapshot for the
    last third.

    Published on this split at 128 px, k-NN (k=200, t=0.1) after 800 epochs on one A6000: MAE ViT-S
    61.0, DINO ResNet-18 88.8 in 312 minutes, MSN ViT-S 82.8 in 515 minutes, SwAV ResNet-18 90.2.
    """
    from dinov3core.train.engine.config import Gram
    from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule
    from dinov3core.train.recipes.imagenet import vits16_1gpu

    made = vits16_1gpu()
    count = sum(1 for _ in (images / "train").rglob("*.jpg"))
    epochs, batch, warmup = (2, 4, 0.5) if small else (EPOCHS, BATCH, 10)
    epoch_steps = max(count // batch, 1)
    gram = Gram()
    if name == "imagenette_gram":
        rising = 1 if small else EPOCHS * 2 // 3
        gram = Gram(
            teacher="snapshot",
            weight=PhasedSchedule(
                0.0, 0.0, 2.0, warmup_epochs=rising, cosine_epochs=0 if small else 1
            ),
            first_update=rising * epoch_steps,
        )
    made = replace(
        made,
        name=name,
        gram=gram,
        backbone=replace(made.backbone, patch_size=8),
        crops=replace(made.crops, global_size=112, local_size=48),
        data=replace(
            made.data,
            source=str(images / "train"),
            probe=str(images),
            workers=14,
            probe_bank=9469,
            probe_queries=3925,
        ),
        optim=replace(
            made.optim,
            lr=CosineSchedule(5e-4, 1e-6, warmup_epochs=warmup),
            freeze_last_layer_epochs=0.0 if small else 1.0,
        ),
        teacher=replace(
            made.teacher,
            temperature=CosineSchedule(0.07, 0.07, start=0.04, warmup_epochs=0.5 if small else 30),
        ),
        run=replace(
            made.run,
            epochs=epochs,
            epoch_steps=epoch_steps,
            batch_size=batch,
            eval_every=10 * epoch_steps,
            checkpoint_every=2 * epoch_steps,
            keep_checkpoints=2,
            out=str(out / name),
        ),
    )
    return _tiny(made) if small else made


def _tiny(made):
    head = {"prototypes": 64, "hidden": 32, "bottleneck": 16}
    return replace(
        made,
        backbone=replace(made.backbone, width=32, depth=2, heads=2),
        dino=replace(made.dino, **head),
        ibot=replace(made.ibot, **head),
        crops=replace(made.crops, global_size=32, local_size=16, local_count=2),
        data=replace(made.data, workers=0),
        run=replace(made.run, device="cpu", precision="fp32", compile=False, threads=1),
    )


def go_on(name: str, images: Path, out: Path, deadline: float, small: bool) -> dict:
    """Start or resume a run in a process of its own, interrupt it in time, and judge the newest
    checkpoint.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_training", name, str(images), str(out)]
    with (out / f"{name}.log").open("a") as log:
        run = subprocess.Popen(
            command + ["--dry-run"] * small, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            run.wait(max(deadline - CLOSING_SECONDS - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)
            run.wait(CLOSING_SECONDS / 2)
    if run.returncode and run.returncode not in (1, 130, -signal.SIGINT):
        raise RuntimeError(f"the run ended with {run.returncode}; see {log.name}")
    return _judge(name, images, out, small)


def _judge(name: str, images: Path, out: Path, small: bool) -> dict:
    """k-NN of the untrained and of the newest EMA backbone on the whole split."""
    from safetensors.torch import load_file

    from dinov3core.train.engine import checkpoint
    from dinov3core.train.engine.parallel import World
    from dinov3core.train.engine.trainer import build_networks

    made = recipe(name, images, out, small)
    device = torch.device("cpu" if small else "cuda")
    newest = checkpoint.newest_whole(made.folder / "checkpoints", World(0, 1, device))
    if newest is None:
        raise RuntimeError(f"{made.folder} has no checkpoint yet; see {out / name}.log")
    backbone = build_networks(made).backbone.to(device)
    before = _knn(backbone, made, images, device)
    backbone.load_state_dict(load_file(newest.path / "teacher.safetensors"))
    after = _knn(backbone, made, images, device)
    done = newest.state["step"]
    minutes = newest.state["counters"]["seconds"] / 60
    epochs = done / made.run.epoch_steps
    return {
        "op": "training",
        "epochs": epochs,
        "of": made.run.epochs,
        "minutes": minutes,
        "images_per_second": done * made.run.batch_size / (60 * minutes),
        "knn_before": before,
        "knn_after": after,
        "unfinished": done < made.run.total_steps,
        "said": f"{epochs:.0f} of {made.run.epochs:g} epochs, {minutes:.1f} min, k-NN {before:.1f} -> {after:.1f} %",
    }


def _knn(backbone: torch.nn.Module, made, images: Path, device: torch.device) -> float:
    """Top-1 of the CLS token, k=200 and t=0.1 (fewer neighbours when the bank is smaller)."""
    from dinov3core.data.images import open_source
    from dinov3core.evals.frozen import FrozenEncoder
    from dinov3core.evals.knn import knn_accuracy
    from dinov3core.evals.views import central_view
    from dinov3core.image_statistics import IMAGENET

    autocast = torch.bfloat16 if device.type == "cuda" else None
    encoder = FrozenEncoder(backbone, device=device, autocast_dtype=autocast, statistics=IMAGENET)
    side, found = made.crops.global_size, []
    for part in ("train", "val"):
        source = open_source(images / part)
        pixels = torch.stack(
            [central_view(source.load(i), resize=side, crop=side) for i in range(len(source))]
        )
        labels = torch.tensor([source.label(i) for i in range(len(source))])
        found += [encoder.embed(pixels, batch_size=256).cls, labels]
    neighbours = min(NEIGHBOURS, len(found[0]))
    return knn_accuracy(*found, k=(neighbours,), temperature=TEMPERATURE).top1[neighbours]


def main(argv: list[str]) -> None:
    """One run, to its end or until it is interrupted."""
    from dinov3core.train.engine.loop import pretrain

    name, images, out = argv[:3]
    pretrain(recipe(name, Path(images), Path(out), "--dry-run" in argv), argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
