"""The spreading term (Sablayrolles et al. 2019): maximise the distance to the nearest neighbour
within a crop.
"""

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
    """KoLeo of each global crop on its own, [C]; the two views of an image must not repel each
    other.

    Args:
        cls_CBD: pre-head CLS tokens, one slice per global crop.
        topk, group, group_size: see `koleo_loss`; group None looks at this process only.
    """
    return torch.stack(
        [koleo_loss(cls_BD, topk=topk, group=group, group_size=group_size) for cls_BD in cls_CBD]
    )
