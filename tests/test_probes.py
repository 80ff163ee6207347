"""k-NN, linear probe and logistic regression on features: against scikit-learn, torch.optim, an
oracle and chance.
"""

import itertools
import math
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3core import evals
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.labelled import Labelled, split_by_class
from dinov3core.evals.backbones import FeatureExtractor, PixelBackbone, fingerprint, pixel_features
from dinov3core.evals.cache import Embedder, identity, joined
from dinov3core.evals.linear import LinearProbes, _batches, _top5, fit_linear
from dinov3core.evals.logistic import Rows, score_penalties
from dinov3core.evals.reading import measured_statistics, read_ahead
from dinov3core.models import ImageStatistics, build

CLASSES = 4
TASKS = {
    "knn": {"k": (5,)},
    "linear": {"iterations": 300, "batch_size": 32},
    "logreg": {"penalties": (0.01, 1.0, 100.0)},
}
every_task = pytest.mark.parametrize("task", TASKS)


class Codes:
    """Images whose first pixel says the class; all others are noise that says nothing."""

    def __init__(self, count: int, seed: int, broken: tuple[int, ...] = ()):
        rng = np.random.default_rng(seed)
        self.pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        self.labels = rng.permutation(np.arange(count) % CLASSES)
        self.pixels[:, 0, 0, 0] = self.labels
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage(self.name(index), "broken on purpose")
        return Image.fromarray(self.pixels[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"code {index}"


class Found(NamedTuple):
    cls: Tensor
    registers: Tensor
    patches: Tensor


class Reader(nn.Module):
    """A backbone that counts its calls; `what` turns pixels in [0, 1] into CLS [B, D]."""

    patch_size = 8
    statistics = ImageStatistics((0.0,) * 3, (1.0,) * 3)

    def __init__(self, what):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.what, self.calls = what, []

    def features(self, images: Tensor) -> Found:
        self.calls.append(len(images))
        cls = self.what(images) * self.scale
        return Found(cls, cls[:, None, :0], cls[:, :, None, None].expand(-1, -1, 2, 2))


def oracle(images: Tensor) -> Tensor:
    return F.one_hot((images[:, 0, 0, 0] * 255).round().long(), CLASSES).float()


def noise(images: Tensor) -> Tensor:
    return images[:, :, 4:8, 4:8].flatten(1)


def codes(train: int = 240, test: int = 400) -> Labelled:
    return Labelled(Codes(train, 0), Codes(test, 1), [f"class {i}" for i in range(CLASSES)])


VIEW = Embedder(size=16, resize=16, batch_size=50)


def top1(result: dict) -> float:
    found = result["top1"]
    return next(iter(found.values())) if isinstance(found, dict) else found


@every_task
def test_an_oracle_scores_everything_and_noise_scores_chance(task: str):
    if task == "logreg":
        pytest.importorskip("sklearn")
    run = getattr(evals, task)
    result = run(Reader(oracle), codes(), embedder=VIEW, **TASKS[task])
    assert top1(result) == 100.0
    assert (result["train_images"], result["test_images"], result["unreadable"]) == (240, 400, 0)
    assert result["protocol"]["size"] == 16
    standard_error = 100 * math.sqrt(0.25 * 0.75 / 400)
    assert (
        abs(top1(run(Reader(noise), codes(), embedder=VIEW, **TASKS[task])) - 25.0)
        < 4 * standard_error
    )


def overlapping(count: int = 300, width: int = 6) -> tuple[Tensor, Tensor]:
    """Three classes that overlap."""
    torch.manual_seed(0)
    labels = torch.arange(count) % 3
    return torch.randn(count, width) + torch.randn(3, width)[labels], labels


def test_logistic_regression_is_scikit_learns_however_it_starts():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = overlapping()
    x, y = features.double().numpy(), labels.numpy()
    penalties = (1e-3, 1e-1, 10.0)
    fit, held = Rows(x[:200], y[:200]), Rows(x[200:], y[200:])
    scores, stopped = score_penalties(fit, held, penalties)
    cold = [
        linear_model.LogisticRegression(C=c, max_iter=1000, tol=1e-10).fit(x[:200], y[:200])
        for c in penalties
    ]
    assert scores == pytest.approx([100 * model.score(x[200:], y[200:]) for model in cold])
    assert stopped <= len(penalties)
    assert score_penalties(fit, held, (1e5,), iterations=2)[1] == 1


def test_logistic_regression_reports_the_chosen_penalty_refitted_on_all():
    linear_model = pytest.importorskip("sklearn.linear_model")
    backbone = Reader(lambda images: torch.cat([0.1 * oracle(images), noise(images)], 1))
    penalties = (1e-4, 1.0, 100.0)
    found = evals.logreg(backbone, codes(), embedder=VIEW, penalties=penalties)
    train, test = (VIEW(backbone, source) for source in codes()[:2])

    def accuracy(penalty: float, rows: slice) -> float:
        model = linear_model.LogisticRegression(C=penalty, max_iter=1000, tol=1e-10)
        model.fit(train.cls[rows].double().numpy(), train.labels[rows].numpy())
        return 100 * model.score(test.cls.double().numpy(), test.labels.numpy())

    everything, part = slice(None), slice(200)
    assert found["c"] == max(penalties, key=lambda c: found["held_out_top1"][f"{c:.3g}"])
    assert found["top1"] == pytest.approx(accuracy(found["c"], everything))
    others = [accuracy(c, everything) for c in penalties if c != found["c"]] + [
        accuracy(found["c"], part)
    ]
    assert found["top1"] not in others  # another choice would be seen


def test_a_grid_point_equals_torchs_own_sgd():
    features, labels = overlapping(64)
    rates = (0.05, 0.5)
    found = fit_linear(features, labels, rates, classes=3, iterations=20, batch_size=64, seed=5)
    generator = torch.Generator().manual_seed(5)
    start = 0.01 * torch.randn(6, 1, 3, generator=generator)[:, 0]
    for point, rate in enumerate(rates):  # full batches: their order is of no consequence
        layer = nn.Linear(6, 3)
        with torch.no_grad():
            layer.weight.copy_(start.T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 64 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(layer(features), labels).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(
            found.weight[:, point].T, layer.weight.detach(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(found.bias[point], layer.bias.detach(), rtol=1e-4, atol=1e-5)
        expected = (layer(features).argmax(1) == labels).double().mean() * 100
        assert found.top1(features, labels, chunk=7)[point].item() == pytest.approx(expected.item())


def test_many_points_and_few_give_the_same_classifier():
    features, labels = overlapping()
    settings = {"classes": 3, "iterations": 40, "batch_size": 50, "seed": 1}
    many = fit_linear(features, labels, (1e-3, 0.1, 1.0), **settings)
    alone = fit_linear(features, labels, (0.1,), **settings)
    torch.testing.assert_close(many.weight[:, 1], alone.weight[:, 0], rtol=1e-4, atol=1e-6)


def test_the_learning_rate_is_chosen_without_the_test_images():
    """With another test set the same rate is chosen, and its held-out score is the best one."""
    first = evals.linear(Reader(noise), codes(), embedder=VIEW, **TASKS["linear"])
    other = Labelled(Codes(240, 0), Codes(40, 9), ["a", "b", "c", "d"])
    second = evals.linear(Reader(noise), other, embedder=VIEW, **TASKS["linear"])
    assert (
        first["learning_rate"] == second["learning_rate"]
        and first["held_out_top1"] == second["held_out_top1"]
    )
    scores = first["held_out_top1"]
    assert len(scores) == 13 and scores[f"{first['learning_rate']:g}"] == max(scores.values())


@pytest.mark.parametrize(("task", "fitted"), [("linear", "fit_linear"), ("logreg", "_fitted")])
def test_held_out_images_are_for_choosing_and_then_for_training(
    monkeypatch, task: str, fitted: str
):
    if task == "logreg":
        pytest.importorskip("sklearn")
    module, rows = (
        sys.modules[getattr(evals, task).__module__],
        [],
    )  # the package's names are the functions
    original, place = getattr(module, fitted), 0 if task == "linear" else 1
    monkeypatch.setattr(
        module, fitted, lambda *a, **k: rows.append(len(a[place])) or original(*a, **k)
    )
    run = getattr(evals, task)(Reader(oracle), codes(), embedder=VIEW, **TASKS[task])
    assert rows[-1] == run["train_images"] == 240 and set(rows[:-1]) == {216}


def test_c_is_chosen_by_the_held_out_cls_tokens_of_the_training_images(monkeypatch):
    pytest.importorskip("sklearn")
    module, seen = sys.modules[evals.logreg.__module__], []
    monkeypatch.setattr(
        module, "score_penalties", lambda *args: seen.append(args) or ([1.0, 3.0, 2.0], 0)
    )
    data, reader = codes(), Reader(oracle)
    reader.features = lambda images: Reader.features(reader, images)._replace(
        patches=torch.rand(len(images), 2, 1, 1)
    )
    assert (
        evals.logreg(reader, data, embedder=VIEW, **TASKS["logreg"])["c"]
        == TASKS["logreg"]["penalties"][1]
    )
    train, rows = VIEW(reader, data.train), split_by_class(data.train.labels, 0.1, seed=0)
    for (features, labels), chosen in zip(seen[0][:2], rows):
        assert features.dtype == np.float64 and np.array_equal(
            features, train.cls.double().numpy()[chosen]
        )
        assert np.array_equal(labels, data.train.labels[chosen])


def test_batches_take_every_row_once_a_pass_in_another_order():
    rows = torch.arange(10)
    found = itertools.islice(_batches(rows[:, None], rows, 3, torch.Generator().manual_seed(0)), 6)
    passes = torch.cat([y for _, y in found]).view(2, 9).tolist()
    assert all(len(set(order)) == 9 for order in passes) and passes[0] != passes[1] != sorted(
        passes[1]
    )


def test_top5_by_hand():
    probes = LinearProbes(torch.eye(6)[:, None], torch.zeros(1, 6))
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]]).repeat(4, 1)
    assert _top5(probes, scores, torch.tensor([0, 4, 5, 5])) == 50
    assert probes.top1(scores, torch.tensor([0, 4, 5, 5])).tolist() == [25]


def test_neighbours_beyond_the_bank_are_left_out():
    for k, kept in (((1, 20, 240, 241), [1, 20, 240]), ((500,), [240])):
        assert evals.knn(Reader(oracle), codes(), embedder=VIEW, k=k)["protocol"]["k"] == kept


# Features that are computed once.


def test_the_mean_patch_is_the_mean_of_all_patches():
    source, reader = Codes(5, 0), PixelBackbone(8)
    found = VIEW(reader, source)
    pixels = (
        torch.stack([torch.from_numpy(np.array(source.load(i))).permute(2, 0, 1) for i in range(5)])
        / 255
    )
    torch.testing.assert_close(found.patch_mean, reader.features(pixels).patches.mean((2, 3)))
    assert torch.equal(found.both, torch.cat([found.cls, found.patch_mean], 1))


@every_task
def test_the_second_call_reads_the_cache(tmp_path: Path, task: str):
    if task == "logreg":
        pytest.importorskip("sklearn")
    data, embedder = codes(40, 20), Embedder(size=16, resize=16, cache=tmp_path)
    settings = TASKS[task] | ({"iterations": 10} if task == "linear" else {})
    first, second = Reader(oracle), Reader(oracle)
    found = getattr(evals, task)(first, data, embedder=embedder, **settings)
    assert (
        first.calls == [40, 20]
        and getattr(evals, task)(second, data, embedder=embedder, **settings) == found
    )
    assert second.calls == []


def test_other_weights_views_and_data_miss_the_cache(tmp_path: Path):
    embedder = Embedder(size=16, resize=16, cache=tmp_path)
    reader, source = Reader(noise), Codes(12, 0)
    embedder(reader, source)
    embedder(reader, Codes(12, 0))
    assert reader.calls == [12]
    changed = Codes(12, 0)
    changed.pixels[0, 0, 0, 1] ^= 1
    relabelled = Codes(12, 0)
    relabelled.labels[3] = (relabelled.labels[3] + 1) % CLASSES
    scaled = Codes(12, 0)
    scaled.scale = 10_000.0
    for other in (changed, relabelled, scaled, Codes(11, 0)):
        before = len(reader.calls)
        embedder(reader, other)
        assert len(reader.calls) == before + 1
    for other in (
        Embedder(size=16, resize=18, cache=tmp_path),
        Embedder(size=16, resize=16, autocast_dtype=torch.bfloat16, cache=tmp_path),
    ):
        before = len(reader.calls)
        other(reader, source)
        assert len(reader.calls) == before + 1
    with torch.no_grad():
        reader.scale += 1e-6
    before = len(reader.calls)
    embedder(reader, source)
    assert len(reader.calls) == before + 1
    reader.statistics = ImageStatistics((0.1,) * 3, (1.0,) * 3)
    embedder(reader, source)
    assert len(reader.calls) == before + 2


def test_a_cut_cache_file_is_computed_again(tmp_path: Path):
    embedder, reader = Embedder(size=16, resize=16, cache=tmp_path), Reader(oracle)
    found = embedder(reader, Codes(12, 0))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert torch.equal(embedder(reader, Codes(12, 0)).cls, found.cls) and len(reader.calls) == 2


def test_a_fingerprint_tells_settings_that_no_weight_shows():
    torch.manual_seed(0)
    model = build("vit_nano8", depth=1)
    before = fingerprint(model)
    other = build("vit_nano8", depth=1, rope_normalize="max")
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) != before
    with torch.no_grad():
        model.features(torch.randn(1, 3, 16, 16))
        model.features(torch.randn(1, 3, 32, 24))
    assert (
        fingerprint(model.eval()) == before == fingerprint(model.train())
    )  # use and mode change nothing


def test_files_are_known_by_size_and_time(tmp_path: Path):
    class Files(Codes):
        files = (str(tmp_path / "a"),)

        def load(self, index: int) -> Image.Image:
            raise AssertionError("the content need not be read")

    (tmp_path / "a").write_bytes(b"1")
    before = identity(Files(5, 0))
    assert identity(Files(5, 0)) == before
    (tmp_path / "a").write_bytes(b"12")
    assert identity(Files(5, 0)) != before


def test_processes_share_the_rows():
    source, embedder = Codes(23, 0, broken=(4, 7)), VIEW
    whole = embedder(Reader(oracle), source)
    shares = [embedder.compute(Reader(oracle), source, range(rank, 23, 3)) for rank in (2, 0, 1)]
    for one, other in zip(whole[:-1], joined(shares)[:-1]):
        assert torch.equal(one, other)
    assert (
        joined(shares).unreadable
        == whole.unreadable
        == [f"code {i}: broken on purpose" for i in (4, 7)]
    )
    assert whole.rows.tolist() == [i for i in range(23) if i not in (4, 7)]
    assert torch.equal(whole.labels, torch.from_numpy(source.labels)[whole.rows])
    assert whole.both.shape == (21, 2 * CLASSES)


def test_files_of_earlier_versions_keep_their_names():
    """Or the features of every earlier evaluation would be computed again."""
    settings = {"size": 16, "resize": 18, "cache": Path("cache"), "digest": "d"}
    for dtype, name in (
        (None, "a0388aba102f8395d1e2169f65ccb474"),
        (torch.bfloat16, "7cf7b1b45979bf2fddec69142c906ce3"),
    ):
        embedder = Embedder(**settings, autocast_dtype=dtype)
        assert embedder.place(Reader(noise), Codes(5, 0)) == Path("cache") / f"{name}.safetensors"
    half = Embedder(**settings, autocast_dtype=torch.float16)
    assert half.place(Reader(noise), Codes(5, 0)) != embedder.place(Reader(noise), Codes(5, 0))


# Reading ahead.


def test_the_next_batch_is_read_while_one_is_used_and_no_further():
    loaded, started = [], threading.Event()

    def load(index: int) -> int:
        loaded.append(index)
        if index >= 2:
            started.set()
        return 10 * index

    batches = read_ahead(load, range(7), batch_size=2, workers=1)
    assert next(batches) == {0: 0, 1: 10}
    assert started.wait(10)  # the second batch is on its way before it is asked for
    assert max(loaded) <= 3
    assert list(batches) == [{2: 20, 3: 30}, {4: 40, 5: 50}, {6: 60}]
    assert list(read_ahead(load, [], batch_size=2, workers=1)) == []


def test_errors_are_raised_in_order_and_broken_images_keep_their_place():
    def load(index: int) -> int:
        if index == 1:
            raise UnreadableImage("one", "broken on purpose")
        if index == 4:
            raise RuntimeError("stop")
        return index

    batches = read_ahead(load, range(6), batch_size=2, workers=4)
    first = next(batches)
    assert list(first) == [0, 1] and str(first[1]) == "one: broken on purpose"
    assert next(batches) == {2: 2, 3: 3}  # although the fourth has failed by now
    with pytest.raises(RuntimeError, match="stop"):
        next(batches)


# Raw pixels as a backbone.


def test_pixels_are_averaged_cells_of_each_patch():
    images = torch.rand(2, 3, 48, 32)
    backbone = PixelBackbone(patch_size=16)
    found = backbone.features(images)
    assert found.patches.shape == (2, 3 * 64, 3, 2) and found.registers.shape[1] == 0
    patch = images[1, :, 16:32, 16:32]
    expected = patch.unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4)).flatten()
    torch.testing.assert_close(found.patches[1, :, 1, 1].sort().values, expected.sort().values)
    torch.testing.assert_close(found.cls, pixel_features(images))
    assert (
        isinstance(backbone, FeatureExtractor)
        and PixelBackbone(14).side == 7
        and PixelBackbone(5, 13).in_channels == 13
    )


