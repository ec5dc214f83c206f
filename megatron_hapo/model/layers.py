"""What a layer consists of: Megatron's layer specs, and our own layers for the `local` spec.

That spec needs no Transformer Engine: RMSNorm, and packed attention on torch SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_hapo.algorithm.microbatches import zigzag
from megatron_hapo.model.families import Shape


def block_spec(config: TransformerConfig, shape: Shape, *, te: bool, chunk: int) -> Any:
    """Megatron's specs of the layers of a model chunk; `te`: with Transformer Engine's layers."""
    first, number = get_transformer_layer_offset(config, chunk), get_num_layers_to_build(config, chunk)
    layer_spec = _te_layer_spec if te else _local_layer_spec
    layers = [layer_spec(config, experts=shape.has_experts(layer)) for layer in range(first, first + number)]
    if te:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _te_layer_spec(config: TransformerConfig, *, experts: bool) -> Any:
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=experts,
        qk_layernorm=config.qk_layernorm,
    )


def _local_layer_spec(config: TransformerConfig, *, experts: bool) -> Any:
    layer: Any = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if experts:  # as in Transformer Engine's spec, where an expert's first linear layer has no fused norm
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


class RMSNorm(torch.nn.Module):
    """RMSNorm that supports sequence parallelism (Megatron's own torch norm does not)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of marked parameters over the tp ranks, each of which saw a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The normalised and scaled input, same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding of every token of a packed micro-batch by its position, in one operation.

    Megatron (0.19.2) rotates packed sequences one at a time in every layer, with a copy of their lengths to the host.
    The values are the same.
    """

    def get_rotary_seq_len(  # type: ignore[override]
        self, _context: Any, _block: Any, _input: Any, _config: Any, packed_seq_params: PackedBatchParams
    ) -> PackedBatchParams:
        """The argument of `forward`: Megatron asks for a length here, and passes the answer on."""
        return packed_seq_params

    def forward(self, packed: PackedBatchParams, **_: Any) -> Tensor:  # type: ignore[override]
        """Angles of this rank's tokens. [t, 1, 1, head size]"""
        return self.get_emb(packed.max_seqlen_q)[packed.positions]


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention over packed sequences (thd), with one SDPA call per group of similar lengths.

    With context parallelism, a rank has the queries of its slice and gathers the keys and values of all slices.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ):
        super().__init__()
        assert config.attention_dropout == 0, "attention dropout is not supported"
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> Tensor:
        """The attention output, [t, 1, heads * d]. All ranks of the context-parallel group call it together.

        Args:
            query: [t, 1, heads, d], this rank's slice of the packed tokens.
            key, value: [t, 1, kv_heads, d].
        """
        assert attention_mask is None, "packed sequences define their own mask"
        assert isinstance(packed_seq_params, PackedBatchParams)
        params, query, key, value = packed_seq_params, query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.cp_group is not None:
            key, value = (self._gather(x, params) for x in (key, value))
        queries = params.query_layout.spread(query)
        keys, values = (params.key_layout.spread(x) for x in (key, value))
        attended = [
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
            )
            for q, k, v, mask in zip(queries, keys, values, params.masks, strict=True)
        ]
        return params.query_layout.collect(attended).flatten(1)[:, None]

    def _gather(self, x: Tensor, params: PackedBatchParams) -> Tensor:
        """The slices of all ranks in sequence order; the backward pass sums and scatters the gradients."""
        return gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[params.gathered_order]


