"""Snapshots survive a round trip, and the report stands on its own whatever is missing."""

import html.parser
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3core.image_statistics import ImageStatistics
from dinov3core.pictures.states import Snapshot
from dinov3core.train.engine.report import write_report
from dinov3core.train.engine.snapshot import take_snapshot

ROOT = Path(__file__).resolve().parents[1]


class Features(NamedTuple):
    cls: Tensor
    registers: Tensor
    patches: Tensor


class Colours(nn.Module):
    """Mean colour of each patch as its feature."""

    patch_size = 4

    def features(self, images: Tensor) -> Features:
        patches = F.avg_pool2d(images, self.patch_size)
        return Features(patches.mean((2, 3)), patches.new_zeros(len(images), 0, 3), patches)


def _probe(
    classes: int = 4, channels: int = 3, size: tuple[int, int] = (16, 24)
) -> SimpleNamespace:
    """Images of one colour per class on noise; a darker square marks the object."""
    generator = torch.Generator().manual_seed(0)
    palette = torch.randint(60, 256, (classes, channels, 1, 1), generator=generator)
    labels = torch.arange(60) % classes

    def images(labels):
        noise = torch.randint(-20, 21, (len(labels), channels, *size), generator=generator)
        pixels = palette[labels] + noise
        pixels[..., 6:10, 8:14] //= 4
        return pixels.clamp(0, 255).byte()

    statistics = ImageStatistics((0.5,) * channels, (0.25,) * channels)
    bank, queries = images(labels), images(labels[:20])
    return SimpleNamespace(
        bank=bank, bank_labels=labels, queries=queries, query_labels=labels[:20], views=queries,
        view_labels=labels[:20], statistics=statistics,
    )  # fmt: skip


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return take_snapshot(Colours().train(), _probe())


def test_snapshot_measures_and_pictures(snapshot):
    assert snapshot.scalars["knn"] == 100.0 and 1 < snapshot.scalars["rankme"] <= 3
    assert snapshot.photos.shape == (8, 16, 24, 3) and snapshot.pca.shape == (8, 224, 336, 3)
    assert snapshot.cosines.shape == (8, 12, 18)  # 16 px are enlarged by 3 at most: 12 patches
    assert snapshot.neighbours.shape == (6, 5, 16, 24, 3) and (snapshot.agreement == 1).all()
    for heat, (row, column) in zip(snapshot.cosines, snapshot.points):
        assert heat[row, column] == pytest.approx(1, abs=1e-5) and heat.max() <= 1 + 1e-5
        assert 4 <= row < 8 and 5 <= column < 11  # on the object or its edge


def test_pictures_are_of_the_same_images_whatever_the_model(snapshot):
    other = Colours()
    other.features = lambda images: Colours.features(other, images.flip(3))
    second = take_snapshot(other, _probe())
    for name in ("photos", "points", "queries"):
        assert np.array_equal(getattr(snapshot, name), getattr(second, name))
    assert not np.array_equal(snapshot.pca, second.pca)


def test_queries_spread_over_classes():
    probe = _probe()
    probe.query_labels, order = probe.query_labels.sort(stable=True)
    probe.queries = probe.queries[order]
    probe.views, probe.view_labels = probe.queries, probe.query_labels
    shown = take_snapshot(Colours(), probe).queries
    firsts = [(probe.query_labels == c).nonzero()[0].item() for c in range(4)]
    assert np.array_equal(shown[:4], probe.queries[firsts].permute(0, 2, 3, 1).numpy())


def test_snapshot_round_trip_needs_no_pickle(snapshot, tmp_path):
    snapshot.save(tmp_path / "before.npz")
    loaded = Snapshot.load(tmp_path / "before.npz")
    for name, value in vars(snapshot).items():
        assert (
            np.array_equal(getattr(loaded, name), value)
            if name != "scalars"
            else loaded.scalars == value
        )
    assert [p.name for p in tmp_path.iterdir()] == ["before.npz"]
    for content in (b"", b"not a snapshot", (tmp_path / "before.npz").read_bytes()[:500]):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match="expected a snapshot"):
            Snapshot.load(tmp_path / "broken.npz")
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "absent.npz")


