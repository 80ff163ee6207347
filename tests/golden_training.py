"""Runners of golden cases: schedules, parameter groups and whole steps of the trainer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from golden_cases import Case, compare, gradients, relative_error
from golden_losses import NEGATIVES
from golden_models import build_vit
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3core.data.batch import Batch
from dinov3core.data.crops import CropSettings
from dinov3core.data.masks import MaskSettings, locate
from dinov3core.models import HeadSettings, ProjectionHead, Tokens, VitSettings
from dinov3core.models.networks import NetworkOutput, Networks
from dinov3core.train.engine import optim
from dinov3core.train.engine.config import (
    Data,
    Ema,
    File,
    GramAnchor,
    Loss,
    Optim,
    Pretrain,
    Run,
    Teacher,
)
from dinov3core.train.engine.objective import (
    Objective,
    Targets,
    anchor_loss,
    anchor_patches,
)
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.resolved import resolve
from dinov3core.train.engine.schedules import CosineSchedule, PhasedSchedule, constant
from dinov3core.train.engine.teacher import update_ema
from dinov3core.train.engine.trainer import StepReport, Trainer

ALONE = World(0, 1, torch.device("cpu"))
SUBMODULES = ("backbone", "dino_head", "ibot_head")  # of the reference, each clipped by itself


def bare_recipe() -> Pretrain:
    """A recipe whose parts the cases below replace."""
    return Pretrain(
        "golden",
        VitSettings(),
        HeadSettings(),
        HeadSettings(),
        Loss(),
        CropSettings(),
        MaskSettings(),
        Data(),
        Optim(),
        Teacher(),
        Run(),
    )


def run_schedule(case: Case) -> None:
    """Warm-up without its end, cosine with both ends, constant tail."""
    s = case.settings

    def phases(name: str) -> PhasedSchedule:
        p = s[name]
        return PhasedSchedule(
            p["start"], p["peak"], p["end"], p["warmup_epochs"], p.get("cosine_epochs", -1)
        )

    compare_schedules(
        case,
        Optim(
            lr=phases("lr"),
            lr_scaling=s["lr_scaling_rule"],
            weight_decay=phases("weight_decay"),
            freeze_last_layer_epochs=s["lr"]["freeze_last_layer_epochs"],
        ),
        Teacher(momentum=phases("teacher_momentum"), temperature=phases("teacher_temperature")),
    )


def run_schedule_old_style(case: Case) -> None:
    """Warm-up with its end, cosine without."""
    s = case.settings
    extra = s["truncation_extra"]
    temperature = s["teacher_temperature"]
    warm = s["warmup_teacher_temperature_epochs"]
    compare_schedules(
        case,
        Optim(
            lr=CosineSchedule(
                s["lr"], s["min_lr"], warmup_epochs=s["warmup_epochs"], truncate_extra=extra
            ),
            lr_scaling=s["lr_scaling_rule"],
            weight_decay=CosineSchedule(
                s["weight_decay"], s["weight_decay_end"], truncate_extra=extra
            ),
            freeze_last_layer_epochs=s["freeze_last_layer_epochs"],
        ),
        Teacher(
            momentum=CosineSchedule(s["momentum"], s["momentum_end"], truncate_extra=extra),
            temperature=CosineSchedule(
                temperature, temperature, start=s["warmup_teacher_temperature"], warmup_epochs=warm
            ),
        ),
    )


def compare_schedules(case: Case, optimizer: Optim, teacher: Teacher) -> None:
    s = case.settings
    run = Run(
        epochs=s["epochs"], epoch_steps=s["iterations_per_epoch"], batch_size=s["batch_per_process"]
    )
    recipe = replace(bare_recipe(), optim=optimizer, teacher=teacher, run=run)
    schedules = resolve(recipe, s["processes"]).schedules
    at = case["in.iterations"]
    names = {"teacher_momentum": "momentum"}
    recorded = ("lr", "last_layer_lr", "weight_decay", "teacher_momentum", "teacher_temperature")
    compare(
        case,
        {
            f"out.{name}": torch.from_numpy(schedules[names.get(name, name)])[at]
            for name in recorded
        },
    )


def run_parameter_groups(case: Case) -> None:
    """Multipliers by parameter name, and how many share them; heads have no layer-wise decay."""
    s = case.settings
    recorded = case.json()["groups"]
    modules = {name: rules for name, rules in recorded.items() if isinstance(rules, dict)}
    assert modules
    for module, rules in modules.items():
        depth = s["vit_depth"] if any(name.startswith("blocks.") for name in rules) else None
        shared: Counter[tuple] = Counter()
        for name, want in rules.items():
            got = optim.multipliers(name, depth, s["layerwise_decay"], s["patch_embed_lr_mult"])
            assert abs(got.lr - want["lr_multiplier"]) < 1e-12, (module, name, got, want)
            assert got.weight_decay == want["wd_multiplier"], (module, name, got, want)
            assert got.is_last_layer == want["is_last_layer"], (module, name, got, want)
            shared[round(got.lr, 12), got.weight_decay, got.is_last_layer] += 1
        fused = recorded[f"{module}__fused_groups"]
        assert shared == {
            (round(g["lr_multiplier"], 12), g["wd_multiplier"], g["is_last_layer"]): g["tensors"]
            for g in fused
        }


@dataclass
class Observed:
    """What a step computed on its way."""

    student: list[NetworkOutput] = field(default_factory=list)
    targets: list[Targets] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)


def run_train_step(case: Case) -> None:
    """A whole step of the trainer: losses, targets, logits, gradients, then optimizer and EMA."""
    trainer = make_trainer(case)
    with observing(trainer) as seen:
        report = trainer.step(batch_of(case), case.settings["iteration"])
    compare(case, step_results(case, report, seen) | seen.gradients)
    check_clipping(case, seen.clipped)
    if case.settings["optimizer_step_recorded"]:
        check_after(case, trainer, seen.clipped)
        check_optimizer(case)


def batch_of(case: Case) -> Batch:
    return Batch(
        case["in.collated_global_crops"],
        case["in.collated_local_crops"],
        case.tensors.get("in.collated_gram_teacher_crops"),
        case["in.collated_masks"],
        case["in.mask_indices_list"],
        case["in.masks_weight"],
        positions=range(case.settings["samples"]),
    )


def make_trainer(case: Case) -> Trainer:
    s = case.settings
    initial = load_networks(case, "student")
    with TemporaryDirectory() as folder:
        trainer = Trainer(step_recipe(case, Path(folder)), ALONE, initial)
    trainer.teacher.load_state_dict(load_networks(case, "teacher").state_dict())
    assert trainer.method.objective.global_crops == s["global_crops"]
    return trainer


def load_networks(case: Case, which: str) -> Networks:
    return networks_of(
        case.settings["backbone"], case.settings["heads"], case.under(f"param.{which}.")
    )


def networks_of(backbone_settings: dict, heads: dict, weights: dict[str, Tensor]) -> Networks:
    """A backbone and two heads by the settings of a case, with these weights."""
    backbone = build_vit(backbone_settings)
    projections = [
        ProjectionHead(
            backbone.width,
            HeadSettings(
                heads[f"{kind}_prototypes"],
                hidden=heads["hidden_dim"],
                bottleneck=heads["bottleneck_dim"],
                layers=heads["layers"],
            ),
        )
        for kind in ("dino", "ibot")
    ]
    networks = Networks(backbone, *projections)
    networks.load_state_dict(weights, strict=True)
    return networks


def step_recipe(case: Case, folder: Path) -> Pretrain:
    """The recipe of a step; `folder` gets the weights of a Gram teacher of its own."""
    s = case.settings
    losses = s["losses"]
    optimizer = s["optimizer"]
    reweight = losses["local_loss_reweight"]
    return replace(
        bare_recipe(),
        backbone=VitSettings(patch_size=s["backbone"]["patch_size"]),
        dino=HeadSettings(prototypes=s["heads"]["dino_prototypes"]),
        ibot=HeadSettings(prototypes=s["heads"]["ibot_prototypes"]),
        loss=Loss(
            dino_weight=losses["dino_weight"],
            ibot_weight=losses["ibot_weight"],
            koleo_weight=losses["koleo_weight"],
            koleo_distributed=losses["koleo_distributed"],
            koleo_topk=losses["koleo_topk"],
            student_temperature=losses["student_temperature"],
            sinkhorn_iterations=losses["sinkhorn_iterations"],
            skip_same_crop=losses["skip_same_crop_in_global"],
            local_weight=constant(1.0 if reweight is None else reweight),
        ),
        gram=gram_of(case, folder),
        crops=CropSettings(
            global_size=s["global_size"],
            local_size=s["local_size"],
            global_count=s["global_crops"],
            local_count=s["local_crops"],
        ),
        optim=Optim(
            lr=constant(optimizer["lr"]),
            lr_scaling="none",
            weight_decay=constant(optimizer["weight_decay"]),
            beta1=optimizer["beta1"],
            beta2=optimizer["beta2"],
            eps=optimizer["eps"],
            clip=optimizer["clip_max_norm_per_submodule"],
            layer_decay=optimizer["layerwise_decay"],
            patch_embed_lr=optimizer["patch_embed_lr_mult"],
            freeze_last_layer_epochs=0.0 if optimizer["last_layer_lr"] else 1.0,
        ),
        teacher=Teacher(
            momentum=constant(s["ema_momentum"]),
            temperature=constant(losses["teacher_temperature"]),
        ),
        run=Run(batch_size=s["samples"], epochs=1, epoch_steps=s["iteration"] + 1),
    )


def gram_of(case: Case, folder: Path) -> GramAnchor | None:
    settings = case.settings["losses"]["gram"]
    if settings is None:
        return None
    teacher: Ema | File = Ema()
    if settings["teacher"] != "ema teacher":
        teacher = File(str(folder / "gram_teacher.safetensors"))
        save_file(case.under("param.gram_teacher.backbone."), teacher.path)
    return replace(
        compared_as(settings),
        teacher=teacher,
        weight=constant(settings["weight"]),
        crop_size=case.settings["gram_teacher_size"],
    )


def compared_as(settings: dict) -> GramAnchor:
    """What the settings of a Gram term say about how patches are compared."""
    return GramAnchor(
        tokens=settings["tokens"],
        normalize=settings["l2_normalise"],
        per_image=settings["per_image"],
        negatives=NEGATIVES[settings["negatives"]],
    )


@contextmanager
def observing(trainer: Trainer) -> Iterator[Observed]:
    """Record the student's output, the targets, and the gradients before and after clipping."""
    seen = Observed()
    targets = Objective.targets
    clip = optim.clip_gradients

    def recording_targets(*args, **options) -> Targets:
        seen.targets.append(targets(*args, **options))
        return seen.targets[-1]

    def recording_clip(student: nn.Module, norms: dict[str, Tensor], max_norm: float) -> None:
        seen.gradients = {
            name: g.clone() for name, g in gradients(student, "grad.student.").items()
        }
        clip(student, norms, max_norm)
        seen.clipped = {name: g.clone() for name, g in gradients(student, "student.").items()}

    hook = trainer.student.register_forward_hook(
        lambda module, inputs, output: seen.student.append(output)
    )
    with (
        patch.object(Objective, "targets", recording_targets),
        patch.object(optim, "clip_gradients", recording_clip),
    ):
        yield seen
    hook.remove()


