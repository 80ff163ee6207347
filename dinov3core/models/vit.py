"""The DINOv3 vision transformer: CLS, registers and patches, RoPE, packed crop sets.

Shapes: B images, C channels, P patches (row-major), R registers, D width, T packed tokens of all
crop sets. State-dict keys are the official ones.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from dinov3core.bounds import Bounds, Count, Std
from dinov3core.models.interface import FeatureModule
from dinov3core.models.layers import (
    Block,
    BlockSettings,
    LayerScale,
    MaskedBiasLinear,
    RMSNorm,
    make_norm,
)
from dinov3core.models.outputs import ChosenTokens, Features, Tokens, features_of
from dinov3core.models.rope import RopeEmbedding, RopeSettings
from dinov3core.ops.packing import PackedGroup, Packing


@dataclass(frozen=True)
class VitSettings(BlockSettings):
    """A vision transformer: the settings of its blocks, and what it has beside them."""

    depth: Count = 12
    """Blocks."""
    patch_size: Count = 16
    """Side of a patch in pixels."""
    in_channels: Annotated[int, Bounds(1, 4096)] = 3
    """Channels of an image."""
    registers: Annotated[int, Bounds(0, 1024)] = 4
    """Register tokens between CLS and patches."""
    untie_cls_norm: bool = False
    """A final norm of their own for CLS and registers."""
    untie_local_cls_norm: bool = False
    """In training, a final norm of their own for CLS and registers of local crops."""
    init_std: Std = 0.02
    """Standard deviation of initial weights."""
    rope: RopeSettings = field(default_factory=RopeSettings)


class CropSet(NamedTuple):
    """One of the crop sets that share a pass."""

    images: int
    length: int  # tokens of each image
    grid: tuple[int, int]  # patches of each image: rows, columns

    @property
    def tokens(self) -> int:
        """How many of the packed tokens they are."""
        return self.images * self.length


class PatchEmbed(nn.Module):
    """One convolution whose kernel and stride are the patch; surplus pixels are dropped."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        return self.proj(images).flatten(2).mT


