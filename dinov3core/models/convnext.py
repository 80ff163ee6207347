"""ConvNeXt with the interface of the vision transformer: a pooled CLS, no registers, a stride-32
map of patches.

Shapes: B images, C channels, D width of the last stage, P = (H/32) * (W/32) patches, row-major.
State-dict keys are the official ones, the second name of the final norm (`norms.3.*`) included.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.image_statistics import ImageStatistics
from dinov3core.models.outputs import (
    Features,
    Fit,
    Tokens,
    chosen_layers,
    features_of,
    fit_to_patches,
    official_order,
)

STEM_STRIDE, STAGE_STRIDE = 4, 2


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))) (Liu et al. 2022, figure 4).

    Stochastic depth drops the branch of whole samples and divides the kept ones by the keep rate.
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
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (kept / (1 - self.drop_path)).to(branch.dtype)
        return x + branch


class ConvNeXt(nn.Module):
    """ConvNeXt of the DINOv3 family (Liu et al. 2022; DINOv3 paper, section 5.2).

    Args:
        depths, widths: blocks and channels of the four stages.
        in_channels: any number of channels.
        drop_path: rate of the last block; the rates rise linearly from 0.
        layer_scale: initial value of `gamma`.
        map_stride: resample the maps of `features` to one token per `map_stride` pixels (bilinear,
            antialiased), so that they line up with those of a ViT of that patch size; None leaves
            every stage at its own stride.
    """

    statistics: ImageStatistics | None = None

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        in_channels: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        map_stride: int | None = None,
    ):
        super().__init__()
        if len(depths) != 4 or len(widths) != 4:
            raise ValueError(
                f"depths, widths: expected 4 stages each, got {list(depths)} and {list(widths)}"
            )
        self.width, self.depth = widths[-1], len(depths)
        self.in_channels, self.layer_scale, self.map_stride = in_channels, layer_scale, map_stride
        self.patch_size = STEM_STRIDE * STAGE_STRIDE**3

        stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], STEM_STRIDE, STEM_STRIDE),
            ChannelNorm(widths[0], eps=1e-6),
        )
        reductions = [
            nn.Sequential(
                ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, STAGE_STRIDE, STAGE_STRIDE)
            )
            for before, after in itertools.pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *reductions])
        rates = (drop_path * block / (sum(depths) - 1) for block in itertools.count())
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, next(rates), layer_scale) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions and linear layers normal with std 0.02 and zero bias, norms identity, gamma
        `layer_scale`.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock):
                nn.init.constant_(module.gamma, self.layer_scale)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the normed pooled vector [B, D], the representation of an image."""
        return self.forward_features(images).cls

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tokens | list[Tokens]:
        """Tokens of one crop set or of a list of them; `prenorm` holds the patches alone.

        Raises:
            ValueError: for masks: a convolution has no token to replace.
        """
        if isinstance(images, Tensor):
            if masks is not None:
                raise ValueError(
                    "masks: expected None for a ConvNeXt, which has no mask token, got a mask"
                )
            return self._tokens(self._maps(images)[-1])
        return [
            self.forward_features(x, m)
            for x, m in zip(images, masks or [None] * len(images), strict=True)
        ]

    def _tokens(self, map_BDHW: Tensor) -> Tokens:
        """One norm for the pooled vector and the patches."""
        patches = map_BDHW.flatten(2).mT
        cls = self.norm(map_BDHW.mean((2, 3)))
        return Tokens(cls, _no_registers(cls), self.norm(patches), patches)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The maps of all stages, [B, width, H / stride, W / stride]."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images: expected [B, {self.in_channels}, H, W], got {list(images.shape)}; "
                "build the model with in_channels=C for other channel counts"
            )
        if min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images: expected sides of at least {self.patch_size} px, "
                f"got {images.shape[2]} x {images.shape[3]}; give larger ones"
            )
        maps, x = [], images
        for reduce, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(reduce(x))
            maps.append(x)
        return maps

    def features(
        self,
        images: Tensor,
        *,
        layers: int | Sequence[int] = 1,
        norm: bool = True,
        reshape: bool = True,
        fit: Fit = "crop",
    ) -> Features | tuple[Features, ...]:
        """Features of the last `layers` stages, or of the stages with the given indices, in
        ascending depth.

        Widths differ between stages, and so do the strides (4, 8, 16, 32) unless `map_stride` is
        set. Only the last stage has a norm.

        Args:
            images: [B, C, H, W].
            layers: 1 gives one `Features`; any other number or a sequence gives a tuple of them.
            norm: apply the final norm to the last stage.
            reshape: patches as a map [B, D, h, w], contiguous; otherwise [B, h * w, D].
            fit: what happens to sides that are no multiple of 32; see `fit_to_patches`.
        """
        indices = chosen_layers(layers, self.depth)
        images = fit_to_patches(images, self.patch_size, fit)
        maps, found = self._maps(images), []
        for index in indices:
            stage_norm = self.norms[index] if norm else nn.Identity()
            cls, patches = maps[index].mean((2, 3)), maps[index]
            if self.map_stride:
                grid = (images.shape[2] // self.map_stride, images.shape[3] // self.map_stride)
                patches = F.interpolate(patches, size=grid, mode="bilinear", antialias=True)
            tokens = stage_norm(patches.flatten(2).mT)
            found.append(
                features_of(stage_norm(cls), _no_registers(cls), tokens, patches.shape[2:], reshape)
            )
        return found[0] if layers == 1 else tuple(found)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple:
        """The official call: per stage patches, or (patches, cls), (patches, registers), (patches,
        cls, registers).
        """
        found = self.features(images, layers=n, norm=norm, reshape=reshape)
        found = (found,) if isinstance(found, Features) else found
        return official_order(found, return_class_token, return_extra_tokens)


def _no_registers(cls: Tensor) -> Tensor:
    return cls.new_empty(cls.shape[0], 0, cls.shape[1])