class Page(html.parser.HTMLParser):
    """Collects what a browser would need, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "line", "circle", "polyline", "polygon", "br", "wbr"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.charts, self.addresses, self.texts = [], [], 0, [], []
        self.links, self.ids = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        self.images += [values] if tag == "img" else []
        self.charts += values.get("class") == "chart"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.texts.append(data)


def _rows() -> list[dict]:
    rows = []
    for step in range(1, 41):
        row = {
            "step": step,
            "dino_global": 6.9 - step / 50,
            "ibot": 5.0,
            "log_k": math.log(1024),
            "gram": 0.0,
        }
        row |= {
            "target_entropy": 5.0,
            "lr": 1e-3,
            "step_seconds": 0.9,
            "data_seconds": 0.1,
            "koleo": 0.1,
        }
        row |= {"grad_norm_backbone": 1.0 if step % 7 else None, "images_per_second": 80.0}
        rows.append(row)
    return [*rows, {"step": 40, "event": "eval", "knn": 54.4, "knn_error": 1.4, "rankme": 61.0}]


SUMMARY = {
    "recipe": "quick<start>",
    "seconds": 278.4,
    "knn_pixels": 33.5,
    "knn_before": 20.3,
    "knn_after": 54.4,
    "knn_pixels_error": 1.3,
    "knn_before_error": 1.1,
    "knn_after_error": 1.4,
    "knn_chance": 25.0,
    "images": {
        "trained": "9 images in /data/<b>",
        "shown": "8 training images",
        "neighbours": "6 of these",
        "knn": "20-NN on 1,200 pictures",
    },
    "collapse": "none",
    "verdict": "Healthy run",
    "collapse_sentence": "Healthy run: no sign of collapse.",
    "skipped_images": 1,
    "skipped": ["a/<b>.jpg"],
    "bad_steps": 0,
    "peak_memory_bytes": 2**30,
    "environment": {"torch": "2.13.0"},
}


def test_report_is_complete_and_self_contained(snapshot, tmp_path):
    path = write_report(tmp_path, snapshot, snapshot, _rows(), SUMMARY, "width: 96 <&>")
    text = path.read_text()
    page = Page(text)
    said = " ".join(" ".join(page.texts).split())
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert all(image["alt"] for image in page.images)
    assert (
        page.links == [f"#{name}" for name in page.ids if name.startswith("part-")]
        and len(page.links) == 5
    )
    assert "http" not in text and "url(" not in text and "<script" not in text
    assert len(page.images) == 8 * 3 + 8 * 3 + 1 + 2  # PCA, cosines, their scale, neighbours
    assert page.charts == 9  # all but drift and usage, which these rows lack
    for expected in (
        "54.4 \xb1 1.4 %",
        "20.3 \xb1 1.1 %",
        "33.5 \xb1 1.3 %",
        "chance, 25.0 %",
        "one standard error",
        "9 images in /data/<b>",
        "Images from: 8 training images",
        "20-NN on 1,200 pictures",
        "34.1 points above",
        "20.9 points above",
        "Healthy run",
        "4.6 min",
        "1.00 GiB",
        "quick<start>",
        "width: 96 <&>",
        "a/<b>.jpg",
        "30 of 30",
        "2.13.0",
    ):
        assert expected in said, expected


@pytest.mark.parametrize("module", ["train.engine.report", "pictures.page"])
def test_pictures_without_pillow_say_what_to_install(module):
    """A plain "No module named PIL" would not say how to get it."""
    program = f"""
import sys
sys.modules["PIL"] = None
import importlib.machinery, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "PIL" else find(name, *rest)
import dinov3core.{module}
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "not installed: PIL; install with: pip install 'dinov3core[train]'" in ran.stderr


