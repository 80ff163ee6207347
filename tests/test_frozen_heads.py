"""The teacher of a head-level distillation: a run opened, its rows, its input, what is refused."""

import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import made_up_batch, tiny_command, tiny_recipe
from torch import Tensor

from dinov3core.checkpoints import save_weights
from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import BatchMasks, MaskSettings, batch_masks
from dinov3core.data.sizes import CropSizes, size_at
from dinov3core.models import HeadSettings, ProjectionHead, VitSettings, build
from dinov3core.models.networks import Networks
from dinov3core.models.vit import VisionTransformer
from dinov3core.ops import sinkhorn
from dinov3core.train.engine import checkpoint, loop
from dinov3core.train.engine.checkpoint import Contents
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.cache import CachedHeads
from dinov3core.train.engine.distillation.exchange import Exchange, Plan
from dinov3core.train.engine.distillation.frozen_teacher import (
    HeadTeacher,
    TeacherRows,
    patch_grid,
    teacher_input,
)
from dinov3core.train.engine.distillation.heads import (
    FrozenHeads,
    SharedPass,
    Views,
    as_seen_by,
)
from dinov3core.train.engine.parallel import World
from dinov3core.train.pretrain import parse

ALONE = World(0, 1, torch.device("cpu"))
HEAD = HeadSettings(24, hidden=16, bottleneck=8, init_std=0.2, prototype_std=0.3)


def networks(patch_size: int, seed: int = 0) -> Networks:
    """A teacher whose patches differ from each other."""
    torch.manual_seed(seed)
    backbone = VisionTransformer(
        VitSettings(
            width=16, depth=2, heads=2, patch_size=patch_size, layer_scale=1.0, init_std=0.2
        )
    )
    return Networks(backbone, ProjectionHead(16, HEAD), ProjectionHead(16, HEAD))


def frozen(patch_size: int) -> FrozenHeads:
    return FrozenHeads(networks(patch_size), "made up", "0" * 16, ALONE.device)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps, saved after each of them."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    fields = ("--run.epoch-steps", "3", "--run.checkpoint-every", "1", "--data.scenes", "16")
    more = ("--run.keep-checkpoints", "3", "--data.probe", "none", "--data.dense", "none")
    loop.pretrain(parse(tiny_command(out, *fields, *more)))
    return out


