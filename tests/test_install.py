"""What a wheel holds runs as a checkout does: kernels/ and train/ are found behind their doors."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov3core import __main__ as console

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = """
from pathlib import Path
from dinov3core.kernels import launch
from dinov3core.train.engine import config
from dinov3core.train.recipes.registry import RECIPES
for module in (launch, config):
    print(Path(module.__file__).resolve())
print(*RECIPES)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel unpacks to."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder / "base")]
    subprocess.run([*command, "--build-lib", str(folder / "lib")], cwd=ROOT, check=True)
    return folder / "lib"


def run(path: Path, *arguments: str, cwd: Path) -> str:
    """What a Python process says that finds packages in `path` and is started elsewhere."""
    environment = {"PYTHONPATH": str(path), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_source_file(wheel: Path) -> None:
    packed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*.py")}
    for room, inside in (("dinov3core", ""), ("kernels", "dinov3core/"), ("train", "dinov3core/")):
        for path in (ROOT / room).rglob("*.py"):
            assert f"{inside}{path.relative_to(ROOT).as_posix()}" in packed


@pytest.mark.parametrize("installed", ["wheel", "checkout"])
def test_rooms_behind_the_doors_are_found(installed: str, wheel: Path, tmp_path: Path) -> None:
    path = wheel if installed == "wheel" else ROOT
    inside = wheel / "dinov3core" if installed == "wheel" else ROOT
    launch, config, recipes = run(path, "-c", IMPORTS, cwd=tmp_path).splitlines()
    assert Path(launch) == (inside / "kernels" / "launch.py").resolve()
    assert Path(config) == (inside / "train" / "engine" / "config.py").resolve()
    assert recipes.startswith("quickstart ")


def test_commands_of_a_wheel_run_anywhere(wheel: Path, tmp_path: Path) -> None:
    for name, command in console.COMMANDS.items():
        if command.module.startswith("train."):
            page = run(wheel, "-m", "dinov3core", name, "--help", cwd=tmp_path)
            assert f"dinov3core {name}" in page
            assert "python train/" not in page
