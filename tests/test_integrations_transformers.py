"""transformers' DINOv3 models: the same numbers from the same weights, and the same outputs with
our op inside.
"""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dinov3core.checkpoints import load_model, save_weights
from dinov3core.models import build

transformers = pytest.importorskip(
    "transformers", reason="pip install transformers to compare with its DINOv3 models"
)
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel  # noqa: E402

from dinov3core.integrations import transformers as integration  # noqa: E402

SMALL = dict(
    hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3, patch_size=8
)
SMALL |= dict(num_register_tokens=4, image_size=64, layerscale_value=0.5)
FAMILIES = {
    "mlp": {},
    "swiglu": dict(use_gated_mlp=True, hidden_act="silu"),
    "7B: no q and v bias, head width 128": dict(
        query_bias=False,
        value_bias=False,
        use_gated_mlp=True,
        hidden_act="silu",
        hidden_size=256,
        num_attention_heads=2,
    ),
    "key bias": dict(key_bias=True),
    "no registers": dict(num_register_tokens=0),
    "four channels": dict(num_channels=4),
}


def noisy(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def theirs(**arguments):
    return noisy(DINOv3ViTModel(DINOv3ViTConfig(**{**SMALL, **arguments})))


def blocks_of(model):
    """transformers 5 has an encoder module, 4 does not."""
    return getattr(model, "model", model).layer


def images_for(model, height=48, width=80):
    torch.manual_seed(1)
    return torch.randn(2, model.config.num_channels, height, width)


def flat(tokens):
    return torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def pair(request, tmp_path):
    """Their model and ours, through a folder of theirs."""
    model = theirs(**request.param)
    model.save_pretrained(tmp_path)
    return model, load_model(tmp_path).model


def test_same_tokens_masks_and_hidden_states(pair):
    model, ours = pair
    images = images_for(model)
    masks = torch.rand(2, 60) < 0.4
    with torch.no_grad():
        want = model(images, bool_masked_pos=masks)
        got = ours.forward_features(images, masks)
        torch.testing.assert_close(flat(got), want.last_hidden_state, rtol=0, atol=2e-5)
        torch.testing.assert_close(got.cls, want.pooler_output, rtol=0, atol=2e-5)
        layers = ours.features(images, layers=[0, 1], norm=False, reshape=False)
        hidden = model(
            images, output_hidden_states=True
        ).hidden_states  # embeddings, then every block
        for features, want in zip(layers, hidden[1:3], strict=True):
            got = torch.cat([features.cls[:, None], features.registers, features.patches], 1)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_same_gradients(pair):
    model, ours = pair
    images = images_for(model)
    weights = torch.randn_like(model(images).last_hidden_state)
    (model(images).last_hidden_state * weights).sum().backward()
    (flat(ours.forward_features(images)) * weights).sum().backward()
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    }
    encoder = "model.layer" if hasattr(model, "model") else "layer"
    names |= {f"{encoder}.1.norm1.weight": "blocks.1.norm1.weight", "norm.bias": "norm.bias"}
    names |= {f"{encoder}.2.attention.o_proj.weight": "blocks.2.attn.proj.weight"}
    gradients, our_gradients = ({n: p.grad for n, p in m.named_parameters()} for m in (model, ours))
    for name, our_name in names.items():
        torch.testing.assert_close(our_gradients[our_name], gradients[name], rtol=1e-4, atol=1e-4)
    qkv = torch.cat([gradients[f"{encoder}.0.attention.{kind}_proj.weight"] for kind in "qkv"])
    torch.testing.assert_close(our_gradients["blocks.0.attn.qkv.weight"], qkv, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vits16", "vits16plus", "vitb16"])
def test_full_size(tmp_path, name):
    torch.manual_seed(0)
    ours = build(name, layer_scale=1.0).eval()
    save_weights(ours, tmp_path, "huggingface")
    model, loading = DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    images = torch.randn(1, 3, 224, 160)
    with torch.no_grad():
        got, want = flat(ours.forward_features(images)), model.eval()(images).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_what_we_write_loads_there_bit_for_bit(pair, tmp_path):
    model, ours = pair
    save_weights(ours, tmp_path / "back", "huggingface", shard_bytes=200_000)
    again, loading = DINOv3ViTModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values())
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (
        again.config.key_bias == model.config.key_bias
        and again.config.rope_theta == model.config.rope_theta
    )


def test_convnext(tmp_path):
    torch.manual_seed(0)
    model = noisy(
        DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 2, 1]))
    )
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").model
    images = torch.randn(2, 3, 64, 96)
    tokens, want = ours.forward_features(images), model(images, output_hidden_states=True)
    torch.testing.assert_close(
        torch.cat([tokens.cls[:, None], tokens.patches], 1),
        want.last_hidden_state,
        rtol=0,
        atol=2e-5,
    )
    for features, stage in zip(
        ours.features(images, layers=4, norm=False), want.hidden_states[1:], strict=True
    ):
        torch.testing.assert_close(features.patches, stage, rtol=0, atol=2e-5)
    weights = torch.randn_like(tokens.cls)
    (tokens.cls * weights).sum().backward()
    (want.pooler_output * weights).sum().backward()
    torch.testing.assert_close(
        ours.stages[2][1].dwconv.weight.grad,
        getattr(model, "model", model).stages[2].layers[1].depthwise_conv.weight.grad,
        rtol=1e-4,
        atol=1e-5,
    )
    save_weights(ours, tmp_path / "ours", "huggingface")
    again, loading = DINOv3ConvNextModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading.values())
    torch.testing.assert_close(
        again.eval()(images).pooler_output, want.pooler_output, rtol=0, atol=0
    )


