"""The DINOv3 vision transformer: CLS, registers and patches, RoPE, packed crop sets, official
state-dict keys.

Shapes: B images, C channels, P patches (row-major), R registers, D width, T packed tokens of all
crop sets.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov3core.image_statistics import ImageStatistics
from dinov3core.models.layers import Block, Group, LayerScale, MaskedBiasLinear, RMSNorm, make_norm
from dinov3core.models.outputs import (
    Chosen,
    Features,
    Fit,
    Tokens,
    chosen_layers,
    features_of,
    fit_to_patches,
    official_order,
)
from dinov3core.models.rope import RopeEmbedding


class PatchEmbed(nn.Module):
    """One convolution with kernel = stride = patch; surplus pixels at the bottom and right are
    dropped.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        return self.proj(images).flatten(2).mT


class VisionTransformer(nn.Module):
    """ViT of the DINOv3 family (Simeoni et al. 2025, "DINOv3", section 3).

    Args:
        width, depth, heads: the size; `width` must be a multiple of 4 * `heads`.
        patch_size, in_channels: the patch embedding; any number of channels.
        ffn: "mlp" or "swiglu", "swiglu32", "swiglu64", "swiglu128"; `ffn_ratio` is its nominal
            expansion.
        registers: number of storage tokens between CLS and patches.
        norm: "layernorm" (eps 1e-6), "layernormbf16" (eps 1e-5) or "rmsnorm".
        mask_k_bias: keep the key bias at zero through a stored mask.
        layer_scale: initial value of LayerScale, None for none.
        drop_path: rate of batch-subset stochastic depth, the same for every block.
        untie_cls_norm: a second final norm for CLS and registers.
        untie_local_cls_norm: in training, a norm of their own for CLS and registers of the second
            crop set.
        rope_*: see `RopeEmbedding`; shift, jitter and rescale act in training only, drawn per block
            and crop set.
        init_std: standard deviation of the linear layers.

    `statistics` is the normalisation the weights were trained with, None when unknown; `build` and
    loaders set it.
    """

    statistics: ImageStatistics | None = None

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 16,
        in_channels: int = 3,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        registers: int = 0,
        norm: str = "layernorm",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        mask_k_bias: bool = False,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        untie_cls_norm: bool = False,
        untie_local_cls_norm: bool = False,
        rope_base: float | None = 100.0,
        rope_min_period: float | None = None,
        rope_max_period: float | None = None,
        rope_normalize: str = "separate",
        rope_shift: float | None = None,
        rope_jitter: float | None = None,
        rope_rescale: float | None = None,
        rope_dtype: torch.dtype = torch.float32,
        init_std: float = 0.02,
    ):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(
                f"width must be a multiple of 4 * heads for 2-D RoPE, got width={width}, "
                f"heads={heads}"
            )
        self.width, self.depth, self.heads = width, depth, heads
        self.patch_size, self.in_channels = patch_size, in_channels
        self.prefix_tokens = 1 + registers
        self.init_std = init_std
        self.layer_scale = layer_scale

        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.rope_embed = RopeEmbedding(
            width // heads,
            base=rope_base,
            min_period=rope_min_period,
            max_period=rope_max_period,
            normalize=rope_normalize,
            shift=rope_shift,
            jitter=rope_jitter,
            rescale=rope_rescale,
            dtype=rope_dtype,
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                ffn=ffn,
                ffn_ratio=ffn_ratio,
                norm=norm,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                mask_k_bias=mask_k_bias,
                layer_scale=layer_scale,
                drop_path=drop_path,
            )
            for _ in range(depth)
        )
        self.norm = make_norm(norm, width)
        self.cls_norm = make_norm(norm, width) if untie_cls_norm else None
        self.local_cls_norm = make_norm(norm, width) if untie_local_cls_norm else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and buffer.

        | tensor | value |
        |---|---|
        | cls_token, storage_tokens | normal, std 0.02 |
        | mask_token | 0 |
        | linear weights | normal, std `init_std` (the official truncation at +-2 never acts at 0.02); biases 0 |
        | qkv bias_mask | 1 for q and v, 0 for k |
        | patch embedding weight and bias | uniform, +-1 / sqrt(C * patch^2) |
        | norms | weight 1, bias 0 |
        | LayerScale | `layer_scale` |
        """
        self.rope_embed.reset_periods()
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "storage_tokens"):
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.init_std, a=-2.0, b=2.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, MaskedBiasLinear):
                    module.bias_mask.fill_(1.0)
                    module.bias_mask[self.width : 2 * self.width] = 0.0
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.layer_scale)
        bound = 1 / math.sqrt(self.in_channels * self.patch_size**2)
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> the normed CLS token [B, D], the representation of an image."""
        return self.forward_features(images, masks).cls

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tokens | list[Tokens]:
        """Tokens of one crop set, or of several that share every linear layer.

        Args:
            images: [B, C, H, W], or a list of such tensors (global crops first, local crops
                second).
            masks: bool [B, P], True where the patch is replaced by the mask token; a list beside a
                list of images.
        """
        if isinstance(images, Tensor):
            return self._forward_sets([images], [masks])[0]
        return self._forward_sets(
            list(images), [None] * len(images) if masks is None else list(masks)
        )

    def forward_chosen(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patch_rows: Tensor | None = None,
    ) -> Chosen:
        """The CLS tokens of all crop sets and chosen patches of the first, as `forward_features`
        gives them.

        The last block works for these tokens alone, the others serve it as keys and values: of a
        local crop of 36 patches one token in 37 or 41 is read. Exact; a share of about 0.7 / depth
        of a training step.

        Args:
            images, masks: as for `forward_features`.
            patch_rows: int64 [n], flat indices into the B * P patches of the first crop set; None:
                all of them.
        """
        x_TD, counts, lengths, grids = self._packed(images, masks)
        starts = [
            0,
            *itertools.accumulate(n * length for n, length in zip(counts, lengths, strict=True)),
        ]
        patches = lengths[0] - self.prefix_tokens
        if patch_rows is None:
            patch_rows = torch.arange(counts[0] * patches, device=x_TD.device)
        cls_rows = [
            torch.arange(start, end, n, device=x_TD.device)
            for start, end, n in zip(starts, starts[1:], lengths)
        ]
        rows = patch_rows // patches * lengths[0] + self.prefix_tokens + patch_rows % patches
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, self._groups(counts, grids), lengths, self.prefix_tokens)
        chosen = torch.cat([*cls_rows, rows])
        x_nD = self.blocks[-1](
            x_TD, self._groups(counts, grids), lengths, self.prefix_tokens, chosen
        )
        *cls, found = x_nD.split([*counts, len(rows)])
        return Chosen(
            [self._prefix_norm(index == 1)(x) for index, x in enumerate(cls)], self.norm(found)
        )

    def _forward_sets(self, images: list[Tensor], masks: list[Tensor | None]) -> list[Tokens]:
        x_TD, counts, lengths, grids = self._packed(images, masks)
        for block in self.blocks:
            x_TD = block(x_TD, self._groups(counts, grids), lengths, self.prefix_tokens)
        parts = x_TD.split([n * length for n, length in zip(counts, lengths, strict=True)])
        prenorms = [
            p.unflatten(0, (n, length)) for p, n, length in zip(parts, counts, lengths, strict=True)
        ]
        return [self._normed(x, local=index == 1) for index, x in enumerate(prenorms)]

    def _packed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[int], list[int], tuple[tuple[int, int], ...]]:
        """Embedded tokens of all crop sets [T, D], and per set its images, sequence length and
        patch grid.
        """
        sequences, grids = zip(
            *(self.embed(x, mask) for x, mask in zip(images, masks, strict=True)), strict=True
        )
        x_TD = (
            torch.cat([s.flatten(0, 1) for s in sequences])
            if len(sequences) > 1
            else sequences[0].flatten(0, 1)
        )
        return x_TD, [len(s) for s in sequences], [s.shape[1] for s in sequences], grids

    def _groups(self, counts: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[Group]:
        """RoPE tables of every crop set; under augmentation a call is a new draw, so each block
        calls again.
        """
        return [(count, *self.rope_embed(*grid)) for count, grid in zip(counts, grids, strict=True)]

    def embed(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Images to the token sequence [CLS, registers, patches] and the patch grid."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images: expected [B, {self.in_channels}, H, W], got {list(images.shape)}; "
                "build the model with in_channels=C for other channel counts"
            )
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if 0 in grid:
            raise ValueError(
                f"images: {images.shape[2]} x {images.shape[3]} px hold no {self.patch_size}-px "
                "patch; give larger ones"
            )
        patches = self.patch_embed(images)
        cls_token = self.cls_token
        if masks is None:
            cls_token = (
                cls_token + 0 * self.mask_token
            )  # keeps mask_token in the graph, with a zero gradient
        else:
            if masks.shape != patches.shape[:2]:
                raise ValueError(
                    f"masks: expected bool {list(patches.shape[:2])}, got {list(masks.shape)}"
                )
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = (
            [cls_token, self.storage_tokens] if hasattr(self, "storage_tokens") else [cls_token]
        )
        return torch.cat(
            [t.expand(images.shape[0], -1, -1) for t in prefix] + [patches], dim=1
        ), grid

    def _normed(self, x_BND: Tensor, local: bool = False) -> Tokens:
        """Final norms: one for all tokens unless untied."""
        prefix_norm = self._prefix_norm(local)
        if prefix_norm is self.norm:
            normed = self.norm(x_BND)
            prefix, patches = normed[:, : self.prefix_tokens], normed[:, self.prefix_tokens :]
        else:
            prefix = prefix_norm(x_BND[:, : self.prefix_tokens])
            patches = self.norm(x_BND[:, self.prefix_tokens :])
        return Tokens(prefix[:, 0], prefix[:, 1:], patches, x_BND)

    def _prefix_norm(self, local: bool) -> nn.Module:
        """Of CLS and registers; the local one acts in training on the second crop set only."""
        if self.local_cls_norm is not None and self.training and local:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm

    def features(
        self,
        images: Tensor,
        *,
        layers: int | Sequence[int] = 1,
        norm: bool = True,
        reshape: bool = True,
        fit: Fit = "crop",
    ) -> Features | tuple[Features, ...]:
        """Features of the last `layers` blocks, or of the blocks with the given indices, in
        ascending depth.

        Args:
            images: [B, C, H, W].
            layers: 1 gives one `Features`; any other number or a sequence gives a tuple of them.
            norm: apply the final norm to every returned layer (what the published evaluations use).
            reshape: patches as a map [B, D, H/p, W/p], contiguous; otherwise [B, P, D].
            fit: what happens to sides off the patch grid; see `fit_to_patches`.
        """
        indices = chosen_layers(layers, self.depth)
        x_BND, grid = self.embed(fit_to_patches(images, self.patch_size, fit))
        B, N = x_BND.shape[:2]
        x_TD, found = x_BND.flatten(0, 1), []
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            x_TD = block(x_TD, self._groups([B], [grid]), [N], self.prefix_tokens)
            if index in indices:
                cls, registers, patches = self._split(x_TD.unflatten(0, (B, N)), norm)
                found.append(features_of(cls, registers, patches, grid, reshape))
        return found[0] if layers == 1 else tuple(found)

    def _split(self, x_BND: Tensor, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        if norm:
            return self._normed(x_BND)[:3]
        return x_BND[:, 0], x_BND[:, 1 : self.prefix_tokens], x_BND[:, self.prefix_tokens :]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple:
        """The official call: per layer patches, or (patches, cls), (patches, registers), (patches,
        cls, registers).
        """
        found = self.features(images, layers=n, norm=norm, reshape=reshape)
        found = (found,) if isinstance(found, Features) else found
        return official_order(found, return_class_token, return_extra_tokens)
