"""The feature call: layers, norms, rectangles, the pad-or-crop rule, attention maps, channels end
to end.
"""

import pytest
import torch

from dinov3core.models import Features, build
from dinov3core.models.attention_maps import attention_maps
from dinov3core.models.outputs import fit_to_patches
from dinov3core.ops import reference

SMALL = dict(depth=3, width=48, heads=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build("vit_nano8", **SMALL, untie_cls_norm=True, mask_k_bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_one_layer_and_several(model, images):
    last = model.features(images)
    assert isinstance(last, Features)
    assert (
        last.cls.shape == (2, 48)
        and last.registers.shape == (2, 2, 48)
        and last.patches.shape == (2, 48, 3, 5)
    )
    both = model.features(images, layers=2)
    assert isinstance(both, tuple) and len(both) == 2
    torch.testing.assert_close(both[1].patches, last.patches)
    chosen = model.features(images, layers=[2, 0])
    torch.testing.assert_close(
        chosen[1].cls, last.cls
    )  # ascending depth, whatever the order asked for
    assert not torch.equal(chosen[0].cls, both[0].cls)


def test_norm_is_the_final_norm_of_every_layer(model, images):
    for normed, raw in zip(
        model.features(images, layers=3), model.features(images, layers=3, norm=False), strict=True
    ):
        torch.testing.assert_close(normed.cls, model.cls_norm(raw.cls))
        torch.testing.assert_close(normed.registers, model.cls_norm(raw.registers))
        torch.testing.assert_close(
            normed.patches.movedim(1, -1), model.norm(raw.patches.movedim(1, -1))
        )


def test_reshape_is_row_major(model, images):
    grid, flat = model.features(images), model.features(images, reshape=False)
    assert grid.patches.is_contiguous()
    torch.testing.assert_close(grid.patches[:, :, 1, 2], flat.patches[:, 1 * 5 + 2])
    torch.testing.assert_close(flat.patches, model.forward_features(images).patches)


def test_official_call(model, images):
    (patches,) = model.get_intermediate_layers(images)
    torch.testing.assert_close(patches, model.features(images, reshape=False).patches)
    found = model.get_intermediate_layers(
        images, [0, 2], True, return_class_token=True, return_extra_tokens=True
    )
    wanted = model.features(images, layers=[0, 2])
    for (patches, cls, registers), features in zip(found, wanted, strict=True):
        for got, want in zip((cls, registers, patches), features, strict=True):
            torch.testing.assert_close(got, want)
    assert len(model.get_intermediate_layers(images, 2, return_extra_tokens=True)[0]) == 2


def test_transposed_images_give_transposed_maps(model, images):
    upright = model.features(images)
    with (
        torch.no_grad()
    ):  # swap what the model knows of rows and columns: kernels, and the two halves of the periods
        model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.mT.clone())
        order = torch.arange(16).view(2, 2, 4).flip(1).flatten()  # [half, axis, period] of a head
        for block in model.blocks:
            qkv = block.attn.qkv
            for tensor in (qkv.weight, qkv.bias):
                heads = tensor.view(3, 3, 16, *tensor.shape[1:])
                heads[:2] = heads[:2, :, order].clone()
    turned = model.features(images.mT)
    torch.testing.assert_close(turned.patches.mT, upright.patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned.cls, upright.cls, rtol=1e-4, atol=1e-4)


def test_sides_off_the_patch_grid(model):
    images = torch.randn(1, 3, 30, 41)
    cropped, padded = model.features(images), model.features(images, fit="pad")
    assert cropped.patches.shape[2:] == (3, 5) and padded.patches.shape[2:] == (4, 6)
    torch.testing.assert_close(cropped.patches, model.features(images[:, :, :24, :40]).patches)
    with pytest.raises(ValueError, match="multiples of 8, got 30 x 41"):
        model.features(images, fit="strict")
    with pytest.raises(ValueError, match="expected one of"):
        model.features(images, fit="stretch")
    full = fit_to_patches(images, 8, "pad")
    assert torch.equal(full[:, :, :30, :41], images) and torch.equal(
        full[:, :, 31, 47], images[:, :, -1, -1]
    )


def test_attention_maps_are_the_weights_that_were_used(model, images):
    """The value-weighted sum of the maps, projected, is what the attention layer returned."""
    caught = {}
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(
            lambda m, args, out, index=index: caught.update({index: (args[0], out)})
        )
    model.features(images)
    for layer in range(3):
        queries = ["cls", 1, 2, (0, 0), (2, 4), (1, 3)]
        maps = attention_maps(model, images, layer=layer - 3, queries=queries)
        assert maps.prefix.shape == (2, 6, 3, 3) and maps.patches.shape == (2, 6, 3, 3, 5)
        weights = torch.cat([maps.prefix, maps.patches.flatten(3)], 3)
        torch.testing.assert_close(weights.sum(3), torch.ones(2, 6, 3))
        x, out = caught[layer]
        v = model.blocks[layer].attn.qkv(x).view(2, 18, 3, 3, 16)[:, :, 2]
        mixed = torch.einsum("bqhn,bnhd->bqhd", weights, v).flatten(2)
        rows = [0, 1, 2, 3, 3 + 14, 3 + 8]
        torch.testing.assert_close(
            model.blocks[layer].attn.proj(mixed), out.view(2, 18, 48)[:, rows]
        )


def test_attention_map_refusals(model, images):
    for query in ("patch", (3, 0), 18, -1, (0, 0, 0)):
        with pytest.raises(ValueError, match="expected 'cls', \\(row, column\\) within 3 x 5"):
            attention_maps(model, images, queries=[query])
    with pytest.raises(ValueError, match="layers: expected"):
        attention_maps(model, images, layer=3)


def test_bfloat16_features_stay_close_to_float32():
    """Cosine of every patch, random ViT-S blocks, 256 and 768 px."""
    torch.manual_seed(0)
    model = build("vits16", depth=4, layer_scale=1.0).eval()
    for side in (256, 768):
        images = torch.randn(1, 3, side, side)
        with torch.no_grad():
            want = model.features(images)
            with torch.autocast("cpu", torch.bfloat16):
                got = model.features(images)
        cosine = torch.nn.functional.cosine_similarity(got.patches.float(), want.patches, dim=1)
        assert cosine.min() > 0.999


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts_and_rectangles_train(channels):
    torch.manual_seed(0)
    model = build("vit_nano8", **SMALL, in_channels=channels, drop_path=0.4, rope_rescale=2.0)
    crops = [torch.randn(4, channels, 32, 48), torch.randn(4, channels, 16, 24)]
    masks = torch.rand(4, 24) < 0.4
    before = model.patch_embed.proj.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = model.forward_features(crops, [masks, None])
    sum(t.cls.square().sum() + t.patches.square().sum() for t in tokens).backward()
    optimizer.step()
    assert model.mask_token.grad.abs().sum() > 0
    assert torch.isfinite(model.patch_embed.proj.weight).all() and not torch.equal(
        model.patch_embed.proj.weight, before
    )


def test_reference_rotation_is_what_the_maps_use(model, images):
    """Without rotation the maps of a patch differ: the test above would not notice a rotation
    missing on both sides.
    """
    with_rotation = attention_maps(model, images, queries=[(1, 1)]).patches
    model.rope_embed.periods.fill_(1e9)  # angles vanish
    assert (
        attention_maps(model, images, queries=[(1, 1)]).patches - with_rotation
    ).abs().max() > 1e-3
    assert reference.rope_rotate(torch.ones(1, 1, 1, 4), None, None).equal(torch.ones(1, 1, 1, 4))