@dataclass(frozen=True)
class PaddedLayout:
    """Packed tokens as a few padded rectangles, each of sequences of similar lengths."""

    shapes: list[tuple[int, int]]
    """(sequences, longest) of each rectangle."""
    place: Tensor
    """[t] int64, place of each packed token among the elements of all rectangles, laid end to end."""

    def spread(self, x_thd: Tensor) -> list[Tensor]:
        """The rectangles of packed x, zero on padding. [sequences, heads, longest, d] each"""
        flat = _Spread.apply(x_thd, self.place, sum(rows * columns for rows, columns in self.shapes))
        parts = flat.split([rows * columns for rows, columns in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def collect(self, rectangles: list[Tensor]) -> Tensor:
        """The inverse of `spread`: what lies on padding is dropped. [t, heads, d]"""
        flat = [rectangle.transpose(1, 2).flatten(0, 1) for rectangle in rectangles]
        return _Collect.apply(flat[0] if len(flat) == 1 else torch.cat(flat), self.place)


class _Spread(torch.autograd.Function):
    """x to the places `place` of a tensor of zeros. As no two tokens share a place, the gradient is a plain gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """The values at the places `place`. Torch's own gradient would add row by row, for places that occur twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, place, grad), None


class PackedBatchParams(PackedSeqParams):
    """Boundaries of packed sequences, and the same sequences as a few padded rectangles, made once per micro-batch."""

    query_layout: PaddedLayout
    """Of this rank's tokens."""
    key_layout: PaddedLayout
    """Of the tokens of all context-parallel ranks."""
    masks: list[Tensor | None]
    """For each rectangle which keys a query attends to, [sequences, 1, longest, longest key] bool. None is the plain
    causal mask, which suffices where padding comes after each sequence: no real token attends to it."""
    positions: Tensor
    """[t] int64, position of each of this rank's tokens in its sequence."""
    gathered_order: Tensor
    """[t] position in the gathered slices of each token of the packed batch."""
    routes: Tensor | None = None
    """[t, expert layers, top_k], the experts of each of this rank's tokens, -1 where the router chooses; None: it
    always does. See `route_replay`."""


PackedFormat = Literal["thd", "sbhd"]
"""How Megatron's attention sees a packed batch. `thd`: as sequences, which Transformer Engine's fused kernel rotates.
`sbhd`: as one long sequence, whose tokens PackedRotaryEmbedding rotates by their positions."""


def packed_params(
    sequence_lengths: list[int],
    device: torch.device,
    *,
    qkv_format: PackedFormat,
    cp_size: int = 1,
    cp_rank: int = 0,
    routes: Tensor | None = None,
) -> PackedBatchParams:
    """Boundaries of sequences packed end to end; the lengths are those of whole sequences, before cp slices them."""
    lengths = torch.tensor(sequence_lengths)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(lengths.max())
    params = PackedBatchParams(
        qkv_format=qkv_format,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    slices = [torch.from_numpy(zigzag(sequence_lengths, cp_size=cp_size, cp_rank=rank)) for rank in range(cp_size)]
    params.routes = routes
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    params.positions = (torch.arange(len(starts)) - starts)[slices[cp_rank]].to(device)
    params.gathered_order = torch.cat(slices).argsort().to(device)
    groups = _similar(lengths)
    own_lengths = lengths // cp_size
    params.query_layout = _padded_layout(own_lengths, groups, device)
    params.key_layout = params.query_layout if cp_size == 1 else _padded_layout(lengths, groups, device)
    params.masks = [
        None if cp_size == 1 else _mask(lengths, own_lengths, rows, slices[cp_rank]).to(device) for rows in groups
    ]
    return params


def _similar(lengths: Tensor) -> list[Tensor]:
    """Groups of rows by the power of two above the length: padding at most doubles a group, and groups are few."""
    size_class = torch.ceil(torch.log2(lengths.float().clamp_min(1)))
    return [(size_class == size).nonzero().flatten() for size in size_class.unique()]


def _padded_layout(lengths: Tensor, groups: list[Tensor], device: torch.device) -> PaddedLayout:
    """The rectangles of groups of rows, for packed sequences of these lengths."""
    shapes = [(len(rows), int(lengths[rows].max())) for rows in groups]
    before, first = 0, torch.empty(len(lengths), dtype=torch.int64)
    for rows, (sequences, longest) in zip(groups, shapes, strict=True):
        first[rows] = before + torch.arange(sequences) * longest
        before += sequences * longest
    starts = lengths.cumsum(0) - lengths
    place = (first - starts).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
    return PaddedLayout(shapes, place.to(device))


def _mask(lengths: Tensor, own_lengths: Tensor, rows: Tensor, own_positions: Tensor) -> Tensor:
    """Which keys of whole sequences the queries of this rank's slice attend to."""
    queries, _ = _rectangle(own_lengths, rows)
    keys, valid = _rectangle(lengths, rows)
    sees = own_positions[queries][:, :, None] >= keys[:, None, :]
    return (sees & valid[:, None, :])[:, None]


def _rectangle(lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the packed batch of the sequences `rows`, and which are not padding (that points at their start)."""
    starts = (lengths.cumsum(0) - lengths)[rows, None]
    offset = torch.arange(int(lengths[rows].max()))[None]
    valid = offset < lengths[rows, None]
    return (starts + offset).where(valid, starts), valid
