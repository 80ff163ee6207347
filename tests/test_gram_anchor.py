"""Gram anchoring: every combination of its fields trains or is refused, where its teacher comes
from, on which grid patches are compared, and that no GPU is waited for.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

# --import-mode=importlib leaves the test folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import (
    checkpoint_of,
    differences,
    made_up_batch,
    metrics_of,
    snapshot,
    tensors_of,
    tiny_command,
    tiny_recipe,
    with_run,
)

from dinov3core.checkpoints import load_weights, save_weights
from dinov3core.data.batch import Batch
from dinov3core.data.images import DatasetSource
from dinov3core.data.loader import BatchMaker, BatchSettings
from dinov3core.losses import compared_rows, resize_patches
from dinov3core.models import HeadSettings, Tokens, VisionTransformer
from dinov3core.train.engine import changes
from dinov3core.train.engine.config import (
    ConfigError,
    Earlier,
    Ema,
    File,
    GramAnchor,
    Pretrain,
    Snapshot,
)
from dinov3core.train.engine.image_tally import FIRST_BATCHES, ImageTally
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.objective import anchor_loss, anchor_patches
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import StepReport, Trainer
from dinov3core.train.pretrain import parse

ALONE = World(0, 1, torch.device("cpu"))
PATCH = 8
GLOBAL = 24  # pixels of a global view


def smallest_recipe() -> Pretrain:
    """One block of width 8; two images a step."""
    base = tiny_recipe()
    head = HeadSettings(prototypes=6, hidden=8, bottleneck=4, init_std=0.2, prototype_std=0.3)
    return replace(
        base,
        backbone=replace(base.backbone, width=8, depth=1),
        dino=head,
        ibot=head,
        crops=replace(base.crops, local_count=1),
        run=replace(base.run, batch_size=2),
        gram=None,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights that fit `smallest_recipe`."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(VisionTransformer(smallest_recipe().backbone), path)
    return str(path)


# --- every combination


@dataclass(frozen=True)
class Combination:
    """A choice for every field that says what is compared, and how a step is cut."""

    teacher: str
    crop_size: int | None
    of_crops: tuple[str, ...]  # fields that concern crops of its own, and are not as by default
    tokens: str
    per_image: bool
    negatives: str
    accumulation: int

    def __str__(self) -> str:
        crops = "+".join(self.of_crops) or "plain"
        fields = vars(self) | {"of_crops": crops}
        return "-".join(map(str, fields.values()))

    def anchor(self, weights: str) -> GramAnchor:
        teachers = {
            "ema": Ema(),
            "snapshot": Snapshot(every=1),
            "file": File(weights, every=1),
            "earlier": Earlier(every=1),
        }
        return GramAnchor(
            teachers[self.teacher],
            crop_size=self.crop_size,
            distorted="distorted" in self.of_crops,
            resize="bilinear" if "bilinear" in self.of_crops else "bicubic",
            antialias="antialias" in self.of_crops,
            tokens=self.tokens,
            per_image=self.per_image,
            negatives=self.negatives,
        )


COMBINATIONS = [
    Combination(*fields)
    for fields in itertools.product(
        ("ema", "snapshot", "file", "earlier"),
        (None, GLOBAL, 2 * GLOBAL),
        ((), ("bilinear",), ("antialias",), ("distorted", "bilinear", "antialias")),
        ("all", "masked", "unmasked"),
        (True, False),
        ("keep", "clip", "clip_teacher"),
        (1, 2),
    )
]
# The sentence that refuses a combination is the first one whose condition holds.
REFUSED: dict[str, Callable[[Combination], bool]] = {
    r"gram.crop_size \d+: the EMA teacher sees the global views alone": lambda one: (
        one.teacher == "ema" and one.crop_size is not None
    ),
    r"gram.distorted, gram.resize and gram.antialias .*; give gram.crop_size": lambda one: (
        one.crop_size is None and bool(one.of_crops)
    ),
    r"gram.tokens \w+ is another count of patches .* set gram.per_image to False": lambda one: (
        one.tokens != "all" and one.per_image
    ),
    r"gram.per_image False is one Gram matrix over the batch, which run.accumulation": lambda one: (
        not one.per_image and one.accumulation > 1
    ),
}


@cache
def batch_of(recipe: Pretrain) -> Batch:
    """The batch that the loader of a run makes."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
    source = DatasetSource([(Image.fromarray(image), 0) for image in pixels])
    gram = recipe.gram and recipe.gram.crops
    settings = BatchSettings(recipe.crops, recipe.masks, 2, PATCH, gram=gram)
    return BatchMaker(source, settings, rank=0, world_size=1).make(0)


