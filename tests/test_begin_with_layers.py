"""A student that begins with layers of its teacher: which ones, and what does not fit."""

from dataclasses import replace

import pytest
import torch

from dinov3core.models import ConvNeXtSettings, RopeSettings, VitSettings
from dinov3core.models.presets import backbone_of
from dinov3core.train.engine.building import begin_with_layers
from dinov3core.train.engine.config import ConfigError

VIT = VitSettings(width=32, depth=6, heads=2, patch_size=8, untie_cls_norm=True)
CONVNEXT = ConvNeXtSettings((2, 1, 5, 3), (8, 8, 12, 16))


def begun(student, teacher, start):
    """Student and teacher with random weights, the student then filled."""
    torch.manual_seed(1)
    models = backbone_of(student), backbone_of(teacher)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.normal_()
    begin_with_layers(*models, start)
    return models


@pytest.mark.parametrize(
    ("depth", "start", "layers"),
    [
        (3, "first", [0, 1, 2]),
        (3, "spaced", [0, 3, 5]),
        (2, "spaced", [0, 5]),
        (1, "spaced", [0]),
        (5, "spaced", [0, 1, 3, 4, 5]),
        (6, "spaced", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_vit_takes_the_layers_asked_for_and_all_else(
    depth: int, start: str, layers: list
) -> None:
    of_student = replace(
        VIT, depth=depth, drop_path=0.1, layer_scale=0.3, rope=RopeSettings(rescale=2.0)
    )
    student, teacher = begun(of_student, VIT, start)
    tensors = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name.startswith("blocks."):
            _, block, inner = name.split(".", 2)
            name = f"blocks.{layers[int(block)]}.{inner}"
        assert torch.equal(tensor, tensors[name]), name
    assert student.blocks[0].attn.qkv.weight is not teacher.blocks[0].attn.qkv.weight


@pytest.mark.parametrize(("start", "third"), [("first", [0, 1, 2]), ("spaced", [0, 2, 4])])
def test_a_convnext_takes_them_in_each_stage(start: str, third: list[int]) -> None:
    of_student = replace(CONVNEXT, depths=(1, 1, 3, 3))
    student, teacher = begun(of_student, CONVNEXT, start)
    layers = [[0], [0], third, [0, 1, 2]]
    tensors = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name.startswith("stages."):
            _, stage, block, inner = name.split(".", 3)
            name = f"stages.{stage}.{layers[int(stage)][int(block)]}.{inner}"
        assert torch.equal(tensor, tensors[name]), name


def test_all_layers_are_the_teacher_itself() -> None:
    student, teacher = begun(VIT, VIT, "spaced")
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(student.eval()(images), teacher.eval()(images))


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (replace(VIT, width=64), VIT, r"backbone.width is 64 and that of the teacher 32, so that"),
        (replace(VIT, registers=0), VIT, r"backbone.registers is 0 and that of the teacher 4, so"),
        (replace(VIT, heads=4), VIT, r"backbone.heads is 4 and that of the teacher 2, so that its"),
        (replace(VIT, layer_scale=0.0), VIT, r"backbone.layer_scale is 0.0 and that of the teache"),
        (replace(VIT, depth=7), VIT, r"the student has 7 blocks and the teacher 6; give it at mos"),
        (
            replace(CONVNEXT, depths=(1, 2, 3, 3)),
            CONVNEXT,
            r"the student has 1-2-3-3 blocks and the teacher 2-1-5-3; give it at most as many, or",
        ),
        (
            replace(CONVNEXT, widths=(8, 8, 12, 8)),
            CONVNEXT,
            r"backbone.widths is \(8, 8, 12, 8\) and that of the teacher \(8, 8, 12, 16\), so",
        ),
        (
            CONVNEXT,
            VIT,
            r"the student is a ConvNeXt and the teacher a ViT, whose layers do not fit",
        ),
        (
            VIT,
            CONVNEXT,
            r"the student is a ViT and the teacher a ConvNeXt, whose layers do not fit",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(student, teacher, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^start spaced: {sentence}"):
        begun(student, teacher, "spaced")
