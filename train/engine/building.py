"""The networks a run begins with: built by its recipe, from weights or at random, by its seed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from dinov3core.checkpoints import load_weights
from dinov3core.models import ConvNeXtSettings, ImageStatistics, ProjectionHead
from dinov3core.models.convnext import STAGES
from dinov3core.models.networks import Networks
from dinov3core.models.presets import Backbone, BackboneSettings, backbone_of
from dinov3core.train.engine import parallel
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.provenance import dotted

# Fields of a backbone's settings that change nothing of what it computes in use.
IN_TRAINING_ALONE = {"drop_path", "rope.shift", "rope.jitter", "rope.rescale", "rope.draw"}
DIFFERING_IN_DEPTH = IN_TRAINING_ALONE | {"depth", "depths", "init_std", "map_stride"}
ANOTHER_NETWORK = (
    "leave out the backbone fields that differ (the recipe adapt has the network of the weights), "
    "or give weights of the network of this recipe"
)


@contextmanager
def construction(what: str) -> Iterator[None]:
    """Around what is made from a recipe: whatever goes wrong there is an error of the recipe.

    Raises:
        ConfigError: instead of the error of a module that cannot be made.
    """
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{what} of this recipe cannot be built: {reason}") from error


def seed_for(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Make every draw that follows a function of these four numbers.

    A step draws for stochastic depth and RoPE augmentation.

    Args:
        part: the number of the micro-batch.
    """
    state = np.random.SeedSequence([seed, step, rank, part]).generate_state(2, np.uint32)
    torch.manual_seed((int(state[0]) << 31) ^ int(state[1]))


@construction("a network")
def build_backbone(recipe: Pretrain) -> Backbone:
    """A freshly initialised backbone; the same on every process, as it depends on run.seed alone.

    What is drawn next on this process is so, too.
    """
    torch.manual_seed(recipe.run.seed)
    backbone = backbone_of(recipe.backbone)
    if recipe.run.init:
        load_initial(backbone, recipe)
    backbone.statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
    return backbone


@construction("a network")
def build_networks(recipe: Pretrain) -> Networks:
    """A freshly initialised student, with its heads; the same on every process."""
    backbone = build_backbone(recipe)
    dino = ProjectionHead(backbone.width, recipe.dino)
    ibot = ProjectionHead(backbone.width, recipe.ibot)
    return Networks(backbone, dino, ibot)


def load_initial(backbone: Backbone, recipe: Pretrain) -> None:
    """The weights of run.init, for the channels of this run, and a word on how they came.

    Raises:
        ConfigError: when they do not fit.
    """
    statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
    rgb_channels = recipe.run.rgb_channels
    try:
        report = load_weights(
            backbone,
            recipe.run.init,
            adapt_input=True,
            rgb_channels=rgb_channels,
            statistics=statistics,
            remedy=ANOTHER_NETWORK,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"run.init: {error}") from error
    if parallel.is_first():
        print(report, file=sys.stderr)


def load_backbone(backbone: Backbone, path: str, field: str) -> None:
    """Load weights of any known layout into a Gram teacher.

    Raises:
        ConfigError: naming the configuration field, when they do not fit it.
    """
    try:
        load_weights(backbone, path, remedy="a Gram teacher has the backbone of its run")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from error


# --- layers of a teacher


def layer_complaints(student: BackboneSettings, teacher: BackboneSettings) -> Iterator[str]:
    """Why a student cannot begin with layers of a teacher: one sentence for everything.

    Both have to be the same network but for the number of blocks, of which the student has no more,
    in a ConvNeXt in each stage.
    """
    instead = "let it start at random, or from weights with run.init"
    if type(student) is not type(teacher):
        yield (
            f"the student is a {_kind(student)} and the teacher a {_kind(teacher)}, whose layers "
            f"do not fit; {instead}"
        )
        return

    of_teacher = dict(dotted(teacher))
    for name, value in dotted(student):
        if name in DIFFERING_IN_DEPTH:
            continue
        other = of_teacher[name]
        if name == "layer_scale" and value and other:  # the scales themselves are weights
            continue
        if value != other:
            yield (
                f"backbone.{name} is {value} and that of the teacher {other}, so that its layers "
                f"do not fit; give both the same, or {instead}"
            )

    pairs = zip(_blocks(student), _blocks(teacher), strict=True)
    if any(count > layers for count, layers in pairs):
        yield (
            f"the student has {_in_row(student)} blocks and the teacher {_in_row(teacher)}; give "
            f"it at most as many, or {instead}"
        )


def begin_with_layers(
    student: Backbone, teacher: Backbone, start: Literal["first", "spaced"]
) -> None:
    """Fill a student with layers of a teacher: its first ones, or evenly spaced ones.

    Evenly spaced ones include the first and, of several, the last. Everything beside the blocks is
    the teacher's: tokens, patch embedding, final norms, in a ConvNeXt stem and reductions.

    Raises:
        ConfigError: `layer_complaints`.
    """
    for complaint in layer_complaints(student.settings, teacher.settings):
        raise ConfigError(f"start {start}: {complaint}")
    names = _names_of_layers(student.settings, teacher.settings, start)
    tensors = teacher.state_dict()
    filled = {}
    for name in student.state_dict():
        block = next((block for block in names if name.startswith(f"{block}.")), None)
        of_teacher = name if block is None else names[block] + name.removeprefix(block)
        filled[name] = tensors[of_teacher]
    student.load_state_dict(filled)


def _names_of_layers(
    student: BackboneSettings, teacher: BackboneSettings, start: Literal["first", "spaced"]
) -> dict[str, str]:
    """The name of every block of a student, and that of the teacher's block it begins as."""
    names = {}
    for part, count, layers in zip(
        _parts(student), _blocks(student), _blocks(teacher), strict=True
    ):
        chosen = range(count) if start == "first" else _spaced(count, layers)
        names |= {f"{part}.{block}": f"{part}.{layer}" for block, layer in enumerate(chosen)}
    return names


def _spaced(count: int, layers: int) -> list[int]:
    """`count` of the numbers below `layers` at equal steps, rounded, first and last included."""
    if count == 1:
        return [0]
    return [(2 * place * (layers - 1) + count - 1) // (2 * (count - 1)) for place in range(count)]


def _kind(settings: BackboneSettings) -> str:
    return "ConvNeXt" if isinstance(settings, ConvNeXtSettings) else "ViT"


def _parts(settings: BackboneSettings) -> list[str]:
    """How the names of blocks begin, for each sequence of them."""
    if isinstance(settings, ConvNeXtSettings):
        return [f"stages.{stage}" for stage in range(STAGES)]
    return ["blocks"]


def _blocks(settings: BackboneSettings) -> tuple[int, ...]:
    """How many blocks each of `_parts` has."""
    return settings.depths if isinstance(settings, ConvNeXtSettings) else (settings.depth,)


def _in_row(settings: BackboneSettings) -> str:
    return "-".join(map(str, _blocks(settings)))