def ema_of(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint's EMA teacher."""
    whole = checkpoint.whole(run / "checkpoints" / f"step_{step:08d}", ALONE)
    names = [name for name in whole.state["tensors"] if name.startswith("teacher.")]
    shapes = {name: whole.state["tensors"][name]["shape"] for name in names}
    tensors = {name.removeprefix("teacher."): torch.empty(shape) for name, shape in shapes.items()}

    class Bag(torch.nn.Module):
        def state_dict(self, *args, **options) -> dict[str, Tensor]:
            return tensors

    checkpoint.load_part(whole, Contents({"teacher": Bag()}, None, {}), ALONE)
    return tensors


def test_a_run_is_opened_at_its_newest_checkpoint(run: Path) -> None:
    said: list[str] = []
    teacher = FrozenHeads.open(run, ALONE, said.append)
    weights = teacher.networks.state_dict()
    saved = ema_of(run, 3)
    assert weights.keys() <= saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    assert said == [f"the teacher is that of {run} after step 3"]

    assert not teacher.networks.training
    assert not any(weight.requires_grad for weight in teacher.networks.parameters())
    assert (teacher.name, teacher.patch_size) == (str(run), 8)
    whole = checkpoint.newest_whole(run / "checkpoints", ALONE)
    assert teacher.fingerprint == checkpoint.fingerprint(whole.state)


def test_a_checkpoint_is_opened_by_itself(run: Path) -> None:
    """Also an earlier one; that the run went on is said."""
    said: list[str] = []
    teacher = FrozenHeads.open(run / "checkpoints" / "step_00000002", ALONE, said.append)
    saved = ema_of(run, 2)
    assert all(torch.equal(tensor, saved[n]) for n, tensor in teacher.networks.state_dict().items())
    assert said == [f"the teacher is that of {run} after step 2 of 3: that run is not finished"]


def test_damage_is_passed_over_and_said(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000003"
    next((newest / "tensors").glob("*.distcp")).write_bytes(b"damaged")
    said: list[str] = []
    teacher = FrozenHeads.open(copy, ALONE, said.append)
    saved = ema_of(run, 2)
    assert all(torch.equal(tensor, saved[n]) for n, tensor in teacher.networks.state_dict().items())
    assert "passed over a damaged checkpoint of the teacher: step_00000003" in said[0]
    assert "not finished" in said[1]
    with pytest.raises(ConfigError, match=r"^teacher.run: .*step_00000003 is damaged .*restore"):
        FrozenHeads.open(newest, ALONE, said.append)


def test_what_has_no_heads_is_pointed_to_features(run: Path, tmp_path: Path) -> None:
    """Files of weights in the layouts of others and ours, and a checkpoint without heads."""
    refused = "holds a backbone without heads; distil at the level of features instead: --teacher"
    backbone = networks(8).backbone
    ours = tmp_path / "weights.safetensors"
    save_weights(backbone, ours)
    save_weights(backbone, tmp_path / "hub", "huggingface")
    inside = run / "checkpoints" / "step_00000003" / "teacher.safetensors"
    for path in (ours, tmp_path / "hub", inside):
        with pytest.raises(ConfigError, match=f"^teacher.run: {path} {refused}"):
            FrozenHeads.open(path, ALONE, print)

    class WithoutHeads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

    kept = checkpoint.Kept(1)
    folder = tmp_path / "features" / "checkpoints"
    folder.parent.mkdir()
    checkpoint.save(folder, 1, Contents({"teacher": WithoutHeads()}, None, {}), {}, ALONE, kept)
    with pytest.raises(ConfigError, match=refused):
        FrozenHeads.open(tmp_path / "features", ALONE, print)


@pytest.mark.parametrize("name", ["nothing", "empty", "notes.txt"])
def test_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ConfigError, match=f"^teacher.run: there is no run .*{name}; give the fol"):
        FrozenHeads.open(tmp_path / name, ALONE, print)


def test_rows_are_those_of_the_heads(run: Path) -> None:
    """Of chosen patches and of all; the last layers give the networks' logits, exactly."""
    teacher = FrozenHeads.open(run, ALONE, print)
    crops = torch.randn(4, 3, 24, 24)
    rows = torch.tensor([0, 5, 9, 17, 35])
    chosen = teacher(crops, rows)
    with torch.no_grad():
        output = teacher.networks(crops, rows)
    assert torch.equal(teacher.cls_logits(chosen.cls), output.cls_logits)
    assert torch.equal(teacher.patch_logits(chosen.patches), output.patch_logits)
    torch.testing.assert_close(teacher(crops).patches[rows], chosen.patches)
    assert teacher(crops).patches.shape == (36, 8)
    assert teacher(crops[:0], rows[:0]).cls.shape == (0, 8)


def test_a_student_has_the_prototypes_and_pixels_of_its_teacher(run: Path) -> None:
    teacher = FrozenHeads.open(run, ALONE, print)
    recipe = tiny_recipe()
    assert list(teacher.complaints("small", recipe)) == []
    other = replace(recipe, ibot=replace(recipe.ibot, prototypes=30))
    other = replace(other, crops=replace(recipe.crops, mean=(0.5, 0.5, 0.5)))
    prototypes, pixels = teacher.complaints("small", other)
    assert prototypes == (
        f"student small has 30 prototypes in its ibot head and the teacher {run} has 24, of which "
        "the targets are; give --small.ibot.prototypes 24"
    )
    assert pixels.startswith(f"the teacher {run} was trained on pixels of another mean")
    assert pixels.endswith("--crops.mean 0.485 0.456 0.406 --crops.std 0.229 0.224 0.225")


def test_a_convnext_is_a_teacher(tmp_path: Path) -> None:
    """Its patches are those of stride 32, and a run of it is opened like any other."""
    torch.manual_seed(0)
    backbone = build("convnext_tiny", depths=(1, 1, 1, 1), widths=(8, 8, 16, 16))
    saved = Networks(backbone, ProjectionHead(16, HEAD), ProjectionHead(16, HEAD))
    stated = {f"{w}.{n}": v for w in ("dino", "ibot") for n, v in asdict(HEAD).items()}
    contents = Contents({"teacher": saved}, None, {})
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, contents, {"recipe": stated}, ALONE, checkpoint.Kept(1))

    teacher = FrozenHeads.open(tmp_path, ALONE, print)
    assert teacher.patch_size == 32
    share = shared_pass(teacher, batch := batch_of_blocks(2, side=32, stride=8), 8)(batch, 0, 0.1)
    assert len(share.targets.patches) == len(batch.mask_indices)  # a grid of 4 x 4 at 128 pixels
    crops = teacher_input(batch.global_crops, (4, 4), 32)
    assert crops.shape[-2:] == (128, 128)
    with torch.no_grad():
        output = saved.eval()(crops, batch.mask_indices)
    assert torch.equal(share.targets.patches.logits, output.patch_logits)


