"""Files of weights: read without running anything they contain, written so that a reader sees all or nothing."""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEADER = "dinov3core"  # key of our JSON in the metadata of a safetensors file
HEADER_VERSION = 1
EXTRAS = "dinov3core.safetensors"  # beside a foreign layout: tensors that layout has no place for
_NAMES = ("model.safetensors", "model.safetensors.index.json", "teacher.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Source:
    """What a file or folder of weights holds, before anyone has said what the names mean."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)  # our own description of the model, also beside other layouts
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside the weights
    preprocessor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json beside the weights
    extras: dict[str, Tensor] = field(default_factory=dict)  # official names


def read(path: str | os.PathLike) -> Source:
    """Read a .safetensors, .pth, .pt or .bin file, or a folder with one (sharded files and config.json included).

    A safetensors file is one under any name. Pickles are read with `weights_only=True`: a file that asks to run code is
    refused.

    Raises:
        ValueError: nothing there, several candidates, truncated, not weights, or code inside.
    """
    path = Path(path)
    file = _locate(path)
    if file.name.endswith(".index.json"):
        index = read_json(file).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{file}: expected a weight_map, got none; download the index again")
        tensors, header = {}, {}
        for shard in sorted(set(index.values())):
            if not (file.parent / shard).is_file():
                raise ValueError(f"{file}: expected shard {shard} beside it, found none; download it as well")
            tensors |= _read_safetensors(file.parent / shard)[0]
        if tensors.keys() != index.keys():
            raise ValueError(
                f"{file}: expected {len(index)} tensors in the shards, got {len(tensors)}; download them again"
            )
    elif _is_safetensors(file):
        tensors, header = _read_safetensors(file)
    else:
        tensors, header = _read_pickle(file), {}
    if path.is_file() and path.name not in _NAMES:  # a file of its own: what lies beside it may belong to others
        return Source(path, tensors, header)
    config, preprocessor = (_json_or_empty(file.parent / name) for name in ("config.json", "preprocessor_config.json"))
    extras, described = _read_extras(file.parent / EXTRAS, tensors)
    return Source(path, tensors, header | described, config, preprocessor, extras)


def _locate(path: Path) -> Path:
    """The file to open for a path."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path}: expected a file or folder of weights, found nothing there; check the path, nothing is downloaded"
        )
    for folder in (path, *_newest_step(path)):
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path}: expected weights, got a torch.distributed.checkpoint, whose index is a pickle; convert it with "
            f"'python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} OUT.pth' and load OUT.pth"
        )
    found = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and p.name != EXTRAS]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{path}: expected one file of weights in the folder, got {names}; name the file")
    return found[0]


def _newest_step(path: Path) -> list[Path]:
    """The newest checkpoint of a training run, when `path` is the folder of one."""
    steps = [p for p in (*path.glob("step_*"), *path.glob("checkpoints/step_*")) if (p / "state.json").is_file()]
    return [max(steps, key=lambda p: p.name)] if steps else []


def _is_safetensors(path: Path) -> bool:
    """By its name, or by what it starts with: 8 bytes of header length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    by_content = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    return by_content or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a complete safetensors file, got a broken one ({error}); download it again"
        ) from error
    return tensors, _parse_header(path, metadata[HEADER]) if HEADER in metadata else {}


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    """Our description of a model, of the one version there is."""
    header = _parse(path, text)
    if header.get("version") != HEADER_VERSION:
        raise ValueError(
            f"{path}: expected version {HEADER_VERSION} of our header, got {header.get('version')!r}; "
            "load it with the dinov3core that wrote it"
        )
    return header


def _read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(2)
    if (
        start[:1] != b"\x80" and start != b"PK"
    ):  # a pickle of protocol 2 or later; the zip archive that torch.save writes
        raise ValueError(f"{path}: expected a safetensors or PyTorch file, got neither; give a file of weights")
    complete = zipfile.is_zipfile(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True if complete else None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError) as error:
        if "weights_only" in str(error) and ("GLOBAL" in str(error) or "Unsupported" in str(error)):
            asked = re.search(r"GLOBAL (\S+)", str(error))
            code = f"code ({asked[1]})" if asked else "code"
            raise ValueError(
                f"{path}: expected tensors, got a pickle that would run {code} when read; it was refused and nothing "
                "was run: ask for a safetensors file"
            ) from error
        raise ValueError(
            f"{path}: expected a PyTorch file, got a truncated or foreign one; download it again"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(found).__name__}; give a state dict")
    return dict(found)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write beside `path` and rename, so that a killed process leaves no half file."""
    partial = path.with_name(path.name + ".tmp")
    save_file({k: _alone(v) for k, v in tensors.items()}, partial, dict(metadata))
    os.replace(partial, path)


def write_shards(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index, as Hugging Face lays them out."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = tensor
        used += tensor.nbytes
    for stale in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)
    if len(shards) == 1:
        write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(shard, folder / name, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_extras(
    folder: Path, extras: Mapping[str, Tensor], header: Mapping[str, Any], beside: Mapping[str, Tensor]
) -> None:
    """Keep `extras` (official names) and `header` next to the weights `beside`, tied to them by a digest."""
    metadata = {HEADER: json.dumps({**header, "belongs_to": digest(beside)})}
    write_safetensors(extras, folder / EXTRAS, metadata)


def _read_extras(path: Path, beside: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        return {}, {}
    extras, header = _read_safetensors(path)
    if header.get("belongs_to") != digest(beside):
        raise ValueError(
            f"{path}: expected extras of the weights beside it, got those of others (were they trained on?); "
            "delete this file, or convert again"
        )
    return extras, header


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and the vectors: any training step moves norms and biases, and they are small."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        if tensors[key].ndim == 1:
            total.update(tensors[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: naming the file.
    """
    return _parse(path, path.read_text(encoding="utf-8", errors="replace"))


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}; download it again")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous and sharing memory with no other: what safetensors asks for."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