def test_report_survives_whatever_is_missing(snapshot, tmp_path):
    page = Page(write_report(tmp_path, None, None, [], {}, "").read_text())
    assert not page.images and not page.charts and "not measured" in " ".join(page.texts)
    odd = [
        {},
        {"step": None, "loss": 1.0},
        {"step": 3, "knn": float("nan"), "lr": "x", "dino_local": 2.0},
    ]
    worse = {
        "knn_after": 10.0,
        "knn_before": 20.0,
        "collapse": "uniform",
        "verdict": "Uniform collapse",
    }
    worse |= {"skipped_images": 3, "bad_steps": None}
    page = Page(write_report(tmp_path, None, snapshot, odd, worse, "").read_text())
    said = " ".join(page.texts)
    assert (
        page.charts == 1
        and "10.0 points below" in said
        and "level with" not in said
        and "Uniform collapse" in said
        and "Skipped images" in said
    )
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_equal_score_is_level(tmp_path):
    summary = {"knn_after": 20.04, "knn_before": 20.0, "knn_pixels": 20.5}
    said = " ".join(Page(write_report(tmp_path, None, None, [], summary, "").read_text()).texts)
    assert "level with the untrained network and 0.5 points below raw pixels" in said


def test_a_difference_within_the_errors_is_no_loss(tmp_path):
    """The high-resolution stage of the quick start: 55.9 to 53.6 of 1,200 images."""
    summary = {
        "began": "begins as the teacher of runs/quickstart_gram after step 100",
        "knn_after": 53.6,
        "knn_after_error": 1.4,
        "knn_before": 55.9,
        "knn_before_error": 1.4,
        "knn_pixels": 35.2,
        "knn_pixels_error": 1.4,
    }
    said = " ".join(Page(write_report(tmp_path, None, None, [], summary, "").read_text()).texts)
    assert (
        "level with the start of this stage (2.3 points below, within two standard errors) and "
        "18.4 points above raw pixels."
    ) in said


def test_the_band_of_k_nn_is_drawn_where_errors_are_known(tmp_path):
    rows = [{"step": s, "knn": 20.0 + s, "knn_error": 2.0} for s in (0, 10, 20)]
    text = write_report(tmp_path, None, None, rows, {"knn_chance": 12.5}, "").read_text()
    assert text.count("<polygon") == 1 and "Chance <b>12.5</b>" in text
    rows[1].pop("knn_error")
    assert "<polygon" not in write_report(tmp_path, None, None, rows, {}, "").read_text()


def test_report_without_labels_marks_nothing(tmp_path):
    probe = _probe()
    probe.bank_labels = probe.query_labels = probe.view_labels = None
    found = take_snapshot(Colours(), probe)
    assert "knn" not in found.scalars and (found.agreement == -1).all()
    page = Page(write_report(tmp_path, None, found, [], {}, "").read_text())
    said = " ".join(page.texts)
    assert "show the class asked for" not in said and "A tick" not in said


def test_one_image_has_no_neighbours(tmp_path):
    probe = _probe()
    one = probe.views[:1]
    probe = replace_fields(probe, views=one, queries=one, bank=one[:0], bank_labels=None)
    found = take_snapshot(Colours(), replace_fields(probe, query_labels=None, view_labels=None))
    assert found.neighbours.shape[:2] == (1, 0)
    found.save(tmp_path / "one.npz")
    page = Page(
        write_report(tmp_path, Snapshot.load(tmp_path / "one.npz"), found, [], {}, "").read_text()
    )
    assert len(page.images) == 2 * 3 + 1 and "Nearest neighbours" not in " ".join(page.texts)


def test_snapshot_of_other_channels_and_a_small_bank():
    probe = _probe(channels=5)
    probe = replace_fields(probe, bank=probe.bank[:3], bank_labels=probe.bank_labels[:3])
    found = take_snapshot(Colours(), probe)
    assert found.photos.shape[-1] == 3 and found.neighbours.shape[1] == 3
    assert json.loads(json.dumps(dict(found.scalars))) == dict(found.scalars)


def replace_fields(probe: SimpleNamespace, **changes) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(probe), **changes})


def test_collapsed_snapshot_still_draws(tmp_path, snapshot):
    model = Colours()
    model.features = lambda images: Colours.features(model, torch.ones_like(images))
    found = take_snapshot(model, _probe())
    assert found.scalars["rankme"] == pytest.approx(1, abs=1e-3)
    assert np.abs(found.pca.astype(int) - 128).max() <= 1
    Page(write_report(tmp_path, snapshot, replace(found, scalars={}), [], {}, "").read_text())


