"""Runners of golden cases: the terms of the objective and the centering, in one process and in two.

They call what the training step calls: the functions of dinov3core.losses, the masks of
dinov3core.data, Sinkhorn. Run as a script (`golden_losses.py FOLDER OUT` in each of two processes),
this file computes every two-process case once and saves the results of this process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from golden_cases import Case, compare, read_cases
from safetensors.torch import save_file
from torch import Tensor
from two_processes import joined

from dinov3core.data.masks import locate
from dinov3core.losses import (
    CropPairs,
    dino_losses,
    gram_anchor_loss,
    ibot_loss,
    koleo_per_crop,
)
from dinov3core.ops import sinkhorn

NEGATIVES = {"none": "keep", "remove_neg": "clip", "remove_only_teacher_neg": "clip_teacher"}


def run_gram_loss(case: Case) -> None:
    s = case.settings
    student = case["in.student"].requires_grad_()
    loss = gram_anchor_loss(
        student,
        case["in.teacher"],
        None,
        normalize=s["l2_normalise"],
        per_image=s["per_image"],
        negatives=NEGATIVES[s["negatives"]],
    )
    loss.backward()
    compare(case, {"out.loss": loss, "grad_in.student": student.grad})


def run_koleo(case: Case) -> None:
    student = case["in.student"].requires_grad_()
    (loss,) = koleo_per_crop(student[None], topk=case.settings["top_k"])
    loss.backward()
    compare(case, {"out.loss": loss, "grad_in.student": student.grad})


def run_dino_cls_loss(case: Case) -> None:
    s = case.settings
    logits_SBK = case["in.student_logits"].requires_grad_()
    batch = logits_SBK.shape[1]
    (loss,) = dino_losses(
        logits_SBK.flatten(0, 1),
        case["in.teacher_probs"].flatten(0, 1),
        [CropPairs(s["student_crops"], s["teacher_crops"], s["skip_same_crop"])],
        torch.arange(batch),
        batch,
        temperature=s["student_temperature"],
    )
    loss.backward()
    compare(case, {"out.loss": loss, "grad_in.student_logits": logits_SBK.grad})


def run_ibot_masked_loss(case: Case) -> None:
    logits = case["in.student_logits"].requires_grad_()
    masks = case["in.masks"]
    located = locate(masks)
    rows = len(located.mask_indices)  # what follows is padding
    weights = located.mask_weights
    if case.settings["weight_given"]:
        weights = case["in.masks_weight"]
    loss = ibot_loss(
        logits[:rows],
        case["in.teacher_probs"][:rows],
        weights,
        len(masks),
        temperature=case.settings["student_temperature"],
    )
    loss.backward()
    compare(case, {"out.loss": loss, "grad_in.student_logits": logits.grad})


def run_ibot_dense_loss(case: Case) -> None:
    """The term written over all patches: its value is that over the masked ones."""
    logits_NPK = case["in.student_logits"].requires_grad_()
    masks = case["in.masks"]
    located = locate(masks)
    loss = ibot_loss(
        logits_NPK.flatten(0, 1)[located.mask_indices],
        case["in.teacher_probs"].flatten(0, 1)[located.mask_indices],
        located.mask_weights,
        len(masks),
        temperature=case.settings["student_temperature"],
    )
    loss.backward()
    compare(case, {"out.loss": loss, "grad_in.student_logits": logits_NPK.grad})


def run_sinkhorn(case: Case) -> None:
    compare(case, sinkhorn_results(case, 0), ignored=not_ours(case))


def not_ours(case: Case) -> list[str]:
    """The caller's count of rows: the recorded code overwrote it, ours takes no count."""
    return [name for name in case.tensors if name.endswith("count_tensor_after_call")]


def sinkhorn_results(case: Case, rank: int) -> dict[str, Tensor]:
    s = case.settings
    assignment = sinkhorn(
        case[f"in.rank{rank}.logits"], s["temperature"], iterations=s["iterations"]
    )
    return {f"out.rank{rank}.assignment": assignment.dense()}


def koleo_results(case: Case, rank: int) -> dict[str, Tensor]:
    s = case.settings
    student = case[f"in.rank{rank}.student"].requires_grad_()
    (loss,) = koleo_per_crop(
        student[None], topk=s["top_k"], group=dist.group.WORLD, group_size=s["loss_group_size"]
    )
    loss.backward()
    return {f"out.rank{rank}.loss": loss.detach(), f"grad_in.rank{rank}.student": student.grad}


RUNNERS = {
    "dino_cls_loss": run_dino_cls_loss,
    "gram_loss": run_gram_loss,
    "ibot_dense_loss": run_ibot_dense_loss,
    "ibot_masked_loss": run_ibot_masked_loss,
    "koleo": run_koleo,
    "sinkhorn_cls": run_sinkhorn,
    "sinkhorn_ibot": run_sinkhorn,
}
TWO_PROCESS_RUNNERS = {
    "koleo": koleo_results,
    "sinkhorn_cls": sinkhorn_results,
    "sinkhorn_ibot": sinkhorn_results,
}


def main(folder: Path, out: Path) -> None:
    cases = [c for c in read_cases(folder) if c.kind in TWO_PROCESS_RUNNERS and c.across_processes]
    with joined() as world:
        results = {
            f"{case.name}/{name}": tensor.contiguous()
            for case in cases
            for name, tensor in TWO_PROCESS_RUNNERS[case.kind](case, world.rank).items()
        }
    save_file(results, out / f"rank{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
