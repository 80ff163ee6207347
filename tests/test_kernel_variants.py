"""Launches as a GPU would compile them (kernel_variants.py), their grids, dtypes and precision."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov3core.kernels import gram, rope, tiles
from dinov3core.models import VisionTransformer
from dinov3core.ops import dispatch, gram_loss
from dinov3core.ops.packing import PackedGroup, Packing
from dinov3core.train.recipes.registry import RECIPES

ROOT = Path(__file__).resolve().parents[1]
GRID_LIMIT = 65535  # of the second and third axis of a CUDA grid; the first one's is 2^31 - 1


def asked(what: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "kernel_variants.py"), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launches() -> dict[str, Any]:
    return asked("launches")


def test_the_front_end_takes_every_launch(launches: dict[str, Any]) -> None:
    """Of training, and of sizes that make one tile or one row: there an integer 1 is a constant."""
    assert launches["variants"] > 100
    assert launches["refused"] == []


def test_the_report_compiles_what_training_launches(launches: dict[str, Any]) -> None:
    assert launches["unlisted"] == []


def test_any_integer_argument_may_be_one_or_a_multiple_of_sixteen() -> None:
    arguments = asked("arguments")
    assert arguments["variants"] > 100
    assert arguments["refused"] == []


@pytest.fixture
def autocast_on_a_gpu() -> Iterator[None]:
    """torch.autocast("cuda") refuses without a GPU; the switch below it does not."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("autocast_on_a_gpu")
@pytest.mark.parametrize("recipe", ["vits16_1gpu", "vitl16_im1k"])
def test_training_compares_float32_patches_under_autocast(recipe: str) -> None:
    """The final norm gives float32, so Gram rows are that, whatever the network multiplies in."""
    backbone = VisionTransformer(replace(RECIPES[recipe]().backbone, depth=1))
    with FakeTensorMode():
        for name, parameter in list(backbone.norm.named_parameters()):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(backbone.norm, name, torch.nn.Parameter(fake, requires_grad=False))
        tokens = torch.empty(2, 5, backbone.width, dtype=torch.bfloat16, device="cuda")
        assert backbone.norm(tokens).dtype == torch.float32
        assert (tokens.float() @ tokens.mT).dtype == torch.bfloat16  # autocast is on


class Grids:
    """Stands for a kernel and keeps the grids it is launched on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.seen.append(grid)
        return lambda *arguments, **options: None


def test_grids_hold_any_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, kernels = GRID_LIMIT + 1, {}
    for module, names in (
        (rope, ("_rope_split_kernel", "_rope_merge_kernel")),
        (gram, ("_gram_residual_kernel", "_gram_project_kernel")),
    ):
        for name in names:
            kernels[name] = Grids()
            monkeypatch.setattr(module, name, kernels[name])
    monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
    table = torch.zeros(1, 32)
    packing = Packing((PackedGroup(images, 1, table, table),), prefix=0, interleaved=False)
    rope.merge(*rope.split(torch.zeros(images, 3, 1, 32), packing), packing)
    gram_loss(torch.zeros(images, 1, 4, requires_grad=True), torch.zeros(images, 1, 4))
    for name, kernel in kernels.items():
        assert kernel.seen, name
        others = [size for grid in kernel.seen for size in grid[1:]]
        assert all(size <= GRID_LIMIT for size in others), (name, kernel.seen)


def test_products_state_their_precision() -> None:
    """tl.dot rounds float32 operands to 11 bits unless it is told otherwise."""
    for path in Path(tiles.__file__).parent.glob("*.py"):
        calls = path.read_text().split("tl.dot(")[1:]
        for call in calls:
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(call[end], 0)
                end += 1
            assert "input_precision=" in call[:end], f"{path.name}: tl.dot({call[:end]}"
