"""Loads and saves weights without an optimizer, from Hugging Face or Megatron (torch_dist) folders, at any layout."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_hapo.checkpoint.checkpoint_errors import explain_load_errors, explain_write_errors, keep_write_failures
from megatron_hapo.checkpoint.hf_weights import assign, load_hf_weights
from megatron_hapo.checkpoint.manifest import damaged_files, has_manifest
from megatron_hapo.checkpoint.model_folder import is_megatron_folder
from megatron_hapo.checkpoint.plausible import check_plausible
from megatron_hapo.checkpoint.progress import Progress
from megatron_hapo.checkpoint.torch_dist_metadata import read_metadata
from megatron_hapo.checkpoint.torch_dist_reader import MappedLoadStrategy
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.build import named_parameters
from megatron_hapo.model.families import Shape
from megatron_hapo.model.parallel_layout import ParallelLayout


def load_weights(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    folder: Path,
    *,
    progress: Progress | None = None,
    as_file_views: bool = False,
) -> None:
    """Fill this rank's parameters from a model folder of either format. All ranks call it together.

    A folder with a manifest is first checked against it, each rank a share of the files. Weights of other folders must
    be finite and plausible.

    Args:
        as_file_views: also a Megatron folder's parameters may become views of its files, possibly unaligned: enough to
            write them again, not to compute with them.
    Raises:
        ConfigError: the folder does not hold this model, or is damaged.
    """
    is_verified = _check_manifest_together(folder)
    if not is_megatron_folder(folder):
        load_hf_weights(model, shape, layout, folder, progress=progress, check_values=not is_verified)
        return
    mapped = MappedLoadStrategy(read_metadata(folder))
    with explain_load_errors(folder):
        state: Any = dist_checkpointing.load({"model": sharded_weights(model, layout)}, str(folder), mapped)
    if as_file_views:
        for number, chunk in enumerate(model):
            for name, parameter in chunk.named_parameters():
                assign(parameter, state["model"][str(number)][name])
    else:
        set_weights(model, state["model"])
    if not is_verified:
        for name, parameter in named_parameters(model):
            check_plausible(parameter.detach(), f"{folder}: {name}")


def _check_manifest_together(folder: Path) -> bool:
    """Whether the folder has a manifest, with which its files then agree."""
    faults: list[Any] = [None] * dist.get_world_size()
    own = damaged_files(folder, share=dist.get_rank(), num_shares=dist.get_world_size())
    dist.all_gather_object(faults, own)
    if found := sorted({fault for part in faults for fault in part}):
        raise ConfigError([f"model.path: {fault}" for fault in found])
    return has_manifest(folder)


def save_weights(model: Sequence[GPTModel], layout: ParallelLayout, folder: Path) -> None:
    """Write a model without an optimizer in torch_dist format, every rank its shard. All ranks call it together."""
    prepare_to_save()
    state: dict[str, Any] = {"model": sharded_weights(model, layout)}
    apply_factories(state)
    dict_list_map_inplace(_with_own_storage, state)
    with explain_write_errors(folder):
        dist_checkpointing.save(state, str(folder))


def _with_own_storage(entry: Any) -> Any:
    """Give a view its own storage object: Megatron would copy half of a gated layer's parameter before writing it."""
    if isinstance(entry, ShardedTensor) and entry.data is not None and entry.data.is_contiguous():
        data = entry.data.detach()
        start = data.storage_offset() * data.itemsize
        storage = data.untyped_storage()[start : start + data.nbytes]
        entry.data = data.new_empty(0).set_(storage, 0, data.shape, data.stride())  # type: ignore[arg-type]
    return entry


def sharded_weights(
    model: Sequence[GPTModel], layout: ParallelLayout, *, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """This rank's parameters and their positions in the whole model, chunk by chunk, as dist_checkpointing takes them.

    The files are independent of the chunks: each tensor is stored under its global name and offset.
    """
    metadata = {"dp_cp_group": layout.dp_cp_group, **(metadata or {})}
    return {
        str(number): {
            # Transformer Engine's extra state serves its float8 only, and other layers do not have it.
            name: entry
            for name, entry in chunk.sharded_state_dict(metadata=metadata).items()
            if not _is_extra(name)
        }
        for number, chunk in enumerate(model)
    }


def _is_extra(name: str) -> bool:
    """Whether the entry is Transformer Engine's `_extra_state`, for grouped experts `_extra_state1` and so on."""
    return name.rpartition(".")[2].startswith("_extra_state")


def set_weights(model: Sequence[GPTModel], state: Mapping[str, Any]) -> None:
    """Copy what was loaded for `sharded_weights` into the model."""
    for number, chunk in enumerate(model):
        missing, unexpected = chunk.load_state_dict(state[str(number)], strict=False)
        faults = [name for name in (*missing, *unexpected) if not _is_extra(name)]
        assert not faults, f"missing from the checkpoint, or not in the model: {faults}"


def prepare_to_save() -> None:
    """Patch Megatron and torch before a save, which is synchronous and writes in this process.

    Megatron passes even its own results through a multiprocessing Manager, which costs every rank a process of 0.6 GB
    and ten seconds, and survives a rank that is killed; a plain queue suffices. torch writes checksums nobody reads.
    """
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    keep_write_failures()
    torch.serialization.set_crc32_options(False)
