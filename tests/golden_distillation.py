"""Runners of golden cases of head-level distillation: a step of one student, several in processes.

They call what a distillation calls: the frozen teacher, the exchange, the pass that is shared, the
trainer. Run as a script (`golden_distillation.py FOLDER OUT` in each of several processes), this
file computes the cases of so many processes and saves the results of this process.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from golden_cases import Case, compare, gradients, read_cases
from golden_training import (
    ALONE,
    batch_of,
    check_after,
    check_clipping,
    check_optimizer,
    load_networks,
    networks_of,
    observing,
    step_recipe,
    step_results,
)
from safetensors.torch import save_file
from torch import Tensor
from two_processes import joined, part_of

from dinov3core.data.batch import Batch
from dinov3core.data.masks import BatchMasks
from dinov3core.models.networks import Networks
from dinov3core.train.engine import optim
from dinov3core.train.engine.accumulation import micro_batches
from dinov3core.train.engine.distillation.exchange import Exchange, Plan
from dinov3core.train.engine.distillation.heads import FrozenHeads, Share, SharedPass, Views
from dinov3core.train.engine.methods import HeadDistillation
from dinov3core.train.engine.objective import Objective, StepWeights
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

AVERAGE = "model_ema"  # what the running average of the student is called in recorded cases


def load_teacher(case: Case) -> FrozenHeads:
    s = case.settings
    weights = case.under("param.teacher.")
    networks = networks_of(s["teacher_backbone"], s["teacher_heads"], weights)
    return FrozenHeads(networks, case.name, "", torch.device("cpu"))


# --- one student


def run_distill_step(case: Case) -> None:
    """A whole step: losses, targets, logits, gradients, then optimizer and average of the student.

    The teacher is bit by bit what it was.
    """
    trainer = make_trainer(case)
    teacher = load_teacher(case)
    batch = batch_of(case)
    views = views_of(case, batch)
    exchange = Exchange(Plan.even(1, [(0, 1)], batch.images), ALONE)
    losses = case.settings["losses"]
    shared = SharedPass(teacher, exchange, ALONE, views, iterations=losses["sinkhorn_iterations"])
    share = shared(batch, case.settings["iteration"], losses["teacher_temperature"])
    with observing(trainer) as seen:
        report = trainer.step(share.batch, case.settings["iteration"], targets=share.targets)
    seen.targets.append(share.targets)

    logits = share.targets.cls.logits.unflatten(0, (-1, batch.images))
    results = step_results(case, report, seen) | {"out.teacher_global_cls_logits": logits}
    compare(case, results | seen.gradients)
    assert not seen.gradients["grad.student.backbone.mask_token"].any()
    check_clipping(case, seen.clipped)
    check_after(case, trainer, seen.clipped, AVERAGE)
    check_optimizer(case, AVERAGE)

    weights = teacher.networks.state_dict()
    assert all(torch.equal(weights[n], x) for n, x in case.under("param.teacher.").items())


def make_trainer(case: Case) -> Trainer:
    with TemporaryDirectory() as folder:
        recipe = step_recipe(case, Path(folder))
        method = HeadDistillation(recipe, ALONE)
        trainer = Trainer(recipe, ALONE, load_networks(case, "student"), method)
    trainer.teacher.load_state_dict(load_networks(case, AVERAGE).state_dict())
    return trainer


def views_of(case: Case, batch: Batch) -> Views:
    """With the masks of a batch."""
    s = case.settings
    masks = BatchMasks(batch.masks, batch.mask_indices, batch.mask_weights)
    patch_size = s["teacher_backbone"]["patch_size"]
    return Views(s["global_crops"], s["local_crops"], patch_size, lambda step: masks)


# --- several students, each in processes of its own


def multi_distill_results(case: Case, world: World) -> dict[str, Tensor]:
    """What this process computed, under the names it is recorded by."""
    s = case.settings
    plan = plan_of(case)
    (settings,) = [x for x in s["students"] if world.rank in range(*x["ranks_range"])]
    name = settings["name"]
    part = part_of(world, plan.ranges)
    exchange = Exchange(plan, world)
    teacher = load_teacher(case)
    student = networks_of(
        settings["backbone"], settings["heads"], case.under(f"param.{name}.student.")
    )

    in_rank = case.under(f"in.rank{world.rank}.")
    share = shared_pass(case, teacher, exchange, part, in_rank)
    of_rank = {
        **bottlenecks(case, teacher, exchange, in_rank),
        **share_results(case, share, part),
        **student_results(case, student, share),
    }
    results = {key.replace(".", f".rank{world.rank}.", 1): x for key, x in of_rank.items()}
    norms = mean_norms(student, part)
    if part.is_main:
        results |= {f"out.{name}.{module}_grad_norm": norm for module, norm in norms.items()}
    return results


def plan_of(case: Case) -> Plan:
    """Who loads what, without the images that the recorded run dropped in the end."""
    s = case.settings
    most = s["loaded_per_rank"]
    firsts = range(0, s["world"] * most, most)
    loaded = tuple(min(max(s["global_batch"] - first, 0), most) for first in firsts)
    assert s["world"] * most - sum(loaded) == s["images_dropped"]
    return Plan(loaded, tuple(tuple(student["ranks_range"]) for student in s["students"]))


def trained_on(crops: Tensor, case: Case, exchange: Exchange) -> Tensor:
    """Of crops [n * loaded, ...] of a process, those of images that anybody trains on."""
    numbers = exchange.plan.loads(exchange.world.rank)
    by_view = crops.unflatten(0, (-1, case.settings["loaded_per_rank"]))
    return by_view[:, : len(numbers)].flatten(0, 1)


def shared_pass(
    case: Case,
    teacher: FrozenHeads,
    exchange: Exchange,
    part: World,
    in_rank: dict[str, Tensor],
) -> Share:
    """What this process trains on."""
    s = case.settings
    none = torch.empty(0)
    loaded = Batch(
        trained_on(in_rank["collated_global_crops"], case, exchange),
        trained_on(in_rank["collated_local_crops"], case, exchange),
        None,
        *(none, none, none),
        positions=exchange.plan.loads(exchange.world.rank),
    )
    names = ("collated_masks", "mask_indices_list", "masks_weight")
    masks = BatchMasks(*(in_rank[name] for name in names))
    patch_size = s["teacher_backbone"]["patch_size"]
    views = Views(s["global_crops"], s["local_crops"], patch_size, lambda step: masks)
    iterations = s["losses"]["sinkhorn_iterations"]
    shared = SharedPass(teacher, exchange, part, views, iterations=iterations)
    return shared(loaded, 0, s["losses"]["teacher_temperature"])


def bottlenecks(
    case: Case, teacher: FrozenHeads, exchange: Exchange, in_rank: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of what this process loaded, and of what it trains on: of all patches, as recorded."""
    s = case.settings
    count = s["global_crops"]
    crops = in_rank["collated_global_crops"]
    before = teacher(crops).cls

    own = teacher(trained_on(crops, case, exchange))
    by_crop = own.patches.unflatten(0, (len(own.cls), in_rank["collated_masks"].shape[1]))
    patches = exchange.views("patch rows", by_crop, count)
    return {
        "out.own_cls_bottleneck_before": before.unflatten(0, (count, -1)),
        "out.teacher_cls_bottleneck": exchange.views("class rows", own.cls, count).unflatten(
            0, (count, -1)
        ),
        "out.teacher_patch_bottleneck": patches.unflatten(0, (count, -1)).flatten(1, 2),
    }