def test_a_cache_stands_in_for_the_teacher(tmp_path: Path) -> None:
    """All patches are stored, and masks choose of them; the second time nothing is computed."""
    batch = made_up_batch(tiny_recipe(), 3)
    teacher = frozen(8)
    want = shared_pass(teacher, batch, 8)(batch, 0, 0.1).targets
    forwards: list[int] = []
    teacher.networks.backbone.patch_embed.register_forward_hook(
        lambda module, inputs, output: forwards.append(len(output))
    )
    shared = shared_pass(CachedHeads(teacher, tmp_path / "cache", print), batch, 8)
    for _ in range(2):
        targets = shared(batch, 0, 0.1).targets
        torch.testing.assert_close(targets.cls.dense(), want.cls.dense())
        torch.testing.assert_close(targets.patches.dense(), want.patches.dense())
    assert forwards == [1, 6]  # one view alone shows the cache what rows are like


# --- views


class BlockMeans:
    """In place of a teacher: the row of a patch is its mean, a crop's the mean of the crop."""

    name = "means"
    fingerprint = ""

    def __init__(self, patch_size: int):
        self.patch_size = patch_size
        self.sides: list[int] = []

    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        self.sides.append(crops.shape[-1])
        patches = F.avg_pool2d(crops[:, :1], self.patch_size).flatten()[:, None]
        return TeacherRows(crops.mean((2, 3))[:, :1], patches if rows is None else patches[rows])

    def cls_logits(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, -rows], 1)

    patch_logits = cls_logits


def batch_of_blocks(images: int, side: int, stride: int) -> Batch:
    """Crops whose blocks of `stride` pixels have a value of their own each; masks of blocks."""
    grid = side // stride
    blocks = torch.arange(2 * images * grid**2).reshape(2 * images, 1, grid, grid).float()
    crops = blocks.repeat_interleave(stride, 2).repeat_interleave(stride, 3).expand(-1, 3, -1, -1)
    masks = batch_masks(2 * images, (grid, grid), MaskSettings(), np.random.default_rng(0))
    return Batch(crops, torch.empty(0, 3, 8, 8), None, *masks, positions=range(images))


