"""Embeddings, k-NN and collapse measures against fp64 mathematics, and the verdict on real
self-distillation runs.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3core.evals.backbones import pixel_features
from dinov3core.evals.collapse import (
    collapse_verdict,
    feature_spread,
    logits_entropy,
    mean_entropy,
    patch_similarity_drift,
    prototype_usage,
    rankme,
)
from dinov3core.evals.frozen import FrozenEncoder, frozen
from dinov3core.evals.knn import knn_accuracy, nearest
from dinov3core.evals.views import central_view
from dinov3core.image_statistics import IMAGENET, ImageStatistics


class Features(NamedTuple):
    cls: Tensor
    registers: Tensor
    patches: Tensor


class Stub(nn.Module):
    """Patch means as patches, their mean as CLS; dropout shows whether eval mode was on."""

    def __init__(self, patch: int = 4):
        super().__init__()
        self.patch, self.noise, self.inside = patch, nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))

    def features(self, images: Tensor) -> Features:
        assert not torch.is_grad_enabled()
        patches = self.inside(self.noise(F.avg_pool2d(images, self.patch)))
        return Features(
            patches.mean((2, 3)), patches.new_zeros(len(images), 0, patches.shape[1]), patches
        )


def encoder(model: nn.Module, statistics: ImageStatistics = IMAGENET, **settings) -> FrozenEncoder:
    return FrozenEncoder(model, statistics=statistics, **settings)


def test_an_encoder_normalises_and_restores_training_flags():
    model = Stub().train()
    model.inside.eval()
    images = torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8)
    found = encoder(model).embed(images, batch_size=2)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    expected = (images.double().mean((2, 3)) / 255 - mean) / std
    torch.testing.assert_close(found.cls.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.patch_mean, found.cls, rtol=0, atol=1e-6)
    assert (
        model.training
        and model.noise.training
        and not model.inside.training
        and not model.inside[0].training
    )


def test_training_flags_come_back_after_an_error():
    model = Stub().train()
    with pytest.raises(RuntimeError, match="stop"), frozen(model):
        raise RuntimeError("stop")
    assert all(module.training for module in model.modules())


def test_an_encoder_takes_floats_iterables_and_other_channel_counts():
    images = torch.rand(5, 4, 8, 8)
    statistics = ImageStatistics((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0))
    reader = encoder(Stub(), statistics)
    stacked = reader.embed(images)
    streamed = reader.embed(iter(images), batch_size=2)
    torch.testing.assert_close(stacked.cls, streamed.cls)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    inputs = (images - mean) / std
    torch.testing.assert_close(stacked.cls, inputs.mean((2, 3)))
    torch.testing.assert_close(reader.patches(images, batch_size=2), F.avg_pool2d(inputs, 4))


def test_gradients_and_grad_mode_are_the_callers_between_batches():
    seen = []
    for batch in torch.rand(4, 3, 8, 8).split(2):
        features = encoder(Stub())(batch)
        seen.append(torch.is_grad_enabled() and not features.cls.requires_grad)
    assert seen == [True, True]


def test_what_a_call_refuses():
    reader = encoder(Stub())
    with pytest.raises(ValueError, match="expected finite values, got NaN or infinity"):
        model = Stub()
        model.inside = nn.Threshold(10.0, math.nan)
        encoder(model).finite(torch.rand(1, 3, 8, 8))
    assert reader.finite(torch.ones(1, 3, 8, 8) + 1e-6).cls.isfinite().all()  # rounding is no error
    with pytest.raises(ValueError, match="pixels in"):
        reader(torch.full((1, 3, 8, 8), 1.01))


def test_autocast_computes_in_its_dtype_and_returns_fp32():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.seen = nn.Conv2d(3, 8, 4, 4), []

        def features(self, images: Tensor) -> Features:
            patches = self.project(images)
            self.seen.append(patches.dtype)
            return Features(patches.mean((2, 3)), patches, patches)

    model, images = Linear(), torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    half, full = (
        encoder(model, autocast_dtype=dtype).embed(images) for dtype in (torch.bfloat16, None)
    )
    assert model.seen == [torch.bfloat16, torch.float32] and half.cls.dtype == torch.float32
    assert 0 < (half.cls - full.cls).abs().max() < 0.05


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "N >= 1"),
        (iter([]), "at least one image, got none"),
        (iter([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]), "one size"),
        (torch.zeros(2, 4, 8, 8), "expected 3 channels as in the statistics, got 4"),
        (torch.full((2, 3, 8, 8), -1.5), "pixels in \\[0, 1\\]"),
        (torch.full((2, 3, 8, 8), float("nan")), "pixels in \\[0, 1\\]"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        encoder(Stub()).embed(images)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (31, 400)])
def test_eval_view_is_a_centred_square(size):
    ramp = np.broadcast_to(
        np.linspace(0, 255, size[0])[None, :, None], (size[1], size[0], 3)
    ).astype(np.uint8)
    pixels = central_view(Image.fromarray(ramp), resize=64, crop=56)
    assert pixels.shape == (3, 56, 56) and pixels.dtype == torch.uint8
    assert abs(pixels.float().mean().item() - 127.5) < 2  # a centred window of a symmetric ramp
    floats = central_view(torch.from_numpy(ramp.copy()).permute(2, 0, 1) / 255, resize=64, crop=56)
    assert (floats * 255 - pixels).abs().max() < 2


def test_eval_view_converts_modes_and_refuses_large_crops():
    assert central_view(Image.new("L", (40, 30)), resize=32, crop=32).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="at most resize=32"):
        central_view(Image.new("RGB", (40, 30)), resize=32, crop=40)


def test_pixel_features_ignore_brightness():
    image = torch.rand(1, 3, 64, 64) / 2
    features = pixel_features(torch.cat([image, image + 0.4]))
    assert features.shape == (2, 3 * 32 * 32)
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=0)


def _knn_fp64(bank, bank_labels, queries, query_labels, ks, temperature=0.07):
    """The definition, one query at a time."""
    classes = sorted(set(bank_labels.tolist()))
    similarity = F.normalize(queries.double()) @ F.normalize(bank.double()).T
    hits = {k: ([], []) for k in ks}
    for row, truth in zip(similarity, query_labels.tolist()):
        order = row.argsort(descending=True)[: max(ks)]
        weights = torch.softmax(row[order] / temperature, 0)
        for k in ks:
            votes = dict.fromkeys(classes, 0.0)
            for weight, index in zip(weights[:k].tolist(), order[:k].tolist()):
                votes[bank_labels[index].item()] += weight
            ranked = [c for c in sorted(classes, key=lambda c: -votes[c]) if votes[c] > 0]
            hits[k][0].append(ranked[0] == truth)
            hits[k][1].append(truth in ranked[:5])
    return {k: tuple(100 * sum(h) / len(h) for h in both) for k, both in hits.items()}


@pytest.mark.parametrize("classes", [2, 4, 30])
def test_knn_matches_the_definition(classes):
    generator = torch.Generator().manual_seed(classes)
    centres = torch.randn(classes, 16, generator=generator)
    labels = torch.randint(0, classes, (2000,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(2000, 16, generator=generator)
    names = (1000 * torch.randperm(classes, generator=generator) - 7)[labels]  # arbitrary integers
    bank, queries, by, qy = features[:1900], features[1900:], names[:1900], names[1900:]
    found = knn_accuracy(bank, by, queries, qy, k=(20, 1, 5))
    for k, (top1, top5) in _knn_fp64(bank, by, queries, qy, (1, 5, 20)).items():
        assert found.top1[k] == pytest.approx(top1, abs=1e-4) and found.top5[k] == pytest.approx(
            top5, abs=1e-4
        )
    assert found.top1[20] > 100 / classes


@pytest.mark.parametrize(
    "rows", [7, 500, 1607]
)  # below, at and beyond the two-stage selection; a ragged last group
@pytest.mark.parametrize("k", [1, 7])
def test_nearest_is_exact(rows, k):
    generator = torch.Generator().manual_seed(rows)
    bank, queries = (
        torch.randn(rows, 9, generator=generator),
        torch.randn(33, 9, generator=generator),
    )
    found = nearest(bank, queries, k)
    exact = (F.normalize(queries.double()) @ F.normalize(bank.double()).T).topk(k)
    assert torch.equal(found.indices, exact.indices)
    torch.testing.assert_close(found.similarities.double(), exact.values, atol=1e-6, rtol=0)


def test_neighbours_are_sought_in_full_precision(monkeypatch):
    """A training run lets products of its layers round to TensorFloat-32; cosines must not."""
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: seen.append(torch.get_float32_matmul_precision()) or product(a, b),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        nearest(torch.rand(9, 4), torch.rand(3, 4), 2)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_query_labels_are_wrong():
    bank = torch.eye(4)
    found = knn_accuracy(bank, torch.tensor([3, 3, 9, 9]), bank, torch.tensor([3, 5, 9, 9]), k=(1,))
    assert found.top1[1] == found.top5[1] == 75.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank_labels": torch.zeros(6, dtype=torch.long)}, "at least two classes"),
        ({"bank_labels": torch.arange(5)}, "bank_labels: expected 6 integers"),
        ({"query_labels": torch.rand(3)}, "query_labels: expected 3 integers"),
        ({"queries": torch.full((3, 4), float("nan"))}, "queries: 3 of 3 rows hold NaN"),
        ({"queries": torch.rand(3, 5)}, "one width"),
        (
            {"queries": torch.rand(0, 4), "query_labels": torch.zeros(0, dtype=torch.long)},
            "at least one row",
        ),
        ({"k": (1, 7)}, "k: expected 1 to 6"),
        ({"k": ()}, "at least one number"),
    ],
)
def test_knn_refuses_in_one_sentence(change, message):
    arguments = {
        "bank": torch.rand(6, 4),
        "bank_labels": torch.arange(6),
        "queries": torch.rand(3, 4),
        "query_labels": torch.arange(3),
        "k": (1, 2),
    }
    with pytest.raises(ValueError, match=message) as error:
        knn_accuracy(**{**arguments, **change})
    assert "\n" not in str(error.value)


def test_rankme_against_singular_values():
    features = torch.randn(200, 48) @ torch.diag(0.8 ** torch.arange(48.0))
    for x in (features, features.T, features[:30]):
        s = torch.linalg.svdvals(x.double())
        p = s / s.sum() + 1e-7
        assert rankme(x) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)
    assert rankme(torch.eye(32)) == pytest.approx(32, rel=1e-4)
    assert rankme(torch.ones(100, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(10, 4)) == 0.0
    with pytest.raises(ValueError, match="NaN"):
        rankme(torch.full((3, 3), float("nan")))


def test_spread_entropy_and_usage():
    assert feature_spread(torch.ones(9, 4)) == pytest.approx(0, abs=1e-12)
    assert feature_spread(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)
    assert mean_entropy(torch.full((3, 64), 1 / 64)) == pytest.approx(math.log(64), rel=1e-6)
    assert mean_entropy(torch.eye(8)) == 0.0
    logits = torch.randn(130, 32)
    p = torch.softmax(logits.double() / 0.1, 1)
    assert logits_entropy(logits, 0.1) == pytest.approx(
        -(p * p.log()).sum(1).mean().item(), rel=1e-5
    )
    usage = prototype_usage(torch.tensor([[0, 1], [1, 0]]), 8)
    assert usage.fraction == 0.25 and usage.perplexity == pytest.approx(2)
    with pytest.raises(ValueError, match="from 0 to 7"):
        prototype_usage(torch.tensor([8]), 8)


def test_patch_drift_sees_structure_and_not_basis():
    maps = torch.randn(3, 8, 4, 5)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    rotated = torch.einsum("de,behw->bdhw", rotation, maps)
    assert patch_similarity_drift(rotated, maps) < 1e-6
    assert patch_similarity_drift(maps.flatten(2).mT, maps) == 0.0
    assert patch_similarity_drift(torch.ones(3, 2, 4, 5), maps) > 0.5  # all patches alike
    x, y = (F.normalize(m.double().flatten(2), dim=1) for m in (maps, maps.flip(3)))
    expected = (x.mT @ x - y.mT @ y).abs().mean().item()
    assert patch_similarity_drift(maps, maps.flip(3)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="same images"):
        patch_similarity_drift(maps, maps[:, :, :3])


def _sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    q = torch.exp((logits - logits.max()) / temperature)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def _distil(kind: str, steps: int = 150, width: int = 32, prototypes: int = 64) -> list[dict]:
    """A real self-distillation run on clustered vectors: `healthy`, or made to collapse `uniform`
    or `dimensional`.
    """
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width))
    head = nn.Linear(width, prototypes, bias=False)
    optimizer = torch.optim.AdamW(
        [*student.parameters(), *head.parameters()], lr=1e-2, weight_decay=0
    )
    centres, rows = torch.randn(20, 16), []
    for step in range(1, steps + 1):
        points = centres[torch.randint(0, 20, (128,))]
        views = [points + 0.3 * torch.randn_like(points) for _ in range(2)]
        features = [student(v) for v in views]
        logits = [F.normalize(f) @ F.normalize(head.weight).T for f in features]
        # No centring of the targets lets one prototype win; a hot teacher spreads them evenly.
        teach = {"healthy": lambda z: _sinkhorn(z, 0.05), "uniform": lambda z: _sinkhorn(z, 5.0)}
        teach["dimensional"] = lambda z: torch.softmax(z / 0.02, 1)
        targets = [teach[kind](z.detach()) for z in logits]
        loss = -(targets[0] * torch.log_softmax(logits[1] / 0.1, 1)).sum(1).mean()
        loss = (loss - (targets[1] * torch.log_softmax(logits[0] / 0.1, 1)).sum(1).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append(
            {
                "step": step,
                "dino_global": loss.item(),
                "target_entropy": mean_entropy(targets[0]),
                "log_k": math.log(prototypes),
            }
        )
        if step % 25 == 1:
            usage = prototype_usage(targets[0].argmax(1), prototypes).fraction
            rows.append(
                {
                    "step": step,
                    "event": "eval",
                    "rankme": rankme(features[0]),
                    "prototype_usage": usage,
                }
            )
    return rows


@pytest.mark.parametrize("kind", ["healthy", "uniform", "dimensional"])
def test_verdict_on_real_runs(kind):
    verdict = collapse_verdict(_distil(kind), width=32)
    assert verdict.kind == {"healthy": "none"}.get(kind, kind), verdict.sentence
    assert verdict.sentence.count(".") >= 1 and "\n" not in verdict.sentence


def _rows(entropy, rank, steps=400, log_k=6.93):
    rows = [
        {"step": s, "target_entropy": entropy(s / steps), "log_k": log_k}
        for s in range(0, steps + 1, 10)
    ]
    return rows + [
        {"step": s, "event": "eval", "rankme": rank(s / steps)} for s in range(0, steps + 1, 100)
    ]


def test_verdict_uses_history():
    def healthy_rank(t):
        return 40 + 20 * t

    # Starts at ln K and leaves it: not a collapse. Falls back and stays: a collapse.
    assert collapse_verdict(_rows(lambda t: 6.93 - 2 * t, healthy_rank), width=96).kind == "none"
    assert (
        collapse_verdict(_rows(lambda t: 5.0 if t < 0.5 else 6.9, healthy_rank), width=96).kind
        == "uniform"
    )
    # Rank 1 at the start of a small LayerScale: growing leaves it open, having grown is fine,
    # standing still is not.
    assert collapse_verdict(_rows(lambda t: 5.0, lambda t: 1 + 0.8 * t), width=96).kind == "unknown"
    assert collapse_verdict(_rows(lambda t: 5.0, lambda t: 1 + 30 * t), width=96).kind == "none"
    assert collapse_verdict(_rows(lambda t: 5.0, lambda t: 1.2), width=96).kind == "dimensional"
    assert (
        collapse_verdict(_rows(lambda t: 5.0, lambda t: 50 - 49 * t), width=96).kind
        == "dimensional"
    )


def test_verdict_waits_and_survives_gaps():
    early = collapse_verdict(_rows(lambda t: 6.93, lambda t: 1.0, steps=60), width=96)
    assert early.kind == "unknown" and "Too early" in early.sentence
    assert "Too early" in collapse_verdict([], width=96).sentence
    blind = collapse_verdict([{"step": 500, "loss": float("nan"), "rankme": None}], width=96)
    assert blind.kind == "not_judged" and "no target entropy and no RankMe" in blind.sentence
    one = [{"step": 500, "log_k": math.log(64)}, {"step": 500, "prototype_usage": 1 / 64}]
    assert collapse_verdict(one, width=96).kind == "dimensional"
    assert collapse_verdict([{"step": 500, "feature_spread": 1e-9}], width=96).kind == "dimensional"
