"""What a cache of teacher outputs saves, and what it costs: passes over the same views, in seconds.

`python -m benchmarks.teacher_cache`. A frozen ViT of random weights sees the built-in scenes, each
in one fixed set of views. The first pass computes and writes, the later ones read; a last pass
computes without a cache, as a run without one does. Then the parts for one view: to hash it, to
read it, to compute it. Outputs of every pass are compared bit for bit.
"""

import json
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor, nn

from benchmarks import machine
from dinov3core.data.crops import CropSettings
from dinov3core.data.loader import BatchSettings, ShareLoader
from dinov3core.data.masks import MaskSettings
from dinov3core.data.scenes import Scenes
from dinov3core.evals.backbones import fingerprint
from dinov3core.models import build
from dinov3core.train.engine.distillation import cache
from dinov3core.train.engine.distillation.frozen_teacher import TeacherRows


@dataclass(frozen=True)
class Command:
    """What is cached."""

    model: str = "vits16"
    """name of a backbone"""
    images: int = 48
    """scenes of a pass"""
    batch: int = 8
    """images of a step"""
    size: int = 224
    """side of global crops in pixels"""
    passes: int = 3
    """over the images, with the cache"""
    entries: int = 1_000_000
    """of an index whose memory is measured"""


class Teacher:
    """CLS and patches of a frozen backbone."""

    def __init__(self, backbone: nn.Module, name: str):
        self.backbone = backbone.eval()
        self.name = name
        self.patch_size: int = backbone.patch_size
        self.fingerprint = fingerprint(backbone)

    @torch.no_grad()
    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        given = self.backbone.features(crops, reshape=False)
        patches = given.patches.flatten(0, 1)
        return TeacherRows(given.cls, patches if rows is None else patches[rows])


def one_pass(command: Command, ask: Callable[[Tensor], TeacherRows], number: int) -> dict:
    """Seconds that loading and asking took, and all outputs."""
    crops = CropSettings(global_size=command.size, local_size=96, local_count=0)
    settings = BatchSettings(crops, MaskSettings(), command.batch, 16, views=1)
    steps = command.images // command.batch
    source = Scenes(steps * command.batch)
    share = range(command.batch)
    outputs: dict[int, Tensor] = {}
    seconds = 0.0
    started = time.perf_counter()
    with ShareLoader(source, settings, share, start_step=number * steps) as loader:
        for _ in range(steps):
            views = next(loader).global_crops
            began = time.perf_counter()
            rows = ask(views)
            seconds += time.perf_counter() - began
            by_view = rows.patches.view(len(views), -1)
            outputs |= {hash(v.numpy().tobytes()): row for v, row in zip(views, by_view)}
    return {"teacher": seconds, "all": time.perf_counter() - started, "outputs": outputs}


def seconds_of(action: Callable[[], object], rounds: int = 15) -> float:
    """The median over some rounds."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return median(taken)


def parts(command: Command, teacher: Teacher, folder: Path) -> dict[str, float]:
    """Milliseconds to hash, to read and to compute one view, and bytes of an entry in memory."""
    view = torch.randn(1, 3, command.size, command.size)
    cached = cache.CachedTeacher(teacher, folder, print)
    cached(view)
    (store,) = cached._stores.values()
    key = cache._key(view[0])
    record = torch.empty(store.layout.length, dtype=torch.uint8)
    milliseconds = {
        "hash": seconds_of(lambda: cache._key(view[0])),
        "read": seconds_of(lambda: store.fetch(key, record)),
        "look for new entries": seconds_of(store.look_again),
        "compute": seconds_of(lambda: teacher(view), 5),
    }
    return {name: 1e3 * taken for name, taken in milliseconds.items()} | {
        "bytes of a record": store.layout.length
    }


def index_memory(entries: int) -> tuple[float, float]:
    """Bytes of memory that an entry takes, and seconds to open an index of so many."""
    with tempfile.TemporaryDirectory() as folder:
        packed = (i.to_bytes(cache.KEY_BYTES, "big") for i in range(entries))
        content = b"".join(cache.ENTRY.pack(key, zlib.crc32(key)) for key in packed)
        (Path(folder) / "all.index").write_bytes(content)
        layout = cache.Layout((1, torch.float32), (1, 1, torch.float32))
        store = cache.Store(Path(folder), layout)
        seconds = seconds_of(lambda: cache.Store(Path(folder), layout).look_again(), 1)
        tracemalloc.start()
        store.look_again()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return held / entries, seconds


def main(argv: Sequence[str]) -> None:
    """The command line."""
    prog = "python -m benchmarks.teacher_cache"
    command = tyro.cli(Command, prog=prog, description=__doc__, args=list(argv))
    teacher = Teacher(build(command.model), command.model)
    teacher(torch.zeros(1, 3, command.size, command.size))  # warm
    with tempfile.TemporaryDirectory() as folder:
        cached = cache.CachedTeacher(teacher, Path(folder), print)
        passes = {f"pass {i + 1}": one_pass(command, cached, i) for i in range(command.passes)}
        passes["no cache"] = one_pass(command, teacher, 0)
        first = passes["pass 1"]["outputs"]
        equal = {
            name: all(torch.equal(first[key], row) for key, row in one["outputs"].items())
            for name, one in passes.items()
        }
        for name, one in passes.items():
            print(
                f"{name:9} teacher {one['teacher']:7.2f} s, with loading {one['all']:7.2f} s, "
                f"bit-equal to pass 1: {equal[name]}"
            )
        print(cached.in_words())
        print(json.dumps(parts(command, teacher, Path(folder)), indent=1))
    held, seconds = index_memory(command.entries)
    print(f"index of {command.entries:,}: {held:.0f} bytes an entry, {seconds:.2f} s to open")
    print(json.dumps(machine.describe(torch.device("cpu"))))


if __name__ == "__main__":
    main(sys.argv[1:])
