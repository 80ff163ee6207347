"""One step's objective: teacher targets of the whole batch, then the weighted terms of a batch or a
micro-batch.

Shapes: B images of this process, G global and L local crops, M masked patches, D width, K
prototypes. Rows are crop-major: row of (crop c, image b) is c * B + b.

Targets (Sinkhorn assignments) and the KoLeo term are statistics of the whole batch. With
accumulation the teacher first sees every micro-batch, so that one Sinkhorn runs over all of them,
and KoLeo is differentiated with respect to the CLS tokens of all micro-batches before any of them
is back-propagated (the gradient-cache idea of Gao et al. 2021).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dinov3core.losses import (
    CropPairs,
    dino_losses,
    gram_anchor_loss,
    ibot_loss,
    koleo_per_crop,
    resize_patches,
)
from dinov3core.ops import sinkhorn
from dinov3core.ops.sinkhorn import Assignment


class Crops(NamedTuple):
    """The tensors of a batch, or of a micro-batch of it, on the training device."""

    global_crops: Tensor  # [G * B, C, H, W]
    local_crops: Tensor  # [L * B, C, h, w]
    gram_crops: Tensor | None  # [G * B, C, H', W'] for a Gram teacher of its own
    masks: Tensor  # bool [G * B, P]
    mask_indices: Tensor  # int64 [M], flat and ascending
    mask_weights: Tensor  # [M]
    host_indices: Tensor | None = None  # mask_indices in host memory, for `split` alone


class Part(NamedTuple):
    """A micro-batch: its crops, the images it holds, and where its masked patches stand in the
    whole batch's list.
    """

    crops: Crops
    images: Tensor  # int64 [b]
    masked_rows: Tensor  # int64 [m]


class StudentOutput(NamedTuple):
    """What the losses need of a student pass."""

    cls: Tensor  # [G * B, D] of the global crops, before the head
    cls_logits: Tensor  # [(G + L) * B, K], global crops first
    patch_logits: Tensor  # [M, K'] at the masked positions
    patches: Tensor | None  # [G * B, P, D] after the final norm, when asked for


class Targets(NamedTuple):
    """What the student is compared with; rows span the whole batch of this process."""

    cls: Assignment  # over G * B rows
    patches: Assignment  # over M rows
    gram: Tensor | None  # teacher patches [G * B, P, D'] on the student's grid


class Networks(nn.Module):
    """A backbone with its two heads: the student, and the shape of its EMA teacher."""

    def __init__(self, backbone: nn.Module, dino_head: nn.Module, ibot_head: nn.Module):
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    def forward(self, crops: Crops, all_patches: bool = True) -> StudentOutput:
        """The student's pass: global crops masked, local crops beside them through the same linear
        layers.

        Args:
            all_patches: also give every patch of the global crops, which the Gram term reads.
        """
        views, masks = [crops.global_crops], [crops.masks]
        if len(crops.local_crops):
            views, masks = [*views, crops.local_crops], [*masks, None]
        found = self.backbone.forward_chosen(
            views, masks, None if all_patches else crops.mask_indices
        )
        masked = found.patches.index_select(0, crops.mask_indices) if all_patches else found.patches
        patches = found.patches.unflatten(0, crops.masks.shape) if all_patches else None
        return StudentOutput(
            found.cls[0], self.dino_head(torch.cat(found.cls)), self.ibot_head(masked), patches
        )


@dataclass(frozen=True)
class GramTerm:
    """How the Gram term compares patches; see `gram_anchor_loss`."""

    tokens: str = "all"
    normalize: bool = True
    per_image: bool = True
    negatives: str = "keep"


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
        koleo_group, sinkhorn_group: process groups of the two batch statistics.
        gram: None, or how the Gram term compares patches.
    """

    global_crops: int = 2
    local_crops: int = 8
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    skip_same_crop: bool = True
    koleo_topk: int = 1
    koleo_group_size: int | None = None
    koleo_group: ProcessGroup | None = None
    sinkhorn_group: ProcessGroup | None = None
    gram: GramTerm | None = None

    @torch.no_grad()
    def targets(
        self,
        teacher: Networks,
        parts: Sequence[Part],
        temperature: float,
        gram_teacher: nn.Module | None = None,
    ) -> Targets:
        """Teacher pass over every micro-batch, then one Sinkhorn per head over the whole batch (and
        all processes).

        Args:
            teacher: sees the global crops unmasked.
            parts: the whole batch as one or more micro-batches.
            temperature: of the teacher.
            gram_teacher: a backbone of its own for the Gram term; None uses the teacher's patches.
        """
        cls_parts, patch_parts, gram_parts = [], [], []
        for part in parts:
            crops, every_patch = part.crops, self.gram is not None and gram_teacher is None
            rows = None if every_patch else crops.mask_indices
            (cls,), patches = teacher.backbone.forward_chosen([crops.global_crops], [None], rows)
            cls_parts.append(teacher.dino_head(cls))
            patch_parts.append(
                teacher.ibot_head(
                    patches.index_select(0, crops.mask_indices) if every_patch else patches
                )
            )
            if every_patch:
                gram_parts.append(patches.unflatten(0, crops.masks.shape))
            elif self.gram is not None:
                gram_parts.append(self._gram_patches(crops, teacher.backbone, gram_teacher))
        cls_logits = (
            cls_parts[0] if len(parts) == 1 else _interleave(cls_parts, parts, self.global_crops)
        )
        patch_logits = patch_parts[0]
        if len(parts) > 1:
            rows = torch.cat([part.masked_rows for part in parts])
            patch_logits = torch.cat(patch_parts)[rows.argsort()]
        assign = {"iterations": self.sinkhorn_iterations, "group": self.sinkhorn_group}
        gram = None
        if gram_parts:
            gram = (
                gram_parts[0]
                if len(parts) == 1
                else _interleave(gram_parts, parts, self.global_crops)
            )
        return Targets(
            sinkhorn(cls_logits, temperature, **assign),
            sinkhorn(patch_logits, temperature, **assign),
            gram,
        )

    @staticmethod
    def _gram_patches(crops: Crops, backbone: nn.Module, gram_teacher: nn.Module) -> Tensor:
        """Patches of a Gram teacher of its own, on the student's grid."""
        images = crops.global_crops if crops.gram_crops is None else crops.gram_crops
        found = gram_teacher.forward_features(images).patches
        return resize_patches(
            found,
            _grid(images, gram_teacher.patch_size),
            _grid(crops.global_crops, backbone.patch_size),
        )

    def koleo(self, cls: Tensor) -> Tensor:
        """KoLeo per global crop [G], on the CLS tokens [G * B, D] of the whole batch."""
        return koleo_per_crop(
            cls.unflatten(0, (self.global_crops, -1)),
            topk=self.koleo_topk,
            group=self.koleo_group,
            group_size=self.koleo_group_size,
        )

    @property
    def pairs(self) -> tuple[CropPairs, CropPairs]:
        """What the CLS term compares: global crops, then local ones, with the teacher's."""
        return (
            CropPairs(self.global_crops, self.global_crops, self.skip_same_crop),
            CropPairs(self.local_crops, self.global_crops),
        )

    def pair_shares(self) -> tuple[float, float]:
        """(a_g, a_l): the shares of global and local pairs among all compared pairs."""
        of_global, of_local = (pairs.per_image for pairs in self.pairs)
        return of_global / (of_global + of_local), of_local / (of_global + of_local)

    def terms(
        self, output: StudentOutput, targets: Targets, part: Part, batch: int
    ) -> dict[str, Tensor]:
        """DINO (global and local), iBOT and Gram of a micro-batch; over all micro-batches they add
        up to the batch's.

        Args:
            output: the student's pass over `part`.
            targets: of the whole batch.
            batch: B, the images of the whole batch on this process.
        """
        dino_global, dino_local = dino_losses(
            output.cls_logits,
            targets.cls,
            self.pairs,
            part.images,
            batch,
            temperature=self.student_temperature,
        )
        found = {
            "dino_global": dino_global,
            "dino_local": dino_local,
            "ibot": ibot_loss(
                output.patch_logits,
                targets.patches,
                part.crops.mask_weights,
                self.global_crops * batch,
                temperature=self.student_temperature,
                target_rows=part.masked_rows,
            ),
        }
        if self.gram is not None:
            found["gram"] = self._gram_term(output, targets, part, batch)
        return found

    def _gram_term(self, output: StudentOutput, targets: Targets, part: Part, batch: int) -> Tensor:
        rows = (
            torch.arange(self.global_crops, device=part.images.device)[:, None] * batch
            + part.images
        ).flatten()
        teacher = targets.gram if len(rows) == len(targets.gram) else targets.gram[rows]
        value = gram_anchor_loss(
            output.patches,
            teacher,
            masks_BP=part.crops.masks,
            tokens=self.gram.tokens,
            normalize=self.gram.normalize,
            per_image=self.gram.per_image,
            negatives=self.gram.negatives,
        )
        return value * (len(part.images) / batch)

    def total(self, terms: Mapping[str, Tensor], weights: StepWeights) -> Tensor:
        """The weighted sum; `terms` may hold "koleo" [G] or lack it."""
        share_global, share_local = self.pair_shares()
        total = weights.dino * (
            share_global * terms["dino_global"] + share_local * weights.local * terms["dino_local"]
        )
        total = total + weights.ibot * terms["ibot"]
        if "koleo" in terms:
            total = total + weights.koleo * terms["koleo"].sum()
        if "gram" in terms:
            total = total + weights.gram * terms["gram"]
        return total


