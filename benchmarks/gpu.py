"""Everything that needs a GPU, in parts for short visits; each goes on where it stopped.

    python -m benchmarks.gpu --part correctness --out results_h200
        # then attention, losses, step, profile
    python -m benchmarks.gpu --part train --out results_h200 --imagenette imagenette128.npz
    python -m benchmarks.gpu --part all --out /tmp/dry --dry-run
        # on a CPU: tiny shapes, kernels interpreted

`python benchmarks/gpu.py` does the same from anywhere. It needs torch, triton and numpy; step and
profile also Pillow and safetensors, train what training needs. Each part has one JSON file under
--out and writes it after every entry; the same command takes up what is missing, and tries again
what failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file: the checkout's root, not benchmarks/, is needed
    sys.path[0] = str(ROOT)

SANITIZERS = ("memcheck", "racecheck")


@dataclass
class Ledger:
    """The entries of one part, on disk after each of them.

    Args:
        path: the JSON file.
        description: of the machine, from `machine.describe`.
        deadline: `time.monotonic()` after which no further entry is begun.
        state: of the device right after an entry's work: clocks, power, temperature.
    """

    path: Path
    description: dict
    deadline: float
    state: Callable[[], dict] = dict
    entries: dict[str, dict] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.entries = {entry["case"]: entry for entry in _records(self.path)}

    def enter(self, case: str, work: Callable[[], dict]) -> None:
        """Do `work` for an entry unless the time is up, or the entry is whole and without error."""
        known = self.entries.get(case, {"error": "not begun"})
        if "error" not in known and not known.get("unfinished"):
            return
        if time.monotonic() > self.deadline:
            self.left.append(case)
            return
        try:
            self.entries[case] = {**work(), "case": case, **self.state()}
        except failures() as error:
            self.entries[case] = {"case": case, "error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        if self.entries[case].get("unfinished"):
            self.left.append(case)
        self._write()
        print(self._line(case), flush=True)

    def _write(self) -> None:
        from dinov3core.writing import write_whole

        results = {
            "date": time.strftime("%Y-%m-%d"),
            **self.description,
            "records": list(self.entries.values()),
        }
        write_whole(self.path, json.dumps(results, indent=1) + "\n")

    def _line(self, case: str) -> str:
        from benchmarks.floors import lines

        entry = self.entries[case]
        if "error" in entry:
            return f"{case}: FAILED, {entry['error'].splitlines()[0]}"
        return lines([entry])[0] if "ratio" in entry else f"{case}: {entry.get('said', 'done')}"

    @property
    def failed(self) -> list[str]:
        return [case for case, entry in self.entries.items() if "error" in entry]


def failures() -> tuple[type[BaseException], ...]:
    """What one entry may raise without ending the others."""
    own = (RuntimeError, AssertionError, ValueError, TypeError, ImportError, OSError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return (*own, subprocess.SubprocessError)
    return (*own, subprocess.SubprocessError, TritonError)


@dataclass(frozen=True)
class Visit:
    """What a part needs to know."""

    device: object
    setting: object
    scale: str
    out: Path
    deadline: float
    imagenette: Path | None

    @property
    def dry(self) -> bool:
        return self.scale == "dry"

    def state(self) -> dict:
        """Clocks, power and temperature now; nothing on a CPU."""
        from benchmarks.machine import clocks

        return {} if self.dry else {"clocks": clocks(self.device)}


def correctness(visit: Visit, ledger: Ledger) -> None:
    """Every op and kernel against float64, twice; the small cases under NVIDIA's sanitizers."""
    from benchmarks import gpu_correctness

    for name, check in gpu_correctness.checks(visit.device, visit.dry):
        ledger.enter(name, check)
    tool = shutil.which("compute-sanitizer")
    for kind in SANITIZERS if tool and not visit.dry else ():
        ledger.enter(f"compute-sanitizer {kind}", partial(_sanitize, tool, kind, visit))


