"""A teacher without heads: any vision backbone, whose CLS token and patches a student matches.

By name it is what `open_backbone` knows (a file or folder of weights, a run), or

    timm:NAME               a model of timm, with the weights that timm itself fetches
    timm:NAME=FILE          that model with the weights of a file
    transformers:FOLDER     a model of transformers saved in a folder, or its name on their hub

and in Python any `nn.Module`. Nothing that a file holds is run: pickles are refused or read with
`weights_only`, and so is a model that brings code of its own. The two packages are imported where
they are named.

Shapes: n crops, C channels, N tokens of a crop, P patches of the students' grid, D width.
"""

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.checkpoints import files
from dinov3core.data.sizes import in_text
from dinov3core.evals.backbones import PixelBackbone, fingerprint
from dinov3core.image_statistics import ImageStatistics
from dinov3core.losses import resize_patches
from dinov3core.models import Features, Tokens
from dinov3core.models.interface import FeatureModule
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.distillation.frozen_teacher import TeacherRows
from dinov3core.train.engine.named_models import NO_RECIPES, Recipes, open_backbone

Grid = tuple[int, int]  # rows and columns of patches

# What a forward pass of somebody else's model may raise for images of a size it was not made for.
REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, NotImplementedError)
# What these packages raise for names and files that they cannot open.
UNOPENED = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError)


class Backbone(NamedTuple):
    """A vision model of any kind, and what has to be known of it."""

    module: nn.Module
    """one of ours, or any that is called with normalised images [n, C, H, W] and returns
    `Features`, `Tokens`, tokens [n, N, D] or a map [n, D, h, w]"""
    patch_size: int
    """pixels of the side of what one patch covers"""
    statistics: ImageStatistics | None = None
    """of the images it was trained on; None: it sees those of the run as they are"""
    prefix_tokens: int = 1
    """of tokens [n, N, D]: how many stand before the patches, the first of them CLS; 0: none, and
    CLS is the mean patch, as it is of a map"""


class Pixels(NamedTuple):
    """How the students see images, which is what a teacher is given."""

    channels: int
    statistics: ImageStatistics
    grid: Grid
    """of their patches"""


