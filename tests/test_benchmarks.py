"""The plain baselines compute what ours computes, and the instruments of the benchmarks measure what they say."""

import copy

import pytest
import torch
from dinov3core.train.objective import Crops, GramTerm, Networks, Objective, StepWeights, split

from benchmarks import baselines
from dinov3core.models.head import ProjectionHead
from dinov3core.models.vit import VisionTransformer

WIDTH, HEADS, PATCH, REGISTERS = 32, 2, 8, 2


@pytest.fixture(scope="module")
def crops() -> Crops:
    torch.manual_seed(0)
    images, patches = 3, (32 // PATCH) ** 2
    masks = torch.rand(2 * images, patches) < 0.4
    masks[0] = False
    counts = masks.sum(1, keepdim=True).clamp(min=1).double()
    return Crops(
        torch.randn(2 * images, 3, 32, 32, dtype=torch.float64),
        torch.randn(4 * images, 3, 16, 16, dtype=torch.float64),
        None,
        masks,
        torch.nonzero(masks.flatten()).squeeze(1),
        (masks / counts)[masks],
    )


@pytest.fixture(scope="module")
def ours() -> Networks:
    torch.manual_seed(1)
    backbone = VisionTransformer(
        width=WIDTH, depth=2, heads=HEADS, patch_size=PATCH, registers=REGISTERS, norm="layernormbf16",
        mask_k_bias=True, layer_scale=0.5, init_std=0.2, rope_dtype=torch.float64,
    )  # fmt: skip
    heads = (ProjectionHead(WIDTH, 48, hidden=24, bottleneck=16, init_std=0.3) for _ in range(2))
    networks = Networks(backbone, *heads).double().train()
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            if "bias" in name or "token" in name:
                parameter.normal_(std=0.3)
    return networks


def _plain_step(ours: Networks, weights: baselines.Weights) -> baselines.Step:
    backbone = baselines.VisionTransformer(WIDTH, 2, HEADS, PATCH, REGISTERS, rope_dtype=torch.float64)
    heads = (baselines.Head(WIDTH, 24, 16, 48) for _ in range(2))
    student = baselines.Networks(backbone, *heads).double()
    state = {name: value for name, value in ours.state_dict().items() if "rope_embed" not in name}
    student.load_state_dict(state, strict=True)
    return baselines.Step(student, torch.optim.AdamW(student.parameters()), weights)


def test_the_plain_step_has_the_same_losses_and_gradients(ours: Networks, crops: Crops) -> None:
    plain = _plain_step(ours, baselines.Weights(local_crops=4, gram=0.7))
    total, found = plain.loss(crops)
    total.backward()

    objective = Objective(local_crops=4, gram=GramTerm())
    (part,) = split(crops, 2, 1)
    targets = objective.targets(plain_teacher(ours), [part], 0.07)
    output = ours(crops)
    terms = objective.terms(output, targets, part, 3)
    terms["koleo"] = objective.koleo(output.cls)
    our_total = objective.total(terms, StepWeights(gram=0.7))
    ours.zero_grad()
    our_total.backward()

    for name in ("dino_global", "dino_local", "ibot", "gram"):
        torch.testing.assert_close(found[name], terms[name], rtol=1e-9, atol=0, msg=name)
    torch.testing.assert_close(found["koleo"], terms["koleo"].sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(total, our_total, rtol=1e-9, atol=0)
    theirs = dict(plain.student.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-7, atol=1e-10, msg=name)


def plain_teacher(ours: Networks) -> Networks:
    return copy.deepcopy(ours).eval().requires_grad_(False)
