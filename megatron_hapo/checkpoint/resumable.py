"""Resumable checkpoints: model and optimizer in Megatron's torch_dist format, loadable at any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_hapo.checkpoint.checkpoint_errors import explain_load_errors, explain_write_errors
from megatron_hapo.checkpoint.manifest import hash_files
from megatron_hapo.checkpoint.torch_dist_metadata import read_metadata
from megatron_hapo.checkpoint.weights import load_weights, prepare_to_save, save_weights, set_weights, sharded_weights
from megatron_hapo.model.families import Shape
from megatron_hapo.model.parallel_layout import ParallelLayout

REFERENCE = "reference"
"""The folder of a replaced reference model inside a checkpoint: weights alone, in the same format."""


def save(
    model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, folder: Path
) -> dict[str, str]:
    """Write a checkpoint, every rank its shard; returns when all ranks have. All ranks call it together.

    Returns:
        The files that this rank has written, which are on the disk, and their hashes for the manifest.
    """
    prepare_to_save()
    with explain_write_errors(folder):
        dist_checkpointing.save(_state(model, optimizer, layout, is_loading=False), str(folder))
        return hash_files(folder, [path.name for path in folder.glob(f"__{dist.get_rank()}_*.distcp")])


def load(model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, folder: Path) -> None:
    """Fill this rank's model and optimizer from a checkpoint of any layout. All ranks call it together.

    Raises:
        ConfigError: the checkpoint is damaged, or holds another model.
    """
    read_metadata(folder)  # rejects what must not be unpickled
    optimizers = chained_optimizers(optimizer)
    for part in optimizers:
        if isinstance(part, DistributedOptimizer):  # the others create their state in sharded_state_dict
            part._init_optimizer_states_with_dummy_values()
    with explain_load_errors(folder):
        state: Any = dist_checkpointing.load(_state(model, optimizer, layout, is_loading=True), str(folder))
    set_weights(model, state["model"])
    settings = [_settings_of(group) for part in optimizers for group in part.param_groups]
    _adopt_rates(state["optimizer"], settings[0])
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip((group for part in optimizers for group in part.param_groups), settings, strict=True):
        group.update(own)  # weight decay, betas and so on are the run's, not the checkpoint's
    for part in optimizers:
        # Megatron lets all parameters share one `step` tensor, which torch's Adam would increment once for each.
        for values in part.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()


def save_reference(model: Sequence[GPTModel], layout: ParallelLayout, folder: Path) -> dict[str, str]:
    """Write the reference model's weights, which are the model's at this moment, into a checkpoint. All ranks call it.

    Returns:
        The files that this rank has written, and their hashes.
    """
    target = folder / REFERENCE
    target.mkdir(exist_ok=True)
    save_weights(model, layout, target)
    with explain_write_errors(folder):
        written = [path.relative_to(folder).as_posix() for path in target.glob(f"__{dist.get_rank()}_*.distcp")]
        return hash_files(folder, written)


def has_reference(folder: Path) -> bool:
    """Whether a checkpoint holds a reference model; else it is the model that the run started from."""
    return (folder / REFERENCE).is_dir()


def load_reference(model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout, folder: Path) -> None:
    """Fill the model with the reference's weights from a checkpoint of any layout. All ranks call it together."""
    load_weights(model, shape, layout, folder / REFERENCE)


def _adopt_rates(saved: Any, own: Mapping[str, Any]) -> None:
    """Give the saved parameter groups this run's peak rates: Megatron (0.19) recognizes a group by them, among others.

    All groups have the same ones, so that groups remain distinct by what else tells them apart.
    """
    if not isinstance(saved, dict):
        return
    for name, value in saved.items():
        if name == "param_groups":
            for group in value:
                group.update({rate: own[rate] for rate in ("max_lr", "min_lr") if rate in own and rate in group})
        else:
            _adopt_rates(value, own)


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, without what training changes."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _state(
    model: Sequence[GPTModel], optimizer: MegatronOptimizer, layout: ParallelLayout, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": layout.dp_cp_group,
    }
    state: dict[str, Any] = {"model": sharded_weights(model, layout, metadata=metadata)}
    with _keep_bucket_padding(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state


@contextlib.contextmanager
def _keep_bucket_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Makes Megatron (0.19.2) keep the padding between the gathered buckets of a distributed optimizer.

    Megatron joins the buckets without padding, but then cuts parameters out at offsets that include it. With more than
    one bucket it would write shifted optimizer states and master weights. Overlapped communication uses several
    buckets, and a tied embedding with pp > 1 gets its own.
    """
    buffers = [buffer for part in chained_optimizers(optimizer) for buffer in getattr(part, "buffers", ())]
    sizes = [(buffer, buffer.numel) for buffer in buffers]
    sizes += [(bucket, bucket.grad_data.numel()) for buffer in buffers for bucket in buffer.buckets]
    original = [holder.numel_unpadded for holder, _ in sizes]
    for holder, size in sizes:
        holder.numel_unpadded = size
    try:
        yield
    finally:
        for (holder, _), size in zip(sizes, original, strict=True):
            holder.numel_unpadded = size


def chained_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers behind this one: with experts there is one for their parameters and one for the others."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def keep_torch_adam_steps() -> None:
    """Patch Megatron's distributed optimizer to load into torch's AdamW, its fallback without apex and TE.

    It replaces a parameter's state by the loaded tensors and so drops torch's `step`, which FusedAdam does not have.
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
