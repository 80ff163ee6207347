"""Convert weights: `python -m dinov3core.convert IN OUT --to huggingface|timm|official|dinov3core`.

What was written is read back and compared with the input bit for bit before anything is reported.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

from dinov3core import extras

if __name__ == "__main__":
    extras.exit_without(*extras.COMMAND)

import torch
import tyro
from torch import Tensor

from dinov3core.checkpoints import load_model, save_weights
from dinov3core.models import NAMED_STATISTICS


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")],
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    to: Literal["huggingface", "timm", "official", "dinov3core"],
    statistics: Literal["stored", "imagenet", "satellite"] = "stored",
) -> str:
    """Read IN, write OUT in the layout --to, read that back and report.

    Args:
        source: a file or folder in any layout; it is recognised by its names.
        target: a file for official (.pth) and dinov3core (.safetensors), a folder for huggingface
            and timm.
        to: the layout to write.
        statistics: image normalisation to write along; stored: what the source states.

    Raises:
        ValueError: an unreadable source, a model the layout cannot express, or a difference after
            reading back.
    """
    model, report = load_model(source)
    if statistics != "stored":
        model.statistics = NAMED_STATISTICS[statistics]
    save_weights(model, target, to)
    again, written = load_model(target)
    expected = model.state_dict()
    tensors = again.state_dict()
    keys = sorted(expected.keys() | tensors.keys())
    different = [key for key in keys if not _same(expected.get(key), tensors.get(key))]
    if different:
        raise ValueError(
            f"{target}: expected the tensors of {source}, got others for {different[:4]}; report "
            "this"
        )
    equal = f"{len(tensors)} tensors of {target} equal those of {source} bit for bit"
    return f"{report}\n{written}\n{equal}"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def main(arguments: list[str] | None = None) -> None:
    """The command line; what cannot be read or written becomes one sentence and exit status 1."""
    try:
        print(tyro.cli(convert, prog="python -m dinov3core.convert", args=arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
