"""Head-level distillation: the teacher is a run of ours, with its heads, and its pass is shared.

Students learn the assignments of a frozen teacher: how its heads distribute images and patches over
prototypes, balanced by Sinkhorn. So they have as many prototypes as the teacher, and nothing else
of it: width, depth, registers, norms and the widths of heads may differ.

A step of the teacher, on every process:

1. It sees the global crops that this process loaded, unmasked, once.
2. Class rows are balanced over all processes. Every student sees the same rows, so that all of them
   share this balance: a process that trains on rows of others applies its prototype scalings.
3. Rows of masked patches are balanced over the processes of a range: masks are drawn by the process
   that trains on an image, so every range has its own.

What travels are bottleneck rows, hundreds of numbers each, not logits, tens of thousands; see
`exchange`. Students of one range share everything here.

Shapes: B images that this process trains on, b that it loaded, G and L global and local crops, P
patches of a global crop, M masked patches, E width of a head's bottleneck, K prototypes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dinov3core.checkpoints import describe, load_model
from dinov3core.data.batch import Batch, Crops
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import BatchMasks
from dinov3core.data.sizes import pair, size_at
from dinov3core.models import HeadSettings, ProjectionHead
from dinov3core.models.networks import Networks
from dinov3core.ops import sinkhorn
from dinov3core.ops.sinkhorn import ALONE, Assignment
from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.checkpoint import Candidate, CheckpointError, Contents
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.distillation.exchange import Exchange
from dinov3core.train.engine.distillation.frozen_teacher import (
    HeadTeacher,
    TeacherRows,
    at_size,
    patch_grid,
    teacher_input,
)
from dinov3core.train.engine.objective import Targets
from dinov3core.train.engine.parallel import World

WITHOUT_HEADS = (
    "holds a backbone without heads; distil at the level of features instead: --teacher features "
    "--teacher.teachers {}"
)


class FrozenHeads:
    """A frozen backbone with its two heads; a `FrozenTeacher` whose rows are bottlenecks.

    Args:
        networks: moved to `device`, in eval mode and without gradients from now on.
        name, fingerprint: see `FrozenTeacher`.
        device: where it computes.
    """

    def __init__(self, networks: Networks, name: str, fingerprint: str, device: torch.device):
        self.networks = networks.to(device).eval().requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.patch_size: int = networks.backbone.patch_size

    @classmethod
    def open(cls, run: Path, world: World, say: Callable[[str], None]) -> Self:
        """The EMA teacher of a run, as its newest whole checkpoint has it.

        Args:
            run: its folder, or one of its checkpoints.
            say: told which state of the run it is, also when the run is not finished.

        Raises:
            ConfigError: there is no such run, its checkpoints are damaged, or it has no heads.
        """
        _refuse_what_is_no_run(run, world)
        try:
            whole = _whole(run, world)
            networks = _networks(whole)
            checkpoint.load_part(whole, Contents({"teacher": networks}, None, {}), world)
        except (CheckpointError, ValueError, OSError) as error:
            raise ConfigError(f"teacher.run: {error}") from error
        for damage in whole.passed_over:
            say(f"passed over a damaged checkpoint of the teacher: {damage}")
        say(f"the teacher is {_state_in_words(whole)}")
        return cls(networks, str(run), checkpoint.fingerprint(whole.state), world.device)

    @torch.no_grad()
    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        """Bottlenecks of the DINO head for crops, of the iBOT head for patches of them."""
        networks = self.networks
        chosen = networks.backbone.forward_chosen([crops], [None], rows)
        return TeacherRows(
            networks.dino_head.bottleneck(chosen.cls[0]),
            networks.ibot_head.bottleneck(chosen.patches),
        )

    @torch.no_grad()
    def cls_logits(self, bottlenecks: Tensor) -> Tensor:
        """[n, E] of the DINO head -> [n, K]."""
        return self.networks.dino_head.last_layer(bottlenecks)

    @torch.no_grad()
    def patch_logits(self, bottlenecks: Tensor) -> Tensor:
        """[m, E'] of the iBOT head -> [m, K']."""
        return self.networks.ibot_head.last_layer(bottlenecks)

    def complaints(self, student: str, recipe: Pretrain) -> Iterator[str]:
        """A sentence for everything in which a student does not match this teacher.

        Args:
            student: its name, as its options have it.
            recipe: of the student.
        """
        for word, head in (("dino", self.networks.dino_head), ("ibot", self.networks.ibot_head)):
            prototypes = head.settings.prototypes
            own = getattr(recipe, word).prototypes
            if own != prototypes:
                yield (
                    f"student {student} has {own} prototypes in its {word} head and the teacher "
                    f"{self.name} has {prototypes}, of which the targets are; give "
                    f"--{student}.{word}.prototypes {prototypes}"
                )
        backbone = self.networks.backbone
        pixels = (tuple(recipe.crops.mean), tuple(recipe.crops.std))
        trained_on = backbone.statistics
        if trained_on is not None and pixels != tuple(map(tuple, trained_on)):
            mean, std = (" ".join(map(str, values)) for values in trained_on)
            yield (
                f"the teacher {self.name} was trained on pixels of another mean and deviation "
                f"than the views of student {student} have; give --crops.mean {mean} --crops.std "
                f"{std}"
            )


def _refuse_what_is_no_run(run: Path, world: World) -> None:
    """As the main process sees it: all go on, or none.

    Raises:
        ConfigError: there are no checkpoints of a run.
    """
    problem = ""
    if world.is_main and not _is_checkpoint(run) and not any(run.glob("checkpoints/step_*")):
        problem = f"there is no run with a checkpoint in {run}; give the folder of one"
        if _is_backbone(run):
            problem = f"{run} {WITHOUT_HEADS.format(run)}"
    problem = world.from_main(problem)
    if problem:
        raise ConfigError(f"teacher.run: {problem}")


def _is_checkpoint(path: Path) -> bool:
    return checkpoint.NAME.fullmatch(path.name) is not None and path.is_dir()


def _is_backbone(path: Path) -> bool:
    """Whether there are weights of a backbone, in any layout."""
    try:
        describe(path)
    except (ValueError, OSError):
        return False
    return True


def _whole(run: Path, world: World) -> Candidate:
    if _is_checkpoint(run):
        return checkpoint.whole(run, world)
    newest = checkpoint.newest_whole(run / "checkpoints", world)
    assert newest is not None  # there are checkpoints, and this raises where none is whole
    return newest


def _networks(whole: Candidate) -> Networks:
    """Of the shape of a checkpoint's teacher; its weights are still to come.

    Raises:
        ValueError: it has no heads, or what describes its backbone is damaged.
    """
    if "teacher.dino_head.last_layer.weight" not in whole.state["tensors"]:
        raise ValueError(f"{whole.path} {WITHOUT_HEADS.format(whole.path)}")
    backbone = load_model(whole.path / "teacher.safetensors").model.float()
    stated = whole.state["recipe"]
    heads = [ProjectionHead(backbone.width, _head(stated, word)) for word in ("dino", "ibot")]
    return Networks(backbone, *heads)


def _head(stated: dict[str, Any], word: str) -> HeadSettings:
    """A head's settings, of what a checkpoint says of its recipe."""
    names = [item.name for item in fields(HeadSettings)]
    return HeadSettings(**{name: stated[f"{word}.{name}"] for name in names})


