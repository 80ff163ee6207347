"""timm's DINOv3 models: the same numbers from the same weights, and the same outputs with our op
inside.
"""

import copy

import pytest
import torch

from dinov3core.checkpoints import load_model, load_weights, save_weights
from dinov3core.models import build

try:
    import timm

    from dinov3core.integrations import timm as integration
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
    pytest.skip(
        f"timm, which needs torchvision, cannot be imported here ({error})", allow_module_level=True
    )

VITS = {
    "mlp": ("vits16", dict(depth=2)),
    "swiglu": ("vits16plus", dict(depth=2)),
    "no qkv bias": ("vitb16", dict(depth=2, qkv_bias=False)),
    "7B": ("vit7b16", dict(depth=1, width=512, heads=4)),
    "four channels": ("vits16", dict(depth=1, in_channels=4)),
}
CONVNEXT = dict(depths=(1, 1, 2, 1), widths=(8, 12, 20, 28))


def noisy(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=VITS.values(), ids=VITS.keys())
def pair(request, tmp_path):
    """Our model and theirs, through a folder of ours."""
    name, arguments = request.param
    ours = noisy(build(name, **arguments))
    save_weights(ours, tmp_path, "timm")
    return ours, timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()


def images_for(ours):
    torch.manual_seed(1)
    return torch.randn(2, ours.in_channels, 64, 96)


def test_same_tokens_and_gradients(pair):
    ours, theirs = pair
    images = images_for(ours)
    tokens = ours.forward_features(images)
    got, want = (
        torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1),
        theirs.forward_features(images),
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        ours(images), theirs(images), rtol=0, atol=2e-5
    )  # both give the CLS token
    weights = torch.randn_like(want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for ours_at, theirs_at in (
        ("patch_embed.proj", "patch_embed.proj"),
        ("blocks.0.attn.proj", "blocks.0.attn.proj"),
    ):
        gradients = (
            ours.get_submodule(ours_at).weight.grad,
            theirs.get_submodule(theirs_at).weight.grad,
        )
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_their_state_dict_comes_back(pair, tmp_path):
    ours, theirs = pair
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = copy.deepcopy(ours)
    report = load_weights(model, tmp_path / "timm.pth")
    assert report.layout == "timm"
    torch.testing.assert_close(
        model(images_for(ours)), ours(images_for(ours)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"],
)
def test_full_width_model_of_theirs(tmp_path, name):
    theirs = noisy(timm.create_model(name, global_pool="token", depth=3))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = build("vits16plus" if "plus" in name else "vits16", depth=3).eval()
    load_weights(ours, tmp_path / "model.pth")
    images = torch.randn(1, 3, 224, 160)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images), theirs(images), rtol=0, atol=1e-4 * theirs(images).abs().max().item()
        )


def test_convnext(tmp_path):
    ours = noisy(build("convnext_tiny", **CONVNEXT))
    save_weights(ours, tmp_path, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=2e-5)
    assert load_model(tmp_path).model.statistics == ours.statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_keeps_outputs_within_the_models_own_noise(pair, dtype):
    ours, theirs = pair
    images = images_for(ours)
    with torch.no_grad():
        reference = copy.deepcopy(theirs).double().forward_features(images.double())
        theirs = theirs.to(dtype)

        def distance():
            return (
                (theirs.forward_features(images.to(dtype)).double() - reference).abs().max().item()
            )

        before, keys = distance(), theirs.state_dict().keys()
        assert integration.accelerate(integration.accelerate(theirs)) is theirs
        assert {type(block.attn) for block in theirs.blocks} == {integration.RopeEvaAttention}
        assert distance() <= 2 * before and theirs.state_dict().keys() == keys
        integration.restore(theirs)
        assert distance() == before


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"])
def test_accelerate_other_rotary_models(name):
    """These rotate neighbouring channels; EVA-02 projects q, k, v apart."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    with torch.no_grad():
        want = model.forward_features(images)
        got = integration.accelerate(model).forward_features(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_accelerated_gradients_and_compilation(pair):
    ours, theirs = pair
    images = images_for(ours)
    weights = torch.randn_like(theirs.forward_features(images))
    gradients = []
    for change in (integration.restore, integration.accelerate):
        change(theirs).zero_grad()
        (theirs.forward_features(images) * weights).sum().backward()
        gradients.append(
            {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], want, rtol=1e-4, atol=1e-5 * want.abs().max().item() + 1e-6
        )
    with torch.no_grad():
        compiled = torch.compile(theirs, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), theirs(images), rtol=0, atol=2e-5)


def test_nothing_to_accelerate():
    with pytest.raises(
        ValueError, match="expected a model with timm's rotary attention inside, got Linear"
    ):
        integration.accelerate(torch.nn.Linear(2, 2))
