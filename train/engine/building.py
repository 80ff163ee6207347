"""The networks a run begins with: built by its recipe, from weights or at random, by its seed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dinov3core.checkpoints import load_weights
from dinov3core.models import ImageStatistics, ProjectionHead
from dinov3core.models.networks import Networks
from dinov3core.models.presets import Backbone, backbone_of
from dinov3core.train.engine import parallel
from dinov3core.train.engine.config import ConfigError, Pretrain

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
def build_networks(recipe: Pretrain) -> Networks:
    """A freshly initialised student; the same on every process, as it depends on run.seed alone."""
    torch.manual_seed(recipe.run.seed)
    backbone = backbone_of(recipe.backbone)
    if recipe.run.init:
        load_initial(backbone, recipe)
    backbone.statistics = ImageStatistics(recipe.crops.mean, recipe.crops.std)
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
