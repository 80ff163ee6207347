"""Several students in 3 and 4 processes: each trains as if it were alone with the same teacher.

In each process, `run_rank` computes all layouts of so many processes and saves what happened in
this one. What it is compared with is computed here, in one process: batches of
`BatchLoader`, one teacher pass over all images, gradients of every process of a student averaged.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import numpy as np
import pytest
import torch
from forked_runs import run_forked_ranks
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_recipe
from torch import Tensor, nn
from two_processes import joined, part_of

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings
from dinov3core.data.loader import MASKS, BatchMaker, BatchSettings
from dinov3core.data.masks import BatchMasks, MaskSettings, batch_masks
from dinov3core.data.scenes import Scenes
from dinov3core.data.sizes import CropSizes, size_at
from dinov3core.models import HeadSettings, ProjectionHead, VitSettings
from dinov3core.models.networks import Networks
from dinov3core.models.vit import VisionTransformer
from dinov3core.ops import sinkhorn
from dinov3core.train.engine import checkpoint, optim
from dinov3core.train.engine.accumulation import micro_batches
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.exchange import (
    Exchange,
    ImageBytes,
    Plan,
    received_bytes,
)
from dinov3core.train.engine.distillation.heads import FrozenHeads, SharedPass, Views
from dinov3core.train.engine.methods import HeadDistillation
from dinov3core.train.engine.objective import Targets
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SEED = 5
STEPS = 2
TEMPERATURE = 0.1
PATCH = 8
CROPS = CropSettings(
    global_size=24,
    local_size=16,
    local_count=3,
    other_sizes=(CropSizes(0.5, 32, 24),),
)


@dataclass(frozen=True)
class Layout:
    """Students by name with the processes that train them, and the images of a step."""

    images: int
    students: dict[str, tuple[int, int]]

    def plan(self, processes: int) -> Plan:
        return Plan.even(processes, list(self.students.values()), self.images)


LAYOUTS: dict[int, dict[str, Layout]] = {
    3: {
        "2+1": Layout(4, {"small": (0, 2), "wide": (2, 3)}),
        "1+1+1": Layout(5, {"small": (0, 1), "wide": (1, 2), "deep": (2, 3)}),
        "two on one range": Layout(4, {"small": (0, 2), "wide": (0, 2), "deep": (2, 3)}),
        "fewer images than processes": Layout(2, {"small": (0, 1), "wide": (1, 3)}),
        "all": Layout(6, {"small": (0, 3), "wide": (0, 3)}),
    },
    4: {
        "1+3": Layout(6, {"small": (0, 1), "wide": (1, 4)}),
        "2+2": Layout(6, {"small": (0, 2), "wide": (2, 4)}),
    },
}
CASES = [(count, name) for count, layouts in LAYOUTS.items() for name in layouts]
STUDENTS = {
    "small": VitSettings(width=16, depth=1, heads=2, registers=0),
    "wide": VitSettings(width=32, depth=1, heads=2, registers=1, untie_local_cls_norm=True),
    "deep": VitSettings(width=16, depth=2, heads=1, registers=2, ffn="swiglu"),
}


def recipe_of(name: str, images: int) -> Pretrain:
    """Of a student; heads of other widths than the teacher's, and the same prototypes."""
    tiny = tiny_recipe()
    backbone = replace(STUDENTS[name], patch_size=PATCH, layer_scale=1.0, init_std=0.2)
    head = HeadSettings(24, hidden=12, bottleneck=6, init_std=0.2, prototype_std=0.3)
    return replace(
        tiny,
        backbone=backbone,
        dino=head,
        ibot=replace(head, prototypes=32),
        loss=replace(tiny.loss, koleo_distributed=False),
        gram=None,
        crops=CROPS,
        run=replace(tiny.run, batch_size=images, seed=SEED),
    )


