"""The family, on the meta device: names, settings, sizes, state dicts, image statistics."""

import inspect
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov3core.models import (
    IMAGENET,
    SATELLITE,
    ConvNeXt,
    ProjectionHead,
    RopeSettings,
    VisionTransformer,
    VitSettings,
    build,
    list_models,
)
from dinov3core.models.layers import Attention, Block
from dinov3core.models.presets import overridden
from dinov3core.models.rope import RopeEmbedding

# DINOv3 model card and Liu et al. 2022: parameters, state-dict entries.
SIZES = {
    "vits16": (21_601_152, 188),
    "vits16plus": (28_697_472, 212),
    "vitb16": (85_669_632, 188),
    "vitl16": (303_154_176, 368),
    "vitl16_sat": (303_156_224, 370),
    "vitl16plus": (403_915_776, 416),
    "vith16plus": (840_633_600, 552),
    "vit7b16": (6_716_043_264, 610),
    "vit7b16_sat": (6_716_043_264, 610),
    "convnext_tiny": (27_820_128, 182),
    "convnext_small": (49_454_688, 344),
    "convnext_base": (87_566_464, 344),
    "convnext_large": (196_230_336, 344),
}
# The recorded key lists that go by another name than the preset.
RECORDED = {
    "vitl16": "vitl16_lvd1689m",
    "vitl16_sat": "vitl16_sat493m",
    "vit7b16": "vit7b16_lvd1689m",
} | {"vit7b16_sat": "vit7b16_sat493m"}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return build(name, **overrides)


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes(name):
    model = on_meta(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_is_the_recorded_one(name):
    folder = os.environ.get("DINOV3CORE_GOLDEN")
    if not folder:
        pytest.skip("set DINOV3CORE_GOLDEN to the folder of recorded cases")
    recorded = json.loads(
        (Path(folder) / "model_variants" / f"{RECORDED.get(name, name)}.json").read_text()
    )
    model = on_meta(name)
    ours = [
        [key, list(t.shape), str(t.dtype).removeprefix("torch.")]
        for key, t in model.state_dict().items()
    ]
    assert sorted(ours) == sorted(recorded["state_dict"])
    assert sorted(name for name, _ in model.named_buffers()) == sorted(recorded["buffers"])
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == recorded["trainable_parameters"]
    )


def test_training_sizes_have_the_published_hidden_widths():
    hidden = {
        ("vitso400m16", "mlp"): 4352,
        ("vitso400m16", "swiglu"): 2904,
        ("vitso400m16", "swiglu64"): 2944,
    }
    hidden |= {
        ("vithuge216", "swiglu"): 3416,
        ("vithuge216", "swiglu64"): 3456,
        ("vitgiant216", "swiglu64"): 4096,
    }
    hidden |= {("vitl16", "swiglu"): 2736, ("vitl16", "swiglu64"): 2752}
    for (name, ffn), width in hidden.items():
        first = on_meta(name, ffn=ffn, depth=1).blocks[0].mlp
        assert (first.fc1 if ffn == "mlp" else first.w1).out_features == width, (name, ffn)


def test_every_name_builds_and_takes_other_channel_counts():
    for name in list_models():
        model = on_meta(name, in_channels=13)
        with FakeTensorMode(allow_non_fake_inputs=True):  # shapes of every size without its memory
            found = model.to_empty(device="cpu").features(torch.empty(2, 13, 64, 96))
        assert model.in_channels == 13 and model.statistics is None
        assert found.cls.shape == (2, model.width)
        assert found.patches.shape == (
            2,
            model.width,
            64 // model.patch_size,
            96 // model.patch_size,
        )


def test_statistics_come_with_the_name():
    assert build("vit_nano8").statistics == on_meta("convnext_tiny").statistics == IMAGENET
    assert on_meta("vitl16_sat").statistics == on_meta("vit7b16_sat").statistics == SATELLITE


