"""The calls that every backbone has, whatever it is made of.

Shapes: B images, C channels, P patches (row-major), R registers, D width.
"""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor, nn

from dinov3core.image_statistics import ImageStatistics
from dinov3core.models.outputs import (
    ChosenTokens,
    Features,
    Fit,
    Tokens,
    chosen_layers,
    fit_to_patches,
    hide_patches,
)


class FeatureModule(nn.Module):
    """A backbone; what it is made of answers `_tokens`, or `_forward_sets`, and `_layer_features`.

    Attributes:
        width: channels of CLS and patches.
        depth: layers that `features` can give.
        patch_size: pixels of a patch's side.
        in_channels: channels of an image.
        graphs_of_a_size: how many graphs the code of a compiled part has at most for each size of
            crops: of student, teacher and Gram teacher, with gradients or without.
        statistics: the normalisation the weights were trained with, None when unknown; `build` and
            loaders set it.
    """

    width: int
    depth: int
    patch_size: int
    in_channels: int
    graphs_of_a_size: int
    statistics: ImageStatistics | None = None

    def _forward_sets(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Tokens]:
        """Tokens of every crop set; set by set, hidden patches in the mean colour."""
        return [
            self._tokens(crops if mask is None else hide_patches(crops, mask, self.patch_size))
            for crops, mask in zip(images, masks, strict=True)
        ]

    def _tokens(self, images: Tensor) -> Tokens:
        """Tokens of one crop set, of which everything is seen."""
        raise NotImplementedError

    def _layer_features(
        self, images: Tensor, indices: Sequence[int], norm: bool, reshape: bool
    ) -> list[Features]:
        """Features of the layers with these ascending indices."""
        raise NotImplementedError

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> the normed CLS token [B, D], the representation of an image."""
        return self.forward_features(images, masks).cls

    @overload
    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> Tokens: ...

    @overload
    def forward_features(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Tokens]: ...

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tokens | list[Tokens]:
        """Tokens of one crop set, or of several, which share every linear layer of a ViT.

        Args:
            images: [B, C, H, W], or a list of such tensors (global crops first, local crops
                second).
            masks: bool [B, P], True where the patch is hidden: a ViT has a learned mask token in
                its place, others see the mean colour there (`outputs.hide_patches`). A list beside
                a list of images.

        Raises:
            ValueError: images or masks that do not fit.
        """
        if isinstance(images, Tensor):
            assert masks is None or isinstance(masks, Tensor)
            return self._forward_sets([images], [masks])[0]
        return self._forward_sets(images, [None] * len(images) if masks is None else list(masks))

    def forward_chosen(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patch_rows: Tensor | None = None,
    ) -> ChosenTokens:
        """The CLS tokens of all crop sets and chosen patches of the first, which losses read.

        Args:
            images, masks: as for `forward_features`.
            patch_rows: int64 [n], flat indices into the B * P patches of the first crop set; None:
                all of them.
        """
        sets = self._forward_sets(images, masks)
        patches = sets[0].patches.flatten(0, 1)
        if patch_rows is not None:
            patches = patches.index_select(0, patch_rows)
        return ChosenTokens([tokens.cls for tokens in sets], patches)

    def compile_parts(self, varying_rows: bool = False) -> None:
        """Compile what is repeated, part by part: every part has one graph for each size of crops.

        None is for all sizes: with lengths as numbers, kernels are chosen for them.

        Args:
            varying_rows: `forward_chosen` is called for another number of patches every time.
        """
        raise NotImplementedError

    def features(
        self,
        images: Tensor,
        *,
        layers: int | Sequence[int] = 1,
        norm: bool = True,
        reshape: bool = True,
        fit: Fit = "crop",
    ) -> Features | tuple[Features, ...]:
        """Features of the last `layers` layers, or of those with the given indices, ascending.

        The layers of a ViT are its blocks, those of a ConvNeXt its four stages, whose widths differ
        and, unless `map_stride` is set, whose strides (4, 8, 16, 32) do as well.

        Args:
            images: [B, C, H, W].
            layers: 1 gives one `Features`; any other number or a sequence gives a tuple of them.
            norm: apply the final norm to every returned layer (what the published evaluations use),
                in a ConvNeXt to the last stage.
            reshape: patches as a map [B, D, h, w], contiguous; otherwise [B, P, D].
            fit: what happens to sides off the patch grid; see `fit_to_patches`.
        """
        indices = chosen_layers(layers, self.depth)
        fitted = fit_to_patches(images, self.patch_size, fit)
        per_layer = self._layer_features(fitted, indices, norm, reshape)
        return per_layer[0] if layers == 1 else tuple(per_layer)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """The official call.

        Per layer patches, or (patches, cls), (patches, registers), (patches, cls, registers).
        """
        features = self.features(images, layers=n, norm=norm, reshape=reshape)
        per_layer = (features,) if isinstance(features, Features) else features
        if not (return_class_token or return_extra_tokens):
            return tuple(layer.patches for layer in per_layer)
        return tuple(
            (
                layer.patches,
                *((layer.cls,) if return_class_token else ()),
                *((layer.registers,) if return_extra_tokens else ()),
            )
            for layer in per_layer
        )

    def _refuse_channels(self, images: Tensor) -> None:
        """Say what images this backbone was built for, when these are others."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images: expected [B, {self.in_channels}, H, W], got {list(images.shape)}; "
                "build the model with in_channels=C for other channel counts"
            )
