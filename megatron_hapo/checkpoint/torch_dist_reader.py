"""Loads tensors of a torch_dist checkpoint as views of its files.

torch reads each tensor into new memory and copies it from there to its destination. Touching new memory is most of the
cost of such a load; besides, each of several ranks that share a stored tensor would read all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_hapo.checkpoint.mapped_file import MappedFile


class MappedLoadStrategy(TorchDistLoadShardedStrategy):
    """Megatron's load strategy, except that what is contiguous in the checkpoint becomes a view of its file, even at
    an unaligned address. The rest is loaded as usual.

    Args:
        metadata: the checkpoint's, as `read_metadata` returns it.
    """

    def __init__(self, metadata: Metadata):
        super().__init__()
        self._metadata = metadata
        self._files: dict[Path, MappedFile] = {}

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> Any:
        """The state dict with the checkpoint's tensors in the places of its sharded ones."""
        others: dict[str, ShardedBase] = {}

        def view(entry: Any) -> Any:
            value = self._view(entry, Path(checkpoint_dir)) if isinstance(entry, ShardedTensor) else None
            if value is None:
                others[str(len(others))] = entry
            return entry if value is None else value

        state = dict_list_map_outplace(view, sharded_state_dict)
        loaded = super().load(dict(others), checkpoint_dir, async_strategy) if others else {}
        values = iter([loaded[name] for name in others])
        return dict_list_map_outplace(lambda entry: next(values) if isinstance(entry, ShardedBase) else entry, state)

    def _view(self, entry: ShardedTensor, folder: Path) -> Tensor | None:
        """A view of the file, or None if no stored chunk contains the whole entry."""
        stored = self._metadata.state_dict_metadata.get(entry.key)
        # Another size is a fault, which Megatron reports, or a vocabulary padded for another tp, which it handles.
        if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != tuple(entry.global_shape):
            return None
        starts = tuple(entry.global_offset)
        sizes = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        piece_starts = self._piece_around(starts, sizes, stored, entry.key)
        piece = None if piece_starts is None else self._piece(MetadataIndex(entry.key, piece_starts), folder)
        if piece_starts is None or piece is None:
            return None
        for axis, (start, piece_start, size) in enumerate(zip(starts, piece_starts, sizes, strict=True)):
            if start - piece_start + size > piece.shape[axis]:
                return None
            piece = piece.narrow(axis, start - piece_start, size)
        return piece.view(entry.local_shape)

    def _piece_around(
        self, starts: tuple[int, ...], sizes: tuple[int, ...], stored: TensorStorageMetadata, key: str
    ) -> tuple[int, ...] | None:
        """Offsets of the stored chunk that contains this block; None if there is none.

        Mostly both begin at the same place, which is tried first because of experts there are many thousands.
        """
        if MetadataIndex(key, starts) in self._metadata.storage_data:
            return starts
        for chunk in stored.chunks:
            ends = zip(starts, sizes, chunk.offsets, chunk.sizes, strict=True)
            if all(first <= start and start + size <= first + length for start, size, first, length in ends):
                return tuple(chunk.offsets)
        return None

    def _piece(self, index: MetadataIndex, folder: Path) -> Tensor | None:
        place = self._metadata.storage_data[index]
        if place.transform_descriptors:  # compressed
            return None
        path = folder / place.relative_path
        with path.open("rb") as file:
            item = _create_file_view(file, place.offset, place.length)
            described: Tensor = torch.load(item, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        storage = described.untyped_storage()
        start = place.offset + storage._checkpoint_offset  # torch's own record of the offset in what it has read
        if path not in self._files:
            self._files[path] = MappedFile(path)
        values = self._files[path].tensor(start, described.dtype, storage.nbytes() // described.itemsize)
        return values.as_strided(described.shape, described.stride(), described.storage_offset())