def test_normalise_is_per_channel():
    pixels = (
        torch.tensor(IMAGENET.mean)[:, None, None].expand(3, 2, 2)
        + torch.tensor(IMAGENET.std)[:, None, None]
    )
    torch.testing.assert_close(IMAGENET.normalise(pixels[None]), torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected 3 channels"):
        IMAGENET.normalise(torch.zeros(1, 4, 2, 2))


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'convnext_tiny'"):
        build("convnext_tini")


# What `build` takes by flat names, none at its default.
OVERRIDES = dict(
    width=64, depth=2, heads=4, patch_size=4, in_channels=5, registers=1, init_std=0.3,
    ffn="swiglu32", ffn_ratio=3.0, norm="rmsnorm", layer_scale=0.3, drop_path=0.2,
    qkv_bias=False, proj_bias=False, ffn_bias=False, mask_k_bias=False,
    untie_cls_norm=True, untie_local_cls_norm=True,
    rope_base=50.0, rope_min_period=0.5, rope_max_period=8.0, rope_normalize="max",
    rope_shift=0.1, rope_jitter=1.5, rope_rescale=2.0, rope_draw="forward", rope_dtype="bf16",
)  # fmt: skip


def flat(settings: VitSettings) -> dict[str, object]:
    values = asdict(settings)
    rope = values.pop("rope")
    return values | {f"rope_{name}": value for name, value in rope.items()}


@pytest.mark.parametrize("name", OVERRIDES)
def test_every_setting_goes_by_a_flat_name(name):
    before, after = VitSettings(), overridden(VitSettings(), {name: OVERRIDES[name]})
    assert flat(before)[name] != OVERRIDES[name]
    assert flat(after) == flat(before) | {name: OVERRIDES[name]}


def test_every_setting_has_a_flat_name():
    assert OVERRIDES.keys() == flat(VitSettings()).keys()


def test_none_and_number_types_are_taken_as_before_settings_were_values():
    off = {"layer_scale": None, "rope_shift": None, "rope_jitter": None, "rope_rescale": None}
    settings = on_meta("vits16", **off, rope_dtype=torch.bfloat16).settings
    rope = RopeSettings(dtype="bf16")
    assert settings == VitSettings(layer_scale=0.0, rope=rope) and not rope.augments


def test_an_unknown_override_is_one_sentence():
    vit = "^unknown setting 'registrs' of a ViT; did you mean 'registers'. Known: width, heads, "
    with pytest.raises(ValueError, match=vit):
        build("vits16", registrs=4)
    convnext = "^unknown setting 'heads' of a ConvNeXt. Known: depths, widths, in_channels, "
    with pytest.raises(ValueError, match=convnext):
        build("convnext_tiny", heads=4)
    with pytest.raises(
        ValueError, match=r"^RoPE dtype: expected one of fp32, .*, got 'torch.int64'"
    ):
        build("vit_nano8", rope_dtype=torch.int64)


@pytest.mark.parametrize("kind", [VisionTransformer, ConvNeXt, Block, Attention])
def test_networks_are_made_of_one_value(kind):
    """So that defaults stand in the settings and nowhere else."""
    assert [*inspect.signature(kind).parameters] == ["settings"]


@pytest.mark.parametrize("kind", [ProjectionHead, RopeEmbedding])
def test_parts_are_made_of_their_width_and_one_value(kind):
    width, settings = inspect.signature(kind).parameters.values()
    assert (
        settings.name == "settings" and width.default is settings.default is inspect.Parameter.empty
    )


def test_the_defaults_are_the_smallest_released_model():
    assert on_meta("vits16").settings == VitSettings()


def test_drop_path_reaches_the_blocks():
    assert {block.drop_path for block in on_meta("vits16", drop_path=0.3).blocks} == {0.3}
    rates = [
        b.drop_path for stage in on_meta("convnext_tiny", drop_path=0.17).stages for b in stage
    ]
    torch.testing.assert_close(rates, torch.linspace(0, 0.17, 18).tolist())