def make_teacher() -> FrozenHeads:
    torch.manual_seed(3)
    settings = VitSettings(
        width=24, depth=2, heads=2, patch_size=PATCH, layer_scale=1.0, init_std=0.2
    )
    backbone = VisionTransformer(settings)
    head = HeadSettings(24, hidden=16, bottleneck=10, init_std=0.2, prototype_std=0.3)
    dino = ProjectionHead(24, head)
    ibot = ProjectionHead(24, replace(head, prototypes=32, bottleneck=8))
    return FrozenHeads(Networks(backbone, dino, ibot), "teacher", "", ALONE.device)


def batches(images: int) -> BatchSettings:
    return BatchSettings(CROPS, MaskSettings(), images, PATCH, seed=SEED)


def crops_of(numbers: range, layout: Layout, step: int) -> Batch:
    """The images of these numbers of a step, in the views that their positions have."""
    of_one = [
        BatchMaker(Scenes(64), batches(1), number, layout.images).make(step) for number in numbers
    ]
    sizes = CROPS.of_each_size[size_at(SEED, step, CROPS.shares)]

    def together(name: str, count: int, size: int) -> Tensor:
        crops = [getattr(batch, name) for batch in of_one]
        return torch.stack(crops, 1).flatten(0, 1) if crops else torch.empty(0, 3, size, size)

    first = step * layout.images
    none = torch.empty(0)
    return Batch(
        together("global_crops", 2, sizes.global_size),
        together("local_crops", 3, sizes.local_size),
        None,
        *(none, none, none),
        positions=range(first + numbers.start, first + numbers.stop),
        skipped=[f"image {number}" for number in numbers],
        upsampled=len(numbers),
    )


def masks_at(step: int, rank: int, images: int) -> BatchMasks:
    sizes = CROPS.of_each_size[size_at(SEED, step, CROPS.shares)]
    side = sizes.global_size // PATCH
    rng = np.random.default_rng((SEED, MASKS, step, rank))
    return batch_masks(2 * images, (side, side), MaskSettings(), rng)


# --- in each of several processes


def run_layout(layout: Layout, world: World) -> tuple[dict[str, Tensor], dict]:
    """Tensors and figures of this process: batches, targets, gradients, bytes, teacher passes."""
    plan = layout.plan(world.size)
    part = part_of(world, plan.ranges)
    share = len(plan.trains_on(world.rank))
    exchange = Exchange(plan, world)
    teacher = make_teacher()
    before = {name: x.clone() for name, x in teacher.networks.state_dict().items()}
    forwards: list[int] = []
    teacher.networks.backbone.patch_embed.register_forward_hook(
        lambda module, inputs, output: forwards.append(len(output))
    )

    shared = SharedPass(
        teacher, exchange, part, Views(2, 3, PATCH, lambda step: masks_at(step, part.rank, share))
    )
    trainers = {}
    for name, ranks in layout.students.items():
        if world.rank in range(*ranks):
            recipe = recipe_of(name, share)
            trainers[name] = Trainer(recipe, part, method=HeadDistillation(recipe, part))

    tensors: dict[str, Tensor] = {}
    told: list[tuple[list[str], int]] = []
    for step in range(STEPS):
        batch, targets = shared(crops_of(plan.loads(world.rank), layout, step), step, TEMPERATURE)
        told.append((batch.skipped, batch.upsampled))
        tensors |= {f"{step}/batch/{name}": x for name, x in batch.tensors().items()}
        tensors |= {
            f"{step}/positions": torch.tensor(batch.positions),
            f"{step}/cls": targets.cls.dense(),
            f"{step}/patches": targets.patches.dense(),
        }
        for name, trainer in trainers.items():
            gradients = gradients_of(trainer, batch, step, targets)
            tensors |= {f"{step}/{name}/{key}": x for key, x in gradients.items()}
    figures = {
        "received": exchange.received,
        "sent": exchange.sent,
        "forwards": forwards,
        "told": told,
        "teacher unchanged": all(
            torch.equal(before[name], x) for name, x in teacher.networks.state_dict().items()
        ),
    }
    return tensors, figures