def _state_in_words(whole: Candidate) -> str:
    """Which state of its run a checkpoint is: "runs/vitb after step 600 of 1000, unfinished"."""
    run = whole.path.parents[1]
    done = whole.state["step"]
    said = f"that of {run} after step {done}"
    try:
        steps = json.loads((run / "config.json").read_bytes())["resolved"]["steps"]
    except (OSError, ValueError, LookupError, TypeError):  # moved, or of nobody's concern
        return said
    return said if done == steps else f"{said} of {steps}: that run is not finished"


class Share(NamedTuple):
    """What a process trains on in a step: the same for all students of its range."""

    batch: Batch
    targets: Any  # `Targets`, or of teachers without heads their rows


@dataclass(frozen=True)
class Views:
    """What all students share of how images are shown.

    Args:
        global_count, local_count: G and L.
        patch_size: of the global crops as they are made; with their size it gives the patch grid.
        draw_masks: the masks of this process at a step, of its place among those of its range.
    """

    global_count: int
    local_count: int
    patch_size: int
    draw_masks: Callable[[int], BatchMasks]


class SharedViews:
    """The part of a step that is done once for all students, on this process; whatever the teacher.

    Args:
        exchange: between all processes.
        part: this process among those of its range.
        views: what all students see.
        precision: in which a teacher computes; bf16 also halves what travels, and nothing is lost
            by that where students compute in bf16 as well.
    """

    def __init__(
        self,
        exchange: Exchange,
        part: World,
        views: Views,
        precision: Literal["bf16", "fp32"],
    ):
        self.exchange = exchange
        self.world = exchange.world
        self.part = part
        self.views = views
        self.precision = precision

    @torch.no_grad()
    def __call__(self, loaded: Crops, step: int, temperature: float) -> Share:
        """What this process trains on, from what it loaded; all processes call it together.

        Args:
            loaded: this process's share of the images of the step, in host memory.
            step: 0-based; masks depend on it.
            temperature: of the teacher.
        """
        masks = self.views.draw_masks(step)
        there = self.world.device
        global_crops = loaded.global_crops.to(there, non_blocking=there.type != "cpu")
        local_crops = loaded.local_crops.to(there, non_blocking=there.type != "cpu")
        targets = self._targets(global_crops, masks, temperature)

        plan = self.exchange.plan
        first = loaded.positions.start - plan.loads(self.world.rank).start
        numbers = plan.trains_on(self.world.rank)
        skipped, upsampled = self._told_of(loaded)
        batch = Batch(
            self._moved("global crops", global_crops, self.views.global_count),
            self._moved("local crops", local_crops, self.views.local_count),
            None,
            *masks,
            positions=range(first + numbers.start, first + numbers.stop),
            skipped=skipped,
            upsampled=upsampled,
        )
        return Share(batch.to(there), targets)

    def _targets(self, crops: Tensor, masks: BatchMasks, temperature: float) -> Any:
        """What students are compared with on this process.

        Args:
            crops: the global crops that this process loaded.
            masks: of the images that it trains on.
        """
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        """Within, a teacher computes in its precision."""
        in_bf16 = self.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=in_bf16)

    def _moved(
        self,
        kind: Literal["global crops", "local crops", "class rows", "patch rows"],
        rows: Tensor,
        count: int,
    ) -> Tensor:
        """As `Exchange.views`, in the precision of what travels; of the type they had."""
        if not self.exchange.plan.moves:
            return rows
        return self.exchange.views(kind, self._on_the_way(rows), count).to(rows.dtype)

    def _on_the_way(self, rows: Tensor) -> Tensor:
        return rows.bfloat16() if self.precision == "bf16" and self.exchange.plan.moves else rows

    def _told_of(self, loaded: Crops) -> tuple[list[str], int]:
        """Images skipped and enlarged, as this process counts them.

        Over the processes of every range they are those of all images of the step.
        """
        if not self.exchange.plan.moves:
            return loaded.skipped, loaded.upsampled
        own = torch.tensor([len(loaded.skipped), loaded.upsampled], device=self.world.device)
        skipped, upsampled = self.world.total(own).tolist()
        names = self.world.gather_texts(loaded.skipped) if skipped else []
        return (names, upsampled) if self.part.is_main else ([], 0)