def step_results(case: Case, report: StepReport, seen: Observed) -> dict[str, Tensor]:
    s = case.settings
    values = {name: torch.tensor(value) for name, value in report.values.items()}
    (student,) = seen.student
    (targets,) = seen.targets
    rows = s["global_crops"] * s["samples"]
    global_logits = student.cls_logits[:rows]
    local_logits = student.cls_logits[rows:]
    reweight = s["losses"]["local_loss_reweight"]
    results = {
        "total_loss": values["loss"],
        "dino_global_crops_loss": values["dino_global"],
        "dino_local_crops_loss": values["dino_local"],
        "dino_local_loss_weight": torch.tensor(1.0 if reweight is None else reweight),
        "ibot_loss": values["ibot"],
        "koleo_loss": values["koleo"],
        "student_global_cls_logits": global_logits.unflatten(0, (-1, s["samples"])),
        "student_local_cls_logits": local_logits.unflatten(0, (-1, s["samples"])),
        "student_masked_patch_logits": student.patch_logits,
        "teacher_cls_assignment": targets.cls.dense().unflatten(0, (-1, s["samples"])),
        "teacher_masked_patch_assignment": targets.patches.dense(),
        **{f"{name}_grad_norm": values[f"grad_norm_{name}"] for name in SUBMODULES},
    }
    if s["losses"]["gram"] is not None:
        results |= {
            "gram_loss": values["gram"],
            "gram_loss_weight": torch.tensor(s["losses"]["gram"]["weight"]),
        }
        results |= gram_statistics(case, student, targets)
    return {f"out.{name}": value for name, value in results.items()}