@pytest.mark.parametrize("one", COMBINATIONS, ids=str)
def test_a_combination_trains_or_is_refused(one: Combination, weights: str) -> None:
    before = "a/run" if one.teacher == "earlier" else ""
    recipe = with_run(smallest_recipe(), accumulation=one.accumulation, from_=before)
    recipe = replace(recipe, gram=one.anchor(weights))
    sentence = next((sentence for sentence, holds in REFUSED.items() if holds(one)), None)
    if sentence is not None:
        with pytest.raises(ConfigError, match=f"^{sentence}"):
            resolve(recipe, 1)
        return
    report = Trainer(recipe, ALONE).step(batch_of(recipe), 0)
    assert report.finite and report.values["gram"] > 0


def test_lengths_of_patches_count_without_normalising() -> None:
    batch = made_up_batch(tiny_recipe(), 4)
    patches = torch.randn(8, 9, 16)
    losses = [
        anchor_loss(GramAnchor(normalize=normalize), patches, 2 * patches, batch)
        for normalize in (True, False)
    ]
    assert losses[0] < 1e-10 and losses[1] > 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(gram=GramAnchor(Snapshot(), crop_size=50)),
            "gram.crop_size: Gram crop 50 is not a multiple of the patch 8; use 48 or 56",
        ),
        (
            dict(gram=GramAnchor(Snapshot(first=8))),
            "gram.teacher.first: the first snapshot is due before step 8, and the run ends after 8",
        ),
        (
            dict(gram=GramAnchor(Earlier())),
            "gram.teacher earlier is a teacher of the run this stage starts from, .* --run.from",
        ),
        (
            dict(gram=GramAnchor(Snapshot(at_most=2))),
            "gram.teacher.at_most 2 limits .*; give gram.teacher.every",
        ),
        (
            dict(gram=GramAnchor(File("x", at_most=2))),
            "gram.teacher.at_most 2 limits .*; give gram.teacher.every",
        ),
        (dict(gram=GramAnchor(File())), "gram.teacher.path: expected a file of weights, .* got no"),
        (
            dict(gram=GramAnchor(tokens="masked", per_image=False)),
            "gram.tokens masked leaves no pa",
        ),
        (dict(gram=GramAnchor("ema")), "gram.teacher: expected an? Ema or .* got 'ema'"),
        (dict(gram="ema"), "gram: expected a GramAnchor or None, got 'ema'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(fields: dict, sentence: str) -> None:
    recipe = smallest_recipe()
    recipe = replace(recipe, masks=replace(recipe.masks, probability=0.0), **fields)
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        resolve(recipe, 1)


def test_a_run_cannot_compare_visible_patches_when_there_are_none() -> None:
    recipe = smallest_recipe()
    all_hidden = replace(recipe.masks, probability=1.0, ratio_min=1.0, ratio_max=1.0)
    gram = GramAnchor(tokens="unmasked", per_image=False)
    with pytest.raises(ConfigError, match=r"^gram.tokens unmasked leaves no patch to compare with"):
        resolve(replace(recipe, masks=all_hidden, gram=gram), 1)


# --- which patches, on which grid


@pytest.mark.parametrize("tokens", ["masked", "unmasked"])
def test_some_of_the_patches_are_those_of_the_masks(tokens: str) -> None:
    batch = made_up_batch(tiny_recipe(), 4)
    rows = compared_rows(tokens, batch.masks, batch.mask_indices)
    want = batch.masks if tokens == "masked" else ~batch.masks
    assert torch.equal(rows, want.flatten().nonzero().squeeze(1))
    assert compared_rows("all", batch.masks, batch.mask_indices) is None


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
def test_no_gpu_is_asked_which_patches_are_compared(tokens: str) -> None:
    """Meta tensors hold no numbers: whatever would wait for a GPU's cannot be answered by them."""
    batch = made_up_batch(tiny_recipe(), 4).to(torch.device("meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        batch.global_crops[batch.masks]  # what the host would have to count
    student = torch.empty(8, 9, 16, device="meta", requires_grad=True)
    gram = GramAnchor(tokens=tokens, per_image=tokens == "all")
    anchor_loss(gram, student, torch.empty(8, 9, 16, device="meta"), batch).backward()
    assert student.grad.shape == student.shape


def test_other_tokens_are_refused() -> None:
    batch = made_up_batch(tiny_recipe(), 4)
    with pytest.raises(ValueError, match="expected 'all', 'masked' or 'unmasked', got 'some'"):
        compared_rows("some", batch.masks, batch.mask_indices)
    patches = torch.randn(8, 9, 16)
    with pytest.raises(ValueError, match="some of the patches need per_image=False"):
        anchor_loss(GramAnchor(tokens="masked"), patches, patches, batch)


class Given(nn.Module):
    """A backbone of patches that are given."""

    def __init__(self, patches: Tensor, patch_size: int = PATCH):
        super().__init__()
        self.patches = patches
        self.patch_size = patch_size
        self.width = patches.shape[2]

    def forward_features(self, images: Tensor) -> Tokens:
        return Tokens(self.patches[:, :0], self.patches[:, :0], self.patches, self.patches)


def with_gram_crops(side: int | tuple[int, int]) -> Batch:
    height, width = (side, side) if isinstance(side, int) else side
    batch = made_up_batch(tiny_recipe(), 4)
    return replace(batch, gram_crops=torch.zeros(8, 3, height, width))


def test_patches_on_the_students_grid_are_left_as_they_are() -> None:
    given = torch.randn(8, 9, 16)
    batch = with_gram_crops(GLOBAL)
    student = Given(torch.randn(8, 9, 24))
    assert anchor_patches(GramAnchor(), Given(given), batch, student) is given
    coarse = with_gram_crops(2 * GLOBAL)  # patches of twice the side are as many
    assert anchor_patches(GramAnchor(), Given(given, 2 * PATCH), coarse, student) is given


def test_a_teacher_on_another_grid_must_have_the_students_width() -> None:
    teacher = Given(torch.randn(8, 36, 16))
    batch = with_gram_crops(2 * GLOBAL)
    sentence = (
        r"on another patch grid \(6 x 6 for 3 x 3\) must be of the student's width 24, got 16"
    )
    with pytest.raises(ValueError, match=sentence):
        anchor_patches(GramAnchor(), teacher, batch, Given(torch.randn(8, 9, 24)))
    resized = anchor_patches(GramAnchor(), teacher, batch, Given(torch.randn(8, 9, 16)))
    assert resized.shape == (8, 9, 16)


def test_a_map_is_resized_row_by_row_to_any_grid() -> None:
    """A map that rises along one axis still does; 4 x 6 patches to 2 x 3 and back."""
    rising = torch.arange(24.0).reshape(1, 4, 6, 1)
    for mode, antialias in itertools.product(("bicubic", "bilinear"), (False, True)):
        settings = {"mode": mode, "antialias": antialias}
        small = resize_patches(rising.flatten(1, 2), (4, 6), (2, 3), **settings)
        assert small.shape == (1, 6, 1)
        map_23 = small.reshape(2, 3)
        assert (map_23.diff(dim=0) > 8).all()  # 12 but for the borders
        assert (0 < map_23.diff(dim=1)).all() and (map_23.diff(dim=1) < 4).all()  # 2
        assert resize_patches(small, (2, 3), (4, 6), **settings).shape == (1, 24, 1)


# --- teachers and when they change


def anchored_by(teacher: Ema | Snapshot | File, steps: int = 8) -> Trainer:
    recipe = replace(with_run(smallest_recipe(), epoch_steps=steps), gram=GramAnchor(teacher))
    return Trainer(recipe, ALONE)


def train(trainer: Trainer, steps: int) -> list[dict[str, Tensor]]:
    """The Gram teacher's weights before the first step and after every one."""
    states = [snapshot(trainer)]
    for step in range(steps):
        assert trainer.step(made_up_batch(trainer.recipe, 2, seed=step), step).finite
        states.append(snapshot(trainer))
    return states


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name): x for key, x in state.items() if key.startswith(name)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_ema_teacher_needs_no_backbone_of_its_own() -> None:
    assert "gram_teacher" not in anchored_by(Ema()).modules()


def test_a_snapshot_is_the_ema_teacher_of_its_step_and_anchors_from_there_on() -> None:
    trainer = anchored_by(Snapshot(first=2, every=4))
    assert trainer.resolved.schedules["gram_weight"].tolist() == [0.0] * 2 + [2.0] * 6
    states = train(trainer, 8)
    anchors = [part(state, "gram_teacher.") for state in states]
    teachers = [part(state, "teacher.backbone.") for state in states]
    assert same(anchors[3], teachers[2])
    assert same(anchors[4], teachers[4])  # after 4 steps
    assert all(same(anchor, teachers[4]) for anchor in anchors[5:8])
    assert same(anchors[8], teachers[8])


def test_a_file_anchors_until_it_is_refreshed_as_often_as_is_said(weights: str) -> None:
    states = train(anchored_by(File(weights, every=2, at_most=2)), 8)
    anchors = [part(state, "gram_teacher.") for state in states]
    teachers = [part(state, "teacher.backbone.") for state in states]
    assert not same(anchors[0], teachers[0]) and same(anchors[0], anchors[1])
    assert same(anchors[2], teachers[2]) and same(anchors[3], teachers[2])
    assert all(same(anchor, teachers[4]) for anchor in anchors[4:])


def copied(weights: str, path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return Path(shutil.copy(weights, path))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("backbone.safetensors", "backbone.safetensors"),
        ("checkpoints/step_00000004/teacher.safetensors", "."),
        ("checkpoints/step_00000004/teacher.safetensors", "checkpoints/step_00000004"),
        ("best/teacher.safetensors", "best"),
    ],
)
def test_weights_come_from_a_file_or_a_run_or_part_of_one(
    file: str, named: str, weights: str, tmp_path: Path
) -> None:
    path = copied(weights, tmp_path / "run" / file)
    (path.parent / "state.json").write_text("{}")
    trainer = anchored_by(File(str(tmp_path / "run" / named)))
    assert same(trainer.gram_teacher.state_dict(), load_file(weights))


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_weights_come_in_any_known_layout(layout: str, weights: str, tmp_path: Path) -> None:
    backbone = VisionTransformer(smallest_recipe().backbone)
    load_weights(backbone, weights)
    save_weights(backbone, tmp_path / "other", format=layout)
    trainer = anchored_by(File(str(tmp_path / "other")))
    got = trainer.gram_teacher.state_dict()
    assert torch.equal(
        got["patch_embed.proj.weight"], load_file(weights)["patch_embed.proj.weight"]
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(patch_size=16),
            r"expected patch_embed.proj.weight of shape \[8, 3, 8, 8\], got .*16\]",
        ),
        (dict(width=16), r"expected weights of .*width 8.*, got those of .*width 16"),
        (
            dict(depth=2),
            r"expected weights of a ViT of 1 blocks, .*, got those of a ViT of 2 blocks",
        ),
        (dict(registers=3), r"expected weights of .* 1 registers, .* got those of .* 3 registers"),
        (dict(norm="rmsnorm"), r"expected the 25 tensors of the model, got 21 of them"),
        (dict(in_channels=4), r"expected patch_embed.proj.weight of shape \[8, 3, 8, 8\], got"),
    ],
)
def test_weights_of_another_backbone_are_refused(
    fields: dict, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(VisionTransformer(replace(smallest_recipe().backbone, **fields)), path)
    with pytest.raises(ConfigError, match=f"^gram.teacher.path: .*: {sentence}") as refused:
        anchored_by(File(str(path)))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^gram.teacher.path: .*absent: .* found nothing there"):
        anchored_by(File(str(tmp_path / "absent")))


# --- runs

ANCHORED = (
    *("--gram.teacher", "snapshot", "--gram.teacher.first", "1", "--gram.teacher.every", "3"),
    *("--gram.teacher.at-most", "2", "--gram.crop-size", "48", "--gram.tokens", "unmasked"),
    *("--gram.per-image", "False", "--run.epoch-steps", "12", "--run.checkpoint-every", "4"),
    *("--data.probe", "none"),
)


class Killed(Exception):
    """The end of a process in mid-run."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second of every run."""
    monkeypatch.setattr(Monitor, "report", lambda *_: None)
    monkeypatch.setattr(Monitor, "snapshot_before", lambda *_: None)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_killed_between_two_refreshes_continues_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refreshed after 3 and 6 steps, and not after 9; killed in step 6, continued from 4."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    pretrain(parse(tiny_command(straight, *ANCHORED)))
    step_of_trainer = Trainer.step

    def step(trainer: Trainer, batch: Batch, step: int, *more: object) -> StepReport:
        if step == 5:
            raise Killed
        return step_of_trainer(trainer, batch, step, *more)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "step", step)
        pretrain(parse(tiny_command(killed, *ANCHORED)))
    resumed = pretrain(parse(tiny_command(killed, *ANCHORED)))

    assert resumed["steps"] == 12
    want = tensors_of(straight, 12, tmp_path / "straight.pt")
    assert any(name.startswith("gram_teacher.") for name in want)
    assert not differences(want, tensors_of(killed, 12, tmp_path / "killed.pt"))
    rows = [row for row in metrics_of(straight) if "loss" in row]
    assert rows == [row for row in metrics_of(killed) if "loss" in row]
    assert [row["gram_weight"] for row in rows] == [0.0] + [2.0] * 11
    state = json.loads((checkpoint_of(killed, 12) / "state.json").read_text())
    assert state["counters"]["gram_updates"] == 2


