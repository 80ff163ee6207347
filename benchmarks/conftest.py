"""Options and fixtures of `pytest benchmarks/`: one machine probe, one results file, one table at the end."""

import datetime
import json
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch loads: no chatter while memory is measured

import pytest
import torch

from benchmarks import machine
from benchmarks.comparison import Setting, setting_for
from benchmarks.floors import RESULTS, Floors, line
from benchmarks.measure import Interleaved

RECORDS = pytest.StashKey[list]()
DESCRIPTION = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dinov3core")
    group.addoption("--seconds", type=float, default=2.0, help="alternating rounds per case and direction")
    group.addoption("--compile", action="store_true", help="also measure torch.compile on a CPU (on a GPU always)")
    group.addoption(
        "--scale", choices=("auto", "dry", "cpu", "gpu"), default="auto", help="sizes; auto: of this machine"
    )
    group.addoption("--record", action="store_true", help="write benchmarks/results/<machine>_<date>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[RECORDS] = []


def scale_of(config: pytest.Config) -> str:
    chosen = config.getoption("--scale")
    return ("gpu" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config, device: torch.device) -> Setting:
    small = scale_of(pytestconfig) == "dry"
    limits = machine.probe(device, torch.bfloat16 if device.type == "cuda" else torch.float32, small)
    pytestconfig.stash[DESCRIPTION] = machine.describe(device, limits) | {"load_before": _load()}
    compiled = device.type == "cuda" or pytestconfig.getoption("--compile")
    return setting_for(device, limits, pytestconfig.getoption("--seconds"), compiled)


@pytest.fixture(scope="session")
def floors(pytestconfig: pytest.Config, device: torch.device) -> Floors:
    return Floors.load("dry" if scale_of(pytestconfig) == "dry" else device.type)


@pytest.fixture
def drive(benchmark):
    """Run the rounds through pytest-benchmark: our turn is its round, the rivals' turns lie around it."""

    def rounds_of(interleaved: Interleaved, rounds: int) -> None:
        def before() -> None:
            benchmark.stats.iterations = interleaved.calls  # its table then shows the time of one call
            interleaved.before()

        benchmark.pedantic(interleaved.run, setup=before, teardown=interleaved.after, rounds=rounds)

    return rounds_of


@pytest.fixture
def keep(pytestconfig: pytest.Config, benchmark, floors: Floors):
    """Add a record to the results, show it beside the timings, and fail when it is under its floor."""

    def add(record: dict) -> None:
        pytestconfig.stash[RECORDS].append(record)
        benchmark.extra_info.update(record)
        floors.check(record)

    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results file when asked to."""
    config = session.config
    records = config.stash[RECORDS]
    if records and config.getoption("--record"):
        found = config.stash[DESCRIPTION] | {"load_after": _load(), "records": records}
        date = datetime.date.today().isoformat()
        path = RESULTS / f"{machine.slug(found)}_{date}.json"
        path.write_text(json.dumps({"date": date, **found}, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("times of the rivals over ours, medians of paired ratios; memory in MB")
    for record in records:
        terminalreporter.write_line(line(record))


def _load() -> float:
    """Processes that wanted a core: above the number of cores, times are those of a busy machine."""
    return round(os.getloadavg()[0], 2)
