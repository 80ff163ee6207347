"""Runners of golden cases: rotary positions, attention, blocks, backbones and heads."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from golden_cases import Case, compare, gradients, replay, scalar_of
from torch import Tensor

from dinov3core.models import HeadSettings, ProjectionHead, VisionTransformer, VitSettings, layers
from dinov3core.models.layers import Attention, Block, BlockSettings, subset_size
from dinov3core.models.rope import RopeEmbedding, RopeSettings
from dinov3core.ops.packing import PackedGroup, Packing

CROP_SETS = ("global", "local")
BRANCHES = ("attention", "ffn")
TOKENS = {
    "x_norm_clstoken": "cls",
    "x_storage_tokens": "registers",
    "x_norm_patchtokens": "patches",
    "x_prenorm": "prenorm",
}


def run_rope(case: Case) -> None:
    s = case.settings
    rope = RopeEmbedding(s["head_dim"], rope_settings(s)).train(s.get("training", False))
    torch.testing.assert_close(rope.periods, case["param.periods"], rtol=1e-6, atol=0)
    with replay_augmentation([case.under("draw.")], s) if rope.training else nullcontext():
        sin, cos = rope(s["H"], s["W"])
    compare(case, {"out.sin": sin, "out.cos": cos})


def rope_settings(rope: Mapping) -> RopeSettings:
    """A RoPE section of a case, which has None where settings have 0."""
    return RopeSettings(
        base=rope["base"] or 0,
        min_period=rope.get("min_period") or 0,
        max_period=rope.get("max_period") or 0,
        normalize=rope["coordinates"],
        shift=rope.get("shift") or 0,
        jitter=rope.get("jitter") or 0,
        rescale=rope.get("rescale") or 0,
        dtype=rope["table_dtype"],
    )


@contextmanager
def replay_augmentation(
    tables: Iterable[Mapping[str, Tensor]], strengths: Mapping
) -> Iterator[None]:
    """Recorded augmentations, a dict per table, in the published order and bounds."""
    kinds = {
        "shift": ("shift", lambda s: s),
        "jitter": ("jitter_log", math.log),
        "rescale": ("rescale_log", math.log),
    }
    used = {kind: rule for kind, rule in kinds.items() if strengths[kind] is not None}
    recorded = [
        (draw[name], bound(strengths[kind]))
        for draw in tables
        for kind, (name, bound) in used.items()
    ]
    with replay(recorded) as next_draw:

        def uniform_(
            self: Tensor, low: float, high: float, *, generator: torch.Generator | None = None
        ) -> Tensor:
            value, bound = next_draw()
            assert (low, high) == (-bound, bound)
            assert self.shape == value.shape and self.dtype == value.dtype
            return self.copy_(value)

        with patch.object(Tensor, "uniform_", uniform_):
            yield


@contextmanager
def replay_subsets(recorded: Iterable[Tensor]) -> Iterator[None]:
    """Recorded samples of stochastic depth, in call order; we would draw as many."""
    with replay(recorded) as next_draw:

        def draw_subset(images: int, rate: float, device: torch.device) -> Tensor:
            subset = next_draw()
            assert len(subset) == subset_size(images, rate) and int(subset.max()) < images
            return subset

        with patch.object(layers, "draw_subset", draw_subset):
            yield


def run_self_attention(case: Case) -> None:
    attention = build_attention(case)
    x = case["in.x"].requires_grad_()

    def attend(sin: Tensor | None, cos: Tensor | None) -> Tensor:
        groups = (PackedGroup(len(x), x.shape[1], sin, cos),)
        return attention(x.flatten(0, 1), packing_of(case, groups)).view_as(x)

    y = attend(case["in.rope_sin"], case["in.rope_cos"])
    scalar_of(case, {"y": y}).backward()
    got = {"out.y": y, "out.y_without_rope": attend(None, None), "grad_in.x": x.grad}
    compare(case, got | gradients(attention))


def run_self_attention_list(case: Case) -> None:
    attention = build_attention(case)
    xs, packing, x_TD = packed_inputs(case, len(case.settings["batches"]))
    ys = unpacked(attention(x_TD, packing), xs)
    scalar_of(case, named("y{}", ys)).backward()
    compare(
        case,
        named("out.y{}", ys) | named("grad_in.x{}", [x.grad for x in xs]) | gradients(attention),
    )


def build_attention(case: Case) -> Attention:
    s = case.settings
    settings = BlockSettings(
        width=s["dim"],
        heads=s["heads"],
        qkv_bias=s.get("qkv_bias", True),
        proj_bias=s.get("proj_bias", True),
        mask_k_bias=s["mask_k_bias"],
    )
    attention = Attention(settings)
    attention.load_state_dict(case.under("param."), strict=True)
    return attention


def packing_of(case: Case, groups: Iterable[PackedGroup]) -> Packing:
    return Packing(tuple(groups), case.settings["prefix_tokens"], interleaved=False)


def packed_inputs(case: Case, sets: int) -> tuple[list[Tensor], Packing, Tensor]:
    """The crop sets of a case, how they are packed, and their tokens packed [T, D]."""
    xs = [case[f"in.x{i}"].requires_grad_() for i in range(sets)]
    tables = [
        (case.tensors.get(f"in.rope_sin{i}"), case.tensors.get(f"in.rope_cos{i}"))
        for i in range(sets)
    ]
    groups = (PackedGroup(*x.shape[:2], sin, cos) for x, (sin, cos) in zip(xs, tables, strict=True))
    return xs, packing_of(case, groups), torch.cat([x.flatten(0, 1) for x in xs])


def unpacked(x_TD: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = x_TD.split([x.shape[0] * x.shape[1] for x in like])
    return [part.view_as(x) for part, x in zip(parts, like, strict=True)]


def named(pattern: str, values: Iterable[Tensor]) -> dict[str, Tensor]:
    return {pattern.format(i): value for i, value in enumerate(values)}


def run_transformer_block(case: Case) -> None:
    s, sets = case.settings, len(case.settings["batches"])
    settings = BlockSettings(
        width=s["dim"],
        heads=s["heads"],
        ffn=s["ffn"],
        ffn_ratio=s["ffn_ratio"],
        norm=s["norm"],
        qkv_bias=s["qkv_bias"],
        mask_k_bias=s["mask_k_bias"],
        layer_scale=1e-5 if s["layer_scale"] else 0,
        drop_path=s["sample_drop_ratio"],
    )
    block = Block(settings)
    block.load_state_dict(case.under("param."), strict=True)
    xs, packing, x_TD = packed_inputs(case, sets)
    with replay_subsets(
        case[f"draw.{branch}_subset{i}"] for branch in BRANCHES for i in range(sets)
    ):
        ys = unpacked(block(x_TD, packing), xs)
    scalar_of(case, named("y{}", ys)).backward()
    evals = unpacked(block.eval()(x_TD, packing), xs)
    got = (
        named("out.y{}", ys)
        | named("out.y{}_eval", evals)
        | named("grad_in.x{}", [x.grad for x in xs])
    )
    compare(case, got | gradients(block))


def build_vit(settings: Mapping) -> VisionTransformer:
    """The backbone a case describes."""
    vit = VitSettings(
        width=settings["embedding_dim"],
        depth=settings["depth"],
        heads=settings["heads"],
        patch_size=settings["patch_size"],
        ffn=settings["ffn"],
        ffn_ratio=settings["ffn_ratio"],
        registers=settings["storage_tokens"],
        norm=settings["norm"],
        qkv_bias=settings["qkv_bias"],
        proj_bias=settings.get("proj_bias", True),
        ffn_bias=settings.get("ffn_bias", True),
        mask_k_bias=settings["mask_k_bias"],
        layer_scale=1e-5 if settings["layer_scale"] else 0,
        drop_path=settings.get("drop_path_rate", 0.0),
        untie_cls_norm=settings.get("separate_cls_and_patch_norm", False),
        untie_local_cls_norm=settings["separate_global_and_local_cls_norm"],
        rope=rope_settings(settings["rope"]),
    )
    return VisionTransformer(vit)


def run_vit_forward(case: Case) -> None:
    vit = build_vit(case.settings).train(case.settings["training"])
    vit.load_state_dict(case.under("param."), strict=True)
    image, masks = case["in.image"], case.tensors.get("in.masks")
    tokens = vit.forward_features(image, masks)
    outputs = {official: getattr(tokens, field) for official, field in TOKENS.items()}
    scalar_of(case, outputs).backward()
    outputs["forward_default"] = vit(image, masks)
    for index, (patches, cls, extra) in enumerate(intermediate(vit, image, 2, reshape=True)):
        outputs |= {
            f"layer{index}_norm_map": patches,
            f"layer{index}_norm_cls": cls,
            f"layer{index}_norm_extra": extra,
        }
    for index, (patches, _, _) in enumerate(intermediate(vit, image, 2, norm=False)):
        outputs[f"layer{index}_raw_tokens"] = patches
    ((outputs["first_block_norm_tokens"], outputs["first_block_norm_cls"], _),) = intermediate(
        vit, image, [0]
    )
    compare(case, recorded_outputs(outputs) | gradients(vit))


def intermediate(
    vit: VisionTransformer, image: Tensor, layers: int | list[int], **options: bool
) -> tuple:
    return vit.get_intermediate_layers(
        image, layers, return_class_token=True, return_extra_tokens=True, **options
    )


def recorded_outputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Results by full name; tensors without elements are not recorded."""
    return {f"out.{name}": value for name, value in outputs.items() if value.numel()}