def identity_of(gram: GramAnchor | None) -> dict[str, object]:
    recipe = replace(smallest_recipe(), gram=gram)
    return changes.identity(recipe, DatasetSource([(Image.new("RGB", (9, 9)), 0)]), ALONE)


def test_another_anchor_is_another_run() -> None:
    anchors = [None, GramAnchor(), GramAnchor(Snapshot()), GramAnchor(negatives="clip")]
    for one, other in itertools.permutations(map(identity_of, anchors), 2):
        assert changes.differences(one, other)
    (change,) = changes.differences(identity_of(GramAnchor()), identity_of(GramAnchor(Snapshot())))
    assert change == "gram.teacher ema -> snapshot"
    (change,) = changes.differences(identity_of(None), identity_of(GramAnchor()))
    assert change == "gram None -> GramAnchor"


def test_a_checkpoint_of_before_there_were_anchors_is_continued() -> None:
    """Its names of the Gram term were others, with values although there was none."""
    names = {"gram.teacher": "none", "gram.weight": "PhasedSchedule", "gram.weight.peak": 0.0}
    older = {name: value for name, value in identity_of(None).items() if name != "gram"}
    assert not changes.differences(older | names | {"crops.gram_size": None}, identity_of(None))
    assert changes.differences(older | names, identity_of(GramAnchor()))
    assert not changes.differences(
        {"gram.teacher": "snapshot"}, identity_of(GramAnchor(Snapshot()))
    )


