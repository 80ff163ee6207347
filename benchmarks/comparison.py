"""One case measured: that all variants agree, then ratios, memory, share of the roofline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Variant
from benchmarks.machine import Limits
from benchmarks.measure import (
    Interleaved,
    Run,
    Timer,
    cycled,
    device_timer,
    graphed,
    held_memory,
    loop,
    peak_memory,
    plan,
    repeated,
)

Drive = Callable[[Interleaved, int], None]
# Relative error (Frobenius norm) beyond which a variant computes something else, not the same with
# other roundings.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 3e-2}


class Disagreement(AssertionError):
    """A variant's output or gradient is not the plain formula's: its speed means nothing."""


@dataclass(frozen=True)
class Setting:
    """How cases are measured.

    Args:
        device, dtype: of the inputs.
        limits: the machine's, from `machine.probe`.
        seconds: of alternating rounds per case and pass.
        shortest: least seconds of one measurement.
        compiled: also measure torch.compile of what people use.
        timer: the clock.
        cold_bytes: input sets are cycled until they span this many bytes; 0: one set.
        graphs: measure CUDA graphs of the work.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    seconds: float = 4.0
    shortest: float = 0.02
    compiled: bool = False
    timer: Timer = device_timer
    cold_bytes: int = 0
    graphs: bool = False


def setting_for(
    device: torch.device,
    limits: Limits,
    seconds: float,
    compiled: bool,
    timer: Timer = device_timer,
) -> Setting:
    """float32 on CPUs; bfloat16, CUDA graphs and inputs beyond twice the L2 cache on GPUs."""
    if device.type == "cpu":
        return Setting(device, torch.float32, limits, seconds, compiled=compiled, timer=timer)
    cold = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return Setting(
        device, torch.bfloat16, limits, seconds, 0.005, compiled, timer, cold, graphs=True
    )


def measure(case: Case, direction: str, setting: Setting, drive: Drive = loop) -> dict:
    """Measure "forward" or "forward+backward" of a case; the result is one entry of a results file.

    Args:
        drive: runs the rounds of an `Interleaved`.

    Raises:
        Disagreement: when a variant computes something else.
    """
    backward = direction != "forward"
    variants = _with_compiled(case, setting)
    sets = _input_sets(case, setting, backward)
    check_agreement(case, variants, sets[0], setting.dtype, backward)

    memory = {
        name: _memory(case, variant, sets[0], backward, setting.device)
        for name, variant in variants.items()
    }
    runs = {
        name: _runner(case, variant, sets, backward, setting) for name, variant in variants.items()
    }

    rounds, repeats = plan(runs, setting.seconds, setting.shortest, setting.timer)
    batches = {name: repeated(run, repeats) for name, run in runs.items()}
    interleaved = Interleaved(batches, repeats * len(sets), setting.timer)
    drive(interleaved, rounds)

    seconds = interleaved.medians()
    moved = case.elements[backward] * setting.dtype.itemsize
    return {
        "case": f"{case.name} {direction}",
        "op": case.op,
        "shape": case.shape,
        "direction": direction,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "rounds": rounds,
        "seconds": seconds,
        "ratio": interleaved.ratios(),
        "peak_bytes": {name: peak for name, (peak, _) in memory.items()},
        "held_bytes": {name: held for name, (_, held) in memory.items()} if backward else {},
        "bytes": moved,
        "flops": case.flops[backward],
        "roofline": setting.limits.bound(moved, case.flops[backward]) / seconds["ours"],
    }


def _with_compiled(case: Case, setting: Setting) -> dict[str, Variant]:
    variants = dict(case.variants)
    if setting.compiled:
        torch.compiler.reset()
        used = variants["sdpa" if "sdpa" in variants else "plain"]
        variants["compiled"] = torch.compile(used, dynamic=False)
    return variants


def _input_sets(case: Case, setting: Setting, backward: bool) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    sets = [case.make(setting.device, setting.dtype)]
    size = sum(tensor.nbytes for tensor in sets[0].values())
    sets += [case.make(setting.device, setting.dtype) for _ in range(setting.cold_bytes // size)]

    for inputs in sets:
        for name in case.leaves if backward else ():
            inputs[name].requires_grad_()
    return sets


def _work(
    case: Case, variant: Variant, inputs: Inputs, backward: bool
) -> tuple[object, tuple[Tensor, ...]]:
    """The output and the gradients of the leaves."""
    if not backward:
        with torch.no_grad():
            return variant(inputs), ()
    output = variant(inputs)
    leaves = [inputs[name] for name in case.leaves]
    return output, torch.autograd.grad(output, leaves, inputs.get("dout"))


def _memory(
    case: Case, variant: Variant, inputs: Inputs, backward: bool, device: torch.device
) -> tuple[int, int]:
    """Peak of the whole pass, and what stays allocated between forward and backward."""
    peak = peak_memory(lambda: _work(case, variant, inputs, backward), device)
    return peak, held_memory(lambda: variant(inputs), device) if backward else 0


def _runner(
    case: Case, variant: Variant, sets: list[dict[str, Tensor]], backward: bool, setting: Setting
) -> Run:
    run = cycled(lambda inputs: _work(case, variant, inputs, backward), sets)
    return graphed(run) if setting.graphs else run


def check_agreement(
    case: Case, variants: Mapping[str, Variant], inputs: Inputs, dtype: torch.dtype, backward: bool
) -> None:
    """Compare every variant's output and gradients with those of the plain formula.

    Raises:
        Disagreement: they differ by more than rounding.
    """
    reference = "plain" if "plain" in variants else "sdpa"
    expected = _compared(case, variants[reference], inputs, backward)
    for name, variant in variants.items():
        results = _compared(case, variant, inputs, backward)
        for index, (got, want) in enumerate(zip(results, expected, strict=True)):
            error = ((got - want).norm() / want.norm()).item()
            if not error <= TOLERANCE[dtype]:
                what = "output" if index == 0 else f"gradient of {case.leaves[index - 1]}"
                raise Disagreement(
                    f"{case.name}: the {what} of {name!r} is {error:.2g} from that of "
                    f"{reference!r}, allowed {TOLERANCE[dtype]:.0e}"
                )


def _compared(case: Case, variant: Variant, inputs: Inputs, backward: bool) -> list[Tensor]:
    output, gradients = _work(case, variant, inputs, backward)
    return [tensor.detach().float() for tensor in (case.dense(output), *gradients)]
