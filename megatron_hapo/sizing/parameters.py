"""How many parameters a rank of a layout holds, counted from a model's sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_hapo.config.pipeline import Pipeline
from megatron_hapo.model.families import (
    MoeShape,
    Shape,
    TableParameter,
    expert_parameters,
    first_parameters,
    last_parameters,
    layer_parameters,
)

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the trainer is laid out over its GPUs, and how much one of them works on at a time."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Chunks of a pipeline stage."""
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    cp: int = 1
    ep: int = 1
    """Experts are dealt out over so many groups of the tp x cp x dp ranks of a stage."""
    etp: int = 1
    """Each expert is cut over so many ranks of a tp group."""
    dp: int = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    cpu_offload: bool = False
    """Of the optimizer's state, to host memory."""
    recompute: Recompute = "none"
    output_head: Literal["logits", "fused"] = "logits"
    tokens_per_microbatch: int = 16384
    """Of one data-parallel rank, before context parallelism cuts it."""
    bytes_per_parameter: int = 2
    """Of weights and activations: 2 for bfloat16 (with float32 master weights), 4 for float32."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline.of(self)

    @property
    def tokens_per_rank(self) -> int:
        return -(-self.tokens_per_microbatch // self.cp)

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same parts of the same experts."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @property
    def sequence_shards(self) -> int:
        """Over how many ranks norms and residuals are cut."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank; dense and expert ones have replicas on different numbers of ranks."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


@lru_cache(maxsize=1024)
def stage_parameters(shape: Shape, layout: Layout, stage: int) -> Parameters:
    """Parameters of a rank of a pipeline stage, as Megatron allocates them.

    With tied embeddings the last stage holds a copy of the embedding, if it is not the first stage too.
    """
    dense = expert = 0
    for layer in stage_layers(shape, layout, stage):
        dense += _num_elements(layer_parameters(shape, layer), layout.tp)
        if (moe := experts(shape, layer)) is not None:
            one = expert_parameters(shape, layer, expert=0, local_expert=0)
            expert += moe.num_experts // layout.ep * _num_elements(one, layout.etp)
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        dense += _num_elements(first_parameters(shape), layout.tp)
    if last:
        dense += _num_elements(last_parameters(shape), layout.tp)
        if shape.tied_embeddings and not first:
            dense += _num_elements(first_parameters(shape), layout.tp)
    return Parameters(dense, expert)


def stage_layers(shape: Shape, layout: Layout, stage: int) -> Sequence[int]:
    """The layers of a pipeline stage."""
    return [layer for chunk in layout.pipeline.chunks(shape.num_layers, stage) for layer in chunk]


@lru_cache(maxsize=64)
def model_parameters(shape: Shape) -> int:
    """Of the whole model, without padding and copies."""
    return stage_parameters(shape, Layout(), 0).total


def experts(shape: Shape, layer: int) -> MoeShape | None:
    """The experts of a layer (num_experts, ffn_size, top_k), or None where it has an ordinary feed-forward block."""
    return None if shape.moe is None or layer in shape.moe.dense_layers else shape.moe


@lru_cache(maxsize=1024)
def active_parameters(shape: Shape, layer: int) -> int:
    """Parameters of one layer that one token meets in a matrix multiplication."""
    attention = [p for p in layer_parameters(shape, layer) if ".self_attention." in p.local_name]
    return _num_elements(attention) + feed_forward_parameters(shape, layer)


@lru_cache(maxsize=1024)
def feed_forward_parameters(shape: Shape, layer: int) -> int:
    """Those of them in the feed-forward block, or in the router and the chosen experts."""
    moe = experts(shape, layer)
    one = expert_parameters(shape, layer, expert=0, local_expert=0)
    block = [p for p in layer_parameters(shape, layer) if ".mlp." in p.local_name]
    return _num_elements(block) + (0 if moe is None else moe.top_k * _num_elements(one))


def _num_elements(parameters: Iterable[TableParameter], num_ranks: int = 1) -> int:
    """Elements on one of the ranks that cut these parameters."""
    return sum(parameter.num_local_elements(num_ranks) for parameter in parameters)