def gram_statistics(case: Case, student: NetworkOutput, targets: Targets) -> dict[str, Tensor]:
    """The Gram loss of masked and of unmasked patches, which the recorded run logged as well."""
    gram = replace(compared_as(case.settings["losses"]["gram"]), per_image=False)
    return {
        f"stats_only.{tokens}_gram_loss": anchor_loss(
            replace(gram, tokens=tokens), student.patches, targets.gram, batch_of(case)
        )
        for tokens in ("masked", "unmasked")
    }


class Recorded(nn.Module):
    """A backbone whose patches were recorded."""

    def __init__(self, patches: Tensor, patch_size: int):
        super().__init__()
        self.patches = patches
        self.patch_size = patch_size
        self.width = patches.shape[2]

    def forward_features(self, images: Tensor) -> Tokens:
        none = self.patches[:, :0]
        return Tokens(none, none, self.patches, none)


def run_gram_highres(case: Case) -> None:
    """The Gram term where the teacher's patches lie on another grid: resized, then compared."""
    s = case.settings
    gram = replace(compared_as(s), resize=s["resize"], antialias=s["resize_antialias"])
    student = case["in.student_patches"].requires_grad_()
    size = s["patch_size"]
    side = s["student_grid"] * size + s["surplus_pixels"]
    gram_side = s["teacher_grid"] * size + s["surplus_pixels"]
    batch = Batch(
        torch.empty(s["crops"], 3, side, side),
        torch.empty(0),
        torch.empty(s["crops"], 3, gram_side, gram_side),
        *locate(case["in.masks"]),
        positions=range(s["crops"]),
    )
    teacher = Recorded(case["in.teacher_patches"], size)
    anchor = anchor_patches(gram, teacher, batch, Recorded(student, size))
    loss = anchor_loss(gram, student, anchor, batch)
    loss.backward()
    results = {"out.resized_teacher_patches": anchor, "out.gram_loss": loss}
    compare(case, results | {"grad_in.student_patches": student.grad})


