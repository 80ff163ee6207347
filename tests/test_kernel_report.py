"""The static report of the kernels (machine code, rules, command) and the tuning search."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from dinov3core import tune
from dinov3core.kernel_report import (
    SHARED_LIMIT,
    TENSOR_CORES,
    ReportRow,
    count_sass,
    problem_of,
    shipped,
)
from dinov3core.kernels import launch

SASS = """
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E R8, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64], P1 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
"""


def test_counting_instructions():
    assert count_sass(SASS) == {
        "instructions": 7,
        "tensor_cores": {"HGMMA": 1, "HMMA": 1},
        "loads": 3,
        "wide_loads": 2,
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes per thread"),
        ({"shared": 232_449}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        (
            {"tensor_cores": {"HMMA": 4}},
            "has no tensor-core instructions (HGMMA)",
        ),  # the slow path of sm_90
    ],
)
def test_rules(change, problem):
    row = dataclasses.replace(
        ReportRow("kernel", "sm_90", 4, 1, tensor_cores={"HGMMA": 4}), **change
    )
    assert problem_of(row, tensor_cores=True) == problem
    assert problem_of(dataclasses.replace(row, tensor_cores={}), tensor_cores=False) == (
        None if "tensor" in str(problem) else problem
    )


def test_registers_of_all_threads_fit() -> None:
    row = ReportRow("kernel", "sm_120", 16, 1, registers=129)
    assert problem_of(row, tensor_cores=False) == "needs 66048 registers, sm_120 has 65536"


@pytest.mark.parametrize("target", launch.ARCHITECTURES)
def test_float32_rows_of_gram_are_compiled_for_every_architecture(target: str) -> None:
    """Training launches them; on GPUs with 99 KiB of shared memory they once asked for 128."""
    names = [build.name for build in shipped() if target in build.targets]
    assert {"gram_residual_fp32_64", "gram_residual_fp32_64_clip"} <= set(names)
    assert target in SHARED_LIMIT and target in TENSOR_CORES


def test_every_kernel_file_lists_what_it_ships():
    builds = list(shipped())
    files = {Path(build.fn.fn.__code__.co_filename).name for build in builds}
    with_kernels = {
        p.name for p in Path(launch.__file__).parent.glob("*.py") if "@triton.jit" in p.read_text()
    }
    assert files == with_kernels
    for build in builds:
        assert set(build.signature) == set(build.fn.arg_names), build.name
        assert {n for n, kind in build.signature.items() if kind == "constexpr"} == set(
            build.constexprs
        ), build.name
        assert set(build.attrs) <= set(build.signature) and set(build.targets) <= set(
            TENSOR_CORES
        ), build.name


def test_a_profile_tells_kernels_apart() -> None:
    """A launch is listed under the name of its function, whichever file that is in."""
    kernels = {(build.fn.__name__, build.fn.fn.__code__.co_filename) for build in shipped()}
    names = [name for name, _ in kernels]
    assert len(names) == len(set(names)), sorted(names)
    assert all(name.endswith("_kernel") for name in names), sorted(names)


@pytest.mark.parametrize(
    ("kernel", "target", "products"),
    [
        ("rope_attention_resident D=64 N=54 tables bf16", "sm_90", "HGMMA"),
        ("gram_residual_fp32_64_clip", "sm_89", "HMMA"),
    ],
)
def test_the_command_compiles_for_a_gpu_that_is_not_there(tmp_path, kernel, target, products):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [
        sys.executable,
        "-m",
        "dinov3core.kernel_report",
        "--check",
        "--json",
        str(tmp_path / "report.json"),
    ]
    selection = ["--kernel", kernel, "--target", target]
    done = subprocess.run([*command, *selection], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["tensor_cores"][products] > 0 and row["spilled"] == 0 and row["problem"] is None
    assert (
        0 < row["wide_loads"] <= row["loads"] and 0 < row["registers"] <= 255 and row["shared"] > 0
    )


def test_the_committed_report_holds_no_problem():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "kernel_report.json"
    rows = json.loads(path.read_text())["rows"]
    assert [row for row in rows if row["problem"]] == []
    names = {(build.name, target) for build in shipped() for target in build.targets}
    assert {(row["kernel"], row["target"]) for row in rows} == names


class TestTune:
    def test_each_field_takes_its_fastest_candidate(self):
        """A made-up GPU: more warps and stages cost more, fused kernels win up to 401 tokens."""

        def measure(backend, length, width):
            entry = launch.rope_attention(torch.device("cpu"), width)
            if backend == "torch":
                return 1e4 if length <= 401 else 0.0
            return (
                sum(entry.stream)
                + sum(entry.two_pass)
                + entry.one_tile_warps
                + entry.resident_warps
            )

        before = launch.rope_attention(torch.device("cpu"), 64)
        entry = tune.tune(64, torch.device("cpu"), measure)
        assert (entry.stream, entry.one_tile_warps, entry.resident_warps) == ((64, 64, 4, 1), 4, 4)
        assert entry.two_pass == min(tune.FIELDS["two_pass"].values, key=sum)
        assert entry.longest == 401
        assert launch.rope_attention(torch.device("cpu"), 64) == before

    def test_it_stops_at_the_first_loss(self):
        assert tune.last_win((1, 2, 3), (True, False, True)) == 1
        assert tune.last_win((1, 2), (False, True)) == 0

    @pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
    def test_without_a_gpu_the_command_says_so(self, capsys):
        assert tune.main([]) == 1
        assert "expected a GPU to measure on" in capsys.readouterr().err