def run_vit_forward_list(case: Case) -> None:
    s = case.settings
    vit = build_vit(s).train(s["training"])
    vit.load_state_dict(case.under("param."), strict=True)
    with replay_rope_of(vit, case), replay_drop_path_of(vit, case):
        tokens_of = vit.forward_features(
            [case["in.global_crops"], case["in.local_crops"]], [case.tensors.get("in.masks"), None]
        )
    outputs = {
        f"{name}.{official}": getattr(tokens, field)
        for name, tokens in zip(CROP_SETS, tokens_of, strict=True)
        for official, field in TOKENS.items()
    }
    scalar_of(case, outputs).backward()
    compare(case, recorded_outputs(outputs) | gradients(vit))


def replay_rope_of(vit: VisionTransformer, case: Case) -> AbstractContextManager:
    if not vit.settings.rope.augments:
        return nullcontext()
    tables = [case.under(f"draw.block{i}.{name}.") for i in range(vit.depth) for name in CROP_SETS]
    return replay_augmentation(tables, case.settings["rope"])


def replay_drop_path_of(vit: VisionTransformer, case: Case) -> AbstractContextManager:
    if not case.settings["drop_path_rate"]:
        return nullcontext()
    calls = [
        (i, branch, name) for i in range(vit.depth) for branch in BRANCHES for name in CROP_SETS
    ]
    return replay_subsets(case[f"draw.block{i}.{branch}.{name}"] for i, branch, name in calls)


def run_projection_head(case: Case) -> None:
    s = case.settings
    settings = HeadSettings(
        s["out_dim"],
        hidden=s["hidden_dim"],
        bottleneck=s["bottleneck_dim"],
        layers=s["layers"],
    )
    head = ProjectionHead(s["in_dim"], settings)
    head.load_state_dict(case.under("param."), strict=True)
    x = case["in.x"].requires_grad_()
    logits = head(x)
    scalar_of(case, {"logits": logits}).backward()
    unit = head.bottleneck(x)
    got = {
        "out.logits": logits,
        "out.bottleneck_l2_normalised": unit,
        "out.logits_from_bottleneck": head.last_layer(unit),
        "grad_in.x": x.grad,
    }
    compare(case, got | gradients(head))


RUNNERS = {
    "projection_head": run_projection_head,
    "rope": run_rope,
    "rope_augmented": run_rope,
    "self_attention": run_self_attention,
    "self_attention_list": run_self_attention_list,
    "transformer_block": run_transformer_block,
    "vit_forward": run_vit_forward,
    "vit_forward_list": run_vit_forward_list,
}
