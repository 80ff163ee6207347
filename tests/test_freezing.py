"""Heads train alone on a backbone held still, then it joins over a ramp.

Run as a script, this file is one of two processes.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it off the path

import pytest
import torch
from tiny_runs import differences, made_up_batch, snapshot, tiny_recipe
from torch import nn
from two_processes import joined, run_ranks

from dinov3core.checkpoints import save_weights
from dinov3core.models import VisionTransformer
from dinov3core.train.engine import optim
from dinov3core.train.engine.config import ConfigError, Pretrain
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.provenance import phases
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
FROZEN = 2  # of the 8 steps of a tiny run
RAMP = 3


def freezing(folder: Path, **run: object) -> Pretrain:
    """The tiny recipe from weights in `folder`: heads alone for 2 steps, a ramp of 3, then 3."""
    recipe = tiny_recipe()
    file = folder / "weights.safetensors"
    if not file.exists():
        torch.manual_seed(1)
        save_weights(VisionTransformer(recipe.backbone), file)
    settings = replace(recipe.optim, freeze_backbone_epochs=FROZEN / 8, unfreeze_epochs=RAMP / 8)
    return replace(recipe, optim=settings, run=replace(recipe.run, init=str(file), **run))


def steps(trainer: Trainer, *numbers: int) -> None:
    for step in numbers:
        batch = made_up_batch(trainer.recipe, 4, seed=step)
        assert trainer.step(batch, step).finite


def parts_of(names: list[str]) -> set[str]:
    """ "student.backbone", "optimizer.dino_head" and so on."""
    return {".".join(name.split(".")[:2]) for name in names}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_backbone_stays_to_the_last_bit_while_heads_train(
    tmp_path: Path, accumulation: int
) -> None:
    """Its weights in student and teacher, and its optimizer state, which there is none of yet."""
    trainer = Trainer(freezing(tmp_path, accumulation=accumulation), ALONE)
    before = snapshot(trainer)
    steps(trainer, *range(FROZEN))
    heads = ("dino_head", "ibot_head")
    assert parts_of(differences(before, snapshot(trainer))) == {
        f"{owner}.{head}" for owner in ("student", "teacher", "optimizer") for head in heads
    }
    steps(trainer, FROZEN)
    after = parts_of(differences(before, snapshot(trainer)))
    assert {"student.backbone", "teacher.backbone", "optimizer.backbone"} <= after


def test_no_activation_of_a_backbone_held_still_is_kept(tmp_path: Path) -> None:
    """What autograd keeps for the backward pass, in bytes."""

    def kept(trainer: Trainer, step: int) -> int:
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            steps(trainer, step)
        return total

    trainer = Trainer(freezing(tmp_path), ALONE)
    assert kept(trainer, 0) < kept(trainer, FROZEN) / 4


def test_the_rate_of_the_backbone_grows_along_a_line(tmp_path: Path) -> None:
    resolved = resolve(freezing(tmp_path), 1)
    assert resolved.frozen_steps == FROZEN
    shares = resolved.schedules["backbone_share"].tolist()
    assert shares == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])
    assert "backbone_share" not in resolve(tiny_recipe(), 1).schedules

    trainer = Trainer(freezing(tmp_path), ALONE)
    now = resolved.at(FROZEN)
    rates = (now["lr"], now["last_layer_lr"], now["weight_decay"], now["backbone_share"])
    optim.set_rates(trainer.optimizer, *rates)
    for group in trainer.optimizer.param_groups:
        share = 1 / 3 if group["is_backbone"] else 1
        assert group["lr"] == pytest.approx(now["lr"] * share * group["lr_multiplier"])


@pytest.mark.parametrize("stop", [1, FROZEN, 3, 6], ids=["alone", "seam", "ramp", "full"])
def test_a_run_continues_to_the_last_bit_in_every_phase(tmp_path: Path, stop: int) -> None:
    """Weights and optimizer state carried over into a new trainer, as a checkpoint does."""
    straight = Trainer(freezing(tmp_path), ALONE)
    steps(straight, *range(8))

    first = Trainer(freezing(tmp_path), ALONE)
    steps(first, *range(stop))
    resumed = Trainer(freezing(tmp_path), ALONE)
    for name, module in resumed.modules().items():
        module.load_state_dict(first.modules()[name].state_dict())
    carried = {name: tensor for name, tensor in snapshot(first).items() if "optimizer" in name}
    for name, parameter in resumed.student.named_parameters():
        state = {
            key: carried[f"optimizer.{name}.{key}"].clone()
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{name}.{key}" in carried
        }
        if state:
            resumed.optimizer.state[parameter] = state
    resumed.counters.gram_updates = first.counters.gram_updates
    steps(resumed, *range(stop, 8))
    assert not differences(snapshot(straight), snapshot(resumed))


def test_a_compiled_run_freezes_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    options = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **given: compile_module(self, **given | options)
    )
    torch._dynamo.reset()
    trainer = Trainer(freezing(tmp_path, compile=True), ALONE)
    before = snapshot(trainer)
    steps(trainer, *range(FROZEN))
    assert "student.backbone" not in parts_of(differences(before, snapshot(trainer)))
    steps(trainer, FROZEN)
    assert "student.backbone" in parts_of(differences(before, snapshot(trainer)))


def test_two_processes_freeze_as_one(tmp_path: Path) -> None:
    freezing(tmp_path)
    run_ranks(Path(__file__), tmp_path)


def main() -> None:
    with joined() as world:
        recipe = freezing(Path(sys.argv[1]))
        # Sinkhorn spans the processes; KoLeo and the masks' weights are per process as it stands.
        trainer = Trainer(recipe, world)
        for step in range(8):
            batch = made_up_batch(recipe, 4, seed=2 * step + world.rank)
            assert trainer.step(batch, step).finite
            moved = trainer.optimizer.state.get(trainer.student.backbone.cls_token)
            assert bool(moved) == (step >= FROZEN), step
        for name, tensor in sorted(snapshot(trainer).items()):
            lowest = world.minimum(tensor.double())
            assert torch.equal(lowest, -world.minimum(-tensor.double())), name


def test_words_and_sentences(tmp_path: Path) -> None:
    recipe = freezing(tmp_path)
    assert phases(resolve(recipe, 1)) == [
        "heads alone for 2 steps, then the backbone as well: its rate grows over 3 steps, and 3 "
        "follow at the full rate"
    ]
    assert phases(resolve(tiny_recipe(), 1)) == []
    forever = replace(recipe, optim=replace(recipe.optim, freeze_backbone_epochs=9.0))
    assert phases(resolve(forever, 1)) == [
        "heads alone for 8 steps, which is all of them: the backbone stays as it is"
    ]
    nothing = replace(recipe, run=replace(recipe.run, init=""))
    with pytest.raises(ConfigError, match=r"^optim\.freeze_backbone_epochs .* give --run\.init"):
        resolve(nothing, 1)


if __name__ == "__main__":
    main()
