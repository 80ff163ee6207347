"""ConvNeXt: recorded outputs and gradients, stages, stochastic depth, the interface of the ViT."""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from golden_cases import compare, gradients, read_cases, scalar_of

from dinov3core.models import ConvNeXt, ConvNeXtSettings, build

TINY = ConvNeXtSettings(depths=(1, 1, 2, 1), widths=(8, 12, 20, 28))


def test_recorded_cases():
    folder = os.environ.get("DINOV3CORE_GOLDEN")
    if not folder:
        pytest.skip("set DINOV3CORE_GOLDEN to the folder of recorded cases")
    cases = [case for case in read_cases(Path(folder)) if case.kind == "convnext_forward"]
    assert cases
    for case in cases:
        s = case.settings
        settings = ConvNeXtSettings(s["depths"], s["widths"], map_stride=s["pseudo_patch_size"])
        model = ConvNeXt(settings).eval()
        model.load_state_dict(case.under("param."))
        images = case["in.image"]
        tokens = model.forward_features(images)
        scalar_of(
            case, {"x_norm_clstoken": tokens.cls, "x_norm_patchtokens": tokens.patches}
        ).backward()
        got = {
            "out.forward_default": model(images),
            "out.x_norm_clstoken": tokens.cls,
            "out.x_norm_patchtokens": tokens.patches,
            "out.x_prenorm": tokens.prenorm,
        }
        for stage, found in enumerate(model.features(images, layers=range(4))):
            got |= {
                f"out.stage{stage}_norm_map": found.patches,
                f"out.stage{stage}_norm_cls": found.cls,
            }
        raw = model.get_intermediate_layers(images, 2, return_class_token=True, norm=False)
        for index, (patches, cls) in enumerate(raw):
            got |= {f"out.last2_{index}_raw_tokens": patches, f"out.last2_{index}_raw_cls": cls}
        compare(case, got | gradients(model))
        assert tokens.registers.shape == (len(images), 0, model.width)


def test_strides_and_widths_of_the_stages():
    found = ConvNeXt(TINY).features(torch.rand(2, 3, 64, 96), layers=4)
    assert [tuple(f.patches.shape) for f in found] == [
        (2, 8, 16, 24),
        (2, 12, 8, 12),
        (2, 20, 4, 6),
        (2, 28, 2, 3),
    ]
    lined_up = ConvNeXt(replace(TINY, map_stride=16)).features(torch.rand(2, 3, 64, 96), layers=4)
    assert {tuple(f.patches.shape[2:]) for f in lined_up} == {(4, 6)}


def test_transposing_images_and_kernels_transposes_the_map():
    model = ConvNeXt(replace(TINY, in_channels=5)).double().eval()
    images = torch.rand(1, 5, 64, 96, dtype=torch.float64)
    upright = model.features(images)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
    turned = model.features(images.transpose(2, 3))
    torch.testing.assert_close(turned.patches.transpose(2, 3), upright.patches)
    torch.testing.assert_close(turned.cls, upright.cls)


def test_features_agree_with_the_forward_pass():
    model = ConvNeXt(TINY).eval()
    images = torch.rand(2, 3, 70, 100)
    tokens, found = model.forward_features(images), model.features(images, reshape=False)
    torch.testing.assert_close(found.patches, tokens.patches)
    torch.testing.assert_close(found.cls, model(images))
    raw = model.features(images, reshape=False, norm=False)
    torch.testing.assert_close(raw.patches, tokens.prenorm)
    assert model.features(images, fit="pad").patches.shape == (2, 28, 3, 4)
    two = model.forward_features([images, images[:, :, :32, :32]])
    torch.testing.assert_close(two[0].cls, tokens.cls)


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    model = ConvNeXt(replace(TINY, drop_path=0.5, layer_scale=0.5))
    block = model.stages[3][0]
    assert block.drop_path == 0.5
    x = torch.rand(4000, 28, 1, 1)
    branch = block.eval()(x) - x
    dropped = block.train()(x) - x
    kept = dropped.flatten(1).abs().sum(1) > 0
    assert abs(kept.double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    torch.testing.assert_close(dropped[kept], 2 * branch[kept], rtol=1e-4, atol=1e-6)


def test_final_norm_has_two_names_and_one_tensor():
    model = ConvNeXt(TINY)
    assert model.norms[3] is model.norm
    assert {"norm.weight", "norms.3.weight"} <= model.state_dict().keys()
    assert "norms.3.weight" not in dict(model.named_parameters())


def test_a_step_on_thirteen_channels_trains_every_parameter():
    model = ConvNeXt(replace(TINY, in_channels=13))
    model(torch.rand(2, 13, 32, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_refusals():
    model = ConvNeXt(TINY)
    with pytest.raises(ValueError, match=r"masks: expected bool \[1, 4\] for 64 x 64 px and p"):
        model.forward_features(torch.rand(1, 3, 64, 64), torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected \\[B, 3, H, W\\]"):
        model(torch.rand(1, 4, 64, 64))
    with pytest.raises(ValueError, match="at least 32 px"):
        model(torch.rand(1, 3, 31, 64))
    with pytest.raises(ValueError, match="multiples of 32"):
        model.features(torch.rand(1, 3, 70, 64), fit="strict")
    with pytest.raises(ValueError, match="expected 4 stages"):
        ConvNeXt(ConvNeXtSettings((1, 1), (8, 8)))
    with pytest.raises(ValueError, match="layer indices from 0 to 3"):
        build("convnext_tiny").features(torch.rand(1, 3, 32, 32), layers=[4])
