"""Feature-level distillation: a student matches what frozen teachers without heads see.

Teachers are any vision backbones, one or several. For each of them the student has an adapter, and
the term is the share of the teacher's variance that the adapter's prediction does not explain
(`dinov3core.losses.features`), of CLS tokens and of patches. It begins near 1 for every teacher
whatever its magnitude, and is read as it stands in the log: 0.3 is 70 % explained.

Teacher and student see the same global crops, whole. Local crops are not used: they can be compared
with the teacher's CLS token of another view alone, and the CLS token of a student that is taught so
was worth less (k-NN 36.4 for 41.4, three seeds; LOG.md, 2026-11-24). Nor are masks, prototypes, and
the spreading of CLS tokens, which the teacher's own spread brings along.

The statistics of a teacher's features are sums over all rows that the student's processes have been
shown, this step's among them. So they are those of the first batch in the first step, the same on
every process, in every checkpoint, and bit-equal after a resume. A batch in which a teacher's
features are not finite is not counted; its step is a bad one.

Shapes: B images of this process, G global crops of each, P patches of a crop, E and E' widths of a
teacher's CLS token and patches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinov3core.data.masks import BatchMasks
from dinov3core.losses import (
    feature_sums,
    finite_total,
    restored,
    standardised,
    statistics_of,
    unexplained_share,
)
from dinov3core.models.adapters import FeatureAdapter, FeatureNetworks, Predicted
from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.accumulation import MicroBatch, WholeKoleo
from dinov3core.train.engine.building import build_backbone
from dinov3core.train.engine.checkpoint import CheckpointError, Contents
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.exchange import Exchange
from dinov3core.train.engine.distillation.frozen_features import (
    FrozenFeatures,
    Pixels,
    open_teacher,
    teacher_names,
)
from dinov3core.train.engine.distillation.frozen_teacher import (
    FrozenTeacher,
    TeacherRows,
    patch_grid,
)
from dinov3core.train.engine.distillation.heads import SharedViews, Views
from dinov3core.train.engine.distillation.settings import Features
from dinov3core.train.engine.methods import Now, Teachers
from dinov3core.train.engine.named_models import NO_RECIPES, Recipes
from dinov3core.train.engine.parallel import World

# Fields of a recipe, or the groups they are in, that mean nothing to teachers without heads.
UNUSED_FIELDS = (
    "dino",
    "ibot",
    "loss",
    "masks",
    "teacher.temperature",
    "optim.freeze_last_layer_epochs",
    "crops.local_count",
    "crops.local_size",
    "crops.local_scale",
)

FeatureTargets = Mapping[str, TeacherRows]
"""Of each teacher, by name: the rows of all global crops that this process trains on, [G * B, E]
and [G * B * P, E']."""


def open_teachers(
    features: Features,
    pixels: Pixels,
    device: torch.device,
    recipes: Recipes = NO_RECIPES,
) -> list[FrozenFeatures]:
    """The teachers of a distillation.

    Args:
        pixels: as the students see images.
        recipes: see `open_backbone`.

    Raises:
        ConfigError: one cannot be opened, or does not take such images.
    """
    names = teacher_names([teacher.weights for teacher in features.teachers])
    return [
        open_teacher(
            name, teacher.weights, pixels, size=teacher.size, device=device, recipes=recipes
        )
        for name, teacher in zip(names, features.teachers, strict=True)
    ]


class FeatureDistillation:
    """The `Method` of a student of teachers without heads; their rows are given to every step.

    Args:
        recipe: of the student.
        world: the processes that train it.
        features: weights of the terms, and of the teachers among each other.
        teachers: in the order of `features.teachers`.

    Raises:
        ConfigError: there are local crops, or nothing is to be learned.
    """

    def __init__(
        self,
        recipe: Pretrain,
        world: World,
        features: Features,
        teachers: Sequence[FrozenFeatures],
    ):
        _refuse(recipe, features)
        self.recipe = recipe
        self.world = world
        self.features = features
        self.teachers = teachers
        whole = sum(teacher.share for teacher in features.teachers)
        self.shares = {
            teacher.name: stated.share / whole
            for teacher, stated in zip(teachers, features.teachers, strict=True)
        }
        self.adapters: nn.ModuleDict = nn.ModuleDict()
        self.prototype_counts = torch.zeros(0, dtype=torch.int64, device=world.device)

    def networks(self) -> FeatureNetworks:
        """A student with fresh adapters, whose statistics are kept from now on."""
        backbone = build_backbone(self.recipe)  # which seeds the draws of the adapters, too
        adapters = {
            teacher.name: FeatureAdapter(backbone.width, teacher.cls_width, teacher.patch_width)
            for teacher in self.teachers
        }
        networks = FeatureNetworks(backbone, adapters)
        self.adapters = networks.adapters
        return networks

    def targets(self, parts: Sequence[MicroBatch], teachers: Teachers, now: Now) -> FeatureTargets:
        raise ValueError("expected the rows of frozen teachers with the batch, got none")

    def whole_terms(
        self,
        student: nn.Module,
        parts: Sequence[MicroBatch],
        rehearsal: Callable[[MicroBatch], AbstractContextManager],
    ) -> dict[str, WholeKoleo]:
        """None: every term is a sum over rows."""
        return {}

    def student_pass(self, student: nn.Module, part: MicroBatch) -> dict[str, Predicted]:
        return student(part.batch.global_crops)

    def terms(
        self,
        output: Mapping[str, Predicted],
        targets: FeatureTargets,
        part: MicroBatch,
        whole: Mapping[str, WholeKoleo],
    ) -> dict[str, Tensor]:
        """For every teacher cls_of_NAME and patches_of_NAME, the shares that are not explained."""
        if part.index == 0:
            self._count(targets)
        crops = part.batch.global_count * part.whole
        terms = {}
        for name, predicted in output.items():
            adapter = self.adapters[name]
            cls, patches = _rows_of(targets[name], part, crops)
            terms[f"cls_of_{name}"] = _term(predicted.cls, cls, adapter.cls_sums, crops)
            terms[f"patches_of_{name}"] = _term(
                predicted.patches, patches, adapter.patch_sums, len(targets[name].patches)
            )
        return terms

    @torch.no_grad()
    def _count(self, targets: FeatureTargets) -> None:
        """Add this step's rows to the statistics, those of all processes at once."""
        buffers = []
        sums = []
        for name, rows in targets.items():
            adapter = self.adapters[name]
            buffers += [adapter.cls_sums, adapter.patch_sums]
            sums += [feature_sums(rows.cls), feature_sums(rows.patches)]
        of_all = self.world.total(torch.cat(sums))
        more = of_all.split([len(buffer) for buffer in buffers])
        for buffer, addition in zip(buffers, more, strict=True):
            buffer.copy_(finite_total(buffer, addition))

    def total(self, terms: Mapping[str, Tensor], now: Now) -> Tensor:
        """The terms by their weights, teachers by their shares."""
        weights = self.features
        return sum(
            (
                share
                * (
                    weights.cls_weight * terms[f"cls_of_{name}"]
                    + weights.patch_weight * terms[f"patches_of_{name}"]
                )
                for name, share in self.shares.items()
            ),
            start=torch.zeros((), device=self.world.device),
        )

    def observations(
        self, output: Mapping[str, Predicted], targets: FeatureTargets, part: MicroBatch
    ) -> dict[str, Tensor]:
        """None: the terms speak for themselves."""
        return {}


class FeaturePass(SharedViews):
    """That of teachers without heads: every one of them sees the crops once.

    All patches travel, as all are matched.

    Args:
        teachers: the same on all processes; as `open_teachers` gives them, or with a cache each.
        exchange, part, views, precision: see `SharedViews`.
    """

    def __init__(
        self,
        teachers: Sequence[FrozenTeacher],
        exchange: Exchange,
        part: World,
        views: Views,
        *,
        precision: Literal["bf16", "fp32"] = "fp32",
    ):
        super().__init__(exchange, part, views, precision)
        self.teachers = teachers

    def _targets(self, crops: Tensor, masks: BatchMasks, temperature: float) -> FeatureTargets:
        targets = {}
        count = self.views.global_count
        patches_of_crop = math.prod(patch_grid(crops, self.views.patch_size))
        for teacher in self.teachers:
            with self._autocast():
                own = teacher(crops)
            patches = own.patches.unflatten(0, (len(crops), patches_of_crop))
            targets[teacher.name] = TeacherRows(
                self._moved("class rows", own.cls, count),
                self._moved("patch rows", patches, count).flatten(0, 1),
            )
        return targets


def _refuse(recipe: Pretrain, features: Features) -> None:
    local = recipe.crops.local_count
    if local:
        raise ConfigError(
            f"crops.local_count {local}: students of teachers without heads see global crops "
            "alone; give --crops.local-count 0"
        )
    if not features.cls_weight + features.patch_weight:
        raise ConfigError(
            "teacher.cls_weight and teacher.patch_weight are both 0, so that nothing is learned; "
            "give one of them"
        )


def _rows_of(rows: TeacherRows, part: MicroBatch, crops: int) -> TeacherRows:
    """Those of the crops of a micro-batch, of the rows of `crops` crops of the whole batch."""
    if len(part.places) == part.whole:
        return rows
    chosen = part.rows()
    patches = rows.patches.unflatten(0, (crops, -1))
    return TeacherRows(rows.cls[chosen], patches[chosen].flatten(0, 1))


def _term(predicted: Tensor, rows: Tensor, sums: Tensor, whole: int) -> Tensor:
    return unexplained_share(predicted, standardised(rows, statistics_of(sums)), whole)


def load_adapters(run: Path | str) -> dict[str, FeatureAdapter]:
    """The adapters of a student, by the names of its teachers, as its newest checkpoint has them.

    They belong to the backbone that is exported there as teacher.safetensors.

    Args:
        run: the student's folder.

    Raises:
        CheckpointError: there is no such run, or it has no adapters.
    """
    world = World(0, 1, torch.device("cpu"))
    whole = checkpoint.newest_whole(Path(run) / "checkpoints", world)
    tensors = {} if whole is None else whole.state["tensors"]
    prefix = "teacher.adapters."
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if whole is None or not names:
        raise CheckpointError(
            f"{run} has no adapters; expected the folder of a student of teachers without heads"
        )
    adapters = {}
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        shapes = [tensors[f"{prefix}{name}.{kind}.weight"]["shape"] for kind in ("cls", "patches")]
        adapters[name] = FeatureAdapter(shapes[0][1], shapes[0][0], shapes[1][0])

    # Weights are those of the running average, whose statistics stay at zero: the student's count.
    statistics = nn.ModuleDict(
        {
            name: _SumsAlone(adapter.cls_sums, adapter.patch_sums)
            for name, adapter in adapters.items()
        }
    )
    averages = nn.ModuleDict(adapters)
    checkpoint.load_part(whole, Contents({prefix[:-1]: averages}, None, {}), world)
    checkpoint.load_part(whole, Contents({"student.adapters": statistics}, None, {}), world)
    return {name: adapter.eval() for name, adapter in adapters.items()}


class _SumsAlone(nn.Module):
    """The statistics of an adapter, sharing its memory."""

    def __init__(self, cls_sums: Tensor, patch_sums: Tensor):
        super().__init__()
        self.register_buffer("cls_sums", cls_sums)
        self.register_buffer("patch_sums", patch_sums)


@torch.no_grad()
def teacher_features(adapter: FeatureAdapter, cls: Tensor, patches: Tensor) -> Predicted:
    """What a student says of a teacher's features, in the teacher's own units.

    Args:
        cls, patches: of the student, [n, D] and [n, P, D], as `features(..., reshape=False)` gives
            them.

    Returns:
        cls [n, E] and patches [n, P, E'].
    """
    predicted = adapter(cls, patches)
    restored_patches = restored(predicted.patches, statistics_of(adapter.patch_sums))
    return Predicted(
        restored(predicted.cls, statistics_of(adapter.cls_sums)),
        restored_patches.unflatten(0, (len(cls), -1)),
    )
