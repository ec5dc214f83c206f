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
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        output = torch.empty_like(query)
        if self.cp_group is not None:
            key, value = (self._gather(x, packed_seq_params) for x in (key, value))
        for group in packed_seq_params.padded_groups:
            q = query[group.index].transpose(1, 2)
            k, v = (x[group.key_index].transpose(1, 2) for x in (key, value))
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=group.mask, is_causal=group.mask is None, scale=self.softmax_scale, enable_gqa=True
            )
            output = output.index_put((group.index[group.valid],), attended.transpose(1, 2)[group.valid])
        return output.flatten(1)[:, None]

    def _gather(self, x: Tensor, params: PackedBatchParams) -> Tensor:
        """The slices of all ranks in sequence order; the backward pass sums and scatters the gradients."""
        return gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[params.gathered_order]


@dataclass(frozen=True)
class PaddedGroup:
    """Sequences of similar lengths, as a padded rectangle."""

    index: Tensor
    """[sequences, longest] positions of the queries in this rank's slice; padding points at its sequence's first."""
    valid: Tensor
    """[sequences, longest] bool: False on padding."""
    key_index: Tensor
    """[sequences, longest key] positions of the keys in the packed batch."""
    mask: Tensor | None
    """[sequences, 1, longest, longest key] bool: which keys a query attends to. None is the plain causal mask, which
    suffices where padding comes after each sequence: no real token attends to it."""


class PackedBatchParams(PackedSeqParams):
    """Boundaries of packed sequences, and the same sequences as a few padded rectangles, made once per micro-batch."""

    padded_groups: list[PaddedGroup]
    positions: Tensor
    """[t] int64, position of each of this rank's tokens in its sequence."""
    gathered_order: Tensor
    """[t] position in the gathered slices of each token of the packed batch."""


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
) -> PackedBatchParams:
    """Boundaries of sequences packed end to end; the lengths are those of whole sequences, before cp slices them."""
    lengths = torch.tensor(sequence_lengths, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
    longest = int(lengths.max())
    params = PackedBatchParams(
        qkv_format=qkv_format,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    slices = [torch.from_numpy(zigzag(sequence_lengths, cp_size=cp_size, cp_rank=rank)) for rank in range(cp_size)]
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    params.positions = (torch.arange(len(starts)) - starts)[slices[cp_rank]].to(device)
    params.gathered_order = torch.cat(slices).argsort().to(device)
    params.padded_groups = [
        _padded_group(lengths.long(), rows, slices[cp_rank] if cp_size > 1 else None, cp_size, device)
        for rows in _similar(lengths)
    ]
    return params


def _similar(lengths: Tensor) -> list[Tensor]:
    """Groups by the power of two above the length, as bool masks: padding at most doubles a group; groups are few."""
    size_class = torch.ceil(torch.log2(lengths.float().clamp_min(1)))
    return [size_class == size for size in size_class.unique()]


def _padded_group(
    lengths: Tensor, rows: Tensor, slice_positions: Tensor | None, cp_size: int, device: torch.device
) -> PaddedGroup:
    index, valid = _rectangle(lengths, rows)
    if slice_positions is None:
        index, valid = index.to(device), valid.to(device)
        return PaddedGroup(index, valid, index, None)
    query_index, query_valid = _rectangle(lengths // cp_size, rows)
    sees = slice_positions[query_index][:, :, None] >= index[:, None, :]
    mask = (sees & valid[:, None, :])[:, None]
    return PaddedGroup(*(x.to(device) for x in (query_index, query_valid, index, mask)))


def _rectangle(lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the packed batch of the sequences `rows`, and which are not padding (that points at their start)."""
    starts = (lengths.cumsum(0) - lengths)[rows, None]
    offset = torch.arange(int(lengths[rows].max()))[None]
    valid = offset < lengths[rows, None]
    return (starts + offset).where(valid, starts), valid