def distance(model, images, reference):
    with torch.no_grad():
        return (
            (model(images.to(model.dtype)).last_hidden_state.double() - reference)
            .abs()
            .max()
            .item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_keeps_outputs_within_the_models_own_noise(pair, dtype):
    model, _ = pair
    images = images_for(model)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(images.double()).last_hidden_state
    model = model.to(dtype)
    before = distance(model, images, reference)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert integration.accelerate(model) is model
    assert {type(layer.attention) for layer in blocks_of(model)} == {integration.RopeAttention}
    assert distance(model, images, reference) <= 2 * before
    assert model.state_dict().keys() == state.keys()
    integration.restore(model)
    assert distance(model, images, reference) == before
    assert type(blocks_of(model)[0].attention).__name__ == "DINOv3ViTAttention"


def test_accelerated_gradients(pair):
    model, _ = pair
    images = images_for(model)
    weights = torch.randn_like(model(images).last_hidden_state)
    gradients = []
    for change in (integration.restore, integration.accelerate):
        change(model).zero_grad()
        (model(images).last_hidden_state * weights).sum().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in ((name, g) for name, g in gradients[0].items() if g.numel()):
        torch.testing.assert_close(
            gradients[1][name], want, rtol=1e-4, atol=1e-5 * want.abs().max().item() + 1e-6
        )


def test_accelerated_model_uses_the_op_on_both_sides_of_the_projection_rule(monkeypatch):
    model = integration.accelerate(theirs())
    calls = []
    monkeypatch.setattr(
        integration, "rope_attention", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
    )
    images = images_for(model)  # 130 tokens, 96 channels: one product
    short = torch.randn(1, 3, 16, 16)  # 9 tokens: three products, stacked
    for x in (images, short):
        with torch.no_grad():
            got = model(x).last_hidden_state
            want = integration.restore(model)(x).last_hidden_state
        integration.accelerate(model)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert [shape[:2] for shape in calls] == [(2, 65)] * 3 + [(1, 9)] * 3


real = integration.rope_attention


def test_masks_hooks_and_attention_weights_still_work():
    model = integration.accelerate(theirs())
    images = images_for(model)
    seen = []
    blocks_of(model)[0].attention.q_proj.register_forward_hook(lambda *a: seen.append(1))
    model(images)
    assert seen
    masked = torch.zeros(1, 1, 65, 65).masked_fill(torch.eye(65).bool(), float("-inf"))
    x, tables = torch.randn(2, 65, 96), model.rope_embeddings(images)
    got = blocks_of(model)[0].attention(x, attention_mask=masked, position_embeddings=tables)[0]
    want = blocks_of(integration.restore(model))[0].attention(
        x, attention_mask=masked, position_embeddings=tables
    )[0]
    torch.testing.assert_close(got, want)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        integration.accelerate(model)
    model.set_attn_implementation("sdpa")
    integration.accelerate(model).set_attn_implementation("eager")
    assert model(images, output_attentions=True).attentions[0].shape == (2, 3, 65, 65)


def test_training_with_dropout_falls_back():
    model = integration.accelerate(theirs(attention_dropout=0.5)).train()
    images = images_for(model)
    assert not torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)


def test_accelerated_model_compiles_without_a_break():
    model = integration.accelerate(theirs())
    images = images_for(model)
    with torch.no_grad():
        want = model(images).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).last_hidden_state, want, rtol=0, atol=2e-5)


def test_registered_implementation_serves_other_models():
    model = theirs()
    images = images_for(model)
    with torch.no_grad():
        want = model(images).last_hidden_state
        model.set_attn_implementation(integration.register())
        torch.testing.assert_close(model(images).last_hidden_state, want, rtol=0, atol=2e-5)
        vit = transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=96,
                image_size=32,
                patch_size=8,
            )
        ).eval()
        pixels = torch.randn(2, 3, 32, 32)
        want = vit(pixels).last_hidden_state
        vit.set_attn_implementation(integration.NAME)
        torch.testing.assert_close(vit(pixels).last_hidden_state, want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="without mask"):
        integration.attention(vit, *[torch.randn(1, 3, 4, 16)] * 3, torch.zeros(1, 1, 4, 4))


def test_nothing_to_accelerate():
    with pytest.raises(
        ValueError, match="expected a model with DINOv3ViTAttention inside, got Linear"
    ):
        integration.accelerate(torch.nn.Linear(2, 2))


def test_cosine_of_bfloat16_features_after_acceleration():
    model = theirs()
    images = images_for(model)
    with torch.no_grad():
        want = model(images).last_hidden_state
        got = integration.accelerate(model.bfloat16())(images).last_hidden_state.float()
    assert cosine_similarity(got, want, dim=-1).min() > 0.995
