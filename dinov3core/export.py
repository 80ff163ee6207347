"""Export a backbone: `python -m dinov3core.export WEIGHTS OUT.onnx`, or `OUT.pt2`.

The former is ONNX of opset 18, the latter a program of torch.export. The graph holds plain torch
operators only, for images of one size and one or any batch size; masks are no input. What was
written is run again (by ONNX Runtime, or as the loaded program), and its difference from the model
is printed.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dinov3core.checkpoints import load_model
from dinov3core.evals.frozen import frozen
from dinov3core.models.layers import Attention
from dinov3core.models.presets import Backbone
from dinov3core.ops.packing import Packing
from dinov3core.ops.reference import rope_rotate

OPSET = 18


@dataclass(frozen=True)
class Export:
    """What to write."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """a file or folder of weights in any layout"""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """a file ending in .onnx or .pt2"""
    height: int = 224
    """of the images, in pixels"""
    width: int = 224
    """of the images, in pixels"""
    batch: int = 0
    """images per call; 0: any number"""


class PlainAttention(Attention):
    """Attention in operators that every exporter knows, for one crop set."""

    def attend(self, qkv_T3Hd: Tensor, packing: Packing) -> Tensor:
        (group,) = packing.groups
        (qkv_BN3Hd,) = packing.views(qkv_T3Hd)
        q, k, v = qkv_BN3Hd.unbind(2)
        q = rope_rotate(q, group.sin, group.cos, packing.prefix).transpose(1, 2)
        k = rope_rotate(k, group.sin, group.cos, packing.prefix).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return out.transpose(1, 2).flatten(0, 1)


@contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Inside, attention of `model` runs as separate torch operators instead of the fused op."""
    swapped = [module for module in model.modules() if type(module) is Attention]
    for module in swapped:
        module.__class__ = PlainAttention
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = Attention


class ClsAndPatches(nn.Module):
    """Images [B, C, H, W] to CLS [B, D] and patches [B, D, h, w], both with the final norm."""

    def __init__(self, model: Backbone):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(images)
        return features.cls, features.patches


def export(model: Backbone, out: Path, height: int, width: int, batch: int = 0) -> float:
    """Write `model` for images of `height` x `width`, run it again and compare.

    Args:
        out: ending in .onnx or .pt2.
        batch: images per call; 0: any number.

    Returns:
        the largest difference between the outputs of what was written and those of the model.

    Raises:
        ValueError: another ending, a size off the patch grid, a negative batch, or a missing
            package.
    """
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{out}: expected a name ending in .onnx or .pt2, got {out.suffix!r}")
    if min(height, width) < 1 or height % model.patch_size or width % model.patch_size:
        raise ValueError(
            f"size: expected positive multiples of {model.patch_size}, got {height} x {width}"
        )
    if batch < 0:
        raise ValueError(f"batch: expected a number of images, or 0 for any number, got {batch}")
    out.parent.mkdir(parents=True, exist_ok=True)
    module = ClsAndPatches(model)
    arguments = (torch.randn(batch or 2, model.in_channels, height, width),)
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    write = _write_onnx if out.suffix == ".onnx" else _write_pt2
    with frozen(module):
        with plain_operators(model):
            run = write(module, arguments, dynamic, out)
        errors = []
        for count in (batch,) if batch else (1, 2, 3):
            images = torch.randn(count, model.in_channels, height, width)
            pairs = zip(run(images), module(images), strict=True)
            errors += [(output - expected).abs().max().item() for output, expected in pairs]
    return max(errors)


Run = Callable[[Tensor], Sequence[Tensor]]


def _write_pt2(
    module: nn.Module, arguments: tuple[Tensor], dynamic: tuple | None, out: Path
) -> Run:
    torch.export.save(torch.export.export(module, arguments, dynamic_shapes=dynamic), out)
    return torch.export.load(out).module()


def _write_onnx(
    module: nn.Module, arguments: tuple[Tensor], dynamic: tuple | None, out: Path
) -> Run:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{out}: expected the packages of the export extra, missing {', '.join(missing)}; "
            "install them with pip install 'dinov3core[export]'"
        )
    import onnxruntime

    torch.onnx.export(
        module,
        arguments,
        out,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=dynamic,
        input_names=["images"],
        output_names=["cls", "patches"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: [
        torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line; what cannot be read or written becomes one sentence and exit status 1."""
    settings = tyro.cli(
        Export, prog="python -m dinov3core.export", description=__doc__, args=arguments
    )
    try:
        model, report = load_model(settings.weights)
        print(report, file=sys.stderr)
        error = export(model.float(), settings.out, settings.height, settings.width, settings.batch)
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    if settings.out.suffix == ".onnx":
        form = f"ONNX, opset {OPSET}"
        again = "run by ONNX Runtime"
    else:
        form = "torch.export"
        again = "loaded and run"
    images = f"batches of {settings.batch or 'any size'}, {settings.height} x {settings.width} px,"
    print(
        f"{settings.out}: {form}: {images} to cls and patches; {again}, the largest difference "
        f"from the model is {error:.2g}"
    )


if __name__ == "__main__":
    main()