@pytest.mark.usefixtures("no_pictures")
def test_small_images_are_said_early_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    short = ("--data.scene-size", "32", "--data.probe", "none", "--run.checkpoint-every", "0")
    gram = ("--gram.teacher", "snapshot", "--gram.crop-size", "48", "--run.steps", "12")
    pretrain(parse(tiny_command(tmp_path / "large", *short, *gram)))
    sentence = (
        "40 of the first 40 images are smaller than the crops cut from them, of up to 48 x 48 px "
        "for the Gram teacher: they are enlarged, which adds no detail; give larger images, or "
        "make --crops.global-size or --gram.crop-size smaller"
    )
    assert capsys.readouterr().err.count(sentence) == 1
    pretrain(parse(tiny_command(tmp_path / "small", *short, "--run.steps", "11")))
    assert "images are smaller" not in capsys.readouterr().err


def test_small_images_are_counted_in_the_first_batches() -> None:
    batch = replace(made_up_batch(smallest_recipe(), 4), gram_crops=torch.zeros(8, 3, 16, 16))
    tally = ImageTally(ALONE)
    for number in range(FIRST_BATCHES + 1):
        tally.count(replace(batch, upsampled=number % 2))
        said = tally.small_images()
        assert bool(said) == (number == FIRST_BATCHES - 1)
        if said:
            assert said.startswith("5 of the first 40 images are smaller than the crops cut from")
            assert "of up to 24 x 24 px: they are enlarged" in said
