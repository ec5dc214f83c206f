"""Resumable checkpoints of a rank's model and optimizer in Megatron's torch_dist format; loads at any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_hapo.checkpoint.metadata import read_metadata
from megatron_hapo.checkpoint.weights import loading, prepare_to_save, set_weights, sharded_weights
from megatron_hapo.checkpoint.writing import writing
from megatron_hapo.model.parallel_layout import ParallelLayout


def save(model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, folder: Path) -> None:
    """Every rank writes its part; returns when all have."""
    prepare_to_save()
    with writing(folder):
        dist_checkpointing.save(_state(model, optimizer, layout, is_loading=False), str(folder))


def load(model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, folder: Path) -> None:
    """Fill model and optimizer of this rank from a checkpoint of any layout.

    Raises:
        ConfigError: it is damaged, or holds another model.
    """
    read_metadata(folder)  # refuses what must not be loaded
    parts = _parts(optimizer)
    for part in parts:
        if isinstance(part, DistributedOptimizer):  # the others make their states as they are asked what to load
            part._init_optimizer_states_with_dummy_values()
    with loading(folder):
        state: Any = dist_checkpointing.load(_state(model, optimizer, layout, is_loading=True), str(folder))
    set_weights(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for part in parts:
        # Megatron gives all parameters one `step` tensor, and torch's Adam would count it up once for each of them.
        for values in part.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()


def _state(
    model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": layout.dp_cp_group,
    }
    state: dict[str, Any] = {"model": sharded_weights(model, layout, metadata=metadata)}
    with _padding_counted(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state


@contextlib.contextmanager
def _padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let Megatron (0.19.2) keep the padding between the gathered buckets of a distributed optimizer.

    It leaves the padding out where it joins them, and then cuts parameters out at places that count it. With more than
    one bucket it would write states, and master weights, that are shifted: overlapped communication has several, and so
    has a tied embedding with pp > 1, which gets a bucket of its own.
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in getattr(part, "buffers", ())]
    sizes = [(buffer, buffer.numel) for buffer in buffers]
    sizes += [(bucket, bucket.grad_data.numel()) for buffer in buffers for bucket in buffer.buckets]
    kept = [holder.numel_unpadded for holder, _ in sizes]
    for holder, size in sizes:
        holder.numel_unpadded = size
    try:
        yield
    finally:
        for (holder, _), size in zip(sizes, kept, strict=True):
            holder.numel_unpadded = size


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """One for the experts' parameters and one for the others, if there are experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def keep_torch_adam_steps() -> None:
    """Let Megatron's distributed optimizer load into torch's AdamW, which it takes without apex and Transformer Engine.

    It replaces a parameter's state by the loaded tensors and so loses torch's `step`, which FusedAdam does not keep.
    """
    if getattr(DistributedOptimizer, "_megatron_hapo_keeps_steps", False):
        return
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        current = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        original(self, model_param, {**current, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states  # type: ignore[method-assign]
    DistributedOptimizer._megatron_hapo_keeps_steps = True  # type: ignore[attr-defined]