def shared_pass(teacher: HeadTeacher, batch: Batch, patch_size: int) -> SharedPass:
    """Of one process; its masks are those of `batch`."""
    masks = BatchMasks(batch.masks, batch.mask_indices, batch.mask_weights)
    exchange = Exchange(Plan.even(1, [(0, 1)], batch.images), ALONE)
    views = Views(2, batch.local_count, patch_size, lambda step: masks)
    return SharedPass(teacher, exchange, ALONE, views)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_rows_are_of_the_masked_places_whatever_the_teachers_patch(patch_size: int) -> None:
    """Crops of 64 pixels for students of stride 8: a grid of 8 x 8, for the teacher as well."""
    batch = batch_of_blocks(3, side=64, stride=8)
    teacher = BlockMeans(patch_size)
    share = shared_pass(teacher, batch, patch_size=8)(batch, 0, 0.1)
    assert teacher.sides == [8 * patch_size]
    assert share.batch.global_crops is batch.global_crops  # the students' crops stay as they are
    values = share.targets.patches.logits[:, 0]
    assert len(values) > 10
    # Blocks number the places; resizing mixes a block with its neighbours beyond its border.
    assert torch.equal(values.round().long() % 8, batch.mask_indices % 8)
    assert float((values - batch.mask_indices).abs().max()) < 4.0


def test_the_published_defect_compares_other_places() -> None:
    """Patches of 4 beside a stride of 8, and the teacher's input left as it is."""
    batch = batch_of_blocks(3, side=64, stride=8)
    assert torch.equal(teacher_input(batch.global_crops, (16, 16), 4), batch.global_crops)
    whole = BlockMeans(4)(batch.global_crops)
    assert len(whole.patches) == 4 * batch.masks.numel()
    values = whole.patches[batch.mask_indices, 0]
    assert not torch.equal(values.round().long() % 8, batch.mask_indices % 8)


def test_the_input_of_a_teacher_is_bilinear_and_antialiased() -> None:
    crops = torch.randn(2, 3, 32, 48)
    grid = patch_grid(crops, 16)
    assert grid == (2, 3) and teacher_input(crops, grid, 16) is crops
    want = F.interpolate(crops, (28, 42), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(teacher_input(crops, grid, 14), want)


def test_one_pass_gives_every_student_what_its_own_would() -> None:
    """Logits and assignments of the networks at work in a step of pretraining."""
    teacher = frozen(8)
    batch = made_up_batch(tiny_recipe(), 4)
    images = []
    embedding = teacher.networks.backbone.patch_embed
    embedding.register_forward_hook(lambda module, inputs, output: images.append(len(inputs[0])))
    share = shared_pass(teacher, batch, 8)(batch, 0, 0.07)
    assert images == [8]  # two crops of each image, once

    with torch.no_grad():
        output = teacher.networks(batch.global_crops, batch.mask_indices)
    assert torch.equal(share.targets.cls.dense(), sinkhorn(output.cls_logits, 0.07).dense())
    assert torch.equal(share.targets.patches.dense(), sinkhorn(output.patch_logits, 0.07).dense())
    assert all(torch.equal(x, batch.tensors()[name]) for name, x in share.batch.tensors().items())
    assert share.batch.positions == batch.positions


def test_a_student_sees_the_views_in_its_own_sizes() -> None:
    """By the step where there are several; the grid, masks and targets stay."""
    batch = made_up_batch(tiny_recipe(), 2)  # 24 and 16 pixels
    assert as_seen_by(batch, CropSettings(24, 16), seed=0, step=0).global_crops is (
        batch.global_crops
    )
    sizes = (CropSizes(0.5, 48, 32),)
    crops = CropSettings(24, 16, other_sizes=sizes)
    drawn = [size_at(7, step, crops.shares) for step in range(6)]
    assert set(drawn) == {0, 1}
    for step, which in enumerate(drawn):
        seen = as_seen_by(batch, crops, seed=7, step=step)
        assert seen.global_crops.shape[-2:] == ((24, 24), (48, 48))[which]
        assert seen.local_crops.shape[-2:] == ((16, 16), (32, 32))[which]
        assert seen.masks is batch.masks
    assert (
        as_seen_by(replace(batch, local_crops=torch.empty(0, 3, 16, 16)), crops, 7, 1) is not None
    )
