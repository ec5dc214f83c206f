"""A torch_dist folder's metadata, which torch pickles: it may name nothing but torch's records of what lies where."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

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


def check_metadata(folder: Path) -> None:
    """Before Megatron reads a checkpoint: a pickle can call whatever it names. The rest of the folder is tensors, which
    torch reads as such (`weights_only`).

    Raises:
        ConfigError: it names something else, or is no pickle at all.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _Reader(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ConfigError([f"model.path: {path} is no metadata of a checkpoint, and was not used: {error}"]) from error


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
