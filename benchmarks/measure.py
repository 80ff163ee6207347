"""Instruments: ratios measured round by round in one process, peak memory, CUDA graphs.

Ratios are medians of paired ratios: in every round each variant runs once, in rotating order, so
that a slow second of a shared machine falls on all of them. An absolute time says little about
another machine; a ratio does. Beside other work even ratios mislead: the threads of a parallel
operation wait for each other, so that many small operations look worse than they are. CPU seconds
of one thread (`cpu_timer`) are then the fairer clock.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], object]
Timer = Callable[[], float]


def device_timer() -> float:
    """Seconds, once the device has finished everything it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_timer() -> float:
    """CPU seconds of this process, whatever else the machine does.

    Meant for one thread: threads that wait for each other spin.
    """
    return time.process_time()


@dataclass
class Interleaved:
    """Times variants in rounds: `before`, then the subject, then `after`.

    Each round starts at another variant.

    Args:
        runs: variants by name; each call is one measurement.
        calls: calls of the work in one measurement.
        timer: the clock.
        subject: the one the others are compared with.
    """

    runs: Mapping[str, Run]
    calls: int = 1
    timer: Timer = device_timer
    subject: str = "ours"
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def before(self) -> None:
        """The turns of the variants that come before the subject in this round."""
        self._measure(self._order()[0])

    def run(self) -> None:
        """The subject's own turn."""
        self._measure([self.subject])

    def after(self) -> None:
        """The turns of the others; the subject has had its own by now."""
        self._measure(self._order(done=1)[1])

    def _order(self, done: int = 0) -> tuple[list[str], list[str]]:
        names = list(self.runs)
        turn = (len(self.seconds.get(self.subject, ())) - done) % len(names)
        names = names[turn:] + names[:turn]
        place = names.index(self.subject)
        return names[:place], names[place + 1 :]

    def _measure(self, names: Sequence[str]) -> None:
        for name in names:
            began = self.timer()
            self.runs[name]()
            self.seconds.setdefault(name, []).append(self.timer() - began)

    def ratios(self) -> dict[str, float]:
        """Of every other variant, the median over rounds of its time over the subject's."""
        ours = self.seconds[self.subject]
        return {
            name: statistics.median(t / o for t, o in zip(times, ours, strict=True))
            for name, times in self.seconds.items()
            if name != self.subject
        }

    def medians(self) -> dict[str, float]:
        """Median seconds of one call of every variant."""
        return {name: statistics.median(times) / self.calls for name, times in self.seconds.items()}


def loop(interleaved: Interleaved, rounds: int) -> None:
    """Run all rounds; the stand-in for pytest-benchmark's `pedantic` where there is no pytest."""
    for _ in range(rounds):
        interleaved.before()
        interleaved.run()
        interleaved.after()


def plan(
    runs: Mapping[str, Run],
    seconds: float,
    shortest: float,
    timer: Timer = device_timer,
) -> tuple[int, int]:
    """How often to measure: (rounds, repeats).

    Every variant is called twice first: compilation, caches and lazy initialisation are not what is
    measured.

    Args:
        seconds: that all rounds may take together.
        shortest: least seconds of one measurement, for which a call is repeated.
    """
    once = []
    for run in runs.values():
        run()
        began = timer()
        run()
        once.append(timer() - began)
    repeats = max(1, min(1000, int(shortest / min(once)) + 1))
    return max(5, min(60, int(seconds / (sum(once) * repeats)))), repeats


def repeated(run: Run, repeats: int) -> Run:
    """Several calls as one."""

    def calls() -> None:
        for _ in range(repeats):
            run()

    return calls


def cycled(run: Callable[..., object], inputs: Sequence[object]) -> Run:
    """One call per input set.

    With enough sets none of them is still in a GPU's L2 cache when its turn comes.
    """

    def calls() -> None:
        for each in inputs:
            run(each)

    return calls


def graphed(run: Run) -> Run:
    """The same work as one CUDA graph, so that launch gaps of the host do not count.

    Args:
        run: must not synchronise.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes allocated at the worst moment of `run`, beyond what was allocated before it.

    CUDA: the caching allocator's own statistic. CPU: the running sum of every allocation and
    release that torch's allocator reports to the profiler, also those inside operators; scratch
    memory of MKL and oneDNN is not in it.
    """
    run()
    if device.type == "cpu":
        return max(itertools.accumulate(_allocations(run)), default=0)
    before = _allocated_on_gpu()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held_memory(run: Run, device: torch.device) -> int:
    """Bytes of the result of `run`: an output with all that its backward needs."""
    if device.type == "cpu":
        return sum(_allocations(run))
    before = _allocated_on_gpu()
    result = run()  # holds what its backward needs
    held = torch.cuda.memory_allocated() - before
    del result
    return held


def _allocations(run: Run) -> list[int]:
    """Bytes taken (positive) and given back (negative) on the CPU by `run`, in order.

    The result of `run` is still held at the end.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
    recorded: Any = profiler.profiler  # typed as optional; there is one after the context
    events = recorded.kineto_results.events()
    del result
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return [change for _, change in changes]


def _allocated_on_gpu() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
