"""Weights between Hugging Face folders and a rank's model: a rank reads only its slices, and writes whole tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_hapo.checkpoint.folder import INDEX
from megatron_hapo.errors import ConfigError
from megatron_hapo.model.build import first_layer
from megatron_hapo.model.families import Placement, Shape, hf_tensor_shapes, placement
from megatron_hapo.parallel import ParallelLayout

SHARD_BYTES = 4 << 30


class HfReader:
    """Tensors of a safetensors folder, read slice by slice."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            self._files = dict(json.loads(index.read_text())["weight_map"])
        else:
            path = folder / "model.safetensors"
            if not path.is_file():
                raise ConfigError([f"model.path: neither {INDEX} nor model.safetensors in {folder}"])
            self._files = dict.fromkeys(self._open(path.name).keys(), path.name)

    def _open(self, name: str):
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, FileNotFoundError) as error:
            raise ConfigError([f"model.path: cannot read {self.folder / name}: {error}"]) from error

    def read(self, place: Placement, expected: dict[str, tuple[int, ...]]) -> Tensor:
        """The tensor of these runs, as it stands in the folder (dtype included)."""
        parts = []
        for run in place.runs:
            if run.tensor not in self._files:
                raise ConfigError([f"model.path: {self.folder} has no tensor {run.tensor}"])
            with self._open(self._files[run.tensor]) as file:
                view = file.get_slice(run.tensor)
                if tuple(view.get_shape()) != expected[run.tensor]:
                    found = tuple(view.get_shape())
                    raise ConfigError(
                        [f"model.path: {run.tensor} has shape {found}, config.json says {expected[run.tensor]}"]
                    )
                match place.axis:
                    case None:
                        parts.append(view[:])
                    case 0:
                        parts.append(view[run.start : run.stop])
                    case _:
                        parts.append(view[:, run.start : run.stop])
        return parts[0] if len(parts) == 1 else torch.cat(parts, place.axis or 0)


def load_hf_weights(model: GPTModel, shape: Shape, layout: ParallelLayout, folder: Path) -> None:
    """Fill this rank's parameters; vocabulary padding becomes zero. Every rank calls it on its own."""
    reader, expected = HfReader(folder), hf_tensor_shapes(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = _place(name, model, shape, layout, layout.tp_rank)
            value = reader.read(place, expected)
            if value.shape != parameter.shape:
                parameter.zero_()
            parameter[tuple(slice(size) for size in value.shape)].copy_(value)


def hf_tensors(model: GPTModel, shape: Shape, layout: ParallelLayout) -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors of this pipeline stage, one at a time, on every tensor-parallel rank of it.

    The ranks of a tp group iterate in lockstep (one all-gather a parameter). A tied output head is not repeated.
    """
    sizes = hf_tensor_shapes(shape)
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight" and shape.tied_embeddings:
            continue
        shards = _all_shards(parameter.detach(), layout, sharded=_place(name, model, shape, layout, 0).axis is not None)
        wholes: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            place = _place(name, model, shape, layout, rank)
            if place.axis is None:
                yield place.runs[0].tensor, shard
                break
            offset = 0
            for run in place.runs:
                whole = wholes.setdefault(run.tensor, parameter.new_empty(sizes[run.tensor]))
                length = run.stop - run.start
                whole.narrow(place.axis, run.start, length).copy_(shard.narrow(place.axis, offset, length))
                offset += length
        yield from wholes.items()


def _all_shards(local: Tensor, layout: ParallelLayout, *, sharded: bool) -> list[Tensor]:
    if not sharded or layout.tp_size == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
    dist.all_gather(shards, local.contiguous(), group=layout.tp_group)
    return shards


def _place(name: str, model: GPTModel, shape: Shape, layout: ParallelLayout, tp_rank: int) -> Placement:
    return placement(name, shape, first_layer=first_layer(model), tp_rank=tp_rank, tp_size=layout.tp_size)


def write_stage(model: GPTModel, shape: Shape, layout: ParallelLayout, folder: Path) -> dict[str, str] | None:
    """Write this stage's tensors into safetensors files of the folder.

    The ranks of data-parallel rank 0 call it; others return at once.

    Returns:
        Tensor name to file name, on tensor-parallel rank 0; None elsewhere.
    """
    if not layout.is_first_replica:
        return None
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{layout.pp_rank:05d}-{len(set(weight_map.values())):05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for name, tensor in hf_tensors(model, shape, layout):
        if layout.tp_rank:
            continue
        pending[name] = tensor.cpu().contiguous()
        if sum(value.nbytes for value in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    return weight_map if layout.tp_rank == 0 else None
