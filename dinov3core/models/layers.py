"""The parts of a ViT block: norms, LayerScale, feed-forward networks, attention.

Shapes: T packed tokens (all images of all crop sets, one after the other), D width, H heads, d head
width. State-dict keys are the official ones (`qkv.bias_mask`, `ls1.gamma`, `mlp.w1`, ...).
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.bounds import Bounds, Count, Width
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.ops.rope_attention import packed_attention


@dataclass(frozen=True)
class BlockSettings:
    """What a transformer block is made of."""

    width: Width = 384
    """Channels of a token, a multiple of 4 times the heads."""
    heads: Count = 6
    """Attention heads."""
    ffn: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = "mlp"
    """The feed-forward layer; the number is what its inner width is rounded up to."""
    ffn_ratio: Annotated[float, Bounds(1e-3, 64)] = 4.0
    """Its inner width over the width; SwiGLU takes two thirds of that."""
    norm: Literal["layernorm", "layernormbf16", "rmsnorm"] = "layernormbf16"
    """LayerNorm with eps 1e-6, LayerNorm with eps 1e-5, or RMSNorm."""
    qkv_bias: bool = True
    """Bias of the projection to queries, keys and values."""
    mask_k_bias: bool = True
    """Hold its part for the keys at zero."""
    proj_bias: bool = True
    """Bias of the projection after attention."""
    ffn_bias: bool = True
    """Biases of the feed-forward layer."""
    layer_scale: Annotated[float, Bounds(0, 100)] = 1e-5
    """Initial value of LayerScale; 0: no LayerScale."""
    drop_path: Annotated[float, Bounds(0, 1, open_high=True)] = 0.0
    """Share of a batch that skips each residual branch in training."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale and no bias; its statistics are always float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def make_norm(kind: str, width: int) -> nn.Module:
    """The norm of that name: `layernorm` has eps 1e-6, `layernormbf16` and `rmsnorm` 1e-5.

    `layernormbf16` is the official name of the second eps; it forces no number type.
    """
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=1e-6)
    if kind == "layernormbf16":
        return nn.LayerNorm(width, eps=1e-5)
    if kind == "rmsnorm":
        return RMSNorm(width, eps=1e-5)
    raise ValueError(f"norm: expected 'layernorm', 'layernormbf16' or 'rmsnorm', got {kind!r}")


