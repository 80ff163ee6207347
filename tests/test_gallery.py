"""The gallery: groups, sheets and what a model sees against hand-made cases; the page as a browser
reads it.
"""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dinov3core.models import (
    ConvNeXt,
    ConvNeXtSettings,
    Features,
    ImageStatistics,
    VisionTransformer,
    VitSettings,
)
from dinov3core.models.attention_maps import attention_maps
from dinov3core.pictures import paint
from dinov3core.pictures.clusters import kmeans, match_labels
from dinov3core.pictures.explorer import TOLERANCE, encode
from dinov3core.pictures.gallery import Bank, Drawing, _attention_rgb, write_gallery
from dinov3core.pictures.sheets import Row, sheet
from dinov3core.pictures.sight import cell_at, look

SMALL = Drawing(patches=4, tile=16)
HALF = ImageStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    settings = VitSettings(
        width=16, depth=2, heads=2, patch_size=8, registers=2, layer_scale=1.0, init_std=0.2
    )
    model = VisionTransformer(settings)
    model.statistics = HALF
    return model


def _convnext() -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtSettings((1, 1, 1, 1), (4, 4, 8, 8)))
    model.statistics = HALF
    return model


class Colours(nn.Module):
    """A foreign backbone: the mean colour of a patch is its feature; it takes plain pixels."""

    patch_size = 4

    def features(self, images: torch.Tensor) -> Features:
        patches = F.avg_pool2d(images, 4)
        return Features(patches.mean((2, 3)), patches.new_zeros(len(images), 0, 3), patches)


def _images(n: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


# Groups


def test_two_groups_are_found_and_numbered_by_size():
    centres = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    truth = torch.tensor([1] * 7 + [0] * 20)
    rows = centres[truth] + 0.3 * torch.randn(27, 3, generator=torch.Generator().manual_seed(1))
    found = kmeans(rows, 2)
    assert torch.equal(found.labels, truth)  # the group of twenty is number 0
    for group in range(2):
        own = rows[truth == group].double()
        torch.testing.assert_close(found.centres[group], own.mean(0))
    assert torch.equal(kmeans(rows, 2).labels, found.labels)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_and_centres_belong_together(seed):
    truth = torch.tensor([3] * 3 + [0] * 9 + [2] * 5 + [1] * 7)  # by size
    rows = 9 * torch.eye(4)[truth] + 0.1 * torch.randn(
        24, 4, generator=torch.Generator().manual_seed(seed)
    )
    found = kmeans(rows, 4, seed=seed)
    assert torch.equal(found.labels, truth)
    assert torch.equal(torch.cdist(rows.double(), found.centres).argmin(1), truth)


def test_groups_are_as_tight_as_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster", reason="compares with scikit-learn")
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    rows[:100] += 3
    theirs = cluster.KMeans(4, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    found = kmeans(rows, 4, restarts=10)
    assert found.spread == pytest.approx(
        (rows.double() - found.centres[found.labels]).square().sum().item()
    )
    assert found.spread <= 1.01 * theirs


def test_fewer_different_rows_than_groups_give_fewer_groups():
    found = kmeans(torch.ones(5, 2).index_fill_(0, torch.tensor([4]), 2.0), 4)
    assert (
        found.labels.tolist() == [0, 0, 0, 0, 1] and len(found.centres) == 2 and found.spread == 0
    )
    for rows, count, sentence in (
        (torch.ones(3, 2), 4, "ask for 1 to N clusters"),
        (torch.full((3, 2), float("nan")), 2, "has diverged"),
    ):
        with pytest.raises(ValueError, match=sentence):
            kmeans(rows, count)


def test_labels_are_renamed_to_agree():
    reference = torch.tensor([[0, 0, 1, 1, 2, 2]])
    permuted = torch.tensor([[2, 2, 0, 0, 1, 1]])
    assert torch.equal(match_labels(permuted, reference, 4), reference)
    assert match_labels(torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), 2).tolist() == [
        0,
        0,
        0,
        1,
    ]


def test_segments_show_the_palette():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, :, 2:] = 3
    rgb = paint.label_rgb(paint.smooth_labels(labels, 4, (40, 40)))
    assert rgb.shape == (1, 40, 40, 3)
    assert (rgb[0, :, :20] == paint.SEGMENT_COLOURS[0]).all()
    assert (rgb[0, :, 20:] == paint.SEGMENT_COLOURS[3]).all()
    with pytest.raises(ValueError, match="expected 0 to 7, got 0 to 8"):
        paint.label_rgb(torch.tensor([[[0, 8]]]))