class FrozenFeatures:
    """A backbone that never changes; a `FrozenTeacher` whose rows are features after its last norm.

    Whatever its patches are, their rows are on the students' grid. The crops it is given are
    normalised by the run; where its own statistics are others, each channel is restated exactly.

    Args:
        name: for people, and of its terms in the log.
        backbone: moved to `device`, float32, in eval mode and without gradients from now on.
        pixels: what it will be given.
        size: side in pixels of its input; 0: that at which its grid is the students'.
        device: where it computes.

    Attributes:
        cls_width, patch_width: of its rows.

    Raises:
        ValueError: it does not take such images, or does not return features of them.
    """

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        pixels: Pixels,
        *,
        size: int = 0,
        device: torch.device | None = None,
    ):
        self.name = name
        self.patch_size = backbone.patch_size
        self.grid = pixels.grid
        self.input_size = _input_size(name, backbone.patch_size, pixels.grid, size)
        self.device = device or torch.device("cpu")
        self._backbone = backbone
        module = backbone.module.float().to(self.device).eval().requires_grad_(False)
        is_ours = isinstance(module, FeatureModule | PixelBackbone)
        self._called: Callable[[Tensor], Any] = module.features if is_ours else module
        self._restated = _restatement(pixels.statistics, backbone.statistics, self.device)
        self.fingerprint = _fingerprint(backbone, pixels, self.input_size)
        self.cls_width, self.patch_width = self._widths(pixels.channels)

    def __call__(self, crops: Tensor, rows: Tensor | None = None) -> TeacherRows:
        """CLS tokens and patches of crops.

        Args:
            crops: [n, C, H, W] as the students see them, of any size. n may be 0.
            rows: int64 [m] among the n * P patches: only these; None: all of them.
        """
        if not len(crops):
            empty = crops.new_empty
            return TeacherRows(empty(0, self.cls_width), empty(0, self.patch_width))
        cls, patches = self._features(crops)
        patches = patches.flatten(0, 1)
        return TeacherRows(cls, patches if rows is None else patches.index_select(0, rows))

    @torch.no_grad()
    def _features(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """CLS [n, D] and patches [n, P, D]."""
        height, width = self.input_size
        if crops.shape[-2:] != self.input_size:
            crops = F.interpolate(crops, size=(height, width), mode="bilinear", antialias=True)
        if self._restated is not None:
            factor, shift = self._restated
            crops = torch.addcmul(shift, crops, factor)
        grid = (height // self.patch_size, width // self.patch_size)
        cls, patches = _read(self._called(crops), grid, self._backbone.prefix_tokens)
        resized = resize_patches(patches, grid, self.grid, mode="bilinear", antialias=True)
        return cls, resized

    def _widths(self, channels: int) -> tuple[int, int]:
        """Of CLS and of patches, as one image shows them."""
        side = in_text(self.input_size)
        blank = torch.zeros(1, channels, *self.input_size, device=self.device)
        try:
            cls, patches = self._features(blank)
        except REFUSALS as error:
            raise ValueError(
                f"teacher {self.name} gives no features of images of {channels} channels and "
                f"{side} pixels: {_first_line(error)}; choose its size, such as size=224"
            ) from error
        return cls.shape[-1], patches.shape[-1]


def _input_size(name: str, patch_size: int, grid: Grid, size: int) -> tuple[int, int]:
    """(height, width) of a teacher's input.

    Args:
        size: of the shorter side; 0: whatever gives `grid`.
    """
    rows, columns = grid
    if not size:
        return rows * patch_size, columns * patch_size
    if size % patch_size:
        below = max(size // patch_size, 1) * patch_size
        raise ValueError(
            f"teacher {name} has patches of {patch_size} pixels, which do not divide its size "
            f"{size}; give size={below} or size={below + patch_size}"
        )
    shorter = min(grid)
    sides = [round(size * side / shorter / patch_size) * patch_size for side in grid]
    return sides[0], sides[1]


def _restatement(
    run: ImageStatistics, own: ImageStatistics | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """(factor, shift) [C, 1, 1] from pixels as the run normalises them to a teacher's.

    p = x * std + mean is the same pixel in both, so x' = x * std / std' + (mean - mean') / std'.

    Returns:
        None where there is nothing to do: they are the same, or the teacher states none.
    """
    if own is None or own == run:
        return None
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64) for values in (*run, *own)
    )
    terms = (std / own_std, (mean - own_mean) / own_std)
    factor, shift = (term.float().to(device)[:, None, None] for term in terms)
    return factor, shift


def _read(output: Any, grid: Grid, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """CLS [n, D] and patches [n, P', D] of what a backbone returned, on its own `grid`.

    Raises:
        ValueError: it is nothing that is known, or has another number of patches.
    """
    rows, columns = grid
    if isinstance(output, Features | Tokens):
        cls: Tensor | None = output.cls
        patches = output.patches
    elif isinstance(output, Tensor) and output.ndim == 3:
        cls = output[:, 0] if prefix_tokens else None
        patches = output[:, prefix_tokens:]
    elif isinstance(output, Tensor) and output.ndim == 4:
        cls = None
        patches = output
    else:
        shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected Features, Tokens, [B, N, D] or [B, D, h, w], got {shown}")

    there = tuple(patches.shape[2:]) if patches.ndim == 4 else patches.shape[1]
    if there not in (grid, rows * columns):
        raise ValueError(f"expected {rows} x {columns} patches, got {_shown(there)}")
    if patches.ndim == 4:
        patches = patches.flatten(2).mT
    return patches.mean(1) if cls is None else cls, patches


def _shown(patches: int | tuple[int, ...]) -> str:
    return str(patches) if isinstance(patches, int) else " x ".join(map(str, patches))


def _fingerprint(backbone: Backbone, pixels: Pixels, input_size: tuple[int, int]) -> str:
    """Of weights and of all else that decides what it gives for crops."""
    rest = [backbone.patch_size, backbone.prefix_tokens, backbone.statistics, pixels, input_size]
    text = fingerprint(backbone.module) + json.dumps(rest)
    return hashlib.sha256(text.encode()).hexdigest()


def open_teacher(
    name: str,
    weights: str,
    pixels: Pixels,
    *,
    size: int = 0,
    device: torch.device | None = None,
    recipes: Recipes = NO_RECIPES,
) -> FrozenFeatures:
    """A teacher by what is said of its weights on a command line; see the top of this file.

    Args:
        name: what it is called from now on.
        recipes: see `open_backbone`.

    Raises:
        ConfigError: there is none, it cannot be opened, or it does not take such images.
    """
    kind, colon, inner = weights.partition(":")
    try:
        if colon and kind in PACKAGES:
            backbone = PACKAGES[kind](inner, pixels.channels)
        else:
            backbone = _ours(weights, pixels.channels, recipes)
        return FrozenFeatures(name, backbone, pixels, size=size, device=device)
    except (ValueError, OSError) as error:
        raise ConfigError(f"teacher.teachers: {error}") from error


def teacher_names(weights: Sequence[str]) -> list[str]:
    """A short name for each, of letters, digits, - and _, and no two alike."""
    names: list[str] = []
    for text in weights:
        last = re.split(r"[:/=]", text.rstrip("/"))[-1]
        stem = last if text.startswith("timm:") and "=" not in text else Path(last).stem
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "teacher"
        same = sum(1 for one in names if one == name or one.startswith(f"{name}_no"))
        names.append(f"{name}_no{same + 1}" if same else name)
    return names


def _ours(weights: str, channels: int, recipes: Recipes) -> Backbone:
    try:
        opened = open_backbone(weights, channels=channels, recipes=recipes).backbone
    except ValueError as error:
        others = " or ".join(f"{kind}:NAME" for kind in PACKAGES)
        raise ValueError(f"{error}; models of other packages are {others}") from error
    return Backbone(opened, opened.patch_size, opened.statistics)


class _OfTimm(nn.Module):
    """The features of a timm model before its head; without a CLS token, what it pools."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Features:
        features = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError("its forward_features gives neither tokens nor a map")
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        if features.ndim == 3 and prefix:
            return Features(features[:, 0], features[:, 1:prefix], features[:, prefix:])
        pooled = self.model.forward_head(features, pre_logits=True)
        patches = features
        if features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            patches = features.movedim(3, 1)
        return Features(pooled, pooled[:, None, :][:, :0], patches)


def _of_timm(text: str, channels: int) -> Backbone:
    """From NAME, with the weights that timm fetches, or NAME=FILE.

    Raises:
        ValueError: timm is not there or knows no such model, or the weights are not its.
    """
    timm = _package("timm")
    name, _, file = text.partition("=")
    arguments = {"pretrained": not file, "in_chans": channels, "num_classes": 0}
    try:
        try:
            # Else a model with learned positions takes images of one size alone.
            model = timm.create_model(name, dynamic_img_size=True, **arguments)
        except TypeError:  # this kind has no such argument, as it needs none
            model = timm.create_model(name, **arguments)
        stride = model.feature_info[-1]["reduction"]
    except UNOPENED as error:
        raise ValueError(f"timm:{text} cannot be opened: {_first_line(error)}") from error
    if file:
        _fill(model, file)
    stated = model.pretrained_cfg or {}
    return Backbone(_OfTimm(model), stride, _statistics(stated, "mean", "std", channels))


def _fill(model: nn.Module, file: str) -> None:
    """Weights of a file into a model without a head; those of a head are left aside.

    Raises:
        ValueError: some are missing or of another shape.
    """
    tensors = files.read(Path(file).expanduser()).tensors
    for wrapped in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(tensors.get(wrapped), Mapping):
            tensors = tensors[wrapped]
            break
    wanted = model.state_dict()
    there = {name: tensors[name] for name in wanted if isinstance(tensors.get(name), Tensor)}
    unlike = [
        name for name in wanted if name not in there or there[name].shape != wanted[name].shape
    ]
    if unlike:
        raise ValueError(
            f"{file}: expected the weights of this model, but {len(unlike)} of {len(wanted)} "
            f"tensors are missing or of another shape, such as {unlike[0]}"
        )
    model.load_state_dict(there)


class _OfTransformers(nn.Module):
    """The last hidden state of a transformers model; without a CLS token, what it pools."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = getattr(model, "vision_model", model)  # of images and text, that of images
        self.prefix = 0
        accepted = inspect.signature(self.model.forward).parameters
        # Learned positions on another grid than that of training.
        interpolates = "interpolate_pos_encoding" in accepted
        self.options = {"interpolate_pos_encoding": True} if interpolates else {}
        # CLIP gives its tokens before the last norm, and CLS alone after it.
        is_clip = self.model.config.model_type == "clip_vision_model"
        self.last_norm = self.model.post_layernorm if is_clip else nn.Identity()

    def forward(self, images: Tensor) -> Features:
        output = self.model(images, **self.options)
        hidden = self.last_norm(output.last_hidden_state)
        if hidden.ndim == 3 and self.prefix:
            return Features(hidden[:, 0], hidden[:, 1 : self.prefix], hidden[:, self.prefix :])
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        pooled = pooled.flatten(1)
        return Features(pooled, pooled[:, None, :][:, :0], hidden)


def _of_transformers(text: str, channels: int) -> Backbone:
    """From a folder that `save_pretrained` wrote, or a name on the hub.

    Raises:
        ValueError: transformers is not there, this is no vision model, or its files hold code.
    """
    transformers = _package("transformers")
    try:
        model = transformers.AutoModel.from_pretrained(
            str(Path(text).expanduser()), trust_remote_code=False, use_safetensors=True
        )
        wrapped = _OfTransformers(model.float().eval())
        config = wrapped.model.config
        stride, wrapped.prefix = _strides(wrapped, config)
    except UNOPENED as error:
        raise ValueError(f"transformers:{text} cannot be opened: {_first_line(error)}") from error
    if config.num_channels != channels:
        raise ValueError(
            f"transformers:{text} takes images of {config.num_channels} channels, and those of "
            f"this run have {channels}"
        )
    stated = _preprocessor(text)
    return Backbone(wrapped, stride, _statistics(stated, "image_mean", "image_std", channels))


@torch.no_grad()
def _strides(wrapped: _OfTransformers, config: Any) -> tuple[int, int]:
    """(pixels of a patch's side, tokens before the patches), as one image shows them."""
    side = getattr(config, "image_size", 224)
    side = side if isinstance(side, int) else side[0]
    hidden = wrapped(torch.zeros(1, config.num_channels, side, side)).patches
    if hidden.ndim == 4:
        return side // hidden.shape[2], 0
    tokens = hidden.shape[1]
    patch = getattr(config, "patch_size", side)
    patch = patch if isinstance(patch, int) else patch[0]
    prefix = tokens - (side // patch) ** 2
    if prefix >= 0:
        return patch, prefix
    rows = math.isqrt(tokens)  # a pyramid: its last patches are larger than its first
    return side // rows, tokens - rows**2


def _preprocessor(text: str) -> Mapping[str, Any]:
    """What stands beside a transformers model of its images; empty: nothing."""
    base = importlib.import_module("transformers.image_processing_base")
    try:
        return base.ImageProcessingMixin.get_image_processor_dict(text)[0]
    except (OSError, ValueError):
        return {}


PACKAGES: Mapping[str, Callable[[str, int], Backbone]] = {
    "timm": _of_timm,
    "transformers": _of_transformers,
}


def _package(name: str) -> Any:
    """A package that is asked for because somebody named it.

    Raises:
        ValueError: it is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        reason = _first_line(error)
        raise ValueError(
            f"a teacher {name}:NAME needs the package {name}, which cannot be imported here "
            f"({reason}); install it with: pip install {name}"
        ) from error


def _statistics(
    stated: Mapping[str, Any], mean: str, std: str, channels: int
) -> ImageStatistics | None:
    """What a model says of its images, where it says it of as many channels."""
    values = [stated.get(key) for key in (mean, std)]
    if not all(isinstance(value, list | tuple) and len(value) == channels for value in values):
        return None
    return ImageStatistics(*(tuple(map(float, value)) for value in values))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
