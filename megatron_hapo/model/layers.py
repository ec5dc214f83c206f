"""The layers of the `local` spec, where Transformer Engine is absent: RMSNorm and packed attention on torch SDPA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """RMSNorm that allows sequence parallelism (Megatron's own torch norm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradient of marked parameters over the tp ranks, each of which saw part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention over packed sequences (thd), one SDPA call for all sequences of similar length."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__()
        assert config.attention_dropout == 0, "attention dropout is not supported"
        self.softmax_scale = softmax_scale

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
        """Args: query [t, heads, d]; key, value [t, kv_heads, d]. Returns: [t, heads * d]."""
        assert attention_mask is None, "packed sequences carry their own mask"
        output = torch.empty_like(query)
        assert isinstance(packed_seq_params, PackedBatchParams)
        for index, valid in packed_seq_params.padded_groups:
            # Padding stands behind each sequence, so the causal mask alone hides it from every real token.
            q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            output = output.index_put((index[valid],), attended.transpose(1, 2)[valid])
        return output.flatten(1)


class PackedBatchParams(PackedSeqParams):
    """Packed sequence boundaries, and the same sequences as a few padded rectangles, made once per micro-batch."""

    padded_groups: list[tuple[Tensor, Tensor]]
    """For each group of similar lengths: [sequences, longest] positions in the packed batch, and which are real."""


def packed_params(sequence_lengths: list[int], device: torch.device) -> PackedBatchParams:
    """Boundaries of sequences laid end to end."""
    lengths = torch.tensor(sequence_lengths, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
    longest = int(lengths.max())
    params = PackedBatchParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    params.padded_groups = _padded_groups(lengths, device)
    return params


def _padded_groups(lengths: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Sequences whose lengths share a power of two: padding at most doubles a group, and groups are few."""
    starts = lengths.cumsum(0) - lengths
    groups = []
    size_class = torch.ceil(torch.log2(lengths.float().clamp_min(1)))
    for size in size_class.unique():
        rows = size_class == size
        offset = torch.arange(int(lengths[rows].max()))[None]
        valid = offset < lengths[rows, None]
        index = (starts[rows, None] + offset).where(valid, 0)
        groups.append((index.to(device), valid.to(device)))
    return groups