# Sheets


def test_tiles_of_a_sheet_lie_in_rows():
    colours = np.array(
        [[[200, 0, 0], [0, 200, 0], [0, 0, 200]], [[9, 9, 9], [99, 99, 99], [150, 150, 0]]],
        np.uint8,
    )
    tiles = np.broadcast_to(colours[:, :, None, None], (2, 3, 10, 20, 3))
    made = np.asarray(
        sheet("Title", "Caption", [Row("one", list(tiles[0])), Row("two", list(tiles[1]))], tile=30)
    )
    for row in range(2):
        for column in range(3):
            rows, columns = np.nonzero((made == colours[row, column]).all(2))
            assert (
                np.ptp(rows) == 29 and np.ptp(columns) == 59
            )  # 30 x 60: the ratio of sides is kept
    places = [[np.nonzero((made == c).all(2))[k].min() for c in colours[:, 0]] for k in (0, 1)]
    assert (
        places[0][1] - places[0][0] == 40 and places[1][0] == places[1][1]
    )  # tile and gap; one left edge
    with pytest.raises(ValueError, match=r"as many tiles, got \[1, 2\]"):
        sheet("t", "c", [Row("a", tiles[0][:1]), Row("b", tiles[0][:2])])


def test_long_labels_and_captions_grow_the_sheet():
    tiles = [np.zeros((8, 8, 3), np.uint8)] * 2
    short = sheet("t", "few words", [Row("a", tiles)])
    long = sheet(
        "t",
        "many words " * 60,
        [Row("a_name_without_any_blank_that_is_far_too_long_for_the_column", tiles)],
    )
    assert long.height > short.height + 100 and long.width < short.width + 200


# What a model sees


def test_a_vit_is_seen_whole():
    model, images = _vit().train(), _images(3, 32, 48)
    places = [(0.1, 0.9), (0.5, 0.5), (0.99, 0.0)]
    seen = look(model, images, places, patches=8, batch_size=2)
    assert (
        model.training
        and seen.seen == (64, 96)
        and seen.patches.shape == (3, 16, 8, 12)
        and not seen.skipped
    )
    pixels = F.interpolate(
        images.float() / 255, size=(64, 96), mode="bicubic", antialias=True
    ).clamp(0, 1)
    inputs = (pixels - 0.5) / 0.25
    with torch.no_grad():
        model.eval()
        expected, raw = model.features(inputs), model.features(inputs, norm=False)
    torch.testing.assert_close(seen.patches, expected.patches)
    torch.testing.assert_close(seen.norms, raw.patches.norm(dim=1))
    torch.testing.assert_close(seen.prefix_norms[:, 0], raw.cls.norm(dim=1))
    torch.testing.assert_close(seen.prefix_norms[:, 1:], raw.registers.norm(dim=2))
    cells = [(0, 10), (4, 6), (7, 0)]
    assert [cell_at(place, (8, 12)) for place in places] == cells
    for i, cell in enumerate(cells):
        maps = attention_maps(model, inputs[i : i + 1], queries=["cls", cell]).patches[0]
        torch.testing.assert_close(seen.cls_attention[i], maps[0])
        torch.testing.assert_close(seen.patch_attention[i], maps[1])


def test_other_models_are_seen_without_what_they_lack():
    images, places = _images(), [(0.5, 0.5)] * 2
    seen = look(_convnext(), images, places, patches=2)
    assert (
        seen.patches.shape == (2, 8, 2, 2)
        and seen.norms.shape == (2, 2, 2)
        and seen.prefix_norms.shape == (2, 1)
    )
    assert seen.cls_attention is None and seen.skipped == (
        "Attention maps need a ViT of this project; ConvNeXt is none.",
    )
    seen = look(Colours(), images, places, patches=8)
    torch.testing.assert_close(seen.patches, F.avg_pool2d(images.float() / 255, 4))
    assert seen.norms is None and len(seen.skipped) == 2