def _sanitize(tool: str, kind: str, visit: Visit) -> dict:
    """Run the small checks on the GPU under a sanitizer."""
    command = [tool, "--tool", kind, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.gpu_correctness"]
    seconds = max(30.0, visit.deadline - time.monotonic())
    return {"said": _last_line(command, visit.out / f"sanitizer_{kind}.log", seconds)}


def attention(visit: Visit, ledger: Ledger) -> None:
    """SDPA alone on each of its backends; then launch choices; then ours and all rivals."""
    from benchmarks import cases, gpu_sdpa

    for name, work in gpu_sdpa.alone(visit.setting, visit.dry):
        ledger.enter(name, work)
    for width in () if visit.dry else (64, 128, 32):
        ledger.enter(f"launch table, head width {width}", partial(_tune, width, visit))
    _measure(cases.attention_cases(visit.scale), visit, ledger)


def _tune(width: int, visit: Visit) -> dict:
    """Measure launch choices in another process; this one takes them up with its first kernel."""
    command = [sys.executable, "-m", "dinov3core.tune", "--width", str(width)]
    path = Path(_last_line(command, visit.out / f"tune_{width}.log").removeprefix("wrote "))
    shutil.copy(path, visit.out / path.name)
    return {"said": f"{path.name}: {path.read_text()[:1500]}"}


def _last_line(command: list[str], log: Path, seconds: float | None = None) -> str:
    """What a command says last; all of it goes to `log`.

    Raises:
        RuntimeError: it fails; subprocess.TimeoutExpired: it takes longer than `seconds`.
    """
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    log.write_text(run.stdout + run.stderr)
    if run.returncode:
        words = (run.stdout + run.stderr)[-500:]
        raise RuntimeError(f"{log.stem} exits with {run.returncode}: {words}")
    return run.stdout.strip().splitlines()[-1]


def losses(visit: Visit, ledger: Ledger) -> None:
    """Gram, Sinkhorn, cross-entropies, KoLeo: ratios, share of the roofline, peak memory."""
    from benchmarks import cases

    _measure(cases.loss_cases(visit.scale), visit, ledger)


def _measure(cases: list, visit: Visit, ledger: Ledger) -> None:
    from benchmarks.comparison import measure

    for case in cases:
        for direction in case.passes:
            name = f"{case.name} {direction}"
            ledger.enter(name, partial(measure, case, direction, visit.setting))


def step(visit: Visit, ledger: Ledger) -> None:
    """Whole training steps: ours, plain, plain compiled; a transformers DINOv3 with our ops."""
    if not _installed(ledger, "PIL", "safetensors"):
        return
    from benchmarks import integrations, steps

    for recipe in steps.recipes(visit.scale):
        ledger.enter(steps.label(recipe), partial(steps.measure, recipe, visit.setting))
    if importlib.util.find_spec("transformers") is None:
        print("transformers: skipped, not installed")
        return
    _measure(integrations.transformers_cases(visit.scale), visit, ledger)


def profile(visit: Visit, ledger: Ledger) -> None:
    """Where the time of a step goes, ours and plain: tables beside the JSON file."""
    if not _installed(ledger, "PIL", "safetensors"):
        return
    from benchmarks import gpu_steps, steps

    for recipe in steps.recipes(visit.scale):
        for kind in ("ours", "plain"):
            path = visit.out / f"profile_{recipe.name}_{kind}.txt"
            work = partial(gpu_steps.profiled, recipe, kind, visit.device, path)
            ledger.enter(f"profile {recipe.name} {kind}", work)


def train(visit: Visit, ledger: Ledger) -> None:
    """ViT-S on imagenette without and with the Gram term, over many calls; k-NN before, after."""
    if visit.imagenette is None:
        print("train: skipped, give --imagenette imagenette128.npz")
        return
    if not _installed(ledger, "PIL", "safetensors", "tqdm", "matplotlib", "tyro"):
        return
    from benchmarks import gpu_training

    folder = gpu_training.unpack(visit.imagenette, visit.out / "imagenette")
    arguments = folder, visit.out, visit.deadline, visit.dry
    for name in ("imagenette", "imagenette_gram"):
        ledger.enter(name, partial(gpu_training.go_on, name, *arguments))


PARTS = {part.__name__: part for part in (correctness, attention, losses, step, profile, train)}


def _installed(ledger: Ledger, *packages: str) -> bool:
    """Whether a part can be imported; a failed entry names what is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]

    def say() -> dict:
        if missing:
            raise ImportError(f"not installed: {', '.join(missing)}")
        return {"said": "installed"}

    ledger.enter(f"imports {' '.join(packages)}", say)
    return not missing


def visit_for(arguments: argparse.Namespace) -> tuple[Visit, dict]:
    """The device, its limits and how to measure on it."""
    import torch

    from benchmarks import machine
    from benchmarks.comparison import setting_for

    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; add --dry-run to try the command on a CPU")
    device = torch.device("cpu" if dry else "cuda")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the training loop sets it
    limits = machine.probe(device, torch.float32 if dry else torch.bfloat16, small=dry)
    setting = setting_for(device, limits, seconds=1.0, compiled=True)
    if dry:
        setting = replace(setting, seconds=0.0, shortest=0.0, compiled=False)
    deadline = time.monotonic() + 60 * arguments.minutes
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    scale = "dry" if dry else "gpu"
    visit = Visit(device, setting, scale, out, deadline, arguments.imagenette)
    return visit, machine.describe(device, limits)


def collect(out: Path, description: dict) -> None:
    """All comparisons so far as <machine>_<date>.json, for benchmarks/results and the report."""
    from benchmarks.machine import slug

    files = [out / f"{part}.json" for part in PARTS]
    entries = [entry for path in files if path.is_file() for entry in _records(path)]
    date = time.strftime("%Y-%m-%d")
    comparisons = [entry for entry in entries if "ratio" in entry]
    results = {"date": date, **description, "records": comparisons}
    (out / f"{slug(description)}_{date}.json").write_text(json.dumps(results, indent=1) + "\n")


def _records(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


def main(argv: list[str]) -> None:
    """Run one part or all; exit 1 when an entry failed, 3 when the time was not enough."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--part", choices=(*PARTS, "all"), required=True)
    parser.add_argument("--out", required=True, help="folder for JSON and logs")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="begin nothing new after this long"
    )
    parser.add_argument("--imagenette", type=Path, help="imagenette128.npz, for train")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, kernels in the interpreter"
    )
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    visit, description = visit_for(arguments)
    failed: list[str] = []
    left: list[str] = []
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        ledger = Ledger(visit.out / f"{part}.json", description, visit.deadline, visit.state)
        PARTS[part](visit, ledger)
        failed += ledger.failed
        left += ledger.left
    collect(visit.out, description)
    print(f"{len(failed)} failed, {len(left)} left for the next call")
    sys.exit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