def check_clipping(case: Case, clipped: dict[str, Tensor]) -> None:
    """What the optimizer saw: each sub-module's gradients, cut to the recorded largest norm.

    Adam divides gradients by their size, so the parameters after one step tell nothing of it.
    """
    limit = case.settings["optimizer"]["clip_max_norm_per_submodule"]
    norms = {name: float(case[f"out.{name}_grad_norm"]) for name in SUBMODULES}
    assert max(norms.values()) > limit  # or there would be nothing to see
    wanted = {
        name: case[f"grad.{name}"] * min(1.0, limit / norms[name.split(".")[1]]) for name in clipped
    }
    for name, want in wanted.items():
        error = relative_error(clipped[name], want, wanted.values())
        assert error <= case.tolerance["grad"], f"{case.name}: {name} clipped: error {error:.3g}"


def check_after(
    case: Case, trainer: Trainer, clipped: dict[str, Tensor], average: str = "teacher"
) -> None:
    """The parameters after the step; `average` is what the student's running average is called.

    Adam's first step divides a gradient by its own size, so that rounding of a tiny gradient moves
    a parameter by up to the learning rate either way. The bound is 0.05 lr where the clipped
    gradient is above 1e-5 of the largest one, else 2 lr. The teacher takes over 1 - momentum of it.
    """
    lr = case.settings["optimizer"]["lr"]
    largest = max(float(g.abs().max()) for g in clipped.values())
    states = {"student": trainer.student.state_dict(), average: trainer.teacher.state_dict()}
    wanted = case.under("after.")
    for name, want in wanted.items():
        which, key = name.split(".", 1)
        bound = torch.where(clipped[f"student.{key}"].abs() > 1e-5 * largest, 0.05 * lr, 2 * lr)
        if which == average:
            bound = (1 - case.settings["ema_momentum"]) * bound + torch.finfo(
                torch.float32
            ).eps * want.abs()
        excess = (states[which][key] - want).abs() - bound
        assert float(excess.max()) <= 0, (
            f"{case.name}: after.{name} is off by {float(excess.max()):.3g} beyond its bound"
        )
    assert {name.split(".")[0] for name in wanted} == states.keys()


def check_optimizer(case: Case, average: str = "teacher") -> None:
    """Clipping, AdamW and EMA alone, from the recorded gradients; agreement: `beyond_step`."""
    s = case.settings["optimizer"]
    student = load_networks(case, "student")
    teacher = load_networks(case, average)
    for name, parameter in student.named_parameters():
        parameter.grad = case[f"grad.student.{name}"].clone()
    norms = optim.gradient_norms(student)
    optim.clip_gradients(student, norms, s["clip_max_norm_per_submodule"])
    groups = optim.param_groups(student, s["layerwise_decay"], s["patch_embed_lr_mult"])
    adamw = optim.make_adamw(groups, (s["beta1"], s["beta2"]), s["eps"])
    optim.set_rates(adamw, s["lr"], s["last_layer_lr"], s["weight_decay"])
    adamw.step()
    update_ema(teacher, student, case.settings["ema_momentum"])
    for which, networks in (("student", student), (average, teacher)):
        for name, parameter in networks.named_parameters():
            excess = beyond_step(parameter.detach(), case[f"after.{which}.{name}"], s["lr"])
            place = f"{case.name}: {which}.{name}"
            assert excess <= 0, f"{place} differs by {excess / s['lr']:.3g} lr more than it may"


def beyond_step(got: Tensor, want: Tensor, lr: float) -> float:
    """By how much two results differ beyond the larger of 1e-4 lr and one ulp of the value.

    A value near 1 moves in steps of 1.2e-7: more than 1e-4 of a learning rate of 1e-3.
    """
    size = want.abs()
    ulp = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return float(((got - want).abs() - ulp.clamp(min=1e-4 * lr)).max())


RUNNERS = {
    "gram_highres": run_gram_highres,
    "parameter_groups": run_parameter_groups,
    "schedule": run_schedule,
    "schedule_old_style": run_schedule_old_style,
    "train_step": run_train_step,
}