def test_what_cannot_be_looked_at_is_said():
    images = _images()
    unknown = _vit()
    unknown.statistics = None
    for arguments, sentence in (
        (
            (unknown, images, [(0.5, 0.5)] * 2),
            "expected them with the backbone, got none; set backbone.statistics",
        ),
        ((_vit(), images, [(0.5, 0.5)]), "for each of 2 images"),
        ((_vit(), images, [(0.5, 1.5)] * 2), "give shares of height and width"),
        ((_vit(), images[0], [(0.5, 0.5)]), "expected a stack"),
    ):
        with pytest.raises(ValueError, match=sentence):
            look(*arguments, patches=4)


# The page


@pytest.mark.parametrize("D", [3, 40, 300])
def test_encoded_cosines_are_within_their_bound(D):
    generator = torch.Generator().manual_seed(D)
    maps = torch.randn(2, D, 9, 7, generator=generator) * torch.logspace(0, -2, D)[:, None, None]
    codes = encode(maps)
    assert codes.error <= TOLERANCE and codes.values.dtype == torch.int16 and codes.grid == (9, 7)
    rows = F.normalize(maps.double(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    kept = codes.values.double() / 32767
    assert (kept @ kept.T - rows @ rows.T).abs().max() <= codes.error
    assert D < 300 or kept.shape[1] < 126  # rows of 300 numbers need fewer


class Reader(HTMLParser):
    """What a page refers to and says."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        self.links += [
            found[key] for key in ("src", "href", "data", "action", "srcset") if key in found
        ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A page of a ViT and a ConvNeXt, with neighbours in a bank that holds the images too."""
    out = tmp_path_factory.mktemp("gallery")
    images = _images(3)
    others = torch.randint(
        0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(6), dtype=torch.uint8
    )
    bank, labels = torch.cat([others, images.flip(0)]), torch.tensor([0, 1, 2])
    models = {"runs/a<b": _vit(), "net & co": _convnext()}
    path = write_gallery(
        models,
        images,
        out,
        points=[(4, 28)] * 3,
        bank=Bank(bank, torch.tensor([5] * 20 + [2, 1, 0]), query_labels=labels),
        drawing=Drawing(patches=4, segments=3, tile=24),
    )
    return models, images, path


def test_the_page_needs_nothing_and_names_both(compared):
    _, _, path = compared
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert not re.search(r"https?:|//cdn|<link|@import|url\(", text)
    inside = [link for link in page.links if link.startswith("#")]
    assert (
        inside == [f"#{name}" for name in page.ids if name.startswith("part-")] and len(inside) == 9
    )
    pictures_ = [link for link in page.links if link not in inside]
    assert pictures_ and all(link.startswith("data:image/jpeg;base64,") for link in pictures_)
    assert all(image["alt"] and int(image["width"]) > 0 for image in page.images)
    assert "runs/a&lt;b" in text and "net &amp; co" in text and "a<b" not in text
    assert "net &amp; co: Attention maps need a ViT of this project; ConvNeXt is none." in text
    assert "Attention of CLS" in text and "runs/a&lt;b, picture 1: CLS head 1" in text
    assert "net &amp; co, picture 1: CLS head" not in text
    assert len(page.ids) == len(set(page.ids))
    Image.open(path.parent / "components.png").verify()
    assert {file.name for file in path.parent.iterdir()} == {
        "gallery.html", "components.png", "segments.png", "similarity.png", "norms.png",
        "attention-runs-a-b.png", "overview-runs-a-b.png", "overview-net-co.png",
        "neighbours-runs-a-b.png", "neighbours-net-co.png",
    }  # fmt: skip


def test_the_page_decodes_to_the_true_cosines(compared):
    models, images, path = compared
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="patch-data">(.*?)</script>', text).group(1))
    assert [model["name"] for model in data["models"]] == list(models) and data["pictures"] == 3
    assert data["start"] == [0, 4.5 / 32, 28.5 / 32]
    for stored, model in zip(data["models"], models.values(), strict=True):
        patches = look(model, images, [(0.5, 0.5)] * 3, patches=4).patches
        assert stored["grid"] == list(patches.shape[-2:])
        codes = (
            np.frombuffer(base64.b64decode(stored["codes"]), "<i2").reshape(
                patches[:, 0].numel(), -1
            )
            / 32767
        )
        rows = F.normalize(patches.double(), dim=1).permute(0, 2, 3, 1).flatten(0, 2).numpy()
        assert np.abs(codes @ codes.T - rows @ rows.T).max() <= 1 / 127


def test_the_page_reads_on_a_narrow_screen(compared):
    """Tables fold into lists, the bar of sections scrolls and stays, and so does the readout."""
    text = compared[2].read_text(encoding="utf-8")
    narrow = text[text.index("@media (max-width:560px)") :]
    assert ".wide thead { display:none }" in narrow and "content:attr(data-head)" in narrow
    assert text.count('<td data-head="Kind">') == 2
    assert re.search(r"nav \{ position:sticky; [^}]*overflow-x:auto", text)
    assert re.search(r"\.readout \{ position:sticky; top:\d+px", text)
    assert (
        text.count('<b class="closest"></b>') == 3 * 2
    )  # a cosine below every picture of every model


def test_attention_of_all_models_stands_in_one_card(tmp_path):
    models = {"first": _vit(0), "second": _vit(1)}
    text = write_gallery(models, _images(), tmp_path, drawing=SMALL).read_text(encoding="utf-8")
    section = text[
        text.index(">Attention of CLS</h2>") : text.index(">Attention of the ringed patch</h2>")
    ]
    cards = section.split('<div class="card">')[1:]
    names = [re.findall(r"<figcaption>(.*?)</figcaption>", card) for card in cards]
    assert names == [["Image", "first", "second"]] * 2
    heads = text[text.index(">Attention by head</h2>") :]
    groups = re.findall(r"<h3>(.*?)</h3>", heads)
    assert groups == ["Picture 1", "first", "second", "Picture 2", "first", "second"]


def test_attention_on_one_scale_compares_images(tmp_path):
    """On scales of their own two maps look alike, although one is ten times the other."""
    maps = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    pair = torch.cat([maps, maps / 10])
    own, joint = (_attention_rgb(pair, (4, 4), scale).astype(int) for scale in ("map", "row"))
    assert np.array_equal(own[0], own[1]) and joint[0].mean() > joint[1].mean() + 40
    text = write_gallery(
        {"a": _vit()}, _images(), tmp_path, drawing=replace(SMALL, attention_scale="row")
    ).read_text()
    assert "joint 98% quantile" in text and "own 98% quantile" not in text


def test_names_of_models_may_hold_anything(tmp_path):
    """As folders may; the names become text in page and pictures."""
    models = {"runs/\udcff\n\x1b[31m": Colours(), "b": Colours()}
    text = write_gallery(models, _images(), tmp_path, drawing=SMALL).read_text(encoding="utf-8")
    assert r"runs/\xff\n\x1b[31m" in text and "\x1b" not in text
    assert json.loads(re.search(r'id="patch-data">(.*?)</script>', text).group(1))["models"][0][
        "name"
    ] == (r"runs/\xff\n\x1b[31m")


def test_neighbours_are_marked(compared):
    _, _, path = compared
    text = path.read_text(encoding="utf-8")
    said = [
        int(n) for n in re.findall(r"<figcaption>[^<]*: (\d+) of 18 are of the same class<", text)
    ]
    assert said == [
        3,
        3,
    ]  # six neighbours of each image in two models; the only one of its class is itself
    made = np.asarray(Image.open(path.parent / "neighbours-runs-a-b.png").convert("RGB"))
    blue, orange = (
        (made == colour).all(2).nonzero()[1] for colour in ((0, 114, 178), (213, 94, 0))
    )
    assert (
        blue.size and blue.max() < orange.min()
    )  # right ones stand first, all wrong ones behind them


def test_one_model_and_settings_that_do_not_fit(tmp_path):
    images = _images()
    text = write_gallery(
        {"only": Colours()}, images, tmp_path, drawing=replace(SMALL, patches=8)
    ).read_text(encoding="utf-8")
    assert (
        "seen by one model" in text
        and "Nearest neighbours" not in text
        and "Norms need a ViT" in text
    )
    assert not (tmp_path / "norms.png").exists()
    for models, settings, sentence in (
        ({}, {}, "expected at least one by name"),
        ({"a b": Colours(), "A-b": Colours()}, {}, "names that differ in letters or digits"),
        ({"a": Colours()}, {"drawing": Drawing(segments=9)}, "segments: expected 2 to 8, got 9"),
        ({"a": Colours()}, {"points": [(0, 0)]}, "for each of 2 images"),
        ({"a": Colours()}, {"points": [(0, 0), (0, 32)]}, "within 32 x 32 pixels"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_gallery(models, images, tmp_path, **settings)