def test_statistics_of_a_source():
    class Bands:
        values = torch.rand(6, 5, 4, 4)

        def __len__(self) -> int:
            return 6

        def load(self, index: int) -> Tensor:
            return self.values[index]

    found = measured_statistics(Bands())
    flat = Bands.values.transpose(0, 1).flatten(1).double()
    assert found.mean == pytest.approx(flat.mean(1).tolist())
    assert found.std == pytest.approx(flat.std(1, correction=0).tolist())


# What does not fit gets one sentence.


@every_task
def test_features_with_nan_are_refused(task: str):
    broken = Reader(
        lambda images: torch.where(oracle(images)[:, :1] > 0, torch.nan, oracle(images))
    )
    with pytest.raises(
        ValueError,
        match="10 of 40 rows hold NaN or infinity; the model that made them has diverged",
    ):
        getattr(evals, task)(broken, codes(40, 20), embedder=VIEW)


def test_what_an_embedder_refuses():
    with pytest.raises(ValueError, match="multiple of the patch size 8, at most resize=16, got 20"):
        Embedder(size=20, resize=16)(Reader(oracle), Codes(4, 0))
    with pytest.raises(DataError, match="none of 2 images can be read, such as"):
        VIEW(Reader(oracle), Codes(2, 0, broken=(0, 1)))
    unknown = Reader(oracle)
    unknown.statistics = None
    with pytest.raises(ValueError, match="expected them with the backbone, got none"):
        VIEW(unknown, Codes(4, 0))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0, 1, 2]), r"expected \[N, D\] and \[N\]"),
        (torch.tensor([0, 1, 2, 3]), "expected 0 to 2, got 0 to 3"),
        (torch.tensor([1, 1, 1, 1]), "at least two classes, got only 1"),
    ],
)
def test_what_a_probe_refuses(labels: Tensor, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        fit_linear(torch.zeros(4, 2), labels, (0.1,), classes=3, iterations=1)
