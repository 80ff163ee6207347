"""The objective of a step: teacher targets of the whole batch, then weighted terms.

Shapes: B images of this process, G global and L local crops, M masked patches, D width, K
prototypes. Rows are crop-major: row of (crop c, image i) is c * B + i.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dinov3core.data.batch import Batch
from dinov3core.losses import (
    CropPairs,
    compared_rows,
    dino_losses,
    gram_anchor_loss,
    ibot_loss,
    koleo_per_crop,
    resize_patches,
)
from dinov3core.models.networks import NetworkOutput, Networks
from dinov3core.ops import sinkhorn
from dinov3core.ops.sinkhorn import Assignment
from dinov3core.train.engine.accumulation import (
    MicroBatch,
    WholeKoleo,
    in_batch_order,
    masked_in_batch_order,
)
from dinov3core.train.engine.config import GramAnchor


class Targets(NamedTuple):
    """What the student is compared with; rows span the whole batch of this process."""

    cls: Assignment  # over G * B rows
    patches: Assignment  # over M rows
    gram: Tensor | None  # teacher patches [G * B, P, D'] on the student's grid


@dataclass(frozen=True)
class StepWeights:
    """The loss weights at one step."""

    dino: float = 1.0
    local: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    gram: float = 0.0


@dataclass(frozen=True)
class Objective:
    """DINO + iBOT + KoLeo + Gram as weighted in the published recipe.

    total = dino * (a_g * global + a_l * local_weight * local) + ibot * ibot + koleo * sum(koleo) +
    gram * gram with a_g and a_l the shares of global and local pairs, 1/9 and 8/9 for 2 global and
    8 local crops.

    Args:
        global_crops, local_crops: G and L.
        student_temperature: of the student's softmax.
        sinkhorn_iterations: of the teacher's centering.
        skip_same_crop: leave out the pairs of a global crop with itself.
        koleo_topk, koleo_group_size: see `koleo_loss`; `koleo_group` None keeps KoLeo within this
            process.
        koleo_group, sinkhorn_group: process groups of the two batch statistics; of the second one,
            what `sinkhorn` takes.
        gram: how the Gram term compares patches; None: there is none.
    """

    global_crops: int = 2
    local_crops: int = 8
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    skip_same_crop: bool = True
    koleo_topk: int = 1
    koleo_group_size: int | None = None
    koleo_group: ProcessGroup | None = None
    sinkhorn_group: ProcessGroup | str | None = None
    gram: GramAnchor | None = None

    @torch.no_grad()
    def targets(
        self,
        teacher: Networks,
        parts: Sequence[MicroBatch],
        temperature: float,
        gram_teacher: nn.Module | None = None,
    ) -> Targets:
        """Teacher pass over every micro-batch, then one Sinkhorn per head over the whole batch.

        Sinkhorn also runs over all processes of `sinkhorn_group`.

        Args:
            teacher: sees the global crops unmasked.
            parts: the whole batch.
            temperature: of the teacher.
            gram_teacher: a backbone of its own for the Gram term; None uses the teacher's patches.
        """
        all_patches = self.gram is not None and gram_teacher is None
        outputs = [
            teacher(part.batch.global_crops, part.batch.mask_indices, all_patches=all_patches)
            for part in parts
        ]
        cls_logits = in_batch_order([output.cls_logits for output in outputs], parts)
        patch_logits = masked_in_batch_order([output.patch_logits for output in outputs], parts)

        gram = None
        if self.gram is not None:
            patches = [output.patches for output in outputs]
            if gram_teacher is not None:
                patches = [
                    anchor_patches(self.gram, gram_teacher, part.batch, teacher.backbone)
                    for part in parts
                ]
            gram = in_batch_order(patches, parts)

        return Targets(
            self._assigned(cls_logits, temperature),
            self._assigned(patch_logits, temperature),
            gram,
        )

    def _assigned(self, logits: Tensor, temperature: float) -> Assignment:
        return sinkhorn(
            logits, temperature, iterations=self.sinkhorn_iterations, group=self.sinkhorn_group
        )

    def koleo(self, cls: Tensor) -> Tensor:
        """KoLeo of each global crop, [G], on the CLS tokens [G * B, D] of the whole batch."""
        return koleo_per_crop(
            cls.unflatten(0, (self.global_crops, -1)),
            topk=self.koleo_topk,
            group=self.koleo_group,
            group_size=self.koleo_group_size,
        )

    @property
    def pairs(self) -> tuple[CropPairs, CropPairs]:
        """What the CLS term compares with the teacher's crops: the global crops, the local ones."""
        return (
            CropPairs(self.global_crops, self.global_crops, self.skip_same_crop),
            CropPairs(self.local_crops, self.global_crops),
        )

    def pair_shares(self) -> tuple[float, float]:
        """(a_g, a_l): the shares of global and local pairs among all compared pairs."""
        of_global, of_local = (pairs.per_image for pairs in self.pairs)
        return of_global / (of_global + of_local), of_local / (of_global + of_local)

    def terms(
        self,
        output: NetworkOutput,
        targets: Targets,
        part: MicroBatch,
        koleo: WholeKoleo | None = None,
    ) -> dict[str, Tensor]:
        """The terms of a micro-batch: DINO (global and local), iBOT, Gram if asked for, KoLeo.

        Over all micro-batches each of them adds up to that of the batch; KoLeo as `WholeKoleo`
        says.

        Args:
            output: the student's pass over `part`.
            targets: of the whole batch.
            koleo: of the whole batch; None: `part` is the whole batch.
        """
        dino_global, dino_local = dino_losses(
            output.cls_logits,
            targets.cls,
            self.pairs,
            part.places,
            part.whole,
            temperature=self.student_temperature,
        )
        ibot = ibot_loss(
            output.patch_logits,
            targets.patches,
            part.batch.mask_weights,
            self.global_crops * part.whole,
            temperature=self.student_temperature,
            target_rows=part.masked_rows,
        )
        terms = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot}
        if self.gram is not None:
            terms["gram"] = self._gram_term(self.gram, output, targets, part)
        terms["koleo"] = self.koleo(output.cls) if koleo is None else koleo.term(output.cls, part)
        return terms

    def _gram_term(
        self, gram: GramAnchor, output: NetworkOutput, targets: Targets, part: MicroBatch
    ) -> Tensor:
        is_whole = len(part.places) == part.whole
        anchor = targets.gram if is_whole else targets.gram[part.rows()]
        loss = anchor_loss(gram, output.patches, anchor, part.batch)
        return loss * (len(part.places) / part.whole)

    def total(self, terms: Mapping[str, Tensor], weights: StepWeights) -> Tensor:
        """The weighted sum of `terms`."""
        share_global, share_local = self.pair_shares()
        total = weights.dino * (
            share_global * terms["dino_global"] + share_local * weights.local * terms["dino_local"]
        )
        total = total + weights.ibot * terms["ibot"]
        total = total + weights.koleo * terms["koleo"].sum()
        if "gram" in terms:
            total = total + weights.gram * terms["gram"]
        return total


