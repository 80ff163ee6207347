"""Weight files: round trips bit for bit, what each layout lacks, and the refusal of every kind of
damage.
"""

import json
import os
import pickle
import stat
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dinov3core import convert
from dinov3core.checkpoints import load_model, load_weights, save_weights
from dinov3core.checkpoints.architecture import RELEASED_FACTS, architecture_of, facts_of_model
from dinov3core.checkpoints.files import EXTRAS
from dinov3core.models import IMAGENET, SATELLITE, ImageStatistics, build

VIT = dict(depth=2, width=48, heads=3)
MODELS = {
    "mlp": ("vit_nano8", VIT),
    "swiglu, local norm": ("vit_nano8", dict(VIT, ffn="swiglu", untie_local_cls_norm=True)),
    "no qkv bias, no registers": ("vit_nano8", dict(VIT, qkv_bias=False, registers=0)),
    "13 channels": ("vit_nano8", dict(VIT, in_channels=13)),
    "free key bias": ("vit_nano8", dict(VIT, mask_k_bias=False)),
    "convnext": ("convnext_tiny", dict(depths=(1, 1, 2, 1), widths=(8, 12, 20, 28))),
}
SUFFIX = {"official": ".pth", "dinov3core": ".safetensors", "huggingface": "", "timm": ""}


