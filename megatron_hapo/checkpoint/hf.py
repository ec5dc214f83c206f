"""Weights between Hugging Face folders and a rank's model: a rank reads only its slices, and writes whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from megatron_hapo.checkpoint.hf_reader import HfReader
from megatron_hapo.checkpoint.writing import writing
from megatron_hapo.model.build import named_parameters
from megatron_hapo.model.families import Placement, Shape, hf_tensor_shapes, is_expert, is_hf_expert, placement
from megatron_hapo.model.parallel_layout import ParallelLayout

SHARD_BYTES = 4 << 30

Progress = Callable[[int], None]
"""Called with the number of bytes that have been moved since the last call."""


def load_hf_weights(
    model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout, folder: Path, *, progress: Progress | None = None
) -> None:
    """Fill this rank's parameters, whose memory is no one else's yet; vocabulary padding becomes zero.

    Every rank calls it on its own.

    Raises:
        ConfigError: the folder does not hold the model that its config.json describes.
    """
    reader = HfReader(folder, shape)
    for name, parameter in named_parameters(model):
        value = reader.read(place_of(name, shape, layout))
        take(parameter, value)
        if progress:
            progress(value.nbytes)


@torch.no_grad()
def take(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Make this the parameter's value, whose own memory was not used yet: without a copy, if all else is equal.

    Where the value is smaller, the rest is zero.
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
    """Whole HF tensors of this pipeline stage, one at a time, on every tensor-parallel rank of it.

    First what is no expert: the ranks of a tp group iterate in lockstep (one all-gather a parameter); a tied output
    head is not repeated. Then the experts that this rank has a part of, in lockstep with its etp group only: the other
    ranks of the tp group have other experts, and may be waiting for somebody to take them. What lies whole and in one
    piece in a parameter of this rank is a view of it.

    Args:
        select: which Megatron parameters; the same answers on the ranks of a tp group, for experts of an etp group.
    """
    sizes = hf_tensor_shapes(shape)
    for name, parameter in sorted(named_parameters(model), key=lambda named: is_expert(named[0])):
        if name == "output_layer.weight" and shape.tied_embeddings:
            continue
        if not select(name):
            continue
        cut = place_of(name, shape, layout).axis is not None
        group = layout.etp_group if is_expert(name) else layout.tp_group
        shards = _all_shards(parameter.detach(), group) if cut else [parameter.detach()]
        wholes: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            place = place_of(name, shape, layout, shard=rank)
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


def spoken_tensors(model: Sequence[GPTModel], shape: Shape, layout: ParallelLayout) -> Iterator[tuple[str, Tensor]]:
    """hf_tensors that this rank is to write or send, so that each tensor of the model comes from one rank.

    Of its tensor- and data-parallel copies the first rank speaks; for an expert the first rank that holds a part of it.
    """

    def spoken(name: str) -> bool:
        return layout.expert_dp_rank == 0 if is_expert(name) else layout.is_first_replica

    for name, tensor in hf_tensors(model, shape, layout, select=spoken):
        if (layout.etp_rank if is_hf_expert(name) else layout.tp_rank) == 0:
            yield name, tensor


def _all_shards(local: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def place_of(name: str, shape: Shape, layout: ParallelLayout, *, shard: int | None = None) -> Placement:
    """Where a parameter of this rank lies; `name` as of `named_parameters`.

    Args:
        shard: instead of this rank's the part of this rank of its tp group, of an expert of its etp group.
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


def write_stage(
    model: Sequence[GPTModel],
    shape: Shape,
    layout: ParallelLayout,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, str] | None:
    """Write this rank's part of its pipeline stage into safetensors files of the folder; all ranks call it.

    Args:
        dtype: to write in; None keeps that of the parameters.
    Returns:
        Tensor name to file name, on the ranks that wrote something; None elsewhere.
    """
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        number = len(set(weight_map.values()))
        name = f"model-{dist.get_rank():05d}-{number:05d}.safetensors"
        with writing(folder):
            save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        if progress:
            progress(sum(value.nbytes for value in pending.values()))
        pending.clear()

    for name, tensor in spoken_tensors(model, shape, layout):
        pending[name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        if sum(value.nbytes for value in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    return weight_map or None
