"""The tensors of a checkpoint: written by torch.distributed.checkpoint, read without its index.

That index, `.metadata`, is a pickle, which runs whatever its writer liked. A load needs little of
it: which bytes of which file hold which part of which tensor. These names and numbers are kept as
JSON instead, and `.metadata` is left for other people's tools. JSON describes tensors only: an
entry of bytes, which torch would unpickle without restraint, cannot occur. The files themselves are
read by torch with `weights_only=True`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dinov3core.train.engine.parallel import World

Nested = dict[str, dict[str, Tensor]]  # group, then name in the group
Index = dict[str, Any]  # as JSON: by full name the type, the shape, and where each part lies


def write(tensors: Nested, folder: Path, world: World) -> Index:
    """Write `tensors` into files under `folder`, together with the other processes.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every process, when one of them cannot
            write. It is no `Exception`.
    """
    return _index(dcp_save(tensors, folder, world))


def read(tensors: Nested, folder: Path, index: Index, world: World) -> None:
    """Fill `tensors` in place from the files under `folder`, together with the other processes.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every process, when one of them cannot
            read, or finds anything but tensors.
        ValueError: `index` is none.
    """
    reader = _IndexedReader(folder, metadata_of(index))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        dcp.load(tensors, storage_reader=reader, process_group=world.group, no_dist=world.size == 1)


def dcp_save(tensors: Nested, folder: Path, world: World) -> Metadata:
    """Write by torch alone, and return the index it made."""
    with warnings.catch_warnings():  # "assuming single process" is what a run without torchrun is
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        return dcp.save(
            tensors,
            storage_writer=_Writer(folder),
            process_group=world.group,
            no_dist=world.size == 1,
        )


def files_of(index: Index) -> list[str]:
    """Names of the files that an index speaks of."""
    return sorted({part["file"] for entry in index.values() for part in entry["parts"]})


def described(tensors: Nested) -> dict[str, str]:
    """Type and shape of each tensor by its full name in an index; a shard's are the whole's."""
    return {
        f"{group}.{name}": f"{_type_name(tensor.dtype)} {list(tensor.shape)}"
        for group, members in tensors.items()
        for name, tensor in members.items()
    }


def described_by(index: Index) -> dict[str, str]:
    """The same of the tensors that an index names."""
    return {name: f"{entry['dtype']} {entry['shape']}" for name, entry in index.items()}


def _index(metadata: Metadata) -> Index:
    index: Index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # `Nested` holds nothing else
        places = [metadata.storage_data[MetadataIndex(name, c.offsets)] for c in entry.chunks]
        index[name] = {
            "dtype": _type_name(entry.properties.dtype),
            "shape": list(entry.size),
            "parts": [_part(place, chunk) for place, chunk in zip(places, entry.chunks)],
        }
    return index


def _part(place: _StorageInfo, chunk: ChunkStorageMetadata) -> dict[str, Any]:
    return {
        "offsets": list(chunk.offsets),
        "shape": list(chunk.sizes),
        "file": place.relative_path,
        "start": place.offset,
        "bytes": place.length,
    }


def metadata_of(index: Index) -> Metadata:
    """What `_index` was made of, as far as a load needs it.

    Raises:
        ValueError: this is no index.
    """
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    try:
        for name, entry in index.items():
            chunks = []
            for part in entry["parts"]:
                offsets = torch.Size(part["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(part["shape"])))
                place = _StorageInfo(_plain_name(part["file"]), part["start"], part["bytes"])
                places[MetadataIndex(name, offsets)] = place
            properties = TensorProperties(dtype=_type(entry["dtype"]))
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected an index of tensors, got something else ({error})") from error
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _plain_name(file: str) -> str:
    """A file beside the index, not one elsewhere on the machine."""
    if Path(file).name != file:
        raise ValueError(f"file {file!r}")
    return file


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"type {name!r}")
    return dtype


class _Writer(dcp.FileSystemWriter):
    """Names the reason of a failure: torch's zip writer covers an OSError with one of its own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _IndexedReader(dcp.FileSystemReader):
    """Reads the tensors of a given index; opens no `.metadata`, nor the one of a rank."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
