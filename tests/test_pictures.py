"""Pictures against the mathematics they show, and charts against the numbers they draw."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov3core.pictures import paint
from dinov3core.pictures.charts import (
    Level,
    Mark,
    Series,
    figure,
    label,
    legend,
    line_chart,
    nice_ticks,
    tick_labels,
)


def _maps(B=3, D=12, h=5, w=7, seed=0):
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("D", [2, 12, 300])  # fewer than three components, D < n, D > n
def test_components_are_those_of_the_singular_value_decomposition(D):
    maps = _maps(D=D)
    found = paint.principal_components(maps)
    x = maps.double().permute(0, 2, 3, 1).reshape(-1, D)
    x = x - x.mean(0)
    u = torch.linalg.svd(x, full_matrices=False).U
    c = min(3, D)
    scores = found.permute(0, 2, 3, 1).reshape(-1, 3).double()
    expected = u[:, :c] * len(x) ** 0.5
    torch.testing.assert_close(scores[:, :c].abs(), expected.abs(), atol=1e-5, rtol=1e-5)
    assert (scores[:, :c].pow(3).mean(0) > 0).all() and not scores[:, c:].any()


def test_colours_do_not_depend_on_the_basis_or_the_order_of_images():
    maps = _maps()
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    rotated = torch.einsum("de,behw->bdhw", rotation, maps)
    plain, turned = paint.pca_rgb(maps).astype(int), paint.pca_rgb(rotated).astype(int)
    assert np.abs(plain - turned).max() <= 1
    assert np.abs(paint.pca_rgb(maps.flip(0)).astype(int) - plain[::-1]).max() <= 1


def test_equal_features_get_equal_colours_across_images():
    maps = _maps(B=2)
    maps[1, :, 2, 3] = maps[0, :, 4, 1]
    rgb = paint.pca_rgb(maps)
    assert rgb.shape == (2, 5, 7, 3) and rgb.dtype == np.uint8
    assert np.array_equal(rgb[1, 2, 3], rgb[0, 4, 1])
    assert paint.pca_rgb(maps, size=(50, 70)).shape == (2, 50, 70, 3)


def test_collapsed_features_are_grey_and_broken_ones_refused():
    rgb = paint.pca_rgb(torch.ones(2, 8, 4, 4) + 1e-7 * torch.randn(2, 8, 4, 4))
    assert np.abs(rgb.astype(int) - 128).max() <= 1
    with pytest.raises(ValueError, match="finite features"):
        paint.pca_rgb(torch.full((1, 8, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="at least 4 patches"):
        paint.pca_rgb(_maps(), mask=torch.zeros(3, 5, 7, dtype=torch.bool))


def _object_scene():
    """A 4 x 4 object with its own feature in the middle of 12 x 12 patches, with noise."""
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    mask[:, 4:8, 4:8] = True
    thing, ground = torch.randn(2, 16, 1, 1, generator=torch.Generator().manual_seed(3)).unbind(0)
    maps = torch.where(mask[:, None], thing, ground) + 0.2 * torch.randn(2, 16, 12, 12)
    return maps, mask


def test_foreground_finds_the_object_and_the_rest_is_pale():
    maps, mask = _object_scene()
    assert torch.equal(paint.foreground(maps), mask)
    assert torch.equal(paint.foreground(-maps), mask)
    rgb = torch.from_numpy(paint.pca_rgb(maps, mask=mask))
    assert (rgb[~mask] == round(0.93 * 255)).all() and rgb[mask].float().std() > 20


def test_cosine_map_is_cosine():
    maps = _maps()
    found = paint.cosine_map(maps, (2, 5), image=1)
    expected = F.cosine_similarity(
        maps.double(), maps[1, :, 2, 5].double()[None, :, None, None], dim=1
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    for point, image in (((5, 0), 0), ((0, 7), 0), ((0, 0), 3)):
        with pytest.raises(ValueError, match="5 x 7 grid of 3 images"):
            paint.cosine_map(maps, point, image)


def test_contrast_peak_is_where_something_is():
    image = torch.full((3, 64, 96), 100, dtype=torch.uint8)
    image[:, 20:24, 60:66] = torch.randint(
        0, 256, (4, 6), generator=torch.Generator().manual_seed(0)
    ).byte()
    y, x = paint.contrast_peak(image)
    assert 20 <= y * 64 <= 24 and 60 <= x * 96 <= 66
    flat = torch.full((1, 32, 32), 0.5)
    assert all(
        abs(share - 0.5) <= 1 / 16 for share in paint.contrast_peak(flat)
    )  # nothing there: the middle


def test_heat_rises_in_lightness():
    rgb = paint.heatmap(torch.linspace(0, 1, 256)[None, None])[0, 0].astype(float) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -1e-4).all() and luminance[0] < 0.02 and luminance[-1] > 0.8
    ends = paint.heatmap(torch.tensor([[[-5.0, 5.0]]]))
    assert np.array_equal(ends[0, 0], paint.heatmap(torch.tensor([[[0.0, 1.0]]]))[0, 0])


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (3, 3), (8, 3)])
def test_as_rgb_takes_any_channels(channels, shown):
    images = torch.randint(0, 256, (2, channels, 4, 5), dtype=torch.uint8)
    rgb = paint.as_rgb(images)
    assert rgb.shape == (2, 4, 5, 3) and np.array_equal(rgb, paint.as_rgb(images.float() / 255))
    for c in range(3):
        plane = images[:, min(c, shown - 1)].numpy().astype(float)
        if channels != 3:
            low, high = np.quantile(plane, (0.02, 0.98))
            plane = np.clip(255 * (plane - low) / (high - low), 0, 255)
        assert np.abs(rgb[..., c] - plane).max() <= 0.51


def test_dark_bands_are_shown_bright_and_flat_ones_as_they_are():
    dark = 0.04 + 0.06 * torch.rand(3, 13, 8, 8, generator=torch.Generator().manual_seed(0))
    rgb = paint.as_rgb(dark)
    assert rgb.min() == 0 and rgb.max() == 255 and 100 < rgb.mean() < 155
    assert (paint.as_rgb(torch.full((1, 1, 4, 4), 0.4)) == 102).all()


def test_ring_is_centred_on_the_patch():
    grey = np.full((120, 160, 3), 128, np.uint8)
    changed = (paint.mark_point(grey, (1, 6), (4, 8)) != 128).any(2)
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() - 45) < 1 and abs(columns.mean() - 130) < 1


def test_sheet_frames_and_shape():
    queries = np.zeros((2, 8, 8, 3), np.uint8)
    neighbours = np.zeros((2, 3, 8, 8, 3), np.uint8)
    sheet = np.asarray(
        paint.neighbour_sheet(queries, neighbours, np.array([[1, 0, 1], [0, 0, 1]], bool), tile=48)
    )
    assert sheet.shape == (2 * 48 + 4, 8 + 4 * 52 - 4, 4)
    left = [8 + (column + 1) * 52 for column in range(3)]
    blue, orange = (0, 114, 178, 255), (213, 94, 0, 255)
    assert [tuple(sheet[0, x]) for x in left] == [blue, orange, blue]
    assert [tuple(sheet[52, x]) for x in left] == [orange, orange, blue]
    assert tuple(sheet[0, 50]) == (0, 0, 0, 0)  # the gap is transparent
    plain = np.asarray(paint.neighbour_sheet(queries, neighbours, tile=48))
    assert len({tuple(plain[0, x]) for x in left}) == 1


def _polyline(svg: str) -> np.ndarray:
    points = re.search(r'<polyline points="([^"]*)"', svg).group(1)
    return np.array([[float(v) for v in p.split(",")] for p in points.split()])


def test_chart_draws_the_numbers():
    steps, values = list(range(0, 101, 10)), [float(v) for v in np.linspace(3, 1, 11)]
    svg = line_chart("loss <a>", [Series("dino", steps, values)], levels=[Level("ln K", 3.5)])
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img" and "from 3 to 1" in root.attrib["aria-label"]
    xy = _polyline(svg)
    assert len(xy) == 11 and (np.diff(xy[:, 0]) > 0).all() and (np.diff(xy[:, 1]) > 0).all()
    assert (
        np.ptp(np.diff(xy[:, 0])) < 0.3 and np.ptp(np.diff(xy[:, 1])) < 0.3
    )  # evenly spaced, as the data
    dashed = next(e for e in root.iter() if "stroke-dasharray" in e.attrib)
    assert float(dashed.attrib["y1"]) < xy[0, 1]  # 3.5 lies above 3


def test_long_curves_are_thinned_to_their_means_and_log_axes_are_geometric():
    noise = np.random.default_rng(0).normal(size=100_000)
    svg = line_chart("long", [Series("x", list(range(100_000)), list(5 + noise))])
    assert len(_polyline(svg)) <= 240 and len(svg) < 20_000
    svg = line_chart("log", [Series("x", [0, 1, 2, 3], [100.0, 10.0, 0.0, 1.0])], log=True)
    xy = _polyline(svg)
    assert len(xy) == 3 and abs((xy[1, 1] - xy[0, 1]) - (xy[2, 1] - xy[1, 1])) < 0.2


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [1e-12, 2e-12], [-3.0, 1e9]])
def test_degenerate_charts_still_draw(values):
    svg = line_chart("flat", [Series("x", list(range(len(values))), values)])
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg
    with pytest.raises(ValueError, match="at least one point"):
        line_chart("none", [Series("x", [], [])])


@pytest.mark.parametrize(
    "low, high", [(0.9996, 1.0), (10_000, 10_003), (-1e-7, 1e-7), (5.0, 5.0001)]
)
def test_labels_of_an_axis_differ(low, high):
    """Three digits would call all of 0.9996 to 1 the same."""
    ticks = nice_ticks(low, high, 5)
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(ticks) > 3
    assert [float(text.replace("k", "e3")) for text in labels] == pytest.approx(ticks, abs=1e-12)
    svg = line_chart("narrow", [Series("x", [0, 1], [low, high])])
    y_axis = [e for e in ET.fromstring(svg).iter() if e.attrib.get("text-anchor") == "end"]
    for element in y_axis:  # nothing is cut off on the left: a digit is below 7 pixels wide
        assert float(element.attrib["x"]) >= 6.9 * len(element.text)


def test_steps_are_whole_numbers():
    svg = line_chart("short", [Series("x", [1, 2, 3], [0.0, 1.0, 2.0])])
    shown = [e.text for e in ET.fromstring(svg).iter() if e.attrib.get("y") == "221"]
    assert shown == ["1", "2", "3"]


def test_a_band_is_as_high_as_its_errors():
    svg = line_chart("k-NN", [Series("x", [0, 10], [20.0, 40.0], [1.0, 3.0])])
    (polygon,) = [e for e in ET.fromstring(svg).iter() if e.tag.endswith("polygon")]
    y = [float(pair.split(",")[1]) for pair in polygon.attrib["points"].split()]
    line = _polyline(svg)[:, 1]
    pixels = (line[0] - line[1]) / 20
    assert [y[0] - y[3], y[1] - y[2]] == pytest.approx([2 * pixels, 6 * pixels], abs=0.3)


def test_ticks_labels_and_legend():
    assert nice_ticks(0.13, 0.88, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(0, 1000, 5) == [0, 200, 400, 600, 800, 1000]
    assert nice_ticks(7, 7, 5)[0] < 7 < nice_ticks(7, 7, 5)[-1]
    texts = {
        0: "0",
        0.25: "0.25",
        12: "12",
        1250: "1250",
        15000: "15k",
        1.2e6: "1.2M",
        2e-4: "2e-4",
        -3.5e-5: "-3.5e-5",
    }
    assert {value: label(value) for value in texts} == texts
    key = legend([Series("a<b", [0, 1], [2.0, 3.0])], [Level("ln K", 6.931)])
    assert "a&lt;b" in key and "<b>3</b>" in key and "<b>6.93</b>" in key


def test_a_second_axis_has_its_own_scale_and_both_have_their_colours():
    """Two curves of the same shape on scales of 20 to 60 and 2 to 6 lie on the same heights."""
    left = Series("left", (0, 10, 20), (20.0, 40.0, 60.0))
    right = Series("right", (0, 10, 20), (2.0, 4.0, 6.0))
    drawing = ET.fromstring(line_chart("both", [left], right=right))
    curves = [line.get("points") for line in drawing.iter("polyline")]
    assert len(curves) == 2 and curves[0] == curves[1]

    labels = {text.text: text for text in drawing.iter("text")}
    for name, anchor, colour in (("60", "end", "--series-0"), ("6", "start", "--series-1")):
        assert labels[name].get("text-anchor") == anchor and colour in labels[name].get("style")
    assert float(labels["60"].get("x")) < float(labels["6"].get("x")) <= 400
    assert float(labels["60"].get("y")) == float(labels["6"].get("y"))
    spoken = drawing.get("aria-label")
    assert "left from 20 to 60" in spoken and "right from 2 to 6" in spoken
    key = figure("both", "", [left], right=right)
    assert "left <b>60</b>" in key and "right <b>6</b>" in key


def test_a_mark_stands_at_its_step_with_its_name_inside():
    curve = Series("a", (0, 50, 100), (1.0, 2.0, 3.0))
    for step, anchor in ((0, "start"), (10, "start"), (90, "end"), (100, "end")):
        drawing = ET.fromstring(line_chart("marked", [curve], marks=[Mark("here <1>", step)]))
        (name,) = (text for text in drawing.iter("text") if text.text == "here <1>")
        lines = [line for line in drawing.iter("line") if line.get("x1") == line.get("x2")]
        x = float(lines[0].get("x1"))
        points = next(drawing.iter("polyline")).get("points").split()
        low, high = (float(points[place].split(",")[0]) for place in (0, -1))
        assert len(lines) == 1 and x == pytest.approx(low + (high - low) * step / 100, abs=0.1)
        assert name.get("text-anchor") == anchor
