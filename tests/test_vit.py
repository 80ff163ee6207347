"""The vision transformer: packing, rectangles, channels, norms, stochastic depth, features."""

from dataclasses import replace

import pytest
import torch

from dinov3core.models import (
    HeadSettings,
    ProjectionHead,
    RopeSettings,
    VisionTransformer,
    VitSettings,
    build,
)
from dinov3core.models.layers import make_ffn, subset_size
from dinov3core.ops import rope_table
from dinov3core.ops.packing import PackedGroup, Packing

TINY = VitSettings(
    width=32,
    depth=2,
    heads=2,
    patch_size=4,
    registers=0,
    norm="layernorm",
    mask_k_bias=False,
    init_std=0.2,
    layer_scale=0.5,
)


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(replace(TINY, **overrides))


def test_packed_crop_sets_equal_separate_passes():
    model = tiny(registers=2).eval()
    large, small = torch.randn(3, 3, 16, 24), torch.randn(5, 3, 8, 8)
    mask = torch.rand(3, 24) < 0.4
    together = model.forward_features([large, small], [mask, None])
    for got, want in zip(
        together, [model.forward_features(large, mask), model.forward_features(small)], strict=True
    ):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_transposing_the_image_transposes_the_features_when_rope_is_symmetric():
    """A rectangle and its transpose agree once y and x swap in patch weights, q and k."""
    model = tiny(registers=1).eval()
    twin = tiny(registers=1).eval()
    twin.load_state_dict(model.state_dict())
    quarter = 32 // 2 // 4
    swap = (
        torch.arange(16).unflatten(0, (2, 2, quarter)).flip(1).flatten()
    )  # y and x frequencies of one head
    rows = torch.cat([head * 16 + swap for head in range(2)])
    with torch.no_grad():
        twin.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.mT)
        for block in twin.blocks:
            for third in (0, 1):
                block.attn.qkv.weight[third * 32 : third * 32 + 32] = block.attn.qkv.weight[
                    third * 32 + rows
                ]
    image = torch.randn(2, 3, 12, 28)
    got = twin.features(image.mT.contiguous())
    want = model.features(image)
    torch.testing.assert_close(got.cls, want.cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.patches, want.patches.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_channel_count_trains(channels):
    model = tiny(in_channels=channels)
    out = model.forward_features(torch.randn(2, channels, 8, 12), torch.rand(2, 6) < 0.5)
    (out.cls.square().mean() + out.patches.square().mean()).backward()
    assert model.patch_embed.proj.weight.grad.shape == (32, channels, 4, 4)
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_channels_and_too_small_images_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\], got \[1, 4, 8, 8\]"):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="hold no 4-px patch"):
        model(torch.randn(1, 3, 8, 3))
    with pytest.raises(ValueError, match=r"masks: expected bool \[1, 4\]"):
        model(torch.randn(1, 3, 8, 8), torch.zeros(1, 5, dtype=torch.bool))


def test_surplus_pixels_are_dropped():
    model = tiny().eval()
    image = torch.randn(1, 3, 11, 9)
    torch.testing.assert_close(model(image), model(image[..., :8, :8]))


@pytest.mark.parametrize(
    "images, rate, size", [(128, 0.3, 89), (512, 0.3, 358), (32, 0.4, 19), (2, 0.3, 1), (1, 0.9, 1)]
)
def test_subset_size_truncates(images, rate, size):
    assert subset_size(images, rate) == size


def test_stochastic_depth_touches_only_the_kept_rows():
    model = tiny(drop_path=0.5, depth=1).train()
    block = model.blocks[0]
    tokens = torch.randn(4 * 6, 32)
    sin = cos = torch.ones(5, 16)
    packing = Packing((PackedGroup(4, 6, sin, cos),), prefix=1, interleaved=False)
    block.mlp.requires_grad_(False)
    torch.nn.init.zeros_(block.ls2.gamma)
    out = block(tokens, packing)
    changed = (out != tokens).view(4, -1).any(1)
    assert changed.sum() == subset_size(4, 0.5) == 2
    whole = tokens + 2 * block.ls1(block.attn(block.norm1(tokens), packing))
    torch.testing.assert_close(out.view(4, -1)[changed], whole.view(4, -1)[changed])


def test_masked_key_bias_never_gets_a_gradient():
    model = tiny(mask_k_bias=True)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    grad = model.blocks[0].attn.qkv.bias.grad
    assert grad[32:64].eq(0).all() and grad[:32].ne(0).any() and grad[64:].ne(0).any()