class SharedPass(SharedViews):
    """That of a teacher with heads: its assignments.

    Args:
        teacher: the same on all processes; `FrozenHeads`, or that with a cache.
        exchange, part, views, precision: see `SharedViews`.
        iterations: of the centering.
    """

    def __init__(
        self,
        teacher: HeadTeacher,
        exchange: Exchange,
        part: World,
        views: Views,
        *,
        iterations: int = 3,
        precision: Literal["bf16", "fp32"] = "fp32",
    ):
        super().__init__(exchange, part, views, precision)
        self.teacher = teacher
        self.iterations = iterations

    def _targets(self, crops: Tensor, masks: BatchMasks, temperature: float) -> Targets:
        teacher = self.teacher
        asked = self.exchange.ask(masks.masks)
        grid = patch_grid(crops, self.views.patch_size)
        with self._autocast():
            own = teacher(teacher_input(crops, grid, teacher.patch_size), asked.rows)
            balanced = self._balanced(teacher.cls_logits(own.cls), temperature, self.world)

            cls = self._moved("class rows", own.cls, self.views.global_count)
            if cls is not own.cls:
                balanced = balanced.of_rows(teacher.cls_logits(cls))

            patches = self.exchange.answer(self._on_the_way(own.patches), asked)
            logits = teacher.patch_logits(patches)
        return Targets(balanced, self._balanced(logits, temperature, self.part), None)

    def _balanced(self, logits: Tensor, temperature: float, among: World) -> Assignment:
        group = ALONE if among.group is None else among.group
        return sinkhorn(logits, temperature, iterations=self.iterations, group=group)


def as_seen_by(batch: Batch, crops: CropSettings, seed: int, step: int) -> Batch:
    """A batch with its crops in the sizes in which a student sees them.

    The patch grid stays, and masks and targets with it.

    Args:
        crops: of the student; where there are several sizes, the step chooses as in `BatchLoader`.
        seed: of the run.
    """
    sizes = crops.of_each_size[size_at(seed, step, crops.shares)]
    return replace(
        batch,
        global_crops=at_size(batch.global_crops, pair(sizes.global_size)),
        local_crops=at_size(batch.local_crops, pair(sizes.local_size)),
    )
