"""The number of parameters on each rank of a layout, computed from a model's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from megatron_hapo.config.parallel_sizes import ParallelSizes
from megatron_hapo.model.families import MoeShape, Shape, padded_vocab_size

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the trainer is laid out over its GPUs, and how many tokens one of them works on at a time."""

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    cpu_offload: bool = False
    """Whether the optimizer's state is in host memory."""
    recompute: Recompute = "none"
    output_head: Literal["logits", "fused"] = "logits"
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
    sizes = layout.sizes
    dense = expert = 0
    for layer in stage_layers(shape, layout, stage):
        dense += _attention(shape, sizes.tp) + 2 * shape.hidden_size
        moe = experts(shape, layer)
        if moe is None:
            dense += 3 * shape.hidden_size * shape.ffn_size // sizes.tp
        else:
            dense += shape.hidden_size * moe.num_experts  # the router
            expert += moe.num_experts // sizes.ep * 3 * shape.hidden_size * moe.ffn_size // sizes.etp
    vocabulary = padded_vocab_size(shape.vocab_size, sizes.tp) // sizes.tp * shape.hidden_size
    first, last = stage == 0, stage == sizes.pp - 1
    if first:
        dense += vocabulary
    if last:
        dense += shape.hidden_size
        if not (shape.tied_embeddings and first):
            dense += vocabulary
    return Parameters(dense, expert)


def stage_layers(shape: Shape, layout: Layout, stage: int) -> Sequence[int]:
    """The layers of a pipeline stage, in order."""
    return [layer for chunk in layout.sizes.chunks(shape.num_layers, stage) for layer in chunk]


@lru_cache(maxsize=64)
def model_parameters(shape: Shape) -> int:
    """Number of parameters of the whole model, without padding and copies."""
    return stage_parameters(shape, Layout(), 0).total


def experts(shape: Shape, layer: int) -> MoeShape | None:
    """The experts of a layer, or None if it has a dense feed-forward block."""
    return None if shape.moe is None or layer in shape.moe.dense_layers else shape.moe


def active_parameters(shape: Shape, layer: int) -> int:
    """Parameters of one layer that take part in matrix products for one token."""
    return _attention(shape, 1) + feed_forward_parameters(shape, layer)


def feed_forward_parameters(shape: Shape, layer: int) -> int:
    """The part of `active_parameters` in the feed-forward block, or in the router and the selected experts."""
    moe = experts(shape, layer)
    if moe is None:
        return 3 * shape.hidden_size * shape.ffn_size
    return shape.hidden_size * (moe.num_experts + 3 * moe.top_k * moe.ffn_size)


def _attention(shape: Shape, tp: int) -> int:
    """Parameters of a layer's attention on one tensor-parallel rank, without its input norm."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    number = (2 * queries + 2 * keys) * shape.hidden_size // tp
    if shape.qkv_bias:
        number += (queries + 2 * keys) // tp
    if shape.qk_norm:
        number += 2 * shape.head_dim
    return number
