"""Gradients do not depend on how a batch is cut: over processes, over micro-batches, or over both.

KoLeo searches the whole batch, Sinkhorn balances it, the masks are the same. Run as a script, this
file is one of the processes and saves the gradients it ends with.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import made_up_batch, tiny_recipe, with_run
from torch import Tensor
from two_processes import PROCESSES, joined, run_ranks

from dinov3core.data.batch import Batch
from dinov3core.train.engine import optim
from dinov3core.train.engine.accumulation import micro_batches
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

IMAGES = 8
TOLERANCE = 1e-5  # of the largest entry; float32 sums in another order: 1e-6 seen


@contextmanager
def keeping_gradients() -> Iterator[dict[str, Tensor]]:
    """The gradients of a step, as the optimizer would see them without clipping."""
    gradients: dict[str, Tensor] = {}

    def keep(student, norms, max_norm) -> None:
        gradients.update(
            {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        )

    with patch.object(optim, "clip_gradients", keep):
        yield gradients


def gradients_of(
    recipe: Pretrain, batch: Batch, world: World
) -> tuple[dict[str, Tensor], dict[str, float]]:
    trainer = Trainer(recipe, world)
    with keeping_gradients() as gradients:
        report = trainer.step(batch, 0)
    return gradients, report.values


def recipe_for(processes: int, accumulation: int) -> Pretrain:
    return with_run(tiny_recipe(), batch_size=IMAGES // processes, accumulation=accumulation)


def whole_batch(seed: int) -> Batch:
    return made_up_batch(tiny_recipe(), IMAGES, seed)


def alone(recipe: Pretrain, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    return gradients_of(recipe, batch, World(0, 1, torch.device("cpu")))


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the largest entry of the tensor (or a thousandth of the
    largest of all).
    """
    assert got.keys() == want.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in want.values())
    return max(
        (
            float((got[name] - want[name]).abs().max()) / max(float(want[name].abs().max()), floor),
            name,
        )
        for name in want
    )


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], dict[str, float]]:
    """One process, one pass over the whole batch."""
    return alone(recipe_for(1, 1), whole_batch(0))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_pass(reference, accumulation: int) -> None:
    got, values = alone(recipe_for(1, accumulation), whole_batch(0))
    error, name = worst(got, reference[0])
    assert error <= TOLERANCE, (name, error)
    assert values == pytest.approx(reference[1], rel=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients of two processes with half the batch each, by variant; both processes end with the
    same ones.
    """
    out = tmp_path_factory.mktemp("parity")
    run_ranks(Path(__file__), out)
    first, second = (load_file(out / f"rank{rank}.safetensors") for rank in range(PROCESSES))
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    variants: dict[str, dict[str, Tensor]] = {}
    for name, tensor in first.items():
        variant, key = name.split("/")
        variants.setdefault(variant, {})[key] = tensor
    return variants


VARIANTS = {
    "accumulation 1": lambda: recipe_for(PROCESSES, 1),
    "accumulation 2": lambda: recipe_for(PROCESSES, 2),
    "KoLeo apart": lambda: replace(
        recipe_for(PROCESSES, 1), loss=replace(tiny_recipe().loss, koleo_distributed=False)
    ),
}


@pytest.mark.parametrize("variant", ["accumulation 1", "accumulation 2"])
def test_two_processes_equal_one(reference, two_processes, variant: str) -> None:
    error, name = worst(two_processes[variant], reference[0])
    assert error <= TOLERANCE, (name, error)


def test_the_comparison_notices_a_statistic_of_half_the_batch(reference, two_processes) -> None:
    error, _ = worst(two_processes["KoLeo apart"], reference[0])
    assert error > 1000 * TOLERANCE


def main(out: Path) -> None:
    with joined() as world:
        batch = micro_batches(whole_batch(0), PROCESSES, world.device)[world.rank].batch
        results = {
            f"{variant}/{name}": gradient.contiguous()
            for variant, recipe in VARIANTS.items()
            for name, gradient in gradients_of(recipe(), batch, world)[0].items()
        }
    save_file(results, out / f"rank{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
