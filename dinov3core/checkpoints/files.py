"""Files of weights: read without running anything that they contain, written whole."""

import hashlib
import json
import os
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

from dinov3core.checkpoints.errors import READ_ERRORS, WeightsError
from dinov3core.checkpoints.stated import shown
from dinov3core.writing import write_whole, written_whole

HEADER = "dinov3core"  # key of our JSON in the metadata of a safetensors file
HEADER_VERSION = 1
OWN_FAMILY = "own"  # of networks that are not of this project
EXTRAS = "dinov3core.safetensors"  # beside a foreign layout: tensors that layout has no place for
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "teacher.safetensors",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MOST_JSON = 2**24  # bytes; the index of the largest model has some hundred kB


@dataclass(frozen=True)
class Source:
    """What a file or folder of weights holds, before anyone has said what the names mean."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)
    """our own description of the model, also beside other layouts"""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside the weights"""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json beside the weights"""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """by official names: what the layout has no place for"""


def read(path: str | os.PathLike) -> Source:
    """Read a .safetensors, .pth, .pt or .bin file, or a folder with one.

    Of a folder, shards and config.json are read too. A safetensors file is one under any name.
    Pickles are read with `weights_only=True`: a file that asks to run code is refused.

    Raises:
        WeightsError: nothing there, no regular file, several candidates, truncated, not weights,
            or code inside.
    """
    path = Path(path)
    file = _locate(path)
    header: dict[str, Any] = {}
    if file.name.endswith(".index.json"):
        tensors = _read_shards(file)
    elif _is_safetensors(file):
        tensors, header = _read_safetensors(file)
    else:
        tensors = _read_pickle(file)
    if path.is_file() and path.name not in _NAMES:
        # A file of its own: what lies beside it may belong to others.
        return Source(path, tensors, header)
    config = _json_or_empty(file.parent / "config.json")
    preprocessor = _json_or_empty(file.parent / "preprocessor_config.json")
    extras, described = _read_extras(file.parent / EXTRAS, tensors)
    return Source(path, tensors, header | described, config, preprocessor, extras)


def _locate(path: Path) -> Path:
    """The file to open for a path."""
    if path.is_file():
        return path
    if not path.exists():
        raise WeightsError(
            path,
            "expected a file or folder of weights, found nothing there; nothing is downloaded",
        )
    if not path.is_dir():
        raise WeightsError(
            path,
            "expected a file or folder of weights, got a pipe, socket or device; save it as a file",
        )
    for folder in (path, *_newest_step(path)):
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    if (path / ".metadata").is_file():
        raise WeightsError(
            path,
            "expected weights, got a torch.distributed.checkpoint, whose index is a pickle; "
            "give the teacher.safetensors beside it, or, if you trust whoever wrote it, as that "
            "runs what the pickle holds: 'python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {path} OUT.pth', and load OUT.pth",
        )
    named = [p for p in path.iterdir() if p.suffix in SUFFIXES and p.name != EXTRAS]
    candidates = sorted(p for p in named if p.is_file())
    if len(candidates) != 1:
        names = ", ".join(p.name for p in candidates[:4]) or "none"
        more = f" and {len(candidates) - 4} more" if len(candidates) > 4 else ""
        raise WeightsError(
            path,
            f"expected one file of weights in the folder, got {names}{more}; name the file",
        )
    return candidates[0]


def _newest_step(path: Path) -> list[Path]:
    """The newest checkpoint of a training run, when `path` is the folder of one."""
    steps = {}
    for folder in (*path.glob("step_*"), *path.glob("checkpoints/step_*")):
        number = re.fullmatch(r"step_(\d{1,18})", folder.name)
        if number and (folder / "state.json").is_file():
            steps[int(number[1])] = folder
    return [steps[max(steps)]] if steps else []


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index names.

    A shard is a plain name in the folder of the index; a link there is followed, as the cache of
    the Hugging Face hub is made of links.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(index, "expected a weight_map, got none; download the index again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsError(
                index,
                f"expected names of shards beside it, got {shard!r}; download the index again",
            )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise WeightsError(
                index,
                f"expected shard {shard} beside it, found none; download it as well",
            )
        tensors |= _read_safetensors(index.parent / shard)[0]
    if tensors.keys() != weight_map.keys():
        raise WeightsError(
            index,
            f"expected the {len(weight_map)} tensors of the index in the shards, "
            f"got {len(tensors)} or others; download them again",
        )
    return tensors


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
        raise WeightsError(
            path,
            f"expected a complete safetensors file, got a broken one ({error}); download it again",
        ) from error
    return tensors, _parse_header(path, metadata[HEADER]) if HEADER in metadata else {}


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    """Our description of a model, of the one version there is."""
    header = _parse(path, text)
    if header.get("version") != HEADER_VERSION:
        raise WeightsError(
            path,
            f"expected version {HEADER_VERSION} of our header, got {shown(header.get('version'))}; "
            "load it with the dinov3core that wrote it",
        )
    return header


def _read_pickle(path: Path) -> dict[Any, Any]:
    with path.open("rb") as file:
        start = file.read(2)
    # a pickle of protocol 2 or later; the zip archive that torch.save writes
    if start[:1] != b"\x80" and start != b"PK":
        raise WeightsError(
            path,
            "expected a safetensors or PyTorch file, got neither; give a file of weights",
        )
    archive = zipfile.is_zipfile(path)
    if archive:
        _refuse_compression(path)
    try:
        content = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=True if archive else None,
        )
    except READ_ERRORS as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise WeightsError(
                path,
                f"expected tensors, got a pickle that would run code ({asked[1]}) when read; "
                "it was refused and nothing was run: ask for a safetensors file",
            ) from error
        raise WeightsError(
            path, "expected a PyTorch file, got a truncated or foreign one; download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            path,
            f"expected a dictionary of tensors, got {type(content).__name__}; give a state dict",
        )
    return dict(content)


def _refuse_compression(path: Path) -> None:
    """torch.save compresses nothing; torch.load with mmap takes compressed bytes for numbers."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(
            path,
            "expected an archive as torch.save writes it, got a compressed one; save it again",
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise WeightsError(
            path,
            "expected entries side by side, got some that overlap; download it again",
        )


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, all or nothing."""
    with written_whole(path, SafetensorError) as partial:
        save_file({k: _alone(v) for k, v in tensors.items()}, partial, dict(metadata))


def write_shards(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and an index beside them."""
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
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_extras(
    folder: Path,
    extras: Mapping[str, Tensor],
    header: Mapping[str, Any],
    beside: Mapping[str, Tensor],
) -> None:
    """Write `extras` (official names) and `header` next to the weights `beside`.

    A digest of these ties them together.
    """
    metadata = {HEADER: json.dumps({**header, "belongs_to": digest(beside)})}
    write_safetensors(extras, folder / EXTRAS, metadata)


def _read_extras(
    path: Path, beside: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        return {}, {}
    extras, header = _read_safetensors(path)
    if header.get("belongs_to") != digest(beside):
        raise WeightsError(
            path,
            "expected extras of the weights beside it, got those of others (were they trained "
            "on?); delete this file, or convert again",
        )
    return extras, header


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and vectors: these are small, and move in any training step."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        if tensors[key].ndim == 1:
            total.update(
                tensors[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        WeightsError: too large, no JSON, nested without end, a name twice, or no object.
    """
    size = path.stat().st_size
    if size > MOST_JSON:
        raise WeightsError(
            path,
            f"expected JSON of at most {MOST_JSON} bytes, got {size}; download it again",
        )
    return _parse(path, path.read_text(encoding="utf-8", errors="replace"))


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            path,
            f"expected JSON, got something else ({error}); download it again",
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(
            path,
            f"expected a JSON object, got {type(content).__name__}; download it again",
        )
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a name may stand once: of two values either may be meant."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} stands there twice")
        content[name] = value
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, all or nothing."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous and sharing memory with no other: what safetensors asks for."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
