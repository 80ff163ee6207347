"""Everything that needs a GPU, in parts that fit into one short visit each and go on where the last
one stopped.

    python -m benchmarks.gpu --part correctness --out results_h200          # then attention,
    losses, step, profile python -m benchmarks.gpu --part train --out results_h200 --imagenette
    imagenette128.npz python -m benchmarks.gpu --part all --out /tmp/dry --dry-run            # on a
    CPU: tiny shapes, kernels interpreted

`python benchmarks/gpu.py` does the same from anywhere. It needs torch, triton and numpy; step and
profile also Pillow and safetensors, train what training needs. Each part keeps one JSON file under
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

if __package__ in (
    None,
    "",
):  # run as a file: the checkout's root, not benchmarks/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

PARTS = ("correctness", "attention", "losses", "step", "profile", "train")
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
        """Do `work` for an entry unless it is there, or the time is up; one that failed or did not
        finish goes on.
        """
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

        found = {
            "date": time.strftime("%Y-%m-%d"),
            **self.description,
            "records": list(self.entries.values()),
        }
        write_whole(self.path, json.dumps(found, indent=1) + "\n")

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
    """What one entry may raise without ending the others: errors of torch and CUDA, of Triton, and
    disagreements.
    """
    found: tuple[type[BaseException], ...] = (
        RuntimeError,
        AssertionError,
        ValueError,
        TypeError,
        ImportError,
        OSError,
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return found
    return (*found, TritonError)


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
    """Every op and kernel against float64, twice; then the small cases under NVIDIA's sanitizers,
    where they exist.
    """
    from benchmarks import gpu_correctness

    for name, check in gpu_correctness.checks(visit.device, visit.dry):
        ledger.enter(name, check)
    tool = shutil.which("compute-sanitizer")
    for kind in SANITIZERS if tool and not visit.dry else ():
        ledger.enter(f"compute-sanitizer {kind}", partial(_sanitize, tool, kind, visit))


def _sanitize(tool: str, kind: str, visit: Visit) -> dict:
    """Run the dry-run checks on the GPU under a sanitizer."""
    command = [
        tool,
        "--tool",
        kind,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.gpu_correctness",
    ]
    seconds = max(30.0, visit.deadline - time.monotonic())
    found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    (visit.out / f"sanitizer_{kind}.log").write_text(found.stdout + found.stderr)
    if found.returncode:
        raise RuntimeError(f"{kind} exits with {found.returncode}: {found.stdout[-500:]}")
    return {"said": found.stdout.strip().splitlines()[-1]}


def attention(visit: Visit, ledger: Ledger) -> None:
    """What there is to beat, SDPA alone on each of its backends; then launch choices; then ours and
    all rivals.
    """
    from benchmarks import cases, gpu_sdpa

    for name, work in gpu_sdpa.alone(visit.setting, visit.dry):
        ledger.enter(name, work)
    for width in () if visit.dry else (64, 128, 32):
        ledger.enter(f"launch table, head width {width}", partial(_tune, width, visit))
    _measure(cases.attention_cases(visit.scale), visit, ledger)


def _tune(width: int, visit: Visit) -> dict:
    """Measure launch choices in another process; this one reads their file with its first kernel,
    and keeps a copy.
    """
    command = [sys.executable, "-m", "dinov3core.tune", "--width", str(width)]
    found = subprocess.run(command, capture_output=True, text=True)
    (visit.out / f"tune_{width}.log").write_text(found.stdout + found.stderr)
    if found.returncode:
        raise RuntimeError(f"tune exits with {found.returncode}: {found.stderr[-500:]}")
    path = Path(found.stdout.strip().splitlines()[-1].removeprefix("wrote "))
    shutil.copy(path, visit.out / path.name)
    return {"said": f"{path.name}: {path.read_text()[:1500]}"}


def losses(visit: Visit, ledger: Ledger) -> None:
    """Gram, Sinkhorn, cross-entropies, KoLeo: ratios, share of the roofline, peak memory."""
    from benchmarks import cases

    _measure(cases.loss_cases(visit.scale), visit, ledger)


def _measure(cases: list, visit: Visit, ledger: Ledger) -> None:
    from benchmarks.comparison import measure

    for case in cases:
        for direction in case.passes:
            ledger.enter(
                f"{case.name} {direction}", partial(measure, case, direction, visit.setting)
            )


def step(visit: Visit, ledger: Ledger) -> None:
    """Whole training steps: ours, plain, plain compiled; and a transformers DINOv3 with our ops,
    where it is there.
    """
    if not _installed(ledger, "PIL", "safetensors"):
        return
    from benchmarks import gpu_steps, steps

    for recipe in steps.recipes(visit.scale):
        ledger.enter(steps.label(recipe), partial(steps.measure, recipe, visit.setting))
    ledger.enter(
        "accelerated transformers", partial(gpu_steps.accelerated, visit.setting, visit.dry)
    )


def profile(visit: Visit, ledger: Ledger) -> None:
    """Where the time of a step goes, ours and plain: tables beside the JSON file."""
    if not _installed(ledger, "PIL", "safetensors"):
        return
    from benchmarks import gpu_steps, steps

    for recipe in steps.recipes(visit.scale):
        for kind in ("ours", "plain"):
            path = visit.out / f"profile_{recipe.name}_{kind}.txt"
            ledger.enter(
                f"profile {recipe.name} {kind}",
                partial(gpu_steps.profiled, recipe, kind, visit.device, path),
            )


def train(visit: Visit, ledger: Ledger) -> None:
    """ViT-S on imagenette at 128 px without and with the Gram term, k-NN before and after; goes on
    at the next call.
    """
    if visit.imagenette is None:
        print("train: skipped, give --imagenette imagenette128.npz")
        return
    if not _installed(ledger, "PIL", "safetensors", "tqdm", "matplotlib"):
        return
    from benchmarks import gpu_training

    folder = gpu_training.unpack(visit.imagenette, visit.out / "imagenette")
    for name in ("imagenette", "imagenette_gram"):
        ledger.enter(
            name, partial(gpu_training.go_on, name, folder, visit.out, visit.deadline, visit.dry)
        )


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

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; add --dry-run to try the command on a CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the training loop sets it
    limits = machine.probe(
        device, torch.float32 if arguments.dry_run else torch.bfloat16, small=arguments.dry_run
    )
    setting = setting_for(device, limits, seconds=1.0, compiled=True)
    if arguments.dry_run:
        setting = replace(setting, seconds=0.0, shortest=0.0, compiled=False)
    scale = "dry" if arguments.dry_run else "gpu"
    deadline = time.monotonic() + 60 * arguments.minutes
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    return Visit(device, setting, scale, out, deadline, arguments.imagenette), machine.describe(
        device, limits
    )


def collect(out: Path, description: dict) -> None:
    """All comparisons so far as one results file, <machine>_<date>.json, for benchmarks/results and
    the report.
    """
    from benchmarks.machine import slug

    entries = [
        entry
        for part in PARTS
        if (out / f"{part}.json").is_file()
        for entry in _records(out / f"{part}.json")
    ]
    date = time.strftime("%Y-%m-%d")
    found = {
        "date": date,
        **description,
        "records": [entry for entry in entries if "ratio" in entry],
    }
    (out / f"{slug(description)}_{date}.json").write_text(json.dumps(found, indent=1) + "\n")


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
    failed, left = [], []
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        ledger = Ledger(visit.out / f"{part}.json", description, visit.deadline, visit.state)
        globals()[part](visit, ledger)
        failed, left = failed + ledger.failed, left + ledger.left
    collect(visit.out, description)
    print(f"{len(failed)} failed, {len(left)} left for the next call")
    sys.exit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
