"""Pretrain a backbone: `python train/pretrain.py [recipe] [--field.subfield value ...]`.

With several processes: `torchrun --nproc-per-node 8 train/pretrain.py [recipe] ...`. Without
arguments the quick start runs: built-in images, any machine. `--help` lists the recipes, and
`<recipe> --help` every field with its default.

`--stages all` runs the recipe and then those that continue it, such as quickstart, quickstart_gram
and quickstart_highres. Options count for all of them; `--run.out`, `--run.from`, `--run.take` and
`--run.init` for the first one. The same command goes on where a stopped one was.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file: the checkout's root, not train/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

from dinov3core.train.engine import command_line, parallel
from dinov3core.train.engine.chain import Stage, pretrain_chain
from dinov3core.train.engine.closing import closing, closing_of_chain
from dinov3core.train.engine.command_line import ChosenRecipe, Ending
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.provenance import Origin
from dinov3core.train.recipes.registry import (
    RECIPES,
    chosen,
    following,
    in_folder_of_its_images,
)

ENDING = Ending(
    writing="writing into the run folder",
    remains="the same command continues the run",
    interrupted="stopped before the run began",
)

STAGES = "--stages"
NOTE = f"{STAGES} all: run the recipes that continue this one as well, each from the run before it."


def parse(argv: list[str]) -> Pretrain:
    """The recipe a command line asks for; with `--stages all`, the first one."""
    words, _ = _without_stages(argv)
    return _chosen(words).recipe


def _chosen(argv: list[str]) -> ChosenRecipe[Pretrain]:
    both = chosen(argv, __doc__ or "", NOTE)
    return both._replace(recipe=in_folder_of_its_images(*both))


def _without_stages(argv: Sequence[str]) -> tuple[list[str], bool]:
    """A command line without `--stages all`, and whether that was there."""
    words = list(argv)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option != STAGES:
            continue
        end = place + 1 if equals else place + 2
        value = value if equals else " ".join(words[place + 1 : end])
        if value != "all":
            raise ConfigError(
                f"{STAGES}: expected all, got {value!r}; for one stage alone give its name: "
                "python train/pretrain.py quickstart_gram"
            )
        return words[:place] + words[end:], True
    return words, False


def stages_of(argv: list[str]) -> Iterator[Stage]:
    """The recipe of a command line (without `--stages`), and after it those that continue it.

    Each comes with the command line that runs it alone.
    """
    asked = chosen(argv)
    first = asked.standard.name
    options = argv[1:] if argv[:1] == [first] else argv
    names = following(first)
    if not names:
        raise ConfigError(
            f"{STAGES} all: no recipe continues {first}; stages that are continued: "
            f"{', '.join(name for name in RECIPES if following(name))}"
        )
    recipe = in_folder_of_its_images(*asked)
    yield Stage(recipe, Origin([first, *options], asked.standard))

    out = asked.recipe.run.out
    for name in names:
        words = [name, *options]
        if out:
            words += ["--run.out", f"{out}_{name.rpartition('_')[2]}"]
        words += _of_the_first_alone(words, recipe.folder)
        recipe, standard = _chosen(words)
        yield Stage(recipe, Origin(words, standard))


def _of_the_first_alone(words: list[str], before: Path) -> list[str]:
    """Options after which a later stage starts from `before`, whatever was given for the first."""
    recipe, standard = _chosen(words)
    options = []
    if recipe.earlier != before:
        options += ["--run.from", str(before) if "/" in str(before) else f"./{before}"]
    if recipe.run.take != standard.run.take:
        options += ["--run.take", standard.run.take]
    if recipe.run.init:
        options += ["--run.init", ""]
    return options


def main(argv: list[str]) -> None:
    """Parse, train, say what came of it and where the report is."""
    words, through = _without_stages(argv)
    if through:
        return run_stages(words)
    recipe, standard = _chosen(words)
    summary = pretrain(recipe, argv=words, standard=standard)
    if summary:  # the main process
        print(closing(summary, recipe.folder))


def run_stages(argv: list[str]) -> None:
    """The same for the recipe of a command line and all that continue it."""
    runs = []
    for outcome in pretrain_chain(list(stages_of(argv))):
        runs.append((outcome.summary, outcome.folder))
        if outcome.summary and not outcome.was_finished:
            print(closing(*runs[-1]), flush=True)
    if parallel.is_first():
        print(closing_of_chain(runs))


def exit_status(argv: list[str]) -> int:
    """`main`, with every other end as a sentence; see `command_line.exit_status`."""
    return command_line.exit_status(main, argv, ENDING)


if __name__ == "__main__":
    command_line.run(main, ENDING)
