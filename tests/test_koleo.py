"""koleo_loss: its value where one can reason about it, edge cases, rows spread over processes.

Run as a script in each of two processes it computes the loss of its own rows and their gradient.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import joined, run_ranks

from dinov3core.losses import koleo_per_crop
from dinov3core.ops import koleo, koleo_loss
from dinov3core.ops.koleo import _sum_by_row
from dinov3core.train.engine.parallel import World

GROUPED = 4  # processes, in groups of two
SETTINGS = {"all": (1, None), "own block": (1, 4), "two neighbours": (2, 8)}


def features(rows: int, width: int = 6) -> Tensor:
    return torch.randn(
        (rows, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_value_on_a_square() -> None:
    """At the corners of a square every nearest neighbour lies at distance sqrt(2), at any norm."""
    corners = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, -5.0]], dtype=torch.float64)
    assert float(koleo_loss(corners)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-7)


def test_gradient_is_that_of_the_formula() -> None:
    x = features(9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: koleo_loss(x, topk=2), (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_be_far_from(rows: int) -> None:
    x = features(rows).float().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32 and not x.grad.any()


class Called(TorchDispatchMode):
    """The names of the ATen operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sums_by_row_have_a_fixed_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """index_add is a race of atomics there, where rows share a neighbour; index_put sorts first."""
    with FakeTensorMode(), Called() as called:
        values = torch.empty(6, 4, device="cuda")
        index = torch.empty(6, dtype=torch.int64, device="cuda")
        _sum_by_row(index, values, torch.empty(3, 4, device="cuda"))
    assert "index_put_" in called.names and "index_add_" not in called.names
    monkeypatch.setattr(koleo, "_sum_by_row", lambda index, values, into: into)
    rows = features(6).float()
    with Called() as called:
        neighbours = torch.ones(6, 2, dtype=torch.int64)
        koleo._koleo_backward._init_fn(torch.ones(()), rows, rows, neighbours)
    assert not [name for name in called.names if "index_add" in name or "scatter" in name]


def test_both_sums_by_row_agree() -> None:
    index = torch.tensor([2, 0, 2, 1, 2])
    values = features(5)
    want = _sum_by_row(index, values, torch.zeros(4, 6).double())
    got = torch.zeros(4, 6).double().index_put_((index,), values, accumulate=True)
    torch.testing.assert_close(got, want)


def test_duplicates_and_zero_rows_are_finite() -> None:
    x = features(6).float()
    x[1] = x[0]
    x[3] = 0
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_logarithm_is_taken_in_float32() -> None:
    x = features(20).bfloat16()
    torch.testing.assert_close(koleo_loss(x), koleo_loss(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, r"floating features \[B, D\], got torch.float32 \[4\]"),
        ((4, 2), {"topk": 0}, "at least 1 and below the 4 candidate rows, got 0"),
        ((4, 2), {"topk": 4}, "below the 4 candidate rows, got 4"),
        ((4, 2), {"group_size": 4}, "group_size=4 needs a process group, got group=None"),
    ],
)
def test_refusals(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        koleo_loss(torch.randn(shape), **options)


def spread(rows: Tensor, first: int, own: int, topk: int, block: int | None) -> Tensor:
    """The loss of rows first .. first + own among their block; autograd through both ends."""
    z = F.normalize(rows, dim=-1, eps=1e-8)
    size = block or len(rows)
    start = first // size * size
    mine = z[first : first + own]
    others = z[start : start + size]
    similarity = mine @ others.T
    similarity = similarity.masked_fill(
        torch.eye(len(z), dtype=torch.bool)[first : first + own, start : start + size], -2
    )
    near = others[similarity.topk(topk, dim=1).indices]
    return -((mine[:, None] - near + 1e-8).norm(dim=-1) + 1e-8).log().mean()


def test_processes_look_at_one_another(tmp_path: Path) -> None:
    run_ranks(Path(__file__), tmp_path)
    for name, (topk, block) in SETTINGS.items():
        rows = features(8).requires_grad_()
        losses = [spread(rows, first, 4, topk, block) for first in (0, 4)]
        gradient = torch.autograd.grad(2 * losses[0] + 3 * losses[1], rows)[0].split(4)
        for rank in (0, 1):
            share = torch.load(tmp_path / f"{name}_{rank}.pt")
            torch.testing.assert_close(share["loss"], losses[rank].detach())
            torch.testing.assert_close(share["gradient"], gradient[rank])
            torch.testing.assert_close(share["compiled"], gradient[rank])
            assert "multiple of the 4 local rows" in share["refusal"]


def test_a_group_of_processes_is_as_one_that_holds_its_images(tmp_path: Path) -> None:
    """Four processes in two groups, as the published high-resolution stage has pairs of them."""
    run_ranks(Path(__file__), tmp_path, processes=GROUPED)
    shares = [torch.load(tmp_path / f"grouped_{rank}.pt") for rank in range(GROUPED)]
    crops = features(2 * 8).view(2, 8, -1)
    for members in (shares[:2], shares[2:]):
        first = members[0]["first"]
        held = crops[:, first : first + 4].clone().requires_grad_()
        whole = koleo_per_crop(held)
        (gradient,) = torch.autograd.grad(whole.sum(), held)
        torch.testing.assert_close(sum(share["loss"] for share in members) / 2, whole.detach())
        # Each process's mean is over its own images, half of those of the group.
        got = torch.cat([share["gradient"] for share in members], dim=1)
        torch.testing.assert_close(got / 2, gradient)


def loss_in_groups(folder: Path, world: World) -> None:
    """Of two global crops of two images per process, among those of two processes."""
    share = features(2 * 8).view(2, 8, -1)[:, 2 * world.rank : 2 * world.rank + 2]
    share = share.clone().requires_grad_()
    loss = koleo_per_crop(share, group=dist.group.WORLD, group_size=4)
    (gradient,) = torch.autograd.grad(loss.sum(), share)
    result = {"loss": loss.detach(), "gradient": gradient, "first": 2 * world.rank}
    torch.save(result, folder / f"grouped_{world.rank}.pt")


def loss_of_share(folder: Path) -> None:
    with joined() as world:
        if world.size == GROUPED:
            loss_in_groups(folder, world)
            return
        for name, (topk, block) in SETTINGS.items():
            rows = features(8).split(4)[world.rank].clone().requires_grad_()
            settings = {"topk": topk, "group": dist.group.WORLD, "group_size": block}
            call = partial(koleo_loss, **settings)
            loss = call(rows)
            (gradient,) = torch.autograd.grad((2 + world.rank) * loss, rows)
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            (compiled_gradient,) = torch.autograd.grad((2 + world.rank) * compiled(rows), rows)
            try:
                koleo_loss(rows, group=dist.group.WORLD, group_size=6)
                refusal = ""
            except ValueError as error:
                refusal = str(error)
            share = {
                "loss": loss.detach(),
                "gradient": gradient,
                "compiled": compiled_gradient,
                "refusal": refusal,
            }
            torch.save(share, folder / f"{name}_{world.rank}.pt")


if __name__ == "__main__":
    loss_of_share(Path(sys.argv[1]))
