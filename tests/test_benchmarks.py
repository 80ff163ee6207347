"""The plain baselines compute what ours computes, and the instruments measure what they say."""

import copy
import io
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import baselines, errors, gpu, gpu_correctness, report, steps
from benchmarks.cases import Case, attention_cases, loss_cases
from benchmarks.comparison import Disagreement, check_agreement
from benchmarks.floors import Floors, lines
from benchmarks.measure import Interleaved, held_memory, loop, peak_memory
from dinov3core import ops
from dinov3core.data.batch import Batch
from dinov3core.models import (
    HeadSettings,
    ProjectionHead,
    RopeSettings,
    VisionTransformer,
    VitSettings,
)
from dinov3core.models.networks import Networks
from dinov3core.train.engine.accumulation import micro_batches
from dinov3core.train.engine.config import GramAnchor
from dinov3core.train.engine.objective import Objective, StepWeights

ROOT = Path(__file__).parents[1]
WIDTH = 32
HEADS = 2
PATCH = 8
REGISTERS = 2


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(0)
    images = 3
    patches = (32 // PATCH) ** 2
    masks = torch.rand(2 * images, patches) < 0.4
    masks[0] = False
    counts = masks.sum(1, keepdim=True).clamp(min=1).double()
    return Batch(
        torch.randn(2 * images, 3, 32, 32, dtype=torch.float64),
        torch.randn(4 * images, 3, 16, 16, dtype=torch.float64),
        None,
        masks,
        torch.nonzero(masks.flatten()).squeeze(1),
        (masks / counts)[masks],
        positions=range(images),
    )


@pytest.fixture(scope="module")
def ours() -> Networks:
    torch.manual_seed(1)
    settings = VitSettings(
        width=WIDTH,
        depth=2,
        heads=HEADS,
        patch_size=PATCH,
        registers=REGISTERS,
        layer_scale=0.5,
        init_std=0.2,
        rope=RopeSettings(dtype="fp64"),
    )
    backbone = VisionTransformer(settings)
    head = HeadSettings(48, hidden=24, bottleneck=16, init_std=0.3, prototype_std=0.3)
    heads = (ProjectionHead(WIDTH, head) for _ in range(2))
    networks = Networks(backbone, *heads).double().train()
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            if "bias" in name or "token" in name:
                parameter.normal_(std=0.3)
    return networks


def _plain_step(ours: Networks, weights: baselines.Weights) -> baselines.Step:
    backbone = baselines.VisionTransformer(
        WIDTH, 2, HEADS, PATCH, REGISTERS, rope_dtype=torch.float64
    )
    heads = (baselines.Head(WIDTH, 24, 16, 48) for _ in range(2))
    student = baselines.Networks(backbone, *heads).double()
    state = {name: value for name, value in ours.state_dict().items() if "rope_embed" not in name}
    student.load_state_dict(state, strict=True)
    return baselines.Step(student, torch.optim.AdamW(student.parameters()), weights)


def test_the_plain_step_has_the_same_losses_and_gradients(ours: Networks, batch: Batch) -> None:
    plain = _plain_step(
        ours, baselines.Weights(local_crops=4, dino=0.9, ibot=0.4, koleo=0.2, gram=0.7)
    )
    total, plain_terms = plain.loss(batch)
    total.backward()

    objective = Objective(local_crops=4, gram=GramAnchor())
    (part,) = micro_batches(batch, 1, torch.device("cpu"))
    targets = objective.targets(copy.deepcopy(ours).eval().requires_grad_(False), [part], 0.07)
    output = ours(
        batch.global_crops,
        batch.mask_indices,
        masks=batch.masks,
        local_crops=batch.local_crops,
        all_patches=True,
    )
    terms = objective.terms(output, targets, part)
    our_total = objective.total(terms, StepWeights(dino=0.9, ibot=0.4, koleo=0.2, gram=0.7))
    ours.zero_grad()
    our_total.backward()

    for name in ("dino_global", "dino_local", "ibot", "gram"):
        torch.testing.assert_close(plain_terms[name], terms[name], rtol=1e-9, atol=0, msg=name)
    torch.testing.assert_close(plain_terms["koleo"], terms["koleo"].sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(total, our_total, rtol=1e-9, atol=0)
    theirs = dict(plain.student.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            theirs[name].grad, parameter.grad, rtol=1e-7, atol=1e-10, msg=name
        )


@pytest.mark.parametrize(
    "case", [*attention_cases("dry"), *loss_cases("dry")], ids=lambda case: case.name
)
def test_every_variant_of_a_case_computes_the_plain_formula(case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.make(torch.device("cpu"), torch.float64)
    for name in case.leaves:
        inputs[name].requires_grad_()
    check_agreement(case, case.variants, inputs, torch.float64, backward=bool(case.leaves))


def test_a_wrong_variant_is_not_timed() -> None:
    (case, *_) = loss_cases("dry")
    inputs = case.make(torch.device("cpu"), torch.float64)
    wrong = {**case.variants, "ours": lambda x: 1.001 * case.variants["plain"](x)}
    with pytest.raises(Disagreement, match="output of 'ours'"):
        check_agreement(case, wrong, inputs, torch.float64, backward=False)


MEGABYTE = 1_000_000


def test_peak_memory_counts_what_lives_at_once() -> None:
    x = torch.zeros(250, 1000)  # 1 MB

    def run() -> None:
        a = x + 1
        b = a * 2
        del a  # b alone
        c = b + 1
        torch.maximum(b, c)  # three alive

    assert peak_memory(run, torch.device("cpu")) == 3 * MEGABYTE


def test_peak_memory_sees_inside_an_op() -> None:
    features = torch.randn(4, 512, 64)
    peak = peak_memory(
        lambda: ops.gram_loss(features, features, negatives="clip"), torch.device("cpu")
    )
    assert peak > 2 * features.nbytes  # it returns a scalar


def test_held_memory_is_what_the_backward_needs() -> None:
    x = torch.zeros(250, 1000, requires_grad=True)
    held = held_memory(lambda: (x * 3).exp().sum(), torch.device("cpu"))
    assert MEGABYTE <= held < 1.01 * MEGABYTE  # the exponential; the product is gone


class Clock:
    """A clock that only the runs move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float, slow: dict[int, float]) -> None:
        self.order.append(name)
        self.now += seconds * slow.get((len(self.order) - 1) // 3, 1.0)


def test_ratios_are_paired_and_turns_rotate() -> None:
    clock = Clock()
    slow = {1: 7.0}  # everything in the second round takes longer
    costs = {"plain": 3.0, "ours": 1.0, "compiled": 2.0}
    runs = {name: partial(clock.run, name, seconds, slow) for name, seconds in costs.items()}
    interleaved = Interleaved(runs, timer=clock)
    loop(interleaved, 3)
    assert clock.order == [
        "plain",
        "ours",
        "compiled",
        "ours",
        "compiled",
        "plain",
        "compiled",
        "plain",
        "ours",
    ]
    assert interleaved.ratios() == {"plain": 3.0, "compiled": 2.0}
    assert interleaved.medians()["ours"] == 1.0


def _record(case: str, direction: str, ours: float, plain: float, peaks: tuple[int, int]) -> dict:
    return {
        "case": f"{case} {direction}",
        "op": case.split()[0],
        "shape": "8x8",
        "direction": direction,
        "seconds": {"ours": ours, "plain": plain},
        "ratio": {"plain": plain / ours},
        "peak_bytes": dict(zip(("ours", "plain"), peaks)),
    }


RECORDS = [
    _record("gram 8x8", "forward", 1.0, 2.0, (10, 40)),
    _record("gram 8x8", "forward+backward", 2.0, 6.0, (20, 30)),
]
FLOORS = Floors(
    {
        "gram 8x8 forward": {"floor": 2.5, "memory_floor": 3.9},
        "gram 8x8 forward+backward": {
            "floor": 2.9,
            "memory_floor": 1.6,
            "goal": {"plain": 3.0, "plain memory": 2.0, "plain backward": 4.0, "xformers": 1.0},
        },
    }
)


def test_a_run_under_a_floor_is_named() -> None:
    (time,) = FLOORS.missed(RECORDS[0])
    assert time == (
        "gram 8x8 forward: the best rival's time is 2.00x ours, under the floor of 2.50x in "
        "benchmarks/floors.json"
    )
    (memory,) = FLOORS.missed(RECORDS[1])
    assert "peak memory is 1.50x ours, under the floor of 1.60x" in memory


def test_goals_tell_what_is_met() -> None:
    goals = FLOORS.goals(RECORDS[1], {record["case"]: record for record in RECORDS})
    assert [(goal.name, goal.measured, goal.met) for goal in goals] == [
        ("plain", 3.0, True),
        ("plain memory", 1.5, False),
        ("plain backward", 4.0, True),
    ]


def test_the_table_goes_between_its_marks() -> None:
    text = "above\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbelow\n"
    assert (
        report.update(text, "new")
        == "above\n<!-- benchmarks -->\nnew\n<!-- /benchmarks -->\nbelow\n"
    )
    with pytest.raises(SystemExit, match="add the two marks"):
        report.update("nothing", "new")


def test_the_committed_floors_name_cases_that_are_measured() -> None:
    for scale in ("cpu", "gpu"):
        cases = [*attention_cases(scale), *loss_cases(scale)]
        known = {f"{case.name} {direction}" for case in cases for direction in case.passes}
        known |= {steps.label(recipe) for recipe in steps.recipes(scale)}
        assert set(Floors.load(scale).entries) <= known


def test_benchmarks_run_record_and_report(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "--scale",
        "dry",
        "--seconds",
        "0",
    ]
    chosen = ["-k", "koleo or 2x54 or vits16", "--record", str(tmp_path)]
    run = subprocess.run(command + chosen, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert {record["op"] for record in results["records"]} == {
        "rope_attention",
        "koleo_loss",
        "training_step",
    }
    assert {"commit", "versions", "limits", "load_before"} <= results.keys()
    assert all(len(record) < 20 for record in results["records"])  # no raw rounds
    pytest.importorskip("matplotlib")
    report.picture(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000
    assert report.table(results).startswith("| what |")


@pytest.mark.parametrize("more", [(), ("--benchmark-verbose",)], ids=["alone", "below all times"])
def test_the_ratios_come_last_and_fit_a_terminal(more: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_losses.py", "-q", "--scale", "dry"]
    command += ["--seconds", "0", "-k", "koleo or sinkhorn", *more]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    *_, below = run.stdout.partition("rivals over ours")
    said = [line for line in below.splitlines() if line.strip()]
    assert sum("plain " in line for line in said) == 5  # five cases, each with its ratios
    assert "Outliers" not in below and all(len(line) <= 120 for line in said)
    assert ("Outliers" in run.stdout) == bool(more)


def test_ratios_are_aligned() -> None:
    assert lines(RECORDS) == [
        "gram 8x8 forward            plain 2.00x    memory 4.00x   1000.000 ms",
        "gram 8x8 forward+backward   plain 3.00x    memory 1.50x   2000.000 ms",
    ]


def _ledger(path: Path, seconds: float = 60.0) -> gpu.Ledger:
    return gpu.Ledger(path, {"device": "none"}, time.monotonic() + seconds)


def test_a_part_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "losses.json"
    done = []

    def work(name: str, fail: bool = False) -> dict:
        done.append(name)
        if fail:
            raise ValueError("a kernel that does not compile")
        return {"said": "done"}

    first = _ledger(path)
    first.enter("a", partial(work, "a"))
    first.enter("b", partial(work, "b", fail=True))
    assert first.failed == ["b"]
    second = _ledger(path)
    second.enter("a", partial(work, "a"))
    second.enter("b", partial(work, "b"))
    assert done == ["a", "b", "b"] and not second.failed
    late = _ledger(path, seconds=-1)
    late.enter("c", partial(work, "c"))
    assert late.left == ["c"] and done == ["a", "b", "b"]
    assert "a kernel that does not compile" in capsys.readouterr().out


def test_a_command_that_takes_too_long_is_one_failed_entry(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ledger = _ledger(tmp_path / "correctness.json")
    ledger.enter("a", partial(gpu._last_line, sleep, tmp_path / "a.log", 0.1))
    ledger.enter("b", lambda: {"said": "done"})
    assert ledger.failed == ["a"] and list(ledger.entries) == ["a", "b"]


@pytest.mark.parametrize("small", [True, False])
def test_checks_ask_of_a_gpu_what_its_kernels_take(small: bool) -> None:
    """The fused attention takes no float32 there, and the sanitizers are to see it all the same."""
    names = [name for name, _ in gpu_correctness.checks(torch.device("cuda"), small)]
    attention = [name for name in names if name.startswith("rope_attention")]
    assert len(attention) == (5 if small else 22)
    assert all(name.endswith("bfloat16") for name in attention)
    assert sum("1029 tokens" in name for name in attention) == (0 if small else 3)
    on_cpu = [name for name, _ in gpu_correctness.checks(torch.device("cpu"), small=True)]
    assert all(name.endswith("float32") for name in on_cpu)
    assert not small or len(on_cpu) == len(names)


@pytest.mark.parametrize("difference", ["error", "chance"])
def test_a_check_fails(difference: str) -> None:
    """A result off by a thousandth, and one that is another every time."""
    case = next(case for case in gpu_correctness.testing.LOSSES if case.op == "koleo_loss")
    calls = iter(range(100))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return case.ours(x) * (1.001 if difference == "error" else 1 + 1e-7 * next(calls))

    with pytest.raises(AssertionError, match=r"error|differs between two runs"):
        gpu_correctness.check(case._replace(ours=ours), torch.float32, torch.device("cpu"))


def test_the_gpu_command_runs_dry(tmp_path: Path) -> None:
    _tiny_archive(tmp_path / "tiny.npz")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--part",
        "all",
        "--dry-run",
        "--out",
        str(tmp_path / "out"),
    ]
    command += [
        "--imagenette",
        str(tmp_path / "tiny.npz"),
        "--minutes",
        "60",
    ]  # however busy the machine
    run = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for part in gpu.PARTS:
        entries = json.loads((tmp_path / "out" / f"{part}.json").read_text())["records"]
        assert entries and not [entry for entry in entries if "error" in entry], part


def test_the_first_parts_need_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    blocked = ["PIL", "safetensors", "tqdm", "matplotlib", "tyro", "pytest", "pytest_benchmark"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv = ['gpu']; "
        f"from benchmarks import cases, comparison, gpu, gpu_correctness, gpu_sdpa, machine; "
        f"gpu.main(['--part', 'attention', '--dry-run', '--out', {str(tmp_path)!r}])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def _tiny_archive(path: Path) -> None:
    """24 noise images in two classes and two splits, in the layout of the real archive."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(24):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(stream, "JPEG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    np.savez(
        path,
        data=np.concatenate(files),
        offset=np.cumsum([0, *map(len, files)]),
        label=np.arange(24) % 2,
        split=(np.arange(24) >= 16).astype(np.uint8),
        classes=np.array(["a", "b c"]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", errors.chosen(small=True), ids=lambda case: case.name)
def test_the_error_table_keeps_the_numerics_contract(case: Case, dtype: torch.dtype) -> None:
    for row in errors.rows_of(case, dtype, torch.device("cpu")):
        assert row.errors.ours <= row.errors.allowed, row
