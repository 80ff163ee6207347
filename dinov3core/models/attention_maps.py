"""Attention maps of chosen queries, recomputed on demand: the fused op never forms the full matrix.

Shapes: B images, Q queries, H heads, R registers, h x w patches, N = 1 + R + h * w tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dinov3core.models.layers import Block
from dinov3core.models.outputs import Fit, chosen_layers, fit_to_patches
from dinov3core.models.vit import VisionTransformer
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.ops.reference import rope_rotate

Query = str | int | tuple[int, int]


class AttentionMaps(NamedTuple):
    """Softmax weights of Q queries; prefix and patches together sum to one."""

    prefix: Tensor  # [B, Q, H, 1 + R]: CLS, then the registers
    patches: Tensor  # [B, Q, H, h, w]


@torch.no_grad()
def attention_maps(
    model: VisionTransformer,
    images: Tensor,
    *,
    layer: int = -1,
    queries: Sequence[Query] = ("cls",),
    fit: Fit = "crop",
) -> AttentionMaps:
    """Where the given tokens look in one block, rotary positions and registers included.

    Args:
        images: [B, C, H, W].
        layer: block index, negative ones from the end.
        queries: "cls", a patch (row, column) of the grid, or a token index (0: CLS, 1 ... R:
            registers).
        fit: what happens to sides off the patch grid; see `fit_to_patches`.

    Raises:
        ValueError: for a layer or query that does not exist.
    """
    (index,) = chosen_layers([layer + model.depth if layer < 0 else layer], model.depth)
    x_BND, grid = model.embed(fit_to_patches(images, model.patch_size, fit))
    B, N, D = x_BND.shape
    rows = [_row(query, grid, model.prefix_tokens) for query in queries]
    sin, cos = model.rope_embed(*grid)
    packing = Packing((PackedGroup(B, N, sin, cos),), model.prefix_tokens, interleaved=False)
    x_TD = x_BND.flatten(0, 1)
    for block in model.blocks[:index]:
        x_TD = block(x_TD, packing)
    block = cast(Block, model.blocks[index])
    qkv = block.attn.qkv(block.norm1(x_TD)).view(B, N, 3, model.heads, D // model.heads)
    q, k = (rope_rotate(qkv[:, :, i], sin, cos, model.prefix_tokens) for i in range(2))
    scores = torch.einsum("bqhd,bnhd->bqhn", q[:, rows], k) / (D // model.heads) ** 0.5
    weights = scores.softmax(-1)
    prefix = weights[..., : model.prefix_tokens]
    patches = torch.unflatten(weights[..., model.prefix_tokens :], -1, grid)
    return AttentionMaps(prefix, patches)


def _row(query: Query, grid: tuple[int, int], prefix_tokens: int) -> int:
    """The token index of a query."""
    if query == "cls":
        return 0
    if isinstance(query, int) and 0 <= query < prefix_tokens + grid[0] * grid[1]:
        return query
    if (
        isinstance(query, tuple)
        and len(query) == 2
        and all(0 <= i < n for i, n in zip(query, grid, strict=True))
    ):
        return prefix_tokens + query[0] * grid[1] + query[1]
    raise ValueError(
        f"queries: expected 'cls', (row, column) within {grid[0]} x {grid[1]} patches or a token "
        f"index below {prefix_tokens + grid[0] * grid[1]}, got {query!r}"
    )
