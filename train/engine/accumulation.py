"""Gradient accumulation: a batch in micro-batches whose gradients add up to the batch's.

Most terms are sums over images. Two are statistics of the whole batch and are held together here:

* the teacher's targets: `in_batch_order` and `masked_in_batch_order` lay the teacher's rows of all
  micro-batches one beside the other, so that one Sinkhorn runs over all of them;
* KoLeo: `WholeKoleo` is differentiated with respect to the CLS tokens of all micro-batches before
  any of them is back-propagated (the gradient cache of Gao et al. 2021).

Shapes: B images of the batch and b of a micro-batch on this process, G global and L local crops, P
patches, M masked patches of the batch and m of a micro-batch, D width. Rows are crop-major: crop c
of image i is row c * B + i of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3core.data.batch import Batch


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some images of a batch with all their crops, and where they stand in the batch."""

    batch: Batch  # of these images alone
    index: int  # among the micro-batches
    whole: int  # B
    places: Tensor  # int64 [b], of these images in the batch
    masked_rows: Tensor  # int64 [m], of their masked patches in the batch's list

    def rows(self) -> Tensor:
        """int64 [G * b]: the rows of these global crops in the batch."""
        crops = torch.arange(self.batch.global_count, device=self.places.device)
        return (crops[:, None] * self.whole + self.places).flatten()


def micro_batches(batch: Batch, parts: int, device: torch.device) -> list[MicroBatch]:
    """Cut a batch into `parts` of equally many images, on the training device.

    Args:
        batch: in host memory, as the loader makes it, or on the device.

    Raises:
        ValueError: when the images do not divide.
    """
    whole = batch.images
    if whole % parts:
        raise ValueError(
            f"accumulation: {whole} images per process do not divide into {parts} micro-batches"
        )

    there = batch.to(device)
    places = torch.arange(whole, device=device)
    if parts == 1:
        masked_rows = torch.arange(len(batch.mask_indices), device=device)
        return [MicroBatch(there, 0, whole, places, masked_rows)]
    shares = zip(places.chunk(parts), _masked_patches(batch, parts), strict=True)
    return [_cut(there, index, of_part, *masked) for index, (of_part, masked) in enumerate(shares)]


def _cut(whole: Batch, index: int, places: Tensor, rows: Tensor, indices: Tensor) -> MicroBatch:
    """The micro-batch of that number.

    Args:
        whole: the batch, on the training device.
        places: int64 [b], of its images in the batch, one after the other.
        rows, indices: of its masked patches, in host memory: see `_masked_patches`.
    """
    rows, indices = (x.to(places.device, non_blocking=True) for x in (rows, indices))
    share = len(places)

    def of_these(crops: Tensor) -> Tensor:
        """Of crops [n * B, ...] of all images, those of these: [n * b, ...]."""
        per_image = len(crops) // whole.images
        return crops.unflatten(0, (per_image, whole.images))[:, places].flatten(0, 1)

    part = Batch(
        of_these(whole.global_crops),
        of_these(whole.local_crops),
        None if whole.gram_crops is None else of_these(whole.gram_crops),
        of_these(whole.masks),
        indices,
        whole.mask_weights[rows],
        positions=whole.positions[index * share : (index + 1) * share],
    )
    return MicroBatch(part, index, whole.images, places, rows)


def _masked_patches(batch: Batch, parts: int) -> list[tuple[Tensor, Tensor]]:
    """Of every micro-batch, in host memory: its rows [m] of the batch's list, and its own indices.

    How many there are decides the shape of what follows. The host knows it from a batch of the
    loader; asked of a GPU, it would wait until the GPU has caught up.
    """
    flat = batch.mask_indices.cpu()
    patches = batch.masks.shape[1]
    share = batch.images // parts
    # flat = (crop * B + image) * P + patch; micro-batch i holds images i * b to (i + 1) * b
    crop = flat // (batch.images * patches)
    image = flat // patches % batch.images
    indices = (crop * share + image % share) * patches + flat % patches
    owner = image // share
    rows_of = [torch.nonzero(owner == part).squeeze(1) for part in range(parts)]
    return [(rows, indices[rows]) for rows in rows_of]


def in_batch_order(rows_of: Sequence[Tensor], parts: Sequence[MicroBatch]) -> Tensor:
    """Rows of the global crops of every micro-batch, [G * b, ...], as those of the batch."""
    if len(parts) == 1:
        return rows_of[0]
    crops = parts[0].batch.global_count
    return torch.cat([rows.unflatten(0, (crops, -1)) for rows in rows_of], dim=1).flatten(0, 1)


def masked_in_batch_order(rows_of: Sequence[Tensor], parts: Sequence[MicroBatch]) -> Tensor:
    """Rows of the masked patches of every micro-batch, [m, ...], as those of the batch."""
    if len(parts) == 1:
        return rows_of[0]
    places = torch.cat([part.masked_rows for part in parts])
    return torch.cat(list(rows_of))[places.argsort()]


@dataclass(frozen=True, eq=False)
class WholeKoleo:
    """KoLeo of a batch that is back-propagated in parts: their gradients add up to its gradient."""

    value: Tensor  # [G], as `Objective.koleo`
    dcls: Tensor  # [G * B, D], its gradient with respect to the CLS tokens

    @classmethod
    def of(cls, tokens: Tensor, koleo: Callable[[Tensor], Tensor]) -> "WholeKoleo":
        """The value and the gradient of `koleo` at the CLS tokens [G * B, D] of a batch."""
        tokens = tokens.detach().requires_grad_()
        value = koleo(tokens)
        (dcls,) = torch.autograd.grad(value.sum(), tokens)
        return cls(value.detach(), dcls)

    def term(self, tokens: Tensor, part: MicroBatch) -> Tensor:
        """A scalar with the gradient of the batch's KoLeo, as far as it concerns a micro-batch.

        Its value means nothing; `value` is what there is to report.

        Args:
            tokens: CLS tokens [G * b, D] of `part`.
        """
        return (tokens.float() * self.dcls[part.rows()]).sum()