def in_bf16(layout: Layout, world: World) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Crops of a step and what was received for it, where bf16 travels; without local crops."""
    plan = layout.plan(world.size)
    part = part_of(world, plan.ranges)
    share = len(plan.trains_on(world.rank))
    loaded = crops_of(plan.loads(world.rank), layout, 0)
    loaded = replace(loaded, local_crops=loaded.local_crops[:0])
    exchange = Exchange(plan, world)
    views = Views(2, 0, PATCH, lambda step: masks_at(step, part.rank, share))
    shared = SharedPass(make_teacher(), exchange, part, views, precision="bf16")
    batch, targets = shared(loaded, 0, TEMPERATURE)
    tensors = batch.tensors() | {"cls": targets.cls.dense(), "patches": targets.patches.dense()}
    return tensors, exchange.received


def opened(run: Path, world: World) -> list[str]:
    """What opening a run as the teacher says, in all processes together; and opening none."""
    said: list[str] = []
    teacher = FrozenHeads.open(run, world, said.append)
    want = make_teacher().networks.state_dict()
    weights = teacher.networks.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in want.items())
    try:
        FrozenHeads.open(run / "nothing", world, said.append)
    except ConfigError as error:
        said.append(str(error))
    return said


def save_run(run: Path) -> None:
    """A run of one checkpoint, whose EMA teacher is the teacher here."""
    networks = make_teacher().networks
    stated = {
        f"{word}.{name}": value
        for word, head in (("dino", networks.dino_head), ("ibot", networks.ibot_head))
        for name, value in asdict(head.settings).items()
    }
    run.mkdir()
    contents = checkpoint.Contents({"teacher": networks}, None, {})
    state = {"recipe": stated}
    checkpoint.save(run / "checkpoints", 1, contents, state, ALONE, checkpoint.Kept(1))


def gradients_of(trainer: Trainer, batch: Batch, step: int, targets: Targets) -> dict[str, Tensor]:
    """Of a step, averaged over the student's processes, before clipping; weights stay."""
    gradients = {}

    def note(student: nn.Module, norms: dict[str, Tensor], limit: float) -> None:
        gradients.update({name: p.grad.clone() for name, p in student.named_parameters()})

    with patch.object(optim, "clip_gradients", note), patch.object(Trainer, "_update"):
        trainer.step(batch, step, targets=targets)
    return gradients


def run_rank(out: Path) -> int:
    torch.set_num_threads(1)
    with joined() as world:
        for name, layout in LAYOUTS[world.size].items():
            tensors, figures = run_layout(layout, world)
            save_file(
                {key: x.contiguous() for key, x in tensors.items()},
                out / f"{name}.{world.rank}.safetensors",
            )
            (out / f"{name}.{world.rank}.json").write_text(json.dumps(figures))
        tensors, received = in_bf16(next(iter(LAYOUTS[world.size].values())), world)
        save_file(tensors, out / f"bf16.{world.rank}.safetensors")
        (out / f"bf16.{world.rank}.json").write_text(json.dumps(received))
        (out / f"opened.{world.rank}.json").write_text(json.dumps(opened(out / "run", world)))
    return 0


