"""Moves weights between Hugging Face folders and a rank's model: reads only the rank's slices, writes whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from megatron_hapo.checkpoint.checkpoint_errors import explain_write_errors
from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.plausible import check_plausible
from megatron_hapo.checkpoint.progress import Progress
from megatron_hapo.model.build import named_parameters
from megatron_hapo.model.families import Placement, Shape, hf_tensor_shapes, is_expert, is_hf_expert, placement
from megatron_hapo.model.parallel_layout import ParallelLayout

MAX_FILE_BYTES = 4 << 30
"""A safetensors file is closed when it has reached this size."""


def load_hf_weights(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    folder: Path,
    *,
    progress: Progress | None = None,
    check_values: bool = True,
) -> None:
    """Fill this rank's parameters, which must not share memory with anything yet; vocabulary padding becomes zero.

    Not a collective: every rank calls it independently.

    Args:
        check_values: whether the weights must be finite and plausible.
    Raises:
        ConfigError: the folder does not hold the model that its config.json describes, or holds damaged weights.
    """
    reader = HfReader(folder, shape)
    for name, parameter in named_parameters(model):
        place = local_placement(name, shape, layout)
        value = reader.read(place)
        if check_values:
            check_plausible(value, " and ".join(f"{reader.path_of(run.tensor)}: {run.tensor}" for run in place.runs))
        assign(parameter, value)
        if progress:
            progress(value.nbytes)


@torch.no_grad()
def assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Set the value of a parameter that shares its memory with nothing yet: without a copy if shape and dtype agree.

    If the value is smaller, the rest of the parameter becomes zero.
    """
    like = (parameter.shape, parameter.dtype, parameter.device)
    if value.is_contiguous() and (value.shape, value.dtype, value.device) == like:
        parameter.data = value
        return
    if value.shape != parameter.shape:
        parameter.zero_()
    parameter[tuple(slice(size) for size in value.shape)].copy_(value)


def hf_tensors(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    *,
    select: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors of this pipeline stage, one at a time, on each of its tensor-parallel ranks.

    All but the experts come first: the ranks of a tp group iterate in lockstep (one all-gather per parameter); a tied
    output head is not repeated. Then come the experts that this rank holds a shard of, in lockstep with its etp group
    only: the other ranks of the tp group hold other experts, and may be waiting for their consumer. A tensor that is
    contiguous in a parameter of this rank is a view of it.

    Args:
        select: which Megatron parameters to include; must agree within a tp group, for experts within an etp group.
    """
    sizes = hf_tensor_shapes(shape)
    for name, parameter in sorted(named_parameters(model), key=lambda named: is_expert(named[0])):
        if name == "output_layer.weight" and shape.tied_embeddings:
            continue
        if not select(name):
            continue
        cut = local_placement(name, shape, layout).axis is not None
        group = layout.etp_group if is_expert(name) else layout.tp_group
        shards = _all_shards(parameter.detach(), group) if cut else [parameter.detach()]
        wholes: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            place = local_placement(name, shape, layout, shard=rank)
            if place.axis is None:
                yield place.runs[0].tensor, shard
                break
            offset = 0
            for run in place.runs:
                length = run.stop - run.start
                part = shard.narrow(place.axis, offset, length)
                offset += length
                if part.shape == sizes[run.tensor]:
                    wholes[run.tensor] = part
                    continue
                if run.tensor not in wholes:
                    wholes[run.tensor] = parameter.new_empty(sizes[run.tensor])
                wholes[run.tensor].narrow(place.axis, run.start, length).copy_(part)
        yield from wholes.items()


def owned_tensors(model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout) -> Iterator[tuple[str, Tensor]]:
    """The hf_tensors that this rank owns, that is writes or sends: each tensor of the model has exactly one owner.

    The owner is the first of its tensor- and data-parallel ranks, for an expert the first rank with a shard of it.
    Collective, as `hf_tensors` is.
    """

    def in_owning_replica(name: str) -> bool:
        return layout.expert_dp_rank == 0 if is_expert(name) else layout.is_first_replica

    for name, tensor in hf_tensors(model, shape, layout, select=in_owning_replica):
        if (layout.etp_rank if is_hf_expert(name) else layout.tp_rank) == 0:
            yield name, tensor


def _all_shards(local: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def local_placement(name: str, shape: Shape, layout: ParallelLayout, *, shard: int | None = None) -> Placement:
    """`families.placement` of a parameter of this rank; `name` as `named_parameters` gives it.

    Args:
        shard: a rank of the tp group (for an expert: of the etp group) whose shard is meant instead of this rank's.
    """
    return placement(
        name,
        shape,
        first_layer=0,
        tp_rank=layout.tp_rank if shard is None else shard,
        tp_size=layout.sizes.tp,
        ep_rank=layout.ep_rank,
        ep_size=layout.sizes.ep,
        etp_rank=layout.etp_rank if shard is None else shard,
        etp_size=layout.sizes.etp,
    )


def write_hf_shards(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, str] | None:
    """Write the tensors that this rank owns into safetensors files of the folder. All ranks call it together.

    Args:
        dtype: of the written tensors; None keeps that of the parameters.
    Returns:
        Tensor name to file name on ranks that own any, None elsewhere.
    """
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        number = len(set(weight_map.values()))
        name = f"model-{dist.get_rank():05d}-{number:05d}.safetensors"
        with explain_write_errors(folder):
            save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        if progress:
            progress(sum(value.nbytes for value in pending.values()))
        pending.clear()

    for name, tensor in owned_tensors(model, shape, layout):
        pending[name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        if sum(value.nbytes for value in pending.values()) >= MAX_FILE_BYTES:
            flush()
    if pending:
        flush()
    return weight_map or None
