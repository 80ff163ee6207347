"""The spreading term (KoLeo, Sablayrolles et al. 2019): push each CLS token off its neighbours."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dinov3core.ops import koleo_loss


def koleo_per_crop(
    cls_CBD: Tensor,
    *,
    topk: int = 1,
    group: ProcessGroup | None = None,
    group_size: int | None = None,
) -> Tensor:
    """KoLeo among the images of each global crop, [C].

    Crops are kept apart because two views of one image must not repel each other.

    Args:
        cls_CBD: CLS tokens before the head: C global crops, B images, D channels.
        topk, group_size: see `koleo_loss`.
        group: processes among whose images neighbours are sought; None: this process alone.
    """
    return torch.stack(
        [koleo_loss(cls_BD, topk=topk, group=group, group_size=group_size) for cls_BD in cls_CBD]
    )
