"""A range of processes as a world: its collectives, gradients and checkpoints are its own.

Run as a script, this file is one of three processes, in ranges of two and of one.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import made_up_batch, snapshot, tiny_recipe, with_run
from torch import Tensor
from two_processes import joined, run_ranks

from dinov3core.train.engine import checkpoint
from dinov3core.train.engine.accumulation import micro_batches
from dinov3core.train.engine.checkpoint import Contents, Kept
from dinov3core.train.engine.config import Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

RANGES = ((0, 2), (2, 3))
IMAGES = 4
SECONDS = 120  # a collective that waits for a process outside its range would wait for ever
ALONE = World(0, 1, torch.device("cpu"))


def recipe_of(first: int, past: int) -> Pretrain:
    """Of the range: two blocks in one, three in the other."""
    recipe = with_run(tiny_recipe(), batch_size=IMAGES // (past - first))
    return replace(recipe, gram=None, backbone=replace(recipe.backbone, depth=2 + first // 2))


def trained(world: World, first: int, past: int) -> Trainer:
    """After two steps on the same images, whoever shares them."""
    recipe = recipe_of(first, past)
    trainer = Trainer(recipe, world)
    for step in range(2):
        whole = made_up_batch(recipe, IMAGES, seed=step)
        mine = micro_batches(whole, world.size, world.device)[world.rank].batch
        trainer.step(mine, step)
    return trainer


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    run_ranks(Path(__file__), folder, processes=3, timeout=SECONDS)
    return folder


@pytest.mark.parametrize("ranks", RANGES)
def test_a_range_trains_as_it_would_alone(out: Path, ranks: tuple[int, int]) -> None:
    want = snapshot(trained(ALONE, *ranks))
    for rank in range(*ranks):
        got = load_file(out / f"rank{rank}.safetensors")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_processes_of_a_range_stay_equal(out: Path) -> None:
    first, second = (load_file(out / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("ranks", RANGES)
def test_the_checkpoint_of_a_range_is_whole_for_anybody(out: Path, ranks: tuple[int, int]) -> None:
    whole = checkpoint.newest_whole(out / f"range{ranks[0]}", ALONE)
    assert whole is not None
    trainer = Trainer(with_run(recipe_of(*ranks), batch_size=IMAGES), ALONE)
    checkpoint.load(whole, contents_of(trainer), ALONE)
    got = load_file(out / f"rank{ranks[0]}.safetensors")
    assert all(torch.equal(tensor, got[name]) for name, tensor in snapshot(trainer).items())


def contents_of(trainer: Trainer) -> Contents:
    return Contents(trainer.modules(), trainer.optimizer, {})


def check_collectives(world: World, part: World, first: int) -> None:
    """The range of one does none of what the other does: nobody outside takes part."""
    mine = torch.tensor([world.rank, -world.rank])
    members = range(first, first + part.size)
    for _ in range(1 + part.size):  # another number of times in each
        assert part.total(mine).tolist() == [sum(members), -sum(members)]
        assert part.minimum(mine).tolist() == [members[0], -members[-1]]
        assert part.from_main(f"from {world.rank}") == f"from {first}"
        assert part.gather_texts([str(world.rank)]) == [str(rank) for rank in members]
        part.wait_for_main()
        part.barrier()


def main(out: Path) -> None:
    with joined() as world:
        parts = {ranks: world.part(*ranks) for ranks in RANGES}
        assert world.part(0, 3) is world
        ((first, past), part), *others = [item for item in parts.items() if item[1] is not None]
        assert not others
        assert (part.rank, part.size, part.is_main) == (
            world.rank - first,
            past - first,
            world.rank == first,
        )
        check_collectives(world, part, first)
        trainer = trained(part, first, past)
        checkpoint.save(out / f"range{first}", 2, contents_of(trainer), {}, part, Kept(1))
        tensors: dict[str, Tensor] = {
            name: value.contiguous() for name, value in snapshot(trainer).items()
        }
        world.wait_for_main()
    save_file(tensors, out / f"rank{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
