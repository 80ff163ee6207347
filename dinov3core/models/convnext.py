"""ConvNeXt with the interface of the vision transformer: a pooled CLS and patches of stride 32.

A patch is a cell of 32 x 32 px. There is no mask token: where the state dict of others has none, a
learned one would be lost with every export. A hidden cell has the mean colour instead, in the
image: hidden behind the stem or later, convolutions of 7 x 7 would already have carried its pixels
into its neighbours.

Shapes: B images, C channels, D width of the last stage, P = (H/32) * (W/32) patches, row-major.
State-dict keys are the official ones, the second name of the final norm (`norms.3.*`) included.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.bounds import Bounds
from dinov3core.models.interface import FeatureModule
from dinov3core.models.outputs import Features, Tokens, features_of

STEM_STRIDE = 4
STAGE_STRIDE = 2
STAGES = 4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))) (Liu et al. 2022, figure 4).

    Stochastic depth drops the branch of whole samples and divides the others by their share.
    """

    def __init__(self, width: int, drop_path: float, layer_scale: float):
        super().__init__()
        self.drop_path = drop_path
        self.gamma = nn.Parameter(torch.full((width,), layer_scale))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).movedim(1, -1))
        branch = (self.gamma * self.pwconv2(F.gelu(self.pwconv1(branch)))).movedim(-1, 1)
        if self.training and self.drop_path:
            stays = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (stays / (1 - self.drop_path)).to(branch.dtype)
        return x + branch


class Stage(nn.Sequential):
    """Blocks of one width, which are compiled as one; torch looks into none of its own classes."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


@dataclass(frozen=True)
class ConvNeXtSettings:
    """A ConvNeXt of four stages, by default the tiny one."""

    depths: Annotated[tuple[int, ...], Bounds(1, 1024)] = (3, 3, 9, 3)
    """Blocks of each of the four stages."""
    widths: Annotated[tuple[int, ...], Bounds(1, 2**16)] = (96, 192, 384, 768)
    """Channels of each stage."""
    in_channels: Annotated[int, Bounds(1, 4096)] = 3
    """Channels of an image."""
    drop_path: Annotated[float, Bounds(0, 1, open_high=True)] = 0.0
    """Share of samples that skip the last block in training; it rises linearly from 0."""
    layer_scale: Annotated[float, Bounds(0, 100)] = 1e-6
    """Initial value of `gamma`."""
    map_stride: Annotated[int | None, Bounds(1, 1024)] = None
    """Resample the maps of `features` to one token per so many pixels (bilinear, antialiased), so
    that they line up with those of a ViT of that patch size; None leaves stages at their strides.
    """

    @property
    def width(self) -> int:
        """Channels of CLS and patches."""
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Layers that features can be taken from: the stages."""
        return STAGES

    @property
    def patch_size(self) -> int:
        """Side in pixels of what a patch of the last stage stands for."""
        return STEM_STRIDE * STAGE_STRIDE ** (STAGES - 1)


class ConvNeXt(FeatureModule):
    """ConvNeXt of the DINOv3 family (Liu et al. 2022; DINOv3 paper, section 5.2).

    Raises:
        ValueError: depths and widths of other than four stages.
    """

    graphs_of_a_size = 8 * STAGES  # each for global crops, and once more for local ones

    def __init__(self, settings: ConvNeXtSettings):
        super().__init__()
        depths = settings.depths
        widths = settings.widths
        if len(depths) != STAGES or len(widths) != STAGES:
            raise ValueError(
                f"depths, widths: expected {STAGES} stages each, got {list(depths)} and "
                f"{list(widths)}"
            )
        self.settings = settings
        self.width = settings.width
        self.depth = settings.depth
        self.in_channels = settings.in_channels
        self.map_stride = settings.map_stride
        self.patch_size = settings.patch_size

        stem = nn.Sequential(
            nn.Conv2d(self.in_channels, widths[0], STEM_STRIDE, STEM_STRIDE),
            ChannelNorm(widths[0], eps=1e-6),
        )
        reductions = [
            nn.Sequential(
                ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, STAGE_STRIDE, STAGE_STRIDE)
            )
            for before, after in itertools.pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *reductions])
        rates = (settings.drop_path * block / (sum(depths) - 1) for block in itertools.count())
        self.stages = nn.ModuleList(
            Stage(*(ConvNeXtBlock(width, next(rates), settings.layer_scale) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter.

        | tensor | value |
        |---|---|
        | convolutions and linear layers | normal, std 0.02; biases 0 |
        | norms | weight 1, bias 0 |
        | gamma | `layer_scale` |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock):
                nn.init.constant_(module.gamma, self.settings.layer_scale)

    def compile_parts(self, varying_rows: bool = False) -> None:
        """Stage by stage, as published; `varying_rows` are chosen behind them."""
        for stage in self.stages:
            stage.compile(dynamic=False)

    def _tokens(self, images: Tensor) -> Tokens:
        """One norm for the pooled vector and the patches; `prenorm` holds the patches alone."""
        map_BDHW = self._maps(images)[-1]
        patches = map_BDHW.flatten(2).mT
        cls = self.norm(map_BDHW.mean((2, 3)))
        return Tokens(cls, _no_registers(cls), self.norm(patches), patches)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The maps of all stages, [B, width, H / stride, W / stride] with strides 4, 8, 16, 32."""
        self._refuse_channels(images)
        if min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images: expected sides of at least {self.patch_size} px, "
                f"got {images.shape[2]} x {images.shape[3]}; give larger ones"
            )
        maps = []
        x = images
        for reduce, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(reduce(x))
            maps.append(x)
        return maps

    def _layer_features(
        self, images: Tensor, indices: Sequence[int], norm: bool, reshape: bool
    ) -> list[Features]:
        maps = self._maps(images)
        per_stage: list[Features] = []
        for index in indices:
            stage_norm = self.norms[index] if norm else nn.Identity()
            map_BDhw = maps[index]
            cls = map_BDhw.mean((2, 3))  # before resampling
            if self.map_stride:
                size = [side // self.map_stride for side in images.shape[2:]]
                map_BDhw = F.interpolate(map_BDhw, size=size, mode="bilinear", antialias=True)
            height, width = map_BDhw.shape[2:]
            patches = stage_norm(map_BDhw.flatten(2).mT)
            per_stage.append(
                features_of(stage_norm(cls), _no_registers(cls), patches, (height, width), reshape)
            )
        return per_stage


def _no_registers(cls: Tensor) -> Tensor:
    """[B, 0, D], where a ViT has its registers."""
    return cls.new_empty(cls.shape[0], 0, cls.shape[1])
