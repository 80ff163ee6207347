"""Networks of your own as backbones: any module that gives features, and where a run finds it.

A backbone is a `FeatureModule`: it states `width`, `depth`, `patch_size` and `in_channels`, and
answers `_forward_sets` and `_layer_features`. `AsBackbone` makes one of any other module:

    # in my_networks.py
    import timm
    from dinov3core.models import AsBackbone

    def small():
        model = timm.create_model("vit_small_patch16_224", dynamic_img_size=True, num_classes=0)
        return AsBackbone(model, width=384, prefix_tokens=1, method="forward_features")

A recipe names that function, `--backbone module --backbone.make my_networks:small`, so that every
process can make the network, and a later one continue the run.

Shapes: B images, C channels, P patches (row-major), R registers, D width, h x w the patch grid.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from dinov3core.bounds import Bounds, Count, Width
from dinov3core.models.interface import FeatureModule
from dinov3core.models.outputs import Features, Tokens, features_of


@dataclass(frozen=True)
class ModuleSettings:
    """A network of your own: what a run has to know of it before it is made."""

    make: str = ""
    """The function that makes it, as PACKAGE.MODULE:FUNCTION. Called without arguments, it returns
    a `dinov3core.models.interface.FeatureModule`, for instance `dinov3core.models.AsBackbone`.
    """
    width: Width = 384
    """Channels of its CLS and patches."""
    patch_size: Count = 16
    """Side in pixels of what one of its patches stands for."""
    in_channels: Annotated[int, Bounds(1, 4096)] = 3
    """Channels of an image."""

    @property
    def depth(self) -> int:
        """Layers that features can be taken from."""
        return 1


class AsBackbone(FeatureModule):
    """A module that gives features, as a backbone.

    What it gives for images [B, C, H, W] is one of these, or an object with one of them as its
    `last_hidden_state`, as models of transformers give:

    | features | CLS | registers |
    |---|---|---|
    | tokens [B, N, D] with `prefix_tokens`: these first, then patches | the first | the others |
    | tokens [B, P, D] without any | the mean patch | none |
    | a map [B, D, h, w] | the mean patch | none |

    They are taken as they come: a final norm is the module's own. Patches hidden from a student
    have the mean colour in its images (`outputs.hide_patches`).

    Args:
        module: what is trained.
        width: D.
        patch_size: pixels of a patch's side: H = h * patch_size.
        prefix_tokens: tokens before the patches.
        in_channels: C.
        method: that is asked for features, such as "forward_features" for models of timm; the call
            of the module itself otherwise.
    """

    depth = 1

    def __init__(
        self,
        module: nn.Module,
        *,
        width: int,
        patch_size: int = 16,
        prefix_tokens: int = 0,
        in_channels: int = 3,
        method: str = "__call__",
    ):
        super().__init__()
        self.module = module
        self.width = width
        self.patch_size = patch_size
        self.prefix_tokens = prefix_tokens
        self.in_channels = in_channels
        self.method = method

    def _tokens(self, images: Tensor) -> Tokens:
        """`prenorm` is what the module gives, as is all else."""
        self._refuse_channels(images)
        given = getattr(self.module, self.method)(images)
        features = getattr(given, "last_hidden_state", given)
        x_BND = features.flatten(2).mT if features.ndim == 4 else features
        prefix = 0 if features.ndim == 4 else self.prefix_tokens
        rows, columns = self._grid(images)
        if x_BND.shape != (len(images), prefix + rows * columns, self.width):
            raise ValueError(
                f"{type(self.module).__name__}: expected {prefix} tokens and {rows} x {columns} "
                f"patches of {self.width} channels for {images.shape[2]} x {images.shape[3]} px, "
                f"got {list(features.shape)}; state its width, patch_size and prefix_tokens"
            )
        patches = x_BND[:, prefix:]
        cls = x_BND[:, 0] if prefix else patches.mean(1)
        return Tokens(cls, x_BND[:, 1 : max(prefix, 1)], patches, x_BND)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def _layer_features(
        self, images: Tensor, indices: Sequence[int], norm: bool, reshape: bool
    ) -> list[Features]:
        if not norm:
            raise ValueError(
                f"norm: expected True, as {type(self.module).__name__} gives its features normed "
                "or not"
            )
        cls, registers, patches, _ = self._tokens(images)
        return [features_of(cls, registers, patches, self._grid(images), reshape)]


def backbone_made(settings: ModuleSettings) -> FeatureModule:
    """What the function that `settings` name makes.

    Raises:
        ValueError: there is no such function, or it makes something else than was stated.
    """
    place, _, name = settings.make.partition(":")
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"backbone.make {settings.make}: {error}; write PACKAGE.MODULE:FUNCTION, with the "
            "folder of the package on PYTHONPATH"
        ) from error
    backbone = make()
    if not isinstance(backbone, FeatureModule):
        raise ValueError(
            f"backbone.make {settings.make}: expected a FeatureModule, got "
            f"{type(backbone).__name__}; wrap it in dinov3core.models.AsBackbone"
        )
    for field in ("width", "patch_size", "in_channels"):
        stated, own = getattr(settings, field), getattr(backbone, field)
        if stated != own:
            raise ValueError(
                f"backbone.{field}: expected {own}, as {settings.make} makes it, got {stated}; "
                f"give --backbone.{field.replace('_', '-')} {own}"
            )
    return backbone