class LayerScale(nn.Module):
    """A learned scale per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def make_layer_scale(width: int, init: float) -> nn.Module:
    """A LayerScale that starts at `init`, or nothing for 0."""
    return LayerScale(width, init) if init else nn.Identity()


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x): w1 is the gate, w2 the value (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=bias)
        self.w2 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


SWIGLU_ALIGN = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def make_ffn(kind: str, width: int, ratio: float, bias: bool) -> nn.Module:
    """The feed-forward network of that name.

    `mlp` has int(width * ratio) inner channels; `swiglu` and `swiglu32` to `swiglu128` have two
    thirds of that, rounded up to a multiple of 8, 32, 64 or 128.
    """
    hidden = int(width * ratio)
    if kind == "mlp":
        return Mlp(width, hidden, bias)
    if kind in SWIGLU_ALIGN:
        align = SWIGLU_ALIGN[kind]
        multiples = math.ceil(int(hidden * 2 / 3) / align)
        return SwiGLU(width, multiples * align, bias)
    raise ValueError(f"ffn: expected 'mlp' or one of {sorted(SWIGLU_ALIGN)}, got {kind!r}")


class MaskedBiasLinear(nn.Linear):
    """The qkv projection with its bias multiplied by `bias_mask`.

    With the third of the keys at 0, that part of the bias never learns. Without rotation a key bias
    shifts all scores of a query alike and softmax cancels it: a direction that only drifts. With
    rotary positions the shift depends on the distance; the released models mask it all the same.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=True)
        not_yet = torch.full((out_features,), float("nan"))  # until initialised or loaded
        self.register_buffer("bias_mask", not_yet)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    """Self-attention with rotary positions on the patch tokens; no mask, no dropout."""

    def __init__(self, settings: BlockSettings):
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        if settings.qkv_bias and settings.mask_k_bias:
            self.qkv: nn.Linear = MaskedBiasLinear(width, 3 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=settings.qkv_bias)
        self.proj = nn.Linear(width, width, bias=settings.proj_bias)

    def forward(self, x_TD: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """Attention within every image of the packed crop sets.

        Args:
            packing: the crop sets that the T tokens are.
            rows: int64 [n]: project these tokens alone, [n, D].
        """
        T, D = x_TD.shape
        qkv = self.qkv(x_TD).view(T, 3, self.heads, D // self.heads)
        out = self.attend(qkv, packing).reshape(T, D)
        return self.proj(out if rows is None else out.index_select(0, rows))

    def attend(self, qkv_T3Hd: Tensor, packing: Packing) -> Tensor:
        """Rotation and attention alone, [T, H, d]."""
        return packed_attention(qkv_T3Hd, packing)


def subset_size(images: int, rate: float) -> int:
    """How many of `images` samples a branch works on under stochastic depth; at least one.

    The product is truncated, as published.
    """
    return max(int(images * (1 - rate)), 1)


def draw_subset(images: int, rate: float, device: torch.device) -> Tensor:
    """The samples one branch works on: the head of a random permutation, int64 [subset_size]."""
    return torch.randperm(images, device=device)[: subset_size(images, rate)]


class Subset(NamedTuple):
    """The samples of every crop set that one branch works on."""

    rows: Tensor  # int64 [S], their tokens among the T packed ones
    packing: Packing  # the crop sets they form
    scale: Tensor  # [S, 1], images over samples of the crop set of each row

    def spread(self, x_TD: Tensor) -> Tensor:
        """[T, 1]: the scale of every row, 0 for tokens of the other samples."""
        return x_TD.new_zeros(len(x_TD), 1).index_copy(0, self.rows, self.scale)


class Block(nn.Module):
    """Pre-norm transformer block over packed crop sets.

    Linear layers, norms and the feed-forward network run once on the packed tokens; attention runs
    per image. In training with `drop_path` > 0 each branch works on a random subset of the images
    of each crop set, and its output is scaled by images / subset (batch-subset stochastic depth):
    the dropped rows cost nothing.
    """

    def __init__(self, settings: BlockSettings):
        super().__init__()
        width = settings.width
        self.drop_path = settings.drop_path
        self.norm1 = make_norm(settings.norm, width)
        self.attn = Attention(settings)
        self.ls1 = make_layer_scale(width, settings.layer_scale)
        self.norm2 = make_norm(settings.norm, width)
        self.mlp = make_ffn(settings.ffn, width, settings.ffn_ratio, settings.ffn_bias)
        self.ls2 = make_layer_scale(width, settings.layer_scale)

    def forward(self, x_TD: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """The tokens after the block.

        Args:
            packing: the crop sets that the T tokens are.
            rows: int64 [n]: return these tokens alone, [n, D]; the others serve as keys and values.
        """
        if not (self.training and self.drop_path > 0):
            branch = self.ls1(self.attn(self.norm1(x_TD), packing, rows))
            x_TD = (x_TD if rows is None else x_TD.index_select(0, rows)) + branch
            return x_TD + self.ls2(self.mlp(self.norm2(x_TD)))
        if rows is not None:
            return self._chosen_of_subsets(x_TD, packing, rows)

        subset = self._draw(packing, x_TD)
        x_SD = self.norm1(x_TD.index_select(0, subset.rows))
        branch = self.ls1(self.attn(x_SD, subset.packing))
        x_TD = x_TD.index_add(0, subset.rows, (branch * subset.scale).to(x_TD.dtype))

        subset = self._draw(packing, x_TD)
        branch = self.ls2(self.mlp(self.norm2(x_TD.index_select(0, subset.rows))))
        return x_TD.index_add(0, subset.rows, (branch * subset.scale).to(x_TD.dtype))

    def _chosen_of_subsets(self, x_TD: Tensor, packing: Packing, rows: Tensor) -> Tensor:
        """`forward` under stochastic depth for chosen tokens.

        Those outside the subset get their branch times zero: which they are is data, and leaving
        them out would wait for the device.
        """
        subset = self._draw(packing, x_TD)
        # where each packed token stands among those of the subset; 0 for tokens outside it
        place = subset.rows.new_zeros(len(x_TD)).index_copy(
            0, subset.rows, torch.arange(len(subset.rows), device=x_TD.device)
        )
        x_SD = self.norm1(x_TD.index_select(0, subset.rows))
        branch = self.ls1(self.attn(x_SD, subset.packing, place[rows]))
        scaled = branch * subset.spread(x_TD)[rows]
        x_nD = x_TD.index_select(0, rows) + scaled.to(x_TD.dtype)

        subset = self._draw(packing, x_TD)
        branch = self.ls2(self.mlp(self.norm2(x_nD)))
        return x_nD + (branch * subset.spread(x_TD)[rows]).to(x_TD.dtype)

    def _draw(self, packing: Packing, x_TD: Tensor) -> Subset:
        """A subset of the samples of every crop set."""
        rows: list[Tensor] = []
        groups: list[PackedGroup] = []
        scales: list[Tensor] = []
        start = 0  # of the crop set among the packed tokens
        for group in packing.groups:
            images = group.images
            length = group.length
            samples = draw_subset(images, self.drop_path, x_TD.device)
            within = torch.arange(length, device=x_TD.device)
            rows.append((start + samples[:, None] * length + within).flatten())
            groups.append(group._replace(images=len(samples)))
            scales.append(x_TD.new_full((len(samples) * length, 1), images / len(samples)))
            start += images * length
        subset = replace(packing, groups=tuple(groups))
        return Subset(torch.cat(rows), subset, torch.cat(scales))
