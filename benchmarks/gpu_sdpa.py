"""`scaled_dot_product_attention` on each backend, unrotated: the least a rival can cost."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.comparison import Setting
from benchmarks.measure import Interleaved, graphed, loop, plan, repeated

# images, tokens, heads, head width
SHAPES = ((128, 261, 16, 64), (512, 54, 16, 64), (128, 261, 32, 128), (32, 1029, 16, 64))
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def alone(setting: Setting, small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, measurement) at the shapes of global, local and high-resolution crops."""
    for images, tokens, heads, width in ((2, 16, 2, 32),) if small else SHAPES:
        for direction in ("forward", "forward+backward"):
            name = f"sdpa alone {images}x{tokens} {heads}x{width} {direction}"
            sizes = (images, heads, tokens, width)
            backward = direction != "forward"
            yield name, partial(_sdpa, sizes, backward, setting)


def _sdpa(sizes: tuple[int, int, int, int], backward: bool, setting: Setting) -> dict:
    images, heads, tokens, width = sizes
    place = {"device": setting.device, "dtype": setting.dtype}
    packed = torch.randn(images, tokens, 3, heads, width, **place)
    q, k, v = (x.transpose(1, 2).requires_grad_(backward) for x in packed.unbind(2))
    dout = torch.randn(images, tokens, heads, width, **place).transpose(1, 2)

    def run(backend: SDPBackend | None) -> object:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(output, (q, k, v), dout) if backward else output

    runs = {"default": partial(run, None)}
    if setting.device.type == "cuda":
        named = {name: partial(run, backend) for name, backend in BACKENDS.items()}
        runs |= {name: work for name, work in named.items() if _works(work)}
        runs = {name: graphed(work) for name, work in runs.items()}
    rounds, repeats = plan(runs, setting.seconds, setting.shortest)
    batches = {name: repeated(work, repeats) for name, work in runs.items()}
    timed = Interleaved(batches, repeats, subject="default")
    loop(timed, rounds)
    seconds = timed.medians()
    flops = (14 if backward else 4) * images * heads * tokens**2 * width
    said = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items())
    return {"op": "sdpa_alone", "seconds": seconds, "flops": flops, "said": said}


def _works(run: Callable[[], object]) -> bool:
    """Whether a backend takes these inputs."""
    try:
        run()
    except RuntimeError:
        return False
    return True
