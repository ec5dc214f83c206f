"""Checks what a torch_dist folder has pickled, before torch and Megatron unpickle it.

The metadata may refer only to torch's own record classes; objects other than tensors may contain only plain values. All
files must be present and long enough.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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
    """The checkpoint's metadata. Call it before Megatron reads the checkpoint: a pickle can call whatever it names.

    torch loads tensors with `weights_only`, but other objects without, so those are checked here.

    Raises:
        ConfigError: the metadata names anything else or is not a pickle, or a file is missing or too short.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Reader(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ConfigError([f"model.path: {path} is not the metadata of a checkpoint, rejected: {error}"]) from error
    if not isinstance(metadata, Metadata):
        raise ConfigError([f"model.path: {path} is not the metadata of a checkpoint but a {type(metadata).__name__}"])
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
    _check_objects(folder, metadata)
    return metadata


def _check_objects(folder: Path, metadata: Metadata) -> None:
    seen: set[bytes] = set()  # there are many, and nearly all consist of the same few bytes
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            continue
        path = folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if content in seen:
            continue
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError([f"model.path: {path}: {index.fqn} is not a plain value, rejected: {reason}"]) from error
        seen.add(content)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