def share_results(case: Case, share: Share, part: World) -> dict[str, Tensor]:
    batch, targets = share
    assignment = targets.cls.dense()
    masked = torch.tensor([len(batch.mask_indices)])
    return {
        "exact.image_ids": torch.tensor(batch.positions),
        "exact.redistributed_global_crops": batch.global_crops,
        "exact.redistributed_local_crops": batch.local_crops,
        "exact.n_masked_patches_after": part.total(masked),
        "out.teacher_cls_assignment": assignment.unflatten(0, (case.settings["global_crops"], -1)),
        "out.teacher_masked_patch_assignment": targets.patches.dense(),
    }


def student_results(case: Case, student: Networks, share: Share) -> dict[str, Tensor]:
    """Losses and gradients of this process alone; the student sees its crops whole."""
    s = case.settings
    objective = objective_of(s)
    batch = share.batch
    (part,) = micro_batches(batch, 1, torch.device("cpu"))
    output = student.train()(batch.global_crops, batch.mask_indices, local_crops=batch.local_crops)
    terms = objective.terms(output, share.targets, part)
    losses = s["losses"]
    reweight = losses["local_loss_reweight"]
    total = objective.total(
        terms,
        StepWeights(
            dino=losses["dino_weight"],
            local=1.0 if reweight is None else reweight,
            ibot=losses["ibot_weight"],
            koleo=losses["koleo_weight"],
        ),
    )
    total.backward()

    of_global, of_local = output.cls_logits.split([len(batch.global_crops), len(batch.local_crops)])
    results = {
        "total_loss": total,
        "dino_global_crops_loss": terms["dino_global"],
        "dino_local_crops_loss": terms["dino_local"],
        "ibot_loss": terms["ibot"],
        "koleo_loss": terms["koleo"].mean(),
        "student_global_cls_logits": of_global.unflatten(0, (s["global_crops"], -1)),
        "student_local_cls_logits": of_local.unflatten(0, (s["local_crops"], -1)),
        "student_masked_patch_logits": output.patch_logits,
    }
    outputs = {f"out.{name}": value.detach() for name, value in results.items()}
    return outputs | gradients(student, "grad.student.")


def objective_of(settings: dict) -> Objective:
    losses = settings["losses"]
    return Objective(
        global_crops=settings["global_crops"],
        local_crops=settings["local_crops"],
        student_temperature=losses["student_temperature"],
        skip_same_crop=losses["skip_same_crop_in_global"],
        koleo_topk=losses["koleo_topk"],
    )


def mean_norms(student: Networks, part: World) -> dict[str, Tensor]:
    """Gradient norms of each sub-module after averaging over the student's processes."""
    for parameter in student.parameters():
        if parameter.grad is not None:
            parameter.grad = part.mean(parameter.grad)
    return optim.gradient_norms(student)


RUNNERS = {"distill_step": run_distill_step}
PROCESS_RUNNERS = {"multi_distill": multi_distill_results}


def main(folder: Path, out: Path) -> None:
    with joined() as world:
        cases = [
            case
            for case in read_cases(folder)
            if case.kind in PROCESS_RUNNERS and case.settings["world"] == world.size
        ]
        results = {
            f"{case.name}/{name}": tensor.contiguous()
            for case in cases
            for name, tensor in PROCESS_RUNNERS[case.kind](case, world).items()
        }
    save_file(results, out / f"rank{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
