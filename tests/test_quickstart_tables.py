"""One source for the pages' numbers of the quick start; a run agrees with train/evaluate.py."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import quickstart
from dinov3core.evals.results import write_results
from dinov3core.train.engine.building import build_networks
from dinov3core.train.engine.loop import pretrain
from dinov3core.train.engine.named_models import open_backbone
from dinov3core.train.evaluate import main as evaluate
from dinov3core.train.recipes.quickstart import quickstart as recipe
from dinov3core.train.recipes.registry import RECIPES
from tests.test_run import tiny
from tests.tiny_runs import with_run

SCORES = {
    "pixels": {"20-NN": [35.0, 35.0], "linear probe": [12.0, 13.0]},
    "untrained": {"20-NN": [20.0, 16.0], "linear probe": [29.0, 29.0]},
    "trained": {"20-NN": [57.25, 65.0], "linear probe": [59.0, 60.0]},
}
OTHERS = ("segmentation, mIoU", "depth within 1.25", "tracking, J&F")
RESULTS = {
    "date": "2026-11-24",
    "device": "A CPU",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "options": "--iterations 2000",
    "test_images": 1200,
    "classes": 12,
    "seeds": [0, 1],
    "seconds": [184.6, 190.0],
    "peak_memory_bytes": [2**30, 2**29],
    "load": [[0.1, 2.0], None],
    "ran_on": ["CPU, 2 threads", "CPU, 2 threads"],
    "scores": {name: own | {key: [1.0, 2.0] for key in OTHERS} for name, own in SCORES.items()},
}


def test_the_pages_say_what_the_file_says() -> None:
    results = json.loads(quickstart.FILE.read_text(encoding="utf-8"))
    for page, text in quickstart.rendered(results).items():
        same = page.read_text(encoding="utf-8") == text
        assert same, f"{page.name}: run python -m benchmarks.quickstart --render"


def test_both_tables_from_one_file() -> None:
    first, second = quickstart.runs_table(RESULTS), quickstart.tasks_table(RESULTS)
    assert first.splitlines()[4:6] == [
        "| 0 | 35.0 \u00b1 1.4 | 20.0 \u00b1 1.2 | **57.2 \u00b1 1.4** | 185 s | 1.00 GiB |",
        "| 1 | 35.0 \u00b1 1.4 | 16.0 \u00b1 1.1 | **65.0 \u00b1 1.4** | 190 s | 0.50 GiB |",
    ]
    assert "chance 8.3" in first
    assert "load 0.1 to 2.0: A CPU (CPU, 2 threads); torch 2.13.0" in first
    assert second.splitlines()[4:6] == [
        "| 20-NN | 35.0 | 18.0 (16.0 to 20.0) | **61.1 (57.2 to 65.0)** |",
        "| linear probe | 12.5 (12.0 to 13.0) | 29.0 | **59.5 (59.0 to 60.0)** |",
    ]
    assert "at most 1.4 points" in second


class Runner:
    """Stands for the two commands: leaves what they leave."""

    def __init__(self, knn_after: float = 50.0, dies_at: int = -1) -> None:
        self.knn_after, self.dies_at, self.commands = knn_after, dies_at, []

    def __call__(self, command: Sequence[str]) -> None:
        if len(self.commands) == self.dies_at:
            raise SystemExit("killed")
        self.commands.append(command)
        options = dict(zip(command[3::2], command[4::2]))
        if command[1] == "train/pretrain.py":
            out = Path(options["--run.out"])
            out.mkdir(parents=True)
            summary = {"knn_pixels": 30.0, "knn_before": 20.0, "knn_after": self.knn_after}
            summary |= {"seconds": 1.0, "peak_memory_bytes": 1, "environment": {"device": "CPU"}}
            (out / "summary.json").write_text(json.dumps(summary))
            return
        knn = {"pixels:quickstart": 30.0, "untrained:quickstart": 20.0}.get(command[2], 50.0)
        tasks = {
            "knn": {"top1": {"20": knn}, "test_images": 1200},
            "linear": {"top1": 1.0},
            "segmentation": {"miou": 1.0},
            "depth": {"a1": 1.0},
            "tracking": {"j_and_f": 1.0},
        }
        assert options["--tasks"].split(",") == list(tasks)
        result = {"model": command[2], "data": "scenes", "tasks": tasks}
        write_results(result, Path(options["--out"]) / "results.json")


class Pages:
    """Stands for the pages of both tables."""

    def __init__(self, folder: Path):
        self.by_mark = {
            mark: folder / f"{mark.replace(' ', '-')}.md"
            for mark in ("quickstart", "quickstart tasks")
        }
        for mark, page in self.by_mark.items():
            page.write_text(f"<!-- {mark} -->\nOLD\n<!-- /{mark} -->\n")

    def read(self) -> str:
        return "".join(page.read_text() for page in self.by_mark.values())


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pages:
    pages = Pages(tmp_path)
    monkeypatch.setattr(quickstart, "PAGES", pages.by_mark)
    monkeypatch.setattr(quickstart, "FILE", tmp_path / "quickstart.json")
    return pages


def test_a_stopped_command_goes_on(tmp_path: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch):
    given = ["--runs", str(tmp_path / "runs"), "--seeds", "0", "1"]
    first, second, third = Runner(dies_at=3), Runner(), Runner()
    monkeypatch.setattr(quickstart, "run", first)
    with pytest.raises(SystemExit, match="killed"):
        quickstart.main(given)
    assert "OLD" in pages.read() and not quickstart.FILE.exists()
    monkeypatch.setattr(quickstart, "run", second)
    quickstart.main(given)
    assert len(first.commands) == 3 and len(second.commands) == 2 + 3 * 2 - 3  # nothing twice
    assert "| 1 | 30.0" in pages.read() and "OLD" not in pages.read()
    before = pages.read()
    monkeypatch.setattr(quickstart, "run", third)
    quickstart.main(given)
    quickstart.main(["--render"])
    assert not third.commands and pages.read() == before


def test_two_numbers_are_refused(tmp_path: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quickstart, "run", Runner(knn_after=50.1))
    sentence = r"quick start: the run's own 20-NN is 50\.10, .* says 50\.00"
    with pytest.raises(SystemExit, match=sentence):
        quickstart.main(["--runs", str(tmp_path / "runs"), "--seeds", "0"])
    assert "OLD" in pages.read()


def test_a_command_that_fails_is_named():
    with pytest.raises(SystemExit, match=r"error: .* ended with 3; start this again"):
        quickstart.run([quickstart.sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_and_the_evaluation_of_its_weights_say_the_same(tmp_path: Path, seed: int):
    folder, options = tmp_path / "run", ["--read.scenes-train", "48", "--read.scenes-test", "24"]
    summary = pretrain(tiny(folder, seed=seed, eval_every=0))
    for model, key in ((str(folder), "knn_after"), (f"pixels:{folder}", "knn_pixels")):
        out = tmp_path / key
        assert evaluate([model, "--tasks", "knn", "--out", str(out), *options]) == 0
        judged = json.loads((out / "results.json").read_text())["tasks"]["knn"]
        assert judged["top1"]["20"] == summary[key] and judged["judged"]["read"]["scene_size"] == 32


def test_the_untrained_quick_start_is_where_the_run_of_its_seed_starts():
    for seed in (0, 2):
        run = build_networks(with_run(recipe(), seed=seed)).backbone.state_dict()
        named = open_backbone("untrained:quickstart", seed=seed, recipes=RECIPES).backbone
        assert recipe().crops.mean == named.statistics.mean
        assert all(torch.equal(run[name], value) for name, value in named.state_dict().items())


def test_pixels_as_a_model_sees_them(tmp_path: Path):
    seen = open_backbone("pixels:quickstart", recipes=RECIPES)
    assert seen.backbone.patch_size == 8 and seen.size == 48
    assert open_backbone("pixels:vits16").backbone.patch_size == 16
    assert open_backbone("pixels:vit_nano8", channels=5).backbone.in_channels == 5
    with pytest.raises(ValueError, match="did you mean untrained:vits16"):
        open_backbone("pixels:vits61")
