"""Every case of the golden folder named by DINOV3CORE_GOLDEN, at its stated tolerance.

The same mathematics was run elsewhere and recorded: inputs, parameters under their official names,
random draws, outputs and gradients (golden_cases.py). One runner per kind: golden_models.py,
golden_losses.py, golden_training.py, golden_masks.py, golden_distillation.py.
"""

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import golden_distillation
import golden_losses
import golden_masks
import golden_models
import golden_training
import pytest
import torch
from golden_cases import Case, compare, compare_exact, read_cases
from safetensors.torch import load_file
from torch import Tensor
from two_processes import PROCESSES, run_ranks

RUNNERS = (
    golden_models.RUNNERS
    | golden_losses.RUNNERS
    | golden_training.RUNNERS
    | golden_masks.RUNNERS
    | golden_distillation.RUNNERS
    | golden_distillation.PROCESS_RUNNERS
)
FOLDER = Path(os.environ.get("DINOV3CORE_GOLDEN", ""))
CASES = read_cases(FOLDER) if (FOLDER / "cases.json").is_file() else []
OURS = [case for case in CASES if case.kind in RUNNERS]

NAMED = os.environ.get("DINOV3CORE_GOLDEN")
needs_cases = pytest.mark.skipif(
    not CASES, reason=f"no golden cases: DINOV3CORE_GOLDEN={NAMED!r} holds no cases.json"
)


class Tally:
    """Counts cases by kind and prints the table at the end of the test run."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("golden cases")
        for kind in sorted(self.ran):
            terminalreporter.line(f"{kind:22} {self.passed[kind]:3} of {self.ran[kind]:3} passed")
        without = Counter(case.kind for case in CASES if case.kind not in RUNNERS)
        listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(without.items()))
        terminalreporter.line(f"{self.passed.total()} of {self.ran.total()} cases passed")
        terminalreporter.line(
            f"{len(without)} kinds in the folder have no runner: {listed or 'none'}"
        )


@pytest.fixture(scope="module")
def tally(pytestconfig: pytest.Config) -> Tally:
    counts = Tally()
    pytestconfig.pluginmanager.register(counts)
    return counts


Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Results]:
    """What several processes compute of a case, by recorded name.

    Those of a script and a number of processes are started once, for all of their cases.
    """

    @functools.cache
    def of_all(script: Path, processes: int) -> Results:
        out = tmp_path_factory.mktemp("golden")
        run_ranks(script, FOLDER, out, processes=processes)
        files = [out / f"rank{rank}.safetensors" for rank in range(processes)]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def of_case(case: Case) -> Results:
        if case.kind in golden_distillation.PROCESS_RUNNERS:
            everything = of_all(Path(golden_distillation.__file__), case.settings["world"])
        else:
            everything = of_all(Path(golden_losses.__file__), PROCESSES)
        prefix = f"{case.name}/"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(prefix)
        }

    return of_case


@pytest.fixture(autouse=True)
def one_deterministic_thread() -> Iterator[None]:
    """As recorded: the order of sums does not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_cases
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_case(case: Case, tally: Tally, results_of: Callable[[Case], Results]) -> None:
    tally.ran[case.kind] += 1
    if not case.across_processes:
        RUNNERS[case.kind](case)
    else:
        results = results_of(case)
        compare_exact(case, results)
        compare(case, results, ignored=golden_losses.not_ours(case))
    tally.passed[case.kind] += 1


def test_an_optimizer_step_may_differ_by_one_rounding_of_the_value() -> None:
    """At a learning rate of 1e-3: the neighbours of 1 are further apart than 1e-4 of it."""
    one = torch.tensor([1.0, 0.01])
    up = torch.nextafter(one, torch.tensor(2.0))
    assert golden_training.beyond_step(up, one, lr=1e-3) <= 0
    twice = torch.nextafter(up, torch.tensor(2.0))
    assert golden_training.beyond_step(twice, one, lr=1e-3) > 0
    assert golden_training.beyond_step(one + torch.tensor([0.0, 2e-7]), one, lr=1e-3) > 0
    assert golden_training.beyond_step(one + torch.tensor([0.0, 0.9e-7]), one, lr=1e-3) <= 0
