"""Write a model in any known layout, so that reading it back gives every tensor bit for bit."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3core.checkpoints import files, huggingface, timm
from dinov3core.checkpoints.architecture import Architecture, architecture_of_model, has_key_bias
from dinov3core.checkpoints.weights import FOREIGN, Weights, fill
from dinov3core.models import ConvNeXt, VisionTransformer
from dinov3core.models.interface import FeatureModule
from dinov3core.models.presets import Backbone
from dinov3core.writing import written_whole

FORMATS = ("dinov3core", "official", "huggingface", "timm")
# The other two are folders.
SUFFIXES = {"dinov3core": (".safetensors",), "official": (".pth", ".pt", ".bin")}
SHARD_BYTES = 5 * 10**9  # what the Hugging Face hub asks for


def save_weights(
    model: FeatureModule,
    path: str | os.PathLike,
    format: str = "dinov3core",
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights of `model`.

    A network of your own has its state dict written as it is, in the first format alone; no
    `load_model` can build it again, and says so.

    Args:
        path: a file for "dinov3core" (.safetensors, with sizes and image statistics in its header)
            and "official" (.pth); a folder for "huggingface" and "timm", which both get a
            config.json. What those two have no place for goes to dinov3core.safetensors in the
            folder, which only this project reads.
        shard_bytes: size from which "huggingface" splits the file.

    Raises:
        ValueError: an unknown format, a path that is no place for it, or a model the format cannot
            express.
    """
    path = Path(path)
    _refuse_place(path, format)
    if not isinstance(model, VisionTransformer | ConvNeXt):
        _save_own(model, path, format)
        return
    tensors = dict(model.state_dict())
    architecture = architecture_of_model(model)
    header = {
        "version": files.HEADER_VERSION,
        "family": architecture.family,
        "arguments": architecture.arguments,
        "statistics": model.statistics,
        "rotation": "half",
    }
    if format == "dinov3core":
        # Names that begin with norms. are second names.
        tensors = {key: value for key, value in tensors.items() if not key.startswith("norms.")}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(tensors, path, {files.HEADER: json.dumps(header)})
    elif format == "official":
        path.parent.mkdir(parents=True, exist_ok=True)
        # into a file, as torch would else put the passing name of `partial` into the archive
        with written_whole(path, RuntimeError) as partial, partial.open("wb") as file:
            torch.save({key: value.detach().cpu() for key, value in tensors.items()}, file)
    else:
        _refuse_inexpressible(model, architecture, tensors, format)
        path.mkdir(parents=True, exist_ok=True)
        translated = FOREIGN[format].from_official(tensors, architecture)
        files.write_shards(translated, path, shard_bytes if format == "huggingface" else 2**63)
        files.write_extras(path, _lost(model, tensors, translated, format), header, translated)
        _write_configs(path, format, model, architecture, tensors)


def _save_own(model: FeatureModule, path: Path, format: str) -> None:
    """Write the state dict of a network of another class than those of this project."""
    if format != "dinov3core":
        raise ValueError(
            f"format: expected dinov3core for a network of your own, got {format!r}, which has no "
            "names for its tensors"
        )
    header = {
        "version": files.HEADER_VERSION,
        "family": files.OWN_FAMILY,
        "arguments": {"class": type(model).__name__},
        "statistics": model.statistics,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(model.state_dict(), path, {files.HEADER: json.dumps(header)})


def _refuse_place(path: Path, format: str) -> None:
    """Refuse an unknown format, a folder for a file and a file for a folder, before writing."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
    if format in SUFFIXES:
        if path.suffix not in SUFFIXES[format] or path.is_dir():
            endings = " or ".join(SUFFIXES[format])
            raise ValueError(
                f"{path}: expected a file name ending in {endings} for the {format} format; give "
                "one"
            )
    elif path.is_file() or path.suffix in files.SUFFIXES:
        raise ValueError(
            f"{path}: expected a folder for the {format} format, got the name of a file; give a "
            "folder"
        )


def _lost(
    model: Backbone, tensors: Mapping[str, Tensor], translated: Mapping[str, Tensor], format: str
) -> dict[str, Tensor]:
    """The tensors that reading `translated` back would not give bit for bit."""
    again = Weights("", format, FOREIGN[format].to_official(translated), [], {}, None)
    fill(again, model)
    differs = {
        k
        for k, v in tensors.items()
        if k not in again.tensors or not _identical(v, again.tensors[k])
    }
    # a stored bias means nothing without its mask
    differs |= {key + "_mask" for key in differs if key.endswith("qkv.bias")} & tensors.keys()
    return {key: tensors[key] for key in tensors if key in differs}


def _identical(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(torch.uint8), b.to(a.device).contiguous().view(torch.uint8)
    )


def _refuse_inexpressible(
    model: Backbone, architecture: Architecture, tensors: Mapping[str, Tensor], format: str
) -> None:
    """Refuse a model whose outputs the layout's own code would not give."""
    if architecture.family == "convnext":
        return
    a = architecture.arguments
    needs: list[tuple[str, Any, bool]] = [
        (
            "norm",
            a["norm"],
            a["norm"] == "layernormbf16" or (format == "huggingface" and a["norm"] == "layernorm"),
        ),
        ("layer_scale", a["layer_scale"], a["layer_scale"] is not None),
        ("untie_cls_norm", a["untie_cls_norm"], not a["untie_cls_norm"]),
        ("rope_normalize", a["rope_normalize"], a["rope_normalize"] == "separate"),
        ("rope_base", a["rope_base"], a["rope_base"] is not None),
        ("proj_bias", a["proj_bias"], format == "huggingface" or a["proj_bias"]),
        ("ffn_bias", a["ffn_bias"], format == "huggingface" or a["ffn_bias"]),
        ("key bias", "nonzero", format == "huggingface" or not has_key_bias(tensors)),
    ]
    for name, value, fits in needs:
        if not fits:
            raise ValueError(
                f"format: expected a model that the {format} layout can express, got "
                f"{name}={value!r}"
            )
    base = model.settings.rope.base
    exact = base ** (
        torch.arange(len(tensors["rope_embed.periods"])) * 4 / model.rope_embed.head_dim
    )
    # 2^-8: rounding to bfloat16, as in the released files
    if not torch.allclose(tensors["rope_embed.periods"].float().cpu(), exact, rtol=2**-8, atol=0):
        raise ValueError(f"format: expected RoPE periods of base {base}, which {format} recomputes")


def _write_configs(
    folder: Path,
    format: str,
    model: Backbone,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
) -> None:
    if format == "timm":
        files.write_json(
            folder / "config.json", timm.config(tensors, architecture, model.statistics)
        )
        return
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files.write_json(
        folder / "config.json", huggingface.config(tensors, architecture) | {"dtype": dtype}
    )
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.unlink(missing_ok=True)
    if model.statistics is not None:
        files.write_json(preprocessor, huggingface.preprocessor(model.statistics))
