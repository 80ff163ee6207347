"""sinkhorn: the balancing itself, what may and may not be shifted, and rows spread over processes.

Run as a script in each of two processes it balances its share of the rows and saves the targets.
"""

import math
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from two_processes import joined, run_ranks

from dinov3core.ops import Assignment, reference, sinkhorn

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SHARES = {"uneven": (9, 14), "one without rows": (0, 7)}


def scores(rows: int, prototypes: int, seed: int = 0) -> Tensor:
    return torch.randn(
        (rows, prototypes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_is_exp_then_alternating_division() -> None:
    """The plain formula as published, with its own normalisations and no logarithm."""
    logits = 0.5 * scores(30, 12)
    temperature = 0.07
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    torch.testing.assert_close(
        sinkhorn(logits, temperature).dense(), (q * q.shape[1]).T, rtol=1e-11, atol=1e-13
    )


def test_rows_sum_to_one_and_columns_come_to_balance() -> None:
    imbalances = []
    for iterations in (1, 2, 3, 10, 40):
        dense = sinkhorn(scores(200, 16), 0.5, iterations=iterations).dense()
        torch.testing.assert_close(dense.sum(1), torch.ones(200, dtype=torch.float64))
        imbalances.append(float((dense.sum(0) / 12.5 - 1).abs().max()))
    assert imbalances == sorted(imbalances, reverse=True)
    assert imbalances[0] > 0.05 and imbalances[-1] < 1e-12


def test_a_constant_per_prototype_cancels_and_one_per_row_does_not() -> None:
    logits = scores(20, 9)
    want = sinkhorn(logits, 0.1).dense()
    torch.testing.assert_close(sinkhorn(logits + 5 * scores(1, 9, seed=1), 0.1).dense(), want)
    assert float((sinkhorn(logits + scores(20, 1, seed=1), 0.1).dense() - want).abs().max()) > 0.01


def test_scalings_are_exact_once_normalized() -> None:
    assignment = sinkhorn(scores(20, 9), 0.1).normalized()
    exponent = (
        assignment.scale * assignment.logits + assignment.offset_log2 + assignment.column_log2
    )
    torch.testing.assert_close(
        torch.exp2(exponent + assignment.row_log2[:, None]), assignment.dense()
    )


@pytest.mark.parametrize("iterations", [1, 3])
def test_sums_of_unnormalized_rows_stay_in_range(iterations: int) -> None:
    """Between 1 / R and K, wherever the row lies: the reader needs no maximum."""
    logits = scores(40, 30).float() * 10
    logits[::3] -= 500
    a = sinkhorn(logits, 0.07, iterations=iterations)
    sums = torch.exp2(
        torch.add(a.offset_log2, logits, alpha=float(a.scale)) + a.column_log2 + a.row_log2[:, None]
    ).sum(1)
    assert (sums >= 1 / 41).all() and (sums <= 31).all()


@pytest.mark.parametrize("iterations", [1, 3])
def test_other_rows_by_the_same_scalings(iterations: int) -> None:
    """Rows that were balanced get what they got, in any order; new ones the softmax it is."""
    logits = scores(20, 9)
    assignment = sinkhorn(logits, 0.1, iterations=iterations)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    again = assignment.of_rows(logits[order])
    assert torch.equal(again.dense(), assignment.dense()[order])
    assert torch.equal(again.logits, logits[order]) and len(again) == 20

    new = scores(5, 9, seed=2)
    log_scalings = (assignment.offset_log2 + assignment.column_log2) * math.log(2)
    want = (new / 0.1 + log_scalings).softmax(1)
    torch.testing.assert_close(assignment.of_rows(new).dense(), want, rtol=1e-11, atol=1e-13)
    assert len(assignment.of_rows(new[:0])) == 0


def test_other_rows_are_constants_and_of_the_same_prototypes() -> None:
    assignment = sinkhorn(scores(20, 9), 0.1)
    given = scores(3, 9).requires_grad_()
    assert not assignment.of_rows(given).dense().requires_grad
    for wrong in (scores(3, 8), scores(3, 9)[0], scores(3, 9).long()):
        with pytest.raises(ValueError, match=r"expected floating logits \[R, 9\].*got torch"):
            assignment.of_rows(wrong)


def test_rows_and_length() -> None:
    assignment = sinkhorn(scores(20, 9), 0.1)
    assert len(assignment) == 20
    for index in (torch.tensor([3, 3, 0]), slice(2, 5), torch.arange(20) % 7 == 0):
        part = assignment.rows(index)
        assert isinstance(part, Assignment)
        torch.testing.assert_close(part.dense(), assignment.dense()[index])


def test_no_rows() -> None:
    assignment = sinkhorn(torch.zeros(0, 5), 0.1)
    assert assignment.dense().shape == (0, 5) and assignment.column_log2.isfinite().all()


def test_forbidden_prototype_gets_nothing() -> None:
    logits = scores(8, 5)
    logits[:, 2] = -torch.inf
    dense = sinkhorn(logits, 0.1).dense()
    assert (dense[:, 2] == 0).all()
    torch.testing.assert_close(
        dense[:, [0, 1, 3, 4]], sinkhorn(logits[:, [0, 1, 3, 4]], 0.1).dense()
    )


def test_not_a_number_is_not_hidden() -> None:
    logits = scores(8, 5)
    logits[3, 1] = torch.nan
    assert sinkhorn(logits, 0.1).dense()[3].isnan().all()


def test_constant_under_autograd() -> None:
    assert not sinkhorn(scores(8, 5).requires_grad_(), 0.1).dense().requires_grad


@pytest.mark.skipif(
    TORCH < (2, 13), reason="torch 2.11 compiles again for every new float; results are the same"
)
def test_crosses_compile_and_a_changing_temperature_does_not_recompile() -> None:
    compiles = CompileCounterWithBackend("aot_eager")
    balance = torch.compile(lambda x, t: sinkhorn(x, t), fullgraph=True, backend=compiles)
    total = torch.compile(lambda a: a.dense().sum() * len(a), fullgraph=True, backend="aot_eager")
    logits = scores(8, 5)
    for step in range(6):
        temperature = 0.04 + 0.005 * step
        assignment = balance(logits, temperature)
        torch.testing.assert_close(assignment.dense(), sinkhorn(logits, temperature).dense())
        assert float(total(assignment)) == pytest.approx(64)
    assert compiles.frame_count <= 2


@pytest.mark.parametrize(
    ("logits", "temperature", "iterations", "message"),
    [
        (torch.zeros(3), 0.1, 3, r"floating logits \[R, K\] with K >= 1, got torch.float32 \[3\]"),
        (torch.zeros(3, 0), 0.1, 3, r"got torch.float32 \[3, 0\]"),
        (torch.zeros(3, 2, dtype=torch.int64), 0.1, 3, "got torch.int64"),
        (torch.zeros(3, 2), 0.0, 3, "temperature > 0 and iterations >= 1, got 0.0 and 3"),
        (torch.zeros(3, 2), 0.1, 0, "got 0.1 and 0"),
    ],
)
def test_refusals(logits: Tensor, temperature: float, iterations: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(logits, temperature, iterations=iterations)


def test_processes_balance_together(tmp_path: Path) -> None:
    run_ranks(Path(__file__), tmp_path)
    for name, shares in SHARES.items():
        logits = scores(sum(shares), 11)
        want = reference.sinkhorn(logits, 0.07).split(shares)
        for rank, rows in enumerate(logits.split(shares)):
            share = torch.load(tmp_path / f"{name}_{rank}.pt")
            torch.testing.assert_close(share["together"], want[rank])
            torch.testing.assert_close(share["group"], want[rank])
            torch.testing.assert_close(share["compiled"], want[rank])
            torch.testing.assert_close(share["alone"], sinkhorn(rows, 0.07).dense())


def balance_share(folder: Path) -> None:
    with joined() as world:
        for name, shares in SHARES.items():
            rows = scores(sum(shares), 11).split(shares)[world.rank]
            compiled = torch.compile(
                lambda x: sinkhorn(x, 0.07).dense(), fullgraph=True, backend="aot_eager"
            )
            share = {
                "together": sinkhorn(rows, 0.07).dense(),
                "group": sinkhorn(rows, 0.07, group=dist.group.WORLD).dense(),
                "alone": sinkhorn(rows, 0.07, group="alone").dense(),
                "compiled": compiled(rows),
            }
            torch.save(share, folder / f"{name}_{world.rank}.pt")


if __name__ == "__main__":
    balance_share(Path(sys.argv[1]))