def split(crops: Crops, global_crops: int, parts: int) -> list[Part]:
    """Cut the images of a batch into `parts` equal micro-batches, every crop of an image staying
    with it.

    Raises:
        ValueError: when the images do not divide.
    """
    batch = len(crops.global_crops) // global_crops
    device = crops.global_crops.device
    if parts == 1:
        everything = torch.arange(len(crops.mask_indices), device=device)
        images = torch.arange(batch, device=device)
        return [Part(crops._replace(host_indices=None), images, everything)]
    if batch % parts:
        raise ValueError(
            f"accumulation: {batch} images per process do not divide into {parts} micro-batches"
        )
    shares = torch.arange(batch, device=device).chunk(parts)
    masked = _masked_patches(crops, batch, parts)
    made = []
    for images, (rows, indices) in zip(shares, masked, strict=True):
        rows, indices = (x.to(device, non_blocking=True) for x in (rows, indices))
        made.append(
            Part(
                Crops(
                    _take(crops.global_crops, images, global_crops, batch),
                    _take(crops.local_crops, images, len(crops.local_crops) // batch, batch),
                    None
                    if crops.gram_crops is None
                    else _take(crops.gram_crops, images, global_crops, batch),
                    _take(crops.masks, images, global_crops, batch),
                    indices,
                    crops.mask_weights[rows],
                ),
                images,
                rows,
            )
        )
    return made


def _masked_patches(crops: Crops, batch: int, parts: int) -> list[tuple[Tensor, Tensor]]:
    """Of every micro-batch, in host memory: its rows of the batch's list, and its own flat indices.

    How many there are decides the shape of what follows: asked of a GPU, that would stop the host
    until it has caught up, once per micro-batch.
    """
    flat = crops.mask_indices.cpu() if crops.host_indices is None else crops.host_indices
    patches, share = crops.masks.shape[1], batch // parts
    crop, image = flat // (batch * patches), flat // patches % batch
    indices = (crop * share + image % share) * patches + flat % patches
    owner = image // share
    rows_of = [torch.nonzero(owner == part).squeeze(1) for part in range(parts)]
    return [(rows, indices[rows]) for rows in rows_of]


def _take(tensor: Tensor, images: Tensor, crops: int, batch: int) -> Tensor:
    return tensor.unflatten(0, (crops, batch))[:, images].flatten(0, 1) if crops else tensor


def _interleave(found: Sequence[Tensor], parts: Sequence[Part], crops: int) -> Tensor:
    """Rows of the micro-batches, each crop-major, as the crop-major rows of the whole batch."""
    stacked = torch.cat([f.unflatten(0, (crops, -1)) for f in found], dim=1)
    order = torch.cat([part.images for part in parts]).argsort()
    return stacked[:, order].flatten(0, 1)


def _grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    return images.shape[-2] // patch_size, images.shape[-1] // patch_size