def test_local_cls_norm_acts_on_the_second_crop_set_in_training_only():
    model = tiny(untie_local_cls_norm=True)
    torch.nn.init.constant_(model.local_cls_norm.bias, 5.0)
    views = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    trained = model.train().forward_features(views)
    evaluated = model.eval().forward_features(views)
    torch.testing.assert_close(trained[0].cls, evaluated[0].cls)
    assert (trained[1].cls - evaluated[1].cls).mean() > 4
    torch.testing.assert_close(trained[1].patches, evaluated[1].patches)


@pytest.mark.parametrize(
    "norms", [{}, {"untie_cls_norm": True, "untie_local_cls_norm": True}], ids=["one", "untied"]
)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("every_patch", [False, True])
def test_chosen_tokens_are_those_of_the_whole_pass(every_patch, drop_path, norms):
    model = tiny(drop_path=drop_path, layer_scale=0.5, registers=2, **norms).train()
    for norm in (model.norm, model.cls_norm, model.local_cls_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.bias)
    views = [torch.randn(4, 3, 8, 12), torch.randn(6, 3, 8, 8)]
    masks = [torch.rand(4, 6) < 0.4, None]
    rows = torch.arange(24) if every_patch else masks[0].flatten().nonzero()[:, 0]

    def gradients(tokens):
        loss = sum((t * (1 + i)).square().sum() for i, t in enumerate(tokens))
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in found]

    torch.manual_seed(3)
    whole = model.forward_features(views, masks)
    want = [whole[0].cls, whole[1].cls, whole[0].patches.flatten(0, 1)[rows]]
    torch.manual_seed(3)
    chosen = model.forward_chosen(views, masks, None if every_patch else rows)
    got = [*chosen.cls, chosen.patches]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got), gradients(want), rtol=1e-4, atol=1e-5)


def test_rope_augmentation_draws_per_block_and_crop_set_in_training_only(monkeypatch):
    model = tiny(rope=RopeSettings(rescale=2.0))
    calls = []
    monkeypatch.setattr(
        "dinov3core.models.rope.rope_table", lambda *a, **k: calls.append(a) or rope_table(*a, **k)
    )
    views = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 12)]
    model.train().forward_features(views)
    assert len(calls) == 2 * len(model.blocks)
    calls.clear()
    model.eval().forward_features(views)
    model.forward_features(views)
    assert len(calls) == 2  # one table per grid, then cached


def test_cached_tables_follow_loaded_periods():
    model = tiny().eval()
    image = torch.randn(1, 3, 8, 8)
    before = model.features(image).patches
    state = model.state_dict()
    state["rope_embed.periods"] = state["rope_embed.periods"] * 1.5
    model.load_state_dict(state)
    assert not torch.equal(model.features(image).patches, before)


def test_intermediate_layers_are_ascending_and_normed():
    model = tiny(depth=3, registers=2).eval()
    image = torch.randn(2, 3, 8, 12)
    final = model.forward_features(image)
    first, last = model.features(image, layers=[2, 0], reshape=False)
    torch.testing.assert_close(last.patches, final.patches)
    torch.testing.assert_close(last.registers, final.registers)
    assert not torch.allclose(first.patches, last.patches)
    raw = model.features(image, norm=False, reshape=False)
    torch.testing.assert_close(raw.cls, final.prenorm[:, 0])
    assert model.features(image).patches.shape == (2, 32, 2, 3)
    patches, cls, registers = model.get_intermediate_layers(
        image, 1, return_class_token=True, return_extra_tokens=True
    )[0]
    torch.testing.assert_close(
        (patches, cls, registers), (final.patches, final.cls, final.registers)
    )
    with pytest.raises(ValueError, match="layers: expected 1 to 3"):
        model.features(image, layers=4)


@pytest.mark.parametrize(
    "kind, width, ratio, hidden",
    [
        ("mlp", 384, 4.0, 1536),
        ("swiglu", 384, 6.0, 1536),
        ("swiglu", 1024, 4.0, 2736),
        ("swiglu64", 4096, 3.0, 8192),
    ],
)
def test_feed_forward_widths(kind, width, ratio, hidden):
    with torch.device("meta"):
        ffn = make_ffn(kind, width, ratio, bias=True)
    assert next(ffn.parameters()).shape == (hidden, width)


@pytest.mark.parametrize(
    "name, parameters",
    [("vits16", 21_601_152), ("vits16plus", 28_697_472), ("vitl16", 303_154_176)],
)
def test_parameter_counts_of_released_sizes(name, parameters):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_head_normalises_its_bottleneck():
    settings = HeadSettings(40, hidden=24, bottleneck=8)
    head = ProjectionHead(16, settings)
    x = torch.randn(5, 16)
    torch.testing.assert_close(head.bottleneck(x).norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(head(x), head.bottleneck(x) @ head.last_layer.weight.T)
    assert isinstance(ProjectionHead(16, replace(settings, layers=1)).mlp, torch.nn.Linear)
