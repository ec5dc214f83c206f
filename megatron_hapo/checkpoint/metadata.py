"""A torch_dist folder's metadata, which torch pickles: it may name nothing but torch's records of what lies where, and
what it records must be there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_hapo.errors import ConfigError

_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def read_metadata(folder: Path) -> Metadata:
    """Before Megatron reads a checkpoint: a pickle can call whatever it names. The rest of the folder is tensors, which
    torch reads as such (`weights_only`).

    Raises:
        ConfigError: it names something else, or is no pickle at all; or a file of the folder is missing or too short.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Reader(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ConfigError([f"model.path: {path} is no metadata of a checkpoint, and was not used: {error}"]) from error
    if not isinstance(metadata, Metadata):
        raise ConfigError([f"model.path: {path} is no metadata of a checkpoint, but a {type(metadata).__name__}"])
    sizes: dict[str, int] = {}
    for place in metadata.storage_data.values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    faults = [
        f"model.path: {folder / name} is incomplete or missing; it had {size} bytes (incomplete download or copy?)"
        for name, size in sorted(sizes.items())
        if not (folder / name).is_file() or (folder / name).stat().st_size < size
    ]
    if faults:
        raise ConfigError(faults)
    return metadata


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