def anchor_patches(
    gram: GramAnchor, gram_teacher: nn.Module, batch: Batch, backbone: nn.Module
) -> Tensor:
    """Patches [G * B, P, D] of a Gram teacher of its own, on the student's grid.

    Args:
        backbone: of the student's shape.

    Raises:
        ValueError: the two grids differ, and so do the widths.
    """
    images = batch.global_crops if batch.gram_crops is None else batch.gram_crops
    grid = _grid(images, gram_teacher.patch_size)
    to_grid = _grid(batch.global_crops, backbone.patch_size)
    if grid != to_grid and gram_teacher.width != backbone.width:
        raise ValueError(
            f"a Gram teacher on another patch grid ({grid[0]} x {grid[1]} for {to_grid[0]} x "
            f"{to_grid[1]}) must be of the student's width {backbone.width}, got "
            f"{gram_teacher.width}"
        )
    patches = gram_teacher.forward_features(images).patches
    return resize_patches(patches, grid, to_grid, mode=gram.resize, antialias=gram.antialias)


def anchor_loss(gram: GramAnchor, student: Tensor, anchor: Tensor, batch: Batch) -> Tensor:
    """The Gram term of a batch.

    Args:
        student, anchor: patches [G * B, P, D] after the final norm, on the student's grid.
    """
    return gram_anchor_loss(
        student,
        anchor,
        compared_rows(gram.tokens, batch.masks, batch.mask_indices),
        normalize=gram.normalize,
        per_image=gram.per_image,
        negatives=gram.negatives,
    )


def _grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """(height, width) in patches."""
    return images.shape[-2] // patch_size, images.shape[-1] // patch_size
