"""Read what the compiler makes of every shipped kernel, for GPUs that are not there.

    python -m dinov3core.kernel_report              a table on the terminal
    python -m dinov3core.kernel_report --check      exit code 1 when a configuration breaks a rule
    python -m dinov3core.kernel_report --json FILE  the table as JSON, as
                                                    benchmarks/results/kernel_report.json

Each kernels/*.py lists what it ships (`configurations()`). Every entry is compiled for every
architecture that uses it and the machine code is read back. No GPU and no driver is needed:
Triton's wheel brings ptxas, cuobjdump and nvdisasm. The rules of --check: no register spills,
shared memory within the architecture's limit, tensor-core instructions where the kernel multiplies
matrices (wgmma on sm_90, tcgen05 or mma on sm_100). Counts belong to one Triton version.

Compiled are the launches of training under autocast: bfloat16 logits and attention, tables in
float32 and bfloat16, float32 rows of the Gram term (tests/test_kernel_variants.py holds the list
against what a step launches), and bfloat16 Gram rows. Left out, as near relatives of these:
float16, float32 logits, Grams without a gradient or clamped on the teacher's side only, rows of
fewer channels or prototypes, interleaved or absent rotation; and on sm_86 and sm_89, which run the
instructions of sm_80, all kernels that need little shared memory.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov3core import extras

if TYPE_CHECKING:
    from dinov3core.kernels.launch import KernelBuild

# bytes of shared memory (LDS) one program may use: CUDA programming guide, table of compute
# capabilities; CDNA 3 ISA
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
REGISTER_FILE = 65536  # registers of a multiprocessor: the same table, all of its columns
TENSOR_CORES = {
    "sm_80": ("HMMA",),
    "sm_86": ("HMMA",),
    "sm_89": ("HMMA",),
    "sm_90": ("HGMMA",),
    "sm_100": ("UTCMMA", "HMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("MFMA",),
}
TRITON_STAGES = 3  # when a launch names none
_SASS = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.]+)?)"
)
_COUNTED = {
    "HGMMA": r"HGMMA",
    "HMMA": r"HMMA",
    "UTCMMA": r"UTC\w*MMA",
    "loads": r"LDG(\.|$)|LDGSTS",
    "wide loads": r"(LDG|LDGSTS)\..*128",
    "local memory": r"LDL|STL",
}


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One configuration on one architecture, as compiled.

    Attributes:
        registers: per thread (on AMD vector registers, accumulators included).
        spilled: bytes of stack per thread.
        shared: bytes of shared memory.
        tensor_cores: instructions by kind.
        loads, wide_loads: loads from global memory, and those of 128 bits.
        problem: the broken rule in words, or None.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: int = 0
    tensor_cores: dict[str, int] = dataclasses.field(default_factory=dict)
    loads: int = 0
    wide_loads: int = 0
    problem: str | None = None


def shipped() -> "Iterator[KernelBuild]":
    """What every file of kernels/ ships."""
    package = importlib.import_module("dinov3core.kernels")
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"dinov3core.kernels.{file.name}")
        if hasattr(module, "configurations"):
            yield from module.configurations()


def inspect(build: "KernelBuild", target: str) -> ReportRow:
    """Compile one configuration for one architecture and read the result back."""
    stages = build.options.get("num_stages", TRITON_STAGES)
    row = ReportRow(build.name, target, build.options["num_warps"], stages)
    try:
        compiled = _compile(build, target)
    except RuntimeError as error:  # of Triton and its assemblers; the last line names the stage
        words = str(error).strip().splitlines()[-1][:200]
        return dataclasses.replace(row, problem=f"does not compile: {words}")
    counts = _read_amd(compiled) if target.startswith("gfx") else _read_nvidia(compiled)
    row = dataclasses.replace(row, shared=compiled.metadata.shared, **counts)
    return dataclasses.replace(row, problem=problem_of(row, build.tensor_cores))


def problem_of(row: ReportRow, tensor_cores: bool) -> str | None:
    """The rule a row breaks, in words, or None."""
    if row.spilled:
        return f"spills {row.spilled} bytes per thread"
    if row.target.startswith("sm_") and row.registers * row.warps * 32 > REGISTER_FILE:
        return f"needs {row.registers * row.warps * 32} registers, {row.target} has {REGISTER_FILE}"
    if row.shared > SHARED_LIMIT[row.target]:
        limit = SHARED_LIMIT[row.target]
        return f"needs {row.shared} bytes of shared memory, {row.target} has {limit}"
    if tensor_cores and not any(row.tensor_cores.get(kind) for kind in TENSOR_CORES[row.target]):
        return f"has no tensor-core instructions ({' or '.join(TENSOR_CORES[row.target])})"
    return None


def _compile(build: "KernelBuild", target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    names = list(build.fn.arg_names)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in build.attrs}
    source = ASTSource(build.fn, dict(build.signature), dict(build.constexprs), attrs)
    return triton.compile(source, target=gpu, options=dict(build.options))


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    tools = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        sass = _output(tools / "nvdisasm", "-c", cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "spilled": stack, **count_sass(sass)}


def count_sass(sass: str) -> dict[str, Any]:
    """Instruction counts of a disassembly."""
    ops = [match.group(1) for match in map(_SASS.match, sass.splitlines()) if match]
    count = {
        kind: sum(bool(re.match(pattern, op)) for op in ops) for kind, pattern in _COUNTED.items()
    }
    kinds = {kind: count[kind] for kind in ("HGMMA", "HMMA", "UTCMMA") if count[kind]}
    return {
        "instructions": len(ops),
        "tensor_cores": kinds,
        "loads": count["loads"],
        "wide_loads": count["wide loads"],
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:?\s+(\d+)", text).group(1))

    loads = re.findall(r"(?:buffer|global)_load_(\w+)", text)
    return {
        "registers": number("vgpr_count"),
        "spilled": 4 * number("vgpr_spill_count"),
        "instructions": len(re.findall(r"^\s+[vs]_\w+|^\s+(?:ds|buffer|global)_\w+", text, re.M)),
        "tensor_cores": {"MFMA": len(re.findall(r"\bv_mfma_", text))},
        "loads": len(loads),
        "wide_loads": sum(kind == "dwordx4" for kind in loads),
    }


def _output(*command: Any) -> str:
    words = [str(word) for word in command]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _line(row: ReportRow) -> str:
    cores = " ".join(f"{kind}={count}" for kind, count in row.tensor_cores.items()) or "-"
    return (
        f"{row.kernel:46s} {row.target:7s} {row.warps:2d} warps {row.stages} stages "
        f"{row.registers:4d} registers {row.shared:7d} B shared "
        f"{row.wide_loads:3d}/{row.loads:<3d} wide loads  {cores:16s} {row.problem or ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3core.kernel_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a configuration breaks a rule"
    )
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--kernel", default="", help="only configurations whose name contains this")
    parser.add_argument("--target", default="", help="only this architecture")
    options = parser.parse_args(arguments)
    # kernels imported under it are Python functions and cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    rows = []
    for build in shipped():
        for target in build.targets:
            if options.kernel in build.name and options.target in target:
                rows.append(inspect(build, target))
                print(_line(rows[-1]), flush=True)
    broken = [row for row in rows if row.problem]
    print(
        f"{len(rows)} configurations, {len(broken)} with a problem, "
        f"{time.perf_counter() - started:.0f} s"
    )
    if options.json:
        version = importlib.import_module("triton").__version__
        table = {"triton": version, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    extras.exit_without("torch", "triton")
    sys.exit(main())