def _evaluations(agreement: tuple[float | None, ...]) -> list[dict]:
    knn = (20.0, 40.0, 50.0, 60.0)
    rows = []
    for step, images, patches in zip((0, 100, 200, 300), knn, agreement):
        errors = {"knn_error": 1.0, "dense_agreement_error": 0.5, "dense_miou_error": 0.7}
        row = {"step": step, "event": "eval", "knn": images, **errors}
        rows.append(row | {"dense_agreement": patches, "dense_miou": patches and 80 - patches})
    return rows


def test_images_and_patches_share_a_chart_that_marks_what_was_best(tmp_path):
    """The figure that shows patches degrade; the sentences say it, too."""
    summary = {
        "patches": "degraded",
        "patches_since": 100,
        "patches_sentence": "The patches have degraded since step 100.",
        "patches_command": "python --mend 'my <run>'",
        "best": {"step": 200, "by": "knn", "score": 60.0, "error": 1.0, "last": 60.0},
        "best_sentence": "Best by k-NN: step 200 (60.0 +- 1.0 %), in runs/<x>/best",
    }
    rows = _evaluations((55.0, 62.0, 59.0, 57.0))
    text = write_report(tmp_path, None, None, rows, summary, "").read_text()
    page = Page(text)
    said = " ".join(page.texts)
    assert page.charts == 3  # beside k-NN alone and linear segmentation
    assert text.count("<polygon") == 4  # the bands of all three scores, k-NN twice
    for expected in (
        "Images and patches",
        "Patch agreement (right axis)",
        "Linear segmentation",
        "patches were best",
        "kept as best",
        "The patches have degraded since step 100.",
        "python --mend 'my <run>'",
        "in runs/<x>/best",
    ):
        assert expected in said, expected


def test_one_mark_where_both_are_one_step_and_none_for_the_last(tmp_path):
    rows = _evaluations((55.0, 62.0, 59.0, 57.0))
    best = {"step": 100, "by": "dense", "score": 62.0, "error": 0.5, "last": 57.0}
    summary = {"patches": "degraded", "patches_since": 100, "patches_sentence": "x.", "best": best}
    said = " ".join(Page(write_report(tmp_path, None, None, rows, summary, "").read_text()).texts)
    assert "patches were best" in said and "kept as best" not in said

    rows = _evaluations((55.0, 57.0, 59.0, 62.0))
    summary = {"patches": "none", "patches_sentence": "Fine.", "best": best | {"step": 300}}
    said = " ".join(Page(write_report(tmp_path, None, None, rows, summary, "").read_text()).texts)
    assert "Images and patches" in said and "were best" not in said and "kept as" not in said


def test_patches_without_labels_have_their_chart_and_none_without_masks(tmp_path):
    rows = [row | {"knn": None} for row in _evaluations((55.0, 57.0, 59.0, 62.0))]
    said = " ".join(Page(write_report(tmp_path, None, None, rows, {}, "").read_text()).texts)
    assert "Patch agreement" in said and "axis" not in said
    rows = _evaluations((None,) * 4)
    summary = {"patches": "not_judged", "patches_sentence": "Patches are not judged."}
    said = " ".join(Page(write_report(tmp_path, None, None, rows, summary, "").read_text()).texts)
    assert "Images and patches" not in said and "not judged" not in said


def test_the_terms_of_teachers_without_heads_have_a_chart(tmp_path):
    rows = [
        {"step": step, "cls_of_dino_v2": 1 / step, "patches_of_dino_v2": 2 / step}
        for step in range(1, 9)
    ]
    text = write_report(tmp_path, None, None, rows, {}, "").read_text()
    assert "Features of teachers" in text
    assert "cls of dino_v2" in text and "patches of dino_v2" in text
    assert (
        "Features of teachers"
        not in write_report(tmp_path, None, None, _rows(), {}, "").read_text()
    )
