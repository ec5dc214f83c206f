"""A model's weights alone, from whichever folder holds them: Hugging Face or Megatron (torch_dist), at any layout."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hapo.checkpoint.folder import is_megatron_folder
from megatron_hapo.checkpoint.hf import Progress, load_hf_weights, take
from megatron_hapo.checkpoint.mapped import MappedLoad
from megatron_hapo.checkpoint.metadata import read_metadata
from megatron_hapo.checkpoint.writing import writing
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.families import Shape
from megatron_hapo.model.parallel_layout import ParallelLayout


def load_weights(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    folder: Path,
    *,
    progress: Progress | None = None,
    in_files: bool = False,
) -> None:
    """Fill this rank's parameters from a model folder of either kind. All ranks call it together.

    Args:
        in_files: also a Megatron folder's parameters may stay in its files, at any address: to be written again, not
            to compute with.
    Raises:
        ConfigError: the folder does not hold this model.
    """
    if not is_megatron_folder(folder):
        load_hf_weights(model, shape, layout, folder, progress=progress)
        return
    mapped = MappedLoad(read_metadata(folder))
    with loading(folder):
        state: Any = dist_checkpointing.load({"model": sharded_weights(model, layout)}, str(folder), mapped)
    if in_files:
        for number, chunk in enumerate(model):
            for name, parameter in chunk.named_parameters():
                take(parameter, state["model"][str(number)][name])
    else:
        set_weights(model, state["model"])


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Around Megatron's loading of a checkpoint whose metadata were read.

    Raises:
        ConfigError: it holds another model.
    """
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, KeyError) as error:
        # torch passes on what any rank raised, with the tracebacks in its message.
        failures = [str(failure[0]) for failure in getattr(error, "failures", {}).values()]
        message = " ".join((" ".join(failures) or str(error)).split())[:500]
        raise ConfigError([f"model.path: {folder} does not hold the model of its config.json: {message}"]) from error


def save_weights(model: Sequence[GPTModel], layout: ParallelLayout, folder: Path) -> None:
    """Write a model without optimizer in torch_dist format; every rank its part."""
    prepare_to_save()
    state: dict[str, Any] = {"model": sharded_weights(model, layout)}
    apply_factories(state)
    dict_list_map_inplace(_with_own_storage, state)
    with writing(folder):
        dist_checkpointing.save(state, str(folder))


def _with_own_storage(entry: Any) -> Any:
    """Half of a gated feed-forward layer is a view of its parameter, which Megatron would copy before it writes it."""
    if isinstance(entry, ShardedTensor) and entry.data is not None and entry.data.is_contiguous():
        data = entry.data.detach()
        start = data.storage_offset() * data.itemsize
        storage = data.untyped_storage()[start : start + data.nbytes]
        entry.data = data.new_empty(0).set_(storage, 0, data.shape, data.stride())  # type: ignore[arg-type]
    return entry


def sharded_weights(
    model: Sequence[GPTModel], layout: ParallelLayout, *, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """This rank's parameters with their places in the whole, as dist_checkpointing takes them, chunk by chunk.

    The file knows no chunks: each tensor is stored under its own name and place.
    """
    metadata = {"dp_cp_group": layout.dp_cp_group, **(metadata or {})}
    return {
        str(number): {
            # What Transformer Engine keeps beside weights is for its float8, and other layers do not have it.
            name: entry
            for name, entry in chunk.sharded_state_dict(metadata=metadata).items()
            if not _is_extra(name)
        }
        for number, chunk in enumerate(model)
    }


def _is_extra(name: str) -> bool:
    """`_extra_state`, and of grouped experts `_extra_state1` and so on."""
    return name.rpartition(".")[2].startswith("_extra_state")


def set_weights(model: Sequence[GPTModel], state: Mapping[str, Any]) -> None:
    """Take what was loaded for `sharded_weights`."""
    for number, chunk in enumerate(model):
        missing, unexpected = chunk.load_state_dict(state[str(number)], strict=False)
        faults = [name for name in (*missing, *unexpected) if not _is_extra(name)]
        assert not faults, f"not loaded, or not known: {faults}"


def prepare_to_save() -> None:
    """Before a save, which is synchronous and writes in this process.

    Megatron passes even its results through a multiprocessing Manager: a process of 0.6 GB and ten seconds on every
    rank, which outlives a rank that is killed. A plain queue does. And torch writes checksums that it never reads.
    """
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    torch.serialization.set_crc32_options(False)
