"""The number of parameters on each rank of a layout, computed from a model's sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from megatron_hapo.config import ParallelSizes
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
    """How the trainer is laid out over its GPUs, and how many tokens one of them works on at a time."""

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    cpu_offload: bool = False
    """Whether the optimizer's state is in host memory."""
    has_reference: bool = False
    """Whether a reference model's weights wait in host memory, for one more forward pass a step."""
    recompute: Recompute = "none"
    output_head: Literal["logits", "fused"] = "logits"
    float32_logits: bool = False
    tokens_per_microbatch: int = 16384
    """Tokens of one data-parallel rank, before context parallelism splits them."""
    bytes_per_parameter: int = 2
    """Bytes of a weight or an activation: 2 for bfloat16 (with float32 master weights), 4 for float32."""

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return -(-self.tokens_per_microbatch // self.sizes.cp)

    @property
    def expert_replicas(self) -> int:
        """Number of ranks that hold the same shards of the same experts."""
        return self.sizes.stage_size // (self.sizes.etp * self.sizes.ep)

    @property
    def sequence_shards(self) -> int:
        """Number of ranks over which norms and residuals are sharded."""
        return self.sizes.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank. Dense and expert parameters have different numbers of replicas."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Dense and expert parameters together."""
        return self.dense + self.expert


@lru_cache(maxsize=1024)
def stage_parameters(shape: Shape, layout: Layout, stage: int) -> Parameters:
    """Parameters on a rank of a pipeline stage, as Megatron allocates them.

    With tied embeddings the last stage holds a copy of the embedding, unless it is also the first stage.
    """
    sizes, layers = layout.sizes, stage_layers(shape, layout, stage)
    of_layers, before_layers, after_layers = _dense_elements(shape, sizes.tp)
    of_experts = _expert_elements(shape, sizes.ep, sizes.etp)
    dense = sum(of_layers[layer] for layer in layers)
    first, last = stage == 0, stage == sizes.pp - 1
    if first:
        dense += before_layers
    if last:
        dense += after_layers
        if shape.tied_embeddings and not first:
            dense += before_layers
    return Parameters(dense, sum(of_experts[layer] for layer in layers))


@lru_cache(maxsize=64)
def _dense_elements(shape: Shape, tp: int) -> tuple[tuple[int, ...], int, int]:
    """Elements on one tp rank: of each layer without its experts, before the layers, and after them."""
    of_layers = (_num_elements(layer_parameters(shape, layer), tp) for layer in range(shape.num_layers))
    return tuple(of_layers), _num_elements(first_parameters(shape), tp), _num_elements(last_parameters(shape), tp)


@lru_cache(maxsize=256)
def _expert_elements(shape: Shape, ep: int, etp: int) -> tuple[int, ...]:
    """Elements of each layer's experts on one rank."""

    def of_layer(layer: int) -> int:
        if (moe := experts(shape, layer)) is None:
            return 0
        one = expert_parameters(shape, layer, expert=0, local_expert=0)
        return moe.num_experts // ep * _num_elements(one, etp)

    return tuple(of_layer(layer) for layer in range(shape.num_layers))


def stage_layers(shape: Shape, layout: Layout, stage: int) -> Sequence[int]:
    """The layers of a pipeline stage, in order."""
    return [layer for chunk in layout.sizes.chunks(shape.num_layers, stage) for layer in chunk]


@lru_cache(maxsize=64)
def model_parameters(shape: Shape) -> int:
    """Number of parameters of the whole model, without padding and copies."""
    return stage_parameters(shape, Layout(), 0).total


@dataclass(frozen=True)
class LinearWeights:
    """The weights of a model that engines can hold in float8, with one scale a row."""

    elements: int
    largest: int
    """Elements of the largest matrix as an engine stacks it: gate and up, those of all experts of a layer together."""
    cut_rows: int
    """Rows of matrices that tensor parallelism cuts by rows."""
    whole_rows: int
    """Rows of matrices that it cuts by columns: every rank has all of them."""


@lru_cache(maxsize=64)
def linear_weights(shape: Shape) -> LinearWeights:
    """The linear weights of attention, feed-forward blocks and experts."""
    stacks: list[tuple[TableParameter, int]] = []
    for layer in range(shape.num_layers):
        stacks += [(parameter, 1) for parameter in layer_parameters(shape, layer) if parameter.is_linear]
        if (moe := experts(shape, layer)) is not None:
            one = expert_parameters(shape, layer, expert=0, local_expert=0)
            stacks += [(parameter, moe.num_experts) for parameter in one]
    rows = {True: 0, False: 0}
    for parameter, count in stacks:
        rows[parameter.cut == "columns"] += count * sum(size[0] for size in parameter.tensors.values())
    elements = [count * parameter.num_elements for parameter, count in stacks]
    return LinearWeights(sum(elements), max(elements), cut_rows=rows[False], whole_rows=rows[True])


def experts(shape: Shape, layer: int) -> MoeShape | None:
    """The experts of a layer, or None if it has a dense feed-forward block."""
    return None if shape.moe is None or layer in shape.moe.dense_layers else shape.moe


def layer_kinds(shape: Shape, layers: Sequence[int]) -> list[tuple[int, int]]:
    """A layer of each kind among these, with experts or a dense block, and how many of its kind there are."""
    if shape.moe is None or not shape.moe.dense_layers:
        return [(layers[0], len(layers))]
    kinds: dict[bool, list[int]] = {}
    for layer in layers:
        kinds.setdefault(layer in shape.moe.dense_layers, []).append(layer)
    return [(alike[0], len(alike)) for alike in kinds.values()]


@lru_cache(maxsize=1024)
def active_parameters(shape: Shape, layer: int) -> int:
    """Parameters of one layer that one token meets in a matrix multiplication."""
    attention = [p for p in layer_parameters(shape, layer) if ".self_attention." in p.local_name]
    return _num_elements(attention) + feed_forward_parameters(shape, layer)


@lru_cache(maxsize=1024)
def feed_forward_parameters(shape: Shape, layer: int) -> int:
    """The part of `active_parameters` in the feed-forward block, or in the router and the selected experts."""
    moe = experts(shape, layer)
    one = expert_parameters(shape, layer, expert=0, local_expert=0)
    block = [p for p in layer_parameters(shape, layer) if ".mlp." in p.local_name]
    return _num_elements(block) + (0 if moe is None else moe.top_k * _num_elements(one))


def _num_elements(parameters: Iterable[TableParameter], num_ranks: int = 1) -> int:
    """Elements on one of the ranks that cut these parameters."""
    return sum(parameter.num_local_elements(num_ranks) for parameter in parameters)