def noisy(name="vit_nano8", **arguments):
    """A model with no zero or one left in it; bfloat16 periods and a zero mask in one block, as
    released files have.
    """
    torch.manual_seed(0)
    model = build(name, **(arguments or VIT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(model, "rope_embed"):
            model.rope_embed.periods.copy_(model.rope_embed.periods.bfloat16())
            qkv = model.blocks[1].attn.qkv
            if hasattr(qkv, "bias_mask"):
                qkv.bias_mask.zero_()
            elif qkv.bias is not None:  # no layout but ours and Hugging Face's holds a key bias
                for block in model.blocks:
                    block.attn.qkv.bias.chunk(3)[1].zero_()
    return model.eval()


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    different = [
        key
        for key in ours
        if not torch.equal(ours[key], theirs[key]) or ours[key].dtype != theirs[key].dtype
    ]
    assert not different


@pytest.fixture
def file(tmp_path):
    """A file of ours, and its tensors and metadata to spoil."""
    path = tmp_path / "weights.safetensors"
    save_weights(noisy(), path)
    return path


EVERY = ["official", "dinov3core", "huggingface", "dinov3core", "timm", "dinov3core", "official"]
RINGS = {name: (*model, EVERY) for name, model in MODELS.items()} | {
    "7B": (
        "vit_nano8",
        dict(VIT, heads=2, ffn="swiglu64", qkv_bias=False, untie_local_cls_norm=True),
        EVERY,
    ),
    "key bias": ("vit_nano8", dict(VIT, mask_k_bias=False), [x for x in EVERY if x != "timm"]),
    "RMS norm, two norms, no LayerScale": (
        "vit_nano8",
        dict(VIT, norm="rmsnorm", untie_cls_norm=True, layer_scale=None, proj_bias=False),
        ["official", "dinov3core", "official"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, arguments, layouts", RINGS.values(), ids=RINGS)
def test_a_ring_through_every_layout_ends_with_the_file_it_began_with(
    tmp_path, name, arguments, layouts, dtype
):
    original = model = noisy(name, **arguments).to(dtype)
    if name == "key bias":
        torch.nn.init.ones_(model.blocks[0].attn.qkv.bias)
    model.statistics = ImageStatistics((0.1,) * model.in_channels, (0.2,) * model.in_channels)
    images = torch.rand(2, model.in_channels, 64, 32, dtype=dtype)
    for step, layout in enumerate(layouts):
        path = tmp_path / f"{step}{SUFFIX[layout]}"
        save_weights(model, path, layout)
        model, report = load_model(path)
        assert report.layout == layout and report.total == len(original.state_dict())
        assert_same(model, original)
        if layout == "official":  # has no place for statistics
            model.statistics = original.statistics
        assert model.statistics == original.statistics
    first, last = (
        torch.load(tmp_path / f"{step}.pth", weights_only=True) for step in (0, len(layouts) - 1)
    )
    assert first.keys() == last.keys()
    assert all(
        value.dtype == last[key].dtype and torch.equal(value, last[key])
        for key, value in first.items()
    )
    assert torch.equal(model.features(images).patches, original.features(images).patches)


@pytest.mark.parametrize("layout", SUFFIX)
def test_load_weights_fills_a_model_in_place(tmp_path, layout):
    path = tmp_path / f"weights{SUFFIX[layout]}"
    save_weights(noisy(), path, layout)
    model = build("vit_nano8", **VIT)
    before = dict(model.named_parameters())
    report = load_weights(model, path)
    assert_same(model, noisy())
    assert dict(model.named_parameters()) == before and report.loaded == report.total


def test_the_file_inside_a_folder_stands_for_the_folder(tmp_path):
    save_weights(noisy(), tmp_path, "huggingface")
    assert_same(load_model(tmp_path / "model.safetensors").model, noisy())


def test_sharded_hugging_face_folder(tmp_path):
    save_weights(noisy(), tmp_path, "huggingface", shard_bytes=30_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(load_model(tmp_path).model, noisy())
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="expected shard model-00002-of-"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["vit_nano8", "convnext_tiny"])
def test_both_generations_of_hugging_face_names(tmp_path, name):
    arguments = MODELS["convnext"][1] if "convnext" in name else VIT
    save_weights(noisy(name, **arguments), tmp_path, "huggingface")
    path = tmp_path / "model.safetensors"
    kept = load_file(path)
    moved = {
        ("model." + k if k.startswith(("layer.", "stages.")) else k): v for k, v in kept.items()
    }
    assert moved.keys() != kept.keys()
    save_file(moved, path)
    (tmp_path / EXTRAS).unlink()
    report = load_weights(build(name, **arguments), tmp_path)
    # three weights become one, two biases become one
    assert report.loaded == len(kept) - (3 * VIT["depth"] if "vit" in name else 0)
    assert not report.aside


def test_what_a_layout_lacks_is_filled_and_named(tmp_path):
    save_weights(noisy(ffn="swiglu", untie_local_cls_norm=True, **VIT), tmp_path, "timm")
    (tmp_path / EXTRAS).unlink()
    model = build("vit_nano8", ffn="swiglu", untie_local_cls_norm=True, **VIT)
    text = str(load_weights(model, tmp_path))
    for named in (
        "mask_token",
        "rope_embed.periods",
        "blocks.*.attn.qkv.bias_mask (2)",
        "local_cls_norm.weight",
    ):
        assert named in text
    assert not model.mask_token.any()
    assert torch.equal(model.local_cls_norm.weight, model.norm.weight)
    assert (
        model.rope_embed.periods.tolist() == build("vit_nano8", **VIT).rope_embed.periods.tolist()
    )
    q, k, v = model.blocks[1].attn.qkv.bias_mask.chunk(3)
    assert q.all() and not k.any() and v.all()


def test_stored_bias_mask_and_periods_are_honoured(tmp_path):
    model = noisy()
    save_weights(model, tmp_path / "official.pth", "official")
    fresh = build("vit_nano8", **VIT)
    load_weights(fresh, tmp_path / "official.pth")
    assert not fresh.blocks[1].attn.qkv.bias_mask.any()
    assert torch.equal(fresh.rope_embed.periods, model.rope_embed.periods)
    assert not torch.equal(fresh.rope_embed.periods, build("vit_nano8", **VIT).rope_embed.periods)
    # Hugging Face has no mask: what it stores is the bias that acts
    save_weights(model, tmp_path / "hf", "huggingface")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert (
        not stored["layer.1.attention.q_proj.bias"].any()
        and stored["layer.0.attention.q_proj.bias"].any()
    )
    assert "layer.0.attention.k_proj.bias" not in stored


def test_teacher_checkpoint_of_a_training_run(tmp_path):
    state = noisy().state_dict()
    heads = {
        "dino_head.last_layer.weight": torch.ones(3, 3),
        "ibot_head.last_layer.weight": torch.ones(3, 3),
    }
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in state.items()} | heads},
        tmp_path / "teacher_checkpoint.pth",
    )
    model, report = load_model(tmp_path)
    assert_same(model, noisy())
    assert sorted(report.aside) == sorted(heads)
    whole = {f"student.backbone.{k}": v + 1 for k, v in state.items()}
    whole |= {f"teacher.backbone.{k}": v for k, v in state.items()}
    torch.save({"model": whole, "iteration": 7}, tmp_path / "whole.pth")
    assert_same(load_model(tmp_path / "whole.pth").model, noisy())


def test_folder_of_a_run_gives_its_newest_teacher(tmp_path):
    for step in (10, 20):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        model = noisy()
        with torch.no_grad():
            model.norm.weight.fill_(step)
        save_weights(model, folder / "teacher.safetensors")
    assert load_model(tmp_path).model.norm.weight[0] == 20


def test_local_cls_norm_is_built_where_stored_and_left_aside_where_not_wanted(tmp_path):
    save_weights(noisy(untie_local_cls_norm=True, **VIT), tmp_path / "sat.pth", "official")
    assert load_model(tmp_path / "sat.pth").model.local_cls_norm is not None
    report = load_weights(build("vit_nano8", **VIT), tmp_path / "sat.pth")
    assert report.aside == ["local_cls_norm.weight", "local_cls_norm.bias"]


def test_presets_are_recognised_from_their_tensors():
    for name in ("vits16", "vits16plus", "vitso400m16", "vit7b16", "vitl16_sat", "convnext_base"):
        with torch.device("meta"):
            model = build(name)
        again = architecture_of(model.state_dict(), RELEASED_FACTS).build()
        shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (again, model))
        assert shapes == expected
        assert facts_of_model(again) == facts_of_model(model)


def test_rounding_of_the_rotation_tables_is_kept(tmp_path):
    model = noisy(rope_dtype=torch.bfloat16, **VIT)
    save_weights(model, tmp_path / "model.safetensors")
    again, images = load_model(tmp_path / "model.safetensors").model, torch.rand(1, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    again.rope_embed.dtype, again.rope_embed._tables = torch.float32, {}
    assert not torch.equal(again(images), model(images))


def test_periods_stored_in_bfloat16_are_those_that_act(tmp_path):
    """Released files hold them so; the model keeps float32 tables of the rounded periods."""
    model = build("vit_nano8", **VIT).eval()
    exact = model.rope_embed.periods.clone()
    model.rope_embed.periods.copy_(exact.bfloat16())
    state = model.state_dict()
    torch.save(
        {**state, "rope_embed.periods": state["rope_embed.periods"].bfloat16()},
        tmp_path / "released.pth",
    )
    fresh, images = build("vit_nano8", **VIT).eval(), torch.rand(1, 3, 32, 48)
    load_weights(fresh, tmp_path / "released.pth")
    for other in (fresh, load_model(tmp_path / "released.pth").model):
        assert not torch.equal(other.rope_embed.periods.float(), exact)
        assert torch.equal(other.rope_embed(4, 6)[0], model.rope_embed(4, 6)[0])
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("layout", ["huggingface", "timm"])
@pytest.mark.parametrize(
    "name, overrides", [("vit_nano8", {}), ("vit_nano8", dict(depth=2, heads=2))]
)
def test_a_lone_file_of_a_foreign_layout(tmp_path, layout, name, overrides):
    """Without config.json the heads are those of the named size, or the caller says them."""
    ours = build(name, **overrides).eval()
    save_weights(ours, tmp_path / "folder", layout)
    path = (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "lone.safetensors")
    if overrides:
        with pytest.raises(ValueError, match=r"number of heads, .* \(width 96, depth 2\)"):
            load_model(path)
        model, report = load_model(path, heads=2)
    else:
        model, report = load_model(path)
        assert report.assumed["heads"] == 3 and "taken from the released models" in str(report)
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(model(images), ours(images))


def test_heads_are_never_assumed_against_the_files_word(tmp_path):
    save_weights(noisy(), tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / EXTRAS).unlink()
    with pytest.raises(ValueError, match="expected heads=2 as in the model, got 3"):
        load_model(tmp_path / "hf", heads=2)
    save_weights(noisy(), tmp_path / "flat.pth", "official")
    with pytest.raises(ValueError, match=r"rope_embed\.periods of shape"):
        load_model(tmp_path / "flat.pth", heads=2)
    assert load_model(tmp_path / "flat.pth").report.assumed.keys() == {"norm", "rope_normalize"}
    save_weights(noisy(), tmp_path / "ours.safetensors")
    assert not load_model(tmp_path / "ours.safetensors").report.assumed


def test_dtype_of_the_file_is_kept_by_load_model(tmp_path):
    save_weights(noisy().bfloat16(), tmp_path, "huggingface")
    assert load_model(tmp_path).model.norm.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = build("vit_nano8", **VIT)
    load_weights(model, tmp_path)
    assert model.norm.weight.dtype == torch.float32


def test_statistics_travel_and_a_mismatch_warns(tmp_path):
    model = noisy()
    model.statistics = SATELLITE
    for layout in ("dinov3core", "huggingface", "timm"):
        path = tmp_path / f"{layout}{SUFFIX[layout]}"
        save_weights(model, path, layout)
        if path.is_dir():
            (path / EXTRAS).unlink()
        ours = build("vit_nano8", **VIT)
        assert ours.statistics == IMAGENET
        with pytest.warns(UserWarning, match="trained with image mean"):
            load_weights(ours, path)
        assert ours.statistics == SATELLITE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(ours, path)


def test_released_names_tell_the_statistics(tmp_path):
    for name, statistics in (
        ("x_pretrain_sat493m-0123.pth", SATELLITE),
        ("x_pretrain_lvd1689m-0123.pth", IMAGENET),
    ):
        save_weights(noisy(), tmp_path / name, "official")
        assert load_model(tmp_path / name).model.statistics == statistics
    save_weights(noisy(), tmp_path / "mine.pth", "official")
    assert load_model(tmp_path / "mine.pth").model.statistics is None


def refused(path, match, model=None):
    model = model or build("vit_nano8", **VIT)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value) and str(path.name) in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def spoil(path, change):
    """Rewrite a flat file of ours after `change(tensors)`, without our header."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_tensor(file):
    spoil(file, lambda t: t.pop("blocks.1.mlp.fc2.bias"))
    refused(file, "missing blocks.*.mlp.fc2.bias")


def test_extra_tensor(file):
    spoil(file, lambda t: t.update({"blocks.0.attn.gate": torch.ones(3)}))
    refused(file, "unexpected blocks.*.attn.gate")


def test_wrong_shape(file):
    spoil(file, lambda t: t.update({"norm.weight": torch.ones(49)}))
    refused(file, r"expected norm.weight of shape \[48\], got \[49\]")


def sentence(path, model):
    with pytest.raises(ValueError) as caught:
        load_weights(model, path)
    return str(caught.value)


def test_another_size(tmp_path):
    save_weights(noisy(depth=3, width=48, heads=3), tmp_path / "deeper.pth", "official")
    refused(tmp_path / "deeper.pth", "unexpected blocks")
    deeper = SMALL_VIT.replace("2 blocks", "3 blocks")
    told = f"expected weights of {SMALL_VIT}, got those of {deeper} (unexpected blocks"
    assert told in sentence(tmp_path / "deeper.pth", build("vit_nano8", **VIT))


VIT_WORDS = "a ViT of 2 blocks, width {}, {} heads, patches of {} px, 3 channels, {} registers, "
VIT_WORDS += "mlp {}"
SMALL_VIT = VIT_WORDS.format(48, 3, 8, 2, 192)
OTHER_VIT = VIT_WORDS.format(96, 6, 16, 4, 384)


@pytest.mark.parametrize("layout", SUFFIX)
def test_another_model_is_told_apart_in_words_and_by_its_first_shapes(tmp_path, layout):
    """Also where as many tensors are there as were expected."""
    path = tmp_path / f"other{SUFFIX[layout]}"
    save_weights(noisy(depth=2, width=96, heads=6, patch_size=16, registers=4), path, layout)
    text = sentence(path, build("vit_nano8", **VIT))
    assert f"expected weights of {SMALL_VIT}, got those of {OTHER_VIT} " in text
    assert "(expected cls_token of shape [1, 1, 48], got [1, 1, 96]; " in text
    assert text.count(" of shape ") == 3
    assert text.endswith(
        "more of other shapes); build the model these weights belong to, as load_model does",
    )


def test_another_family_and_another_feed_forward_network(tmp_path):
    model = build("vit_nano8", **VIT)
    save_weights(noisy("convnext_tiny", **MODELS["convnext"][1]), tmp_path / "conv.pth", "official")
    told = "got those of a ConvNeXt of 1-1-2-1 blocks, widths 8-12-20-28, 3 channels (expected norm"
    assert told in sentence(tmp_path / "conv.pth", model)
    save_weights(noisy(ffn="swiglu", **VIT), tmp_path / "gated.pth", "official")
    gated = SMALL_VIT.replace("mlp 192", "swiglu 128")
    told = f"got those of {gated} (missing blocks.*.mlp.fc1.weight"
    assert told in sentence(tmp_path / "gated.pth", model)


def test_a_header_of_other_tensors_is_damage(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(b'\\"depth\\": 2', b'\\"depth\\": 3'))
    with pytest.raises(
        ValueError,
        match=r"a ViT of 3 blocks.* got those of a ViT of 2 blocks.*: download or write",
    ):
        load_model(file)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("layout", SUFFIX)
def test_written_files_have_the_mode_that_the_umask_asks_for(tmp_path, layout, umask, mode):
    before = os.umask(umask)
    try:
        save_weights(noisy(), tmp_path / f"weights{SUFFIX[layout]}", layout, shard_bytes=30_000)
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(
            path.stat().st_mode,
        )
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert set(modes.values()) == {mode}, modes


@pytest.mark.parametrize("layout", ["official", "dinov3core"])
def test_a_failed_write_says_why_and_leaves_what_was_there(tmp_path, monkeypatch, layout):
    path = tmp_path / f"weights{SUFFIX[layout]}"
    save_weights(noisy(), path, layout)
    before = path.read_bytes()

    def full(*_, **__):
        raise (
            SafetensorError(
                "I/O error: No space left on device",
            )
            if layout == "dinov3core"
            else RuntimeError("full")
        )

    monkeypatch.setattr("dinov3core.checkpoints.files.save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError,
        match=r"weights.*: could not be written: (I/O error: No space left|full)",
    ):
        save_weights(noisy(), path, layout)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_not_finite(file):
    spoil(file, lambda t: t["blocks.0.attn.qkv.bias_mask"].fill_(float("nan")))
    refused(file, "NaN or Inf in blocks.0.attn.qkv.bias_mask")


def test_quantised(file):
    spoil(file, lambda t: t.update({"norm.weight": torch.ones(48, dtype=torch.int8)}))
    refused(file, "int8 in norm.weight")


@pytest.mark.parametrize("kept", [4, 3000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    save_weights(noisy(), path, "official" if suffix == ".pth" else "dinov3core")
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "broken|truncated")


def test_kind_of_file_is_told_by_its_content(tmp_path):
    save_weights(noisy(), tmp_path / "a.safetensors")
    assert_same(load_model((tmp_path / "a.safetensors").rename(tmp_path / "a.pth")).model, noisy())
    save_weights(noisy(), tmp_path / "b.pth", "official")
    refused(
        (tmp_path / "b.pth").rename(tmp_path / "b.safetensors"),
        "expected a complete safetensors file",
    )
    (tmp_path / "c.pth").write_bytes(b"\x89PNG\r\n and so on")
    refused(tmp_path / "c.pth", "expected a safetensors or PyTorch file, got neither")
    (tmp_path / "d.pth").write_bytes(b"")
    refused(tmp_path / "d.pth", "got neither")


@pytest.mark.parametrize(
    "written, spoiled, match",
    [
        (
            b'\\"rotation\\": \\"half\\"',
            b'\\"rotation\\": \\"interleaved\\"',
            "halves, got 'interleaved'",
        ),
        (b'\\"version\\": 1', b'\\"version\\": 2', "expected version 1 of our header, got 2"),
        (b'\\"version\\": 1', b"version: 1", "expected JSON"),
    ],
    ids=["rotation", "version", "not JSON"],
)
def test_wrong_header_of_ours(file, written, spoiled, match):
    content = file.read_bytes()
    assert content.count(written) == 1
    changed = content.replace(written, spoiled)
    length = struct.unpack("<Q", content[:8])[0] + len(changed) - len(content)
    file.write_bytes(struct.pack("<Q", length) + changed[8:])
    refused(file, match)


def test_wrong_rotation_in_a_timm_folder(tmp_path):
    save_weights(noisy(), tmp_path, "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["rope_rotate_half"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "rope_rotate_half=false")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "eva02_small_patch14_224"}))
    refused(tmp_path, "expected a DINOv3 architecture")


def test_other_rotation_frequencies(tmp_path):
    save_weights(noisy(), tmp_path, "huggingface")
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / EXTRAS).unlink()
    refused(tmp_path, "rope_base=10000.0")


@pytest.mark.parametrize(
    "name, match",
    [("pos_embed", "learned position embedding"), ("rope.freqs", "rotates neighbouring channels")],
)
def test_models_that_look_alike_and_mark_places_otherwise(file, name, match):
    spoil(file, lambda t: t.update({name: torch.ones(1, 5, 48)}))
    refused(file, match)


def test_final_norm_of_a_convnext_must_agree_with_itself(tmp_path):
    name, arguments = MODELS["convnext"]
    state = {key: value.clone() for key, value in noisy(name, **arguments).state_dict().items()}
    state["norms.3.bias"] += 1
    torch.save(state, tmp_path / "convnext.pth")
    refused(tmp_path / "convnext.pth", "norms.3.bias to equal norm.bias", build(name, **arguments))


def test_another_kind_of_model(tmp_path):
    save_file({"encoder.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    refused(
        tmp_path / "other.safetensors",
        "expected a DINOv3 ViT or ConvNeXt, got names like encoder.weight",
    )
    save_weights(noisy(), tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "dinov2"}')
    refused(tmp_path / "hf", "expected model_type dinov3_vit")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def write_pickle(found, path):
    path.write_bytes(pickle.dumps(found, protocol=2))


def read_pickle(path):
    return pickle.loads(path.read_bytes())


def read_trusting(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("write, trust", [(torch.save, read_trusting), (write_pickle, read_pickle)])
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path, write, trust):
    path, fuse = tmp_path / "bomb.pth", tmp_path / "went_off"
    write({**noisy().state_dict(), "bomb": Bomb(str(fuse))}, path)
    refused(path, r"would run code \([\w.]+\) when read")
    assert not fuse.exists()
    trust(path)
    assert fuse.exists()  # the bomb was live


def test_torch_distributed_checkpoint_is_refused_with_the_way_out(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    refused(tmp_path, "dcp_to_torch")


def test_nothing_there_and_too_many(tmp_path):
    refused(tmp_path / "absent.pth", "found nothing there")
    refused(tmp_path, "expected one file of weights in the folder, got none")
    for name in ("a.pth", "b.pth"):
        save_weights(noisy(), tmp_path / name, "official")
    refused(tmp_path, "got a.pth, b.pth")


def test_extras_of_other_weights(tmp_path):
    save_weights(noisy(), tmp_path, "huggingface")
    spoil(tmp_path / "model.safetensors", lambda t: t["norm.weight"].add_(1))
    refused(tmp_path, "expected extras of the weights beside it")


def test_models_a_layout_cannot_express(tmp_path):
    for arguments, name in (
        (dict(norm="rmsnorm"), "norm"),
        (dict(layer_scale=None), "layer_scale"),
        (dict(untie_cls_norm=True), "untie_cls_norm"),
        (dict(rope_normalize="max"), "rope_normalize"),
        (dict(rope_base=None, rope_min_period=0.5, rope_max_period=8.0), "rope_base"),
    ):
        for layout in ("huggingface", "timm"):
            with pytest.raises(ValueError, match=f"can express, got {name}="):
                save_weights(build("vit_nano8", **VIT, **arguments), tmp_path, layout)
    model = build("vit_nano8", **VIT, mask_k_bias=False)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias.fill_(1.0)
    with pytest.raises(ValueError, match="got key bias"):
        save_weights(model, tmp_path, "timm")
    with pytest.raises(ValueError, match="RoPE periods of base 100"):
        model.rope_embed.periods.mul_(1.1)
        save_weights(model, tmp_path, "huggingface")
    with pytest.raises(ValueError, match="expected one of"):
        save_weights(model, tmp_path, "onnx")


def test_places_that_do_not_suit_a_format_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.pth").mkdir()
    for name, layout, match in (
        ("file", "huggingface", "expected a folder for the huggingface format"),
        ("new.pth", "timm", "expected a folder for the timm format"),
        ("new.pth", "dinov3core", "expected a file name ending in .safetensors"),
        ("new", "official", "ending in .pth or .pt or .bin"),
        ("folder.pth", "official", "ending in .pth or .pt or .bin"),
    ):
        with pytest.raises(ValueError, match=match):
            save_weights(noisy(), tmp_path / name, layout)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.pth"]
    assert (tmp_path / "file").read_text() == "kept"


def test_convert_command(tmp_path, capsys):
    save_weights(noisy(), tmp_path / "in.pth", "official")
    convert.main(
        [
            str(tmp_path / "in.pth"),
            str(tmp_path / "hf"),
            "--to",
            "huggingface",
            "--statistics",
            "satellite",
        ]
    )
    assert "equal those of" in capsys.readouterr().out
    model, _ = load_model(tmp_path / "hf")
    assert_same(model, noisy())
    assert model.statistics == SATELLITE
    with pytest.raises(SystemExit, match=r"error: .*found nothing there"):
        convert.main([str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "timm"])