class VisionTransformer(FeatureModule):
    """ViT of the DINOv3 family (Simeoni et al. 2025, "DINOv3", section 3).

    Raises:
        ValueError: settings of which no network can be made.
    """

    graphs_of_a_size = 8  # of a block, and of the last one, which works for chosen tokens

    def __init__(self, settings: VitSettings):
        super().__init__()
        width = settings.width
        if width % (4 * settings.heads):
            raise ValueError(
                f"width must be a multiple of 4 * heads for 2-D RoPE, got width={width}, "
                f"heads={settings.heads}"
            )
        self.settings = settings
        self.width = width
        self.depth = settings.depth
        self.heads = settings.heads
        self.patch_size = settings.patch_size
        self.in_channels = settings.in_channels
        self.prefix_tokens = 1 + settings.registers

        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if settings.registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, settings.registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.patch_embed = PatchEmbed(self.patch_size, self.in_channels, width)
        self.rope_embed = RopeEmbedding(width // self.heads, settings.rope)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(self.depth))
        self.norm = make_norm(settings.norm, width)
        self.cls_norm = make_norm(settings.norm, width) if settings.untie_cls_norm else None
        self.local_cls_norm = (
            make_norm(settings.norm, width) if settings.untie_local_cls_norm else None
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and buffer.

        | tensor | value |
        |---|---|
        | cls_token, storage_tokens | normal, std 0.02 |
        | mask_token | 0 |
        | linear weights | normal, std `init_std`, cut at +-2 as published; biases 0 |
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
                nn.init.trunc_normal_(module.weight, std=self.settings.init_std, a=-2.0, b=2.0)
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
                nn.init.constant_(module.gamma, self.settings.layer_scale)
        bound = 1 / math.sqrt(self.in_channels * self.patch_size**2)
        for parameter in self.patch_embed.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward_chosen(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patch_rows: Tensor | None = None,
    ) -> ChosenTokens:
        """See `FeatureModule.forward_chosen`; the tokens are those of `forward_features`, exactly.

        The last block works for these tokens alone and reads the others as keys and values: of a
        local crop of 36 patches, one token in 37 or 41. That saves about 0.7 / depth of a training
        step.
        """
        x_TD, sets = self._packed(images, masks)
        first = sets[0]
        patches = first.length - self.prefix_tokens
        if patch_rows is None:
            patch_rows = torch.arange(first.images * patches, device=x_TD.device)

        # Where the chosen tokens stand among the packed ones: every image begins with its CLS.
        starts = itertools.accumulate((crops.tokens for crops in sets), initial=0)
        cls_rows = [
            torch.arange(start, start + crops.tokens, crops.length, device=x_TD.device)
            for start, crops in zip(starts, sets)
        ]
        rows = patch_rows // patches * first.length + self.prefix_tokens + patch_rows % patches
        chosen = torch.cat([*cls_rows, rows])

        packing: Packing | None = None
        for block in self.blocks[:-1]:
            packing = self._packing(sets, packing)
            x_TD = block(x_TD, packing)
        x_nD = self.blocks[-1](x_TD, self._packing(sets, packing), chosen)

        *cls, patches_nD = torch.split(x_nD, [*(crops.images for crops in sets), len(rows)])
        normed = [self._prefix_norm(local=index == 1)(x_BD) for index, x_BD in enumerate(cls)]
        return ChosenTokens(normed, self.norm(patches_nD))

    def compile_parts(self, varying_rows: bool = False) -> None:
        """Block by block, as published: all blocks share one small graph for each size of crops.

        The last block works for as many tokens as rows are chosen, so with another number every
        time one graph is for all of them.
        """
        for block in self.blocks[:-1]:
            block.compile(dynamic=False)
        self.blocks[-1].compile(dynamic=None if varying_rows else False)

    def _forward_sets(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Tokens]:
        x_TD, sets = self._packed(images, masks)
        packing: Packing | None = None
        for block in self.blocks:
            packing = self._packing(sets, packing)
            x_TD = block(x_TD, packing)
        parts = zip(torch.split(x_TD, [crops.tokens for crops in sets]), sets, strict=True)
        prenorms = [torch.unflatten(x, 0, (crops.images, crops.length)) for x, crops in parts]
        return [self._normed(x, local=index == 1) for index, x in enumerate(prenorms)]

    def _packed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[CropSet]]:
        """Embedded tokens of all crop sets [T, D], and what these are."""
        embedded = [self.embed(x, mask) for x, mask in zip(images, masks, strict=True)]
        sequences = [x_BND.flatten(0, 1) for x_BND, _ in embedded]
        x_TD = torch.cat(sequences) if len(sequences) > 1 else sequences[0]
        sets = [CropSet(len(x_BND), x_BND.shape[1], grid) for x_BND, grid in embedded]
        return x_TD, sets

    def _packing(self, sets: Sequence[CropSet], below: Packing | None) -> Packing:
        """The crop sets with their tables, as a block reads them.

        Each block asks, as augmented tables are draws, of this block or of all.

        Args:
            below: what the block below read; None for the first one.
        """
        if below is not None and self.settings.rope.draw == "forward":
            return below
        groups = (
            PackedGroup(crops.images, crops.length, *self.rope_embed(*crops.grid)) for crops in sets
        )
        return Packing(tuple(groups), self.prefix_tokens, interleaved=False)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Images to the token sequence [CLS, registers, patches] and the patch grid."""
        self._refuse_channels(images)
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if 0 in grid:
            raise ValueError(
                f"images: {images.shape[2]} x {images.shape[3]} px hold no {self.patch_size}-px "
                "patch; give larger ones"
            )
        patches = self.patch_embed(images)
        cls_token: Tensor = self.cls_token
        if masks is None:  # keeps mask_token in the graph, with a zero gradient
            cls_token = cls_token + 0 * self.mask_token
        else:
            if masks.shape != patches.shape[:2]:
                raise ValueError(
                    f"masks: expected bool {list(patches.shape[:2])}, got {list(masks.shape)}"
                )
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = [cls_token]
        if hasattr(self, "storage_tokens"):
            prefix.append(self.storage_tokens)
        expanded = [token.expand(images.shape[0], -1, -1) for token in prefix]
        return torch.cat([*expanded, patches], dim=1), grid

    def _normed(self, x_BND: Tensor, local: bool = False) -> Tokens:
        """Final norms: one for all tokens unless untied."""
        prefix_norm = self._prefix_norm(local)
        if prefix_norm is self.norm:
            normed = self.norm(x_BND)
            prefix = normed[:, : self.prefix_tokens]
            patches = normed[:, self.prefix_tokens :]
        else:
            prefix = prefix_norm(x_BND[:, : self.prefix_tokens])
            patches = self.norm(x_BND[:, self.prefix_tokens :])
        return Tokens(prefix[:, 0], prefix[:, 1:], patches, x_BND)

    def _prefix_norm(self, local: bool) -> nn.Module:
        """Of CLS and registers; the local one acts in training on the second crop set only."""
        if self.local_cls_norm is not None and self.training and local:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm

    def _layer_features(
        self, images: Tensor, indices: Sequence[int], norm: bool, reshape: bool
    ) -> list[Features]:
        x_BND, grid = self.embed(images)
        B, N = x_BND.shape[:2]
        x_TD = x_BND.flatten(0, 1)
        per_layer: list[Features] = []
        packing: Packing | None = None
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            packing = self._packing([CropSet(B, N, grid)], packing)
            x_TD = block(x_TD, packing)
            if index in indices:
                cls, registers, patches = self._split(x_TD.unflatten(0, (B, N)), norm)
                per_layer.append(features_of(cls, registers, patches, grid, reshape))
        return per_layer

    def _split(self, x_BND: Tensor, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        """CLS, registers and patches, with the final norm if asked for."""
        if norm:
            return self._normed(x_BND)[:3]
        return x_BND[:, 0], x_BND[:, 1 : self.prefix_tokens], x_BND[:, self.prefix_tokens :]
