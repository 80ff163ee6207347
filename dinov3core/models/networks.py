"""What is trained: a backbone with the heads of DINO and iBOT, and what the losses need of a pass.

Shapes: B images, G global and L local crops of each, P patches of a global crop, M masked patches,
D width, K and K' prototypes of the two heads. Rows are crop-major: crop c of image i is row
c * B + i.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.models.head import ProjectionHead
from dinov3core.models.interface import FeatureModule


class NetworkOutput(NamedTuple):
    """What the losses need of a pass, of the student or of the teacher."""

    cls: Tensor  # [G * B, D] of the global crops, before the head
    cls_logits: Tensor  # [(G + L) * B, K], global crops first
    patch_logits: Tensor  # [M, K'] at the masked positions
    patches: Tensor | None  # [G * B, P, D] after the final norm, when asked for


class Networks(nn.Module):
    """A backbone with its two heads: the student, and the shape of its EMA teacher."""

    def __init__(
        self, backbone: FeatureModule, dino_head: ProjectionHead, ibot_head: ProjectionHead
    ):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def forward(
        self,
        global_crops: Tensor,
        mask_indices: Tensor,
        *,
        masks: Tensor | None = None,
        local_crops: Tensor | None = None,
        all_patches: bool = False,
    ) -> NetworkOutput:
        """One pass; local crops go beside the global ones through the same linear layers.

        Args:
            global_crops: [G * B, C, H, W].
            mask_indices: int64 [M], flat positions among all patches of the global crops, at which
                the iBOT head is applied.
            masks: bool [G * B, P], patches hidden from this network; None: it sees all.
            local_crops: [L * B, C, h, w]; None or none: no local crops.
            all_patches: also give every patch of the global crops, which the Gram term reads.
        """
        crop_sets = [global_crops]
        masks_of = [masks]
        if local_crops is not None and len(local_crops):
            crop_sets.append(local_crops)
            masks_of.append(None)
        rows = None if all_patches else mask_indices
        chosen = self.backbone.forward_chosen(crop_sets, masks_of, rows)

        masked = chosen.patches
        patches = None
        if all_patches:
            masked = chosen.patches.index_select(0, mask_indices)
            patches = torch.unflatten(chosen.patches, 0, (len(global_crops), -1))

        return NetworkOutput(
            chosen.cls[0],
            self.dino_head(torch.cat(chosen.cls)),
            self.ibot_head(masked),
            patches,
        )
