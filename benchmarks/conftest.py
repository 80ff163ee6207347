"""Options and fixtures of `pytest benchmarks/`: one machine probe, one results file, one table."""

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.comparison import Drive, Setting, setting_for
from benchmarks.floors import RESULTS, Floors, lines
from benchmarks.measure import Interleaved, Timer, cpu_timer, device_timer

RECORDS = pytest.StashKey[list]()
DESCRIPTION = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dinov3core")
    group.addoption(
        "--seconds", type=float, default=2.0, help="alternating rounds per case and direction"
    )
    group.addoption(
        "--compile",
        action="store_true",
        help="also measure torch.compile on a CPU (on a GPU always)",
    )
    group.addoption(
        "--scale",
        choices=("auto", "dry", "cpu", "gpu"),
        default="auto",
        help="sizes; auto: by machine",
    )
    group.addoption(
        "--busy",
        action="store_true",
        help="CPU seconds of one thread: for a machine with other work",
    )
    group.addoption(
        "--record",
        nargs="?",
        const=str(RESULTS),
        help="write <machine>_<date>.json here or to the folder",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if config.getoption("--busy"):
        torch.set_num_threads(1)
    config.option.benchmark_quiet = True  # absolute times: with --benchmark-verbose
    config.option.benchmark_timer = f"benchmarks.measure.{timer_of(config).__name__}"
    config.stash[RECORDS] = []


def scale_of(config: pytest.Config) -> str:
    chosen = config.getoption("--scale")
    return ("gpu" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


def timer_of(config: pytest.Config) -> Timer:
    return cpu_timer if config.getoption("--busy") else device_timer


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config, device: torch.device) -> Setting:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer = timer_of(pytestconfig)
    limits = machine.probe(device, dtype, small=scale_of(pytestconfig) == "dry", timer=timer)
    clock = "CPU" if timer is cpu_timer else "wall"
    pytestconfig.stash[DESCRIPTION] = machine.describe(device, limits) | {
        "clock": clock,
        "load_before": machine.load(),
    }
    compiled = device.type == "cuda" or pytestconfig.getoption("--compile")
    seconds = pytestconfig.getoption("--seconds")
    chosen = setting_for(device, limits, seconds, compiled, timer)
    return replace(chosen, shortest=0.0) if scale_of(pytestconfig) == "dry" else chosen


@pytest.fixture(scope="session")
def floors(pytestconfig: pytest.Config) -> Floors:
    """Those of this machine class; none for tiny sizes."""
    return Floors.load(scale_of(pytestconfig))


@pytest.fixture
def drive(benchmark: Any) -> Drive:
    """Run the rounds through pytest-benchmark: our turn is its round, the rivals' lie around it."""

    def rounds_of(interleaved: Interleaved, rounds: int) -> None:
        def before() -> None:
            benchmark.stats.iterations = interleaved.calls  # its table shows the time of one call
            interleaved.before()

        benchmark.pedantic(interleaved.run, setup=before, teardown=interleaved.after, rounds=rounds)

    return rounds_of


@pytest.fixture
def keep(pytestconfig: pytest.Config, benchmark: Any, floors: Floors) -> Callable[[dict], None]:
    """Add a record to the results, show it beside the timings, fail when it is under its floor."""

    def add(record: dict) -> None:
        description = pytestconfig.stash[DESCRIPTION]
        folder = pytestconfig.getoption("--record")
        pytestconfig.stash[RECORDS].append(
            record | {key: description[key] for key in ("commit", "clock", "threads")}
        )
        if folder:
            _write(pytestconfig, Path(folder))
        benchmark.extra_info.update(record)
        missed = floors.missed(record)
        assert not missed, "; ".join(missed)

    return add


def _write(config: pytest.Config, folder: Path) -> None:
    """The results file so far; other cases stay as an earlier run of the day left them."""
    description = config.stash[DESCRIPTION]
    date = datetime.date.today().isoformat()
    path = folder / f"{machine.slug(description)}_{date}.json"
    earlier = json.loads(path.read_text())["records"] if path.is_file() else []
    merged = {record["case"]: record for record in [*earlier, *config.stash[RECORDS]]}
    records = list(merged.values())
    results = {"date": date, **description, "load_after": machine.load(), "records": records}
    path.write_text(json.dumps(results, indent=1) + "\n")


@pytest.hookimpl(trylast=True)  # below the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("rivals over ours: time (medians of pairs), peak memory; our time")
    for text in lines(records):
        terminalreporter.write_line(text)
