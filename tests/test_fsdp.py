"""Every op in a model sharded by FSDP2: two processes have the gradients of one with all images.

Run as a script, this file is one of the processes: it shards a small model per op, passes its half
of the batch through and saves the gathered gradients.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import PROCESSES, joined, run_ranks

from dinov3core import ops

IMAGES, TOKENS, PREFIX, HEADS, HEAD_WIDTH = 8, 7, 1, 2, 8
WIDTH, PROTOTYPES = HEADS * HEAD_WIDTH, 24


class Model(nn.Module):
    """Two projections, the second of which holds prototypes, and one op on top."""

    def __init__(self, loss: Callable[["Model", Tensor, Tensor], Tensor]):
        super().__init__()
        self.loss = loss
        self.first = nn.Linear(WIDTH, 3 * WIDTH)
        self.prototypes = nn.Linear(3 * WIDTH, PROTOTYPES, bias=False)

    def forward(self, images: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self, self.first(images), teacher)


def attention(model: Model, x: Tensor, teacher: Tensor) -> Tensor:
    sin, cos = ops.rope_table(2, 3, HEAD_WIDTH)
    out = ops.rope_attention(
        x.unflatten(-1, (3, HEADS, HEAD_WIDTH)), sin, cos, prefix_tokens=PREFIX
    )
    return out.square().mean()


def gram(model: Model, x: Tensor, teacher: Tensor) -> Tensor:
    return ops.gram_loss(x, teacher)


def balanced_cross_entropy(model: Model, x: Tensor, teacher: Tensor) -> Tensor:
    """Sinkhorn balances over all processes."""
    targets = ops.sinkhorn(teacher[:, 0, :PROTOTYPES], 0.07)
    return ops.soft_cross_entropy(model.prototypes(x[:, 0]), targets)


def fused_cross_entropy(model: Model, x: Tensor, teacher: Tensor) -> Tensor:
    """The op takes the weight of the prototype layer as FSDP2 gathers it for the forward pass."""
    targets = ops.sinkhorn(teacher[:, 0, :PROTOTYPES], 0.07)
    return ops.linear_soft_cross_entropy(x[:, 0], model.prototypes.weight, targets)


def koleo(model: Model, x: Tensor, teacher: Tensor) -> Tensor:
    return ops.koleo_loss(x[:, 0], group=dist.group.WORLD if dist.is_initialized() else None)


LOSSES = (attention, gram, balanced_cross_entropy, fused_cross_entropy, koleo)


def model_and_batch(loss: Callable[..., Tensor]) -> tuple[Model, Tensor, Tensor]:
    """The model and the whole batch, the same on every process."""
    torch.manual_seed(0)
    images, teacher = torch.randn(IMAGES, TOKENS, WIDTH), torch.randn(IMAGES, TOKENS, 3 * WIDTH)
    return Model(loss), images, teacher


def sharded_gradients(loss: Callable[..., Tensor], rank: int) -> dict[str, Tensor]:
    model, images, teacher = model_and_batch(loss)
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    half = slice(rank * IMAGES // PROCESSES, (rank + 1) * IMAGES // PROCESSES)
    model(images[half], teacher[half]).backward()
    return {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks(Path(__file__), folder)
    return load_file(folder / "gradients.safetensors")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_sharded_gradients_are_those_of_the_whole_batch(
    loss: Callable[..., Tensor], saved: dict[str, Tensor]
) -> None:
    model, images, teacher = model_and_batch(loss)
    model(images, teacher).backward()
    want = {
        f"{loss.__name__}.{name}": p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    got = {
        name: gradient for name, gradient in saved.items() if name.startswith(f"{loss.__name__}.")
    }
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in got.values())


if __name__ == "__main__":
    with joined() as world:
        gradients = {
            f"{loss.__name__}.{name}": gradient.contiguous()
            for loss in LOSSES
            for name, gradient in sharded_gradients(loss, world.rank).items()
        }
        if world.rank == 0:
            save_file(gradients, os.path.join(sys.argv[1], "gradients.safetensors"))
        dist.barrier()
        # Past the destructors: 2 of 30 times a process that had sharded modules ended in "terminate
        # called without an active exception" (torch 2.13, gloo), a thread of torch's that was still
        # joinable when it was destroyed.
        os._exit(0)