# --- what it is compared with


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What the processes saved, by their number."""
    folders = {}
    for processes in LAYOUTS:
        folders[processes] = tmp_path_factory.mktemp("ranks")
        save_run(folders[processes] / "run")
        run_forked_ranks(folders[processes], processes, run_rank)
    return folders


class Ranks:
    """What the processes of a layout saved."""

    def __init__(self, folder: Path, processes: int, name: str):
        self.layout = LAYOUTS[processes][name]
        self.plan = self.layout.plan(processes)
        self.ranks = range(processes)
        self.tensors = [load_file(folder / f"{name}.{rank}.safetensors") for rank in self.ranks]
        self.figures = [
            json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in self.ranks
        ]

    def under(self, rank: int, prefix: str) -> dict[str, Tensor]:
        tensors = self.tensors[rank]
        return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


@pytest.fixture(params=CASES, ids=[f"{count}: {name}" for count, name in CASES], scope="module")
def ranks(request: pytest.FixtureRequest, folder_of: dict[int, Path]) -> Ranks:
    processes, name = request.param
    return Ranks(folder_of[processes], processes, name)


def own_batches(ranks: Ranks, student: tuple[int, int], step: int) -> list[Batch]:
    """What `BatchLoader` makes for the processes of a student that trains alone."""
    first, past = student
    settings = batches(ranks.layout.images // (past - first))
    return [
        BatchMaker(Scenes(64), settings, rank, past - first).make(step)
        for rank in range(past - first)
    ]


def test_sizes_of_both_kinds_are_drawn() -> None:
    assert {size_at(SEED, step, CROPS.shares) for step in range(STEPS)} == {0, 1}


def test_a_process_trains_on_what_a_loader_would_give_it(ranks: Ranks) -> None:
    """Crops, masks and positions, bit by bit."""
    for step in range(STEPS):
        for student in ranks.plan.ranges:
            for rank, batch in zip(range(*student), own_batches(ranks, student, step)):
                got = ranks.under(rank, f"{step}/batch/")
                assert got.keys() == batch.tensors().keys()
                assert all(torch.equal(got[name], x) for name, x in batch.tensors().items())
                assert ranks.tensors[rank][f"{step}/positions"].tolist() == list(batch.positions)


def test_gradients_are_those_of_each_student_alone(ranks: Ranks) -> None:
    """To fp32 rounding, averaged over its processes; and so are the assignments."""
    for name, student in ranks.layout.students.items():
        for step in range(STEPS):
            of_each = own_batches(ranks, student, step)
            targets = targets_alone(of_each)
            want = gradients_alone(name, of_each, targets)
            for rank, target in zip(range(*student), targets):
                close(ranks.tensors[rank][f"{step}/cls"], target.cls.dense())
                close(ranks.tensors[rank][f"{step}/patches"], target.patches.dense())
                got = ranks.under(rank, f"{step}/{name}/")
                assert got.keys() == want.keys()
                largest = max(float(x.abs().max()) for x in want.values())
                for key, x in want.items():
                    close(got[key], x, at_least=1e-3 * largest)


def close(got: Tensor, want: Tensor, at_least: float = 0.0) -> None:
    bound = 1e-5 * max(float(want.abs().max()), at_least)
    assert float((got - want).abs().max()) <= bound


def targets_alone(of_each: list[Batch]) -> list[Targets]:
    """Of every process of a student: one teacher pass over all images, one balance of all rows."""
    teacher = make_teacher()
    with torch.no_grad():
        outputs = [teacher.networks(batch.global_crops, batch.mask_indices) for batch in of_each]
    assigned = []
    for rows in (
        [output.cls_logits for output in outputs],
        [output.patch_logits for output in outputs],
    ):
        balanced = sinkhorn(torch.cat(rows), TEMPERATURE)
        assigned.append([balanced.rows(index) for index in slices([len(x) for x in rows])])
    return [Targets(cls, patches, None) for cls, patches in zip(*assigned, strict=True)]


def slices(lengths: list[int]) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths)]


def gradients_alone(name: str, of_each: list[Batch], targets: list[Targets]) -> dict[str, Tensor]:
    recipe = recipe_of(name, of_each[0].images)
    method = HeadDistillation(recipe, ALONE)
    student = method.networks().train()
    now = {"local_weight": 0.7, "gram_weight": 0.0}
    for batch, target in zip(of_each, targets, strict=True):
        (part,) = micro_batches(batch, 1, ALONE.device)
        terms = method.terms(method.student_pass(student, part), target, part, {})
        (method.total(terms, now) / len(of_each)).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def test_the_teacher_sees_every_image_once_and_stays(ranks: Ranks) -> None:
    """Two crops of each, where it was loaded, whatever the number of students."""
    for rank, figures in enumerate(ranks.figures):
        assert figures["teacher unchanged"]
        assert figures["forwards"] == [2 * ranks.plan.loaded[rank]] * STEPS
    assert sum(ranks.plan.loaded) == ranks.layout.images


def test_images_skipped_and_enlarged_are_counted_once_for_every_student(ranks: Ranks) -> None:
    images = [f"image {number}" for number in range(ranks.layout.images)]
    for student in ranks.plan.ranges:
        for step in range(STEPS):
            told = [ranks.figures[rank]["told"][step] for rank in range(*student)]
            assert [name for skipped, _ in told for name in skipped] == images
            assert sum(enlarged for _, enlarged in told) == len(images)


def test_bytes_are_those_of_the_plan(ranks: Ranks) -> None:
    """And nothing moves where each process trains on what it loaded."""
    received: Counter[str] = Counter()
    for rank, figures in enumerate(ranks.figures):
        want: Counter[str] = Counter()
        for step in range(STEPS):
            image = image_bytes(step)
            want.update(received_bytes(ranks.plan, rank, image))
            want["patch rows"] -= received_bytes(ranks.plan, rank, image)["patch rows"]
            want["patch rows"] += 8 * 4 * foreign_patches(ranks, rank, step)
        assert +Counter(figures["received"]) == +want
        received.update(figures["received"])
    assert +received == sum((Counter(figures["sent"]) for figures in ranks.figures), Counter())
    assert bool(received) == ranks.plan.moves


def image_bytes(step: int) -> ImageBytes:
    crops = CROPS.of_each_size[size_at(SEED, step, CROPS.shares)]
    return ImageBytes.of(crops, PATCH, MaskSettings(), (10, 8), torch.float32)


def foreign_patches(ranks: Ranks, rank: int, step: int) -> int:
    """Masked patches of the images that a process trains on and did not load."""
    masks = ranks.tensors[rank][f"{step}/batch/masks"]
    numbers = ranks.plan.trains_on(rank)
    own = ranks.plan.moved(rank, rank)
    of_image = masks.unflatten(0, (2, len(numbers))).sum((0, 2))
    return sum(
        int(count) for number, count in zip(numbers, of_image, strict=True) if number not in own
    )


@pytest.mark.parametrize("processes", LAYOUTS)
def test_bf16_halves_what_travels(folder_of: dict[int, Path], processes: int) -> None:
    """Crops are rounded to it; targets differ by what the teacher's bf16 costs."""
    folder = folder_of[processes]
    name = next(iter(LAYOUTS[processes]))
    ranks = Ranks(folder, processes, name)
    for rank in ranks.ranks:
        got = load_file(folder / f"bf16.{rank}.safetensors")
        want = ranks.under(rank, "0/batch/")
        assert got["global_crops"].dtype == torch.float32 and not len(got["local_crops"])
        rounded = want["global_crops"].bfloat16().float()
        assert torch.equal(got["global_crops"], rounded)
        assert torch.equal(got["mask_indices"], want["mask_indices"])
        for targets in ("cls", "patches"):
            assert float((got[targets] - ranks.tensors[rank][f"0/{targets}"]).abs().max()) < 0.1
        received = json.loads((folder / f"bf16.{rank}.json").read_text())
        whole = received_bytes(ranks.plan, rank, image_bytes(0))
        assert received["global crops"] == whole["global crops"] / 2
        assert received["class rows"] == whole["class rows"] / 2
        assert "local crops" not in received


@pytest.mark.parametrize("processes", LAYOUTS)
def test_all_processes_open_the_teacher_together(
    folder_of: dict[int, Path], processes: int
) -> None:
    folder = folder_of[processes]
    said = [json.loads((folder / f"opened.{rank}.json").read_text()) for rank in range(processes)]
    run = folder / "run"
    assert said == processes * [
        [
            f"the teacher is that of {run} after step 1",
            f"teacher.run: there is no run with a checkpoint in {run / 'nothing'}; give the "
            "folder of one",
        ]
    ]
