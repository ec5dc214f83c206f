"""Attention and rotary embedding of the `local` spec over packed sequences, and what a micro-batch prepares for them.

All sizes are known on the host, in numpy, before a micro-batch starts; nothing here reads a tensor of the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hapo.algorithm.microbatches import spans, to_device, zigzag
from megatron_hapo.model.token_copies import Copies, collect

PackedFormat = Literal["thd", "varlen", "rectangles"]
"""How a model's attention takes a packed batch. `thd`: as Transformer Engine's sequences, with its own masks and
rotation. The others are PackedAttention's, whose tokens PackedRotaryEmbedding rotates by their positions: `varlen` by
torch's kernel for sequences of different lengths, `rectangles` by SDPA on padded copies."""
VARLEN_MAX_HEAD_DIM = 256
"""Largest head of the kernel behind torch's varlen_attn (Flash Attention); heads are multiples of 8."""


def local_format(device: torch.device, dtype: torch.dtype, head_dim: int) -> PackedFormat:
    """The format of the `local` spec for a model: `varlen` wherever its kernel takes the model."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= VARLEN_MAX_HEAD_DIM
    return "varlen" if device.type == "cuda" and fits else "rectangles"


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
    """Causal grouped-query attention over packed sequences, in the way that the micro-batch was prepared for.

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
        return params.sequences.attend(query, key, value, scale=self.softmax_scale).flatten(1)[:, None]

    def _gather(self, x: Tensor, params: PackedBatchParams) -> Tensor:
        """The slices of all ranks in sequence order; the backward pass sums and scatters the gradients."""
        gathered = gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
        return collect(gathered, params.gathered_order)


class PackedBatchParams(PackedSeqParams):
    """Boundaries of packed sequences. For PackedAttention also what it needs of them, made once per micro-batch."""

    sequences: PackedSequences
    positions: Tensor
    """[t] int64, position of each of this rank's tokens in its sequence."""
    gathered_order: Tensor
    """[t] position in the gathered slices of each token of the packed batch."""
    routes: Tensor | None = None
    """[t, expert layers, top_k], the experts of each of this rank's tokens, -1 where the router chooses; None: it
    always does. See `route_replay`."""


def packed_params(
    sequence_lengths: Sequence[int],
    device: torch.device,
    *,
    packed_format: PackedFormat,
    prefixes: Sequence[int] | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    routes: Tensor | None = None,
) -> PackedBatchParams:
    """Boundaries of sequences packed end to end; the lengths are those of whole sequences, before cp slices them.

    Args:
        prefixes: for each sequence the one that it continues, or -1 (`MicroBatch.prefixes`). Not with context
            parallelism, and not for Transformer Engine, whose rotation starts every sequence at 0.
    """
    lengths = np.asarray(sequence_lengths, dtype=np.int64)
    packing = _Packing(lengths, None if prefixes is None else np.asarray(prefixes), cp_size, cp_rank)
    assert prefixes is None or (cp_size == 1 and packed_format != "thd"), "shared prefixes are not supported here"
    cu_seqlens = _boundaries(lengths, device)
    longest = int(packing.whole_lengths.max())
    params = PackedBatchParams(
        qkv_format="thd" if packed_format == "thd" else "sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    params.routes = routes
    if packed_format == "thd":
        return params
    slices = [packing.slice_of(rank) for rank in range(cp_size)]
    params.positions = to_device(spans(packing.prefix_lengths, lengths)[slices[cp_rank]], device)
    params.gathered_order = to_device(np.argsort(np.concatenate(slices)), device)
    if packed_format == "varlen":
        params.sequences = VarlenSequences.of(packing, device)
    else:
        params.sequences = RectangleSequences.of(packing, params.positions)
    return params


@dataclass(frozen=True)
class _Packing:
    """How a micro-batch is packed."""

    lengths: np.ndarray
    """[sequences] int64, tokens of each sequence in the packed batch; with cp_size > 1 multiples of 2 cp_size."""
    prefixes: np.ndarray | None
    """[sequences], the sequence that each continues, or -1; None: all are -1. A prefix has none itself."""
    cp_size: int
    cp_rank: int

    @property
    def starts(self) -> np.ndarray:
        """Place of each sequence's first token in the packed batch. [sequences]"""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def prefix_lengths(self) -> np.ndarray:
        """Tokens of the sequence that each continues. [sequences]"""
        if self.prefixes is None:
            return np.zeros_like(self.lengths)
        return np.where(self.prefixes >= 0, self.lengths[self.prefixes], 0)

    @property
    def whole_lengths(self) -> np.ndarray:
        """Lengths including the prefixes. [sequences]"""
        return self.prefix_lengths + self.lengths

    @property
    def keys(self) -> np.ndarray:
        """Places in the packed batch of each sequence's tokens after those of its prefix, end to end."""
        if self.prefixes is None:
            return np.arange(int(self.lengths.sum()))
        starts, lengths = self.starts, self.lengths
        return spans(
            np.stack([starts[self.prefixes], starts], 1).ravel(), np.stack([self.prefix_lengths, lengths], 1).ravel()
        )

    def slice_of(self, cp_rank: int) -> np.ndarray:
        """Places in the packed batch of the tokens that a context-parallel rank holds."""
        return zigzag(self.lengths.tolist(), cp_size=self.cp_size, cp_rank=cp_rank)


class PackedSequences(ABC):
    """The sequences of a packed micro-batch as one kind of attention takes them."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """Causal attention within each sequence and to its prefix, [t, heads, d].

        Args:
            query: [t, heads, d], this rank's slice.
            key, value: [tokens, kv_heads, d] of whole sequences, end to end.
        """


# ----- varlen


@dataclass(frozen=True)
class VarlenSequences(PackedSequences):
    """Pieces of contiguous queries, each with the keys from its sequence's start to its own end.

    Without context parallelism the pieces are the sequences. Otherwise a rank has two pieces of each, and the front
    pieces of all sequences come first.
    """

    query_boundaries: Tensor
    """[pieces + 1] int32."""
    key_boundaries: Tensor
    """[pieces + 1] int32."""
    longest_query: int
    longest_key: int
    query_order: Tensor | None
    """[t] int64, place in this rank's slice of each query of the pieces; None if the pieces are the sequences."""
    query_place: Tensor | None
    """[t] int64, the inverse of `query_order`."""
    keys: Copies | None
    """The keys of the pieces among those of the packed batch; None if they are the same."""

    @classmethod
    def of(cls, packing: _Packing, device: torch.device) -> VarlenSequences:
        """Of this context-parallel rank."""
        lengths, cp_size, cp_rank = packing.lengths, packing.cp_size, packing.cp_rank
        if cp_size == 1:
            whole = packing.whole_lengths
            return cls(
                query_boundaries=_boundaries(lengths, device),
                key_boundaries=_boundaries(whole, device),
                longest_query=int(lengths.max()),
                longest_key=int(whole.max()),
                query_order=None,
                query_place=None,
                keys=None if packing.prefixes is None else Copies.of(packing.keys, device),
            )
        chunk = lengths // (2 * cp_size)
        key_lengths = [(cp_rank + 1) * chunk, (2 * cp_size - cp_rank) * chunk]
        first = 2 * (np.cumsum(chunk) - chunk)  # a rank's slice has both pieces of a sequence side by side
        order = np.concatenate([spans(first, chunk), spans(first + chunk, chunk)])
        return cls(
            query_boundaries=_boundaries(np.concatenate([chunk, chunk]), device),
            key_boundaries=_boundaries(np.concatenate(key_lengths), device),
            longest_query=int(chunk.max()),
            longest_key=int(key_lengths[1].max()),
            query_order=to_device(order, device),
            query_place=to_device(np.argsort(order), device),
            keys=Copies.of(np.concatenate([spans(packing.starts, part) for part in key_lengths]), device),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """See `PackedSequences.attend`."""
        if self.query_order is not None:
            query = collect(query, self.query_order)
        if self.keys is not None:
            key, value = self.keys.take(key), self.keys.take(value)
        attended = varlen_attention(
            query,
            key,
            value,
            self.query_boundaries,
            self.key_boundaries,
            longest_query=self.longest_query,
            longest_key=self.longest_key,
            scale=scale,
        )
        return attended if self.query_place is None else collect(attended, self.query_place)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_boundaries: Tensor,
    key_boundaries: Tensor,
    *,
    longest_query: int,
    longest_key: int,
    scale: float | None,
) -> Tensor:
    """Attention of pieces whose last query sees all the piece's keys, the one before it one key less, and so on.

    On a GPU torch's varlen_attn, whose causal mask is aligned to the last key: with a window of (-1, 0) it always uses
    Flash Attention (torch 2.14). Torch has no such kernel for a CPU, which computes one piece after another.

    Args:
        query: [t, heads, d]; key, value: [tokens, kv_heads, d].
        query_boundaries, key_boundaries: [pieces + 1] int32.
    """
    gqa = query.shape[1] != key.shape[1]
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            query,
            key,
            value,
            query_boundaries,
            key_boundaries,
            longest_query,
            longest_key,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=gqa,
        )
        assert isinstance(attended, Tensor)
        return attended
    parts = []
    for queries, keys in zip(pairwise(query_boundaries.tolist()), pairwise(key_boundaries.tolist()), strict=True):
        q, k, v = (x[slice(*ends)].transpose(0, 1) for x, ends in ((query, queries), (key, keys), (value, keys)))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return torch.cat(parts, dim=1).transpose(0, 1)


# ----- rectangles


@dataclass(frozen=True)
class RectangleSequences(PackedSequences):
    """A few padded rectangles, each of sequences of similar lengths, with one SDPA call per rectangle."""

    queries: PaddedRows
    """Of this rank's tokens."""
    keys: PaddedRows
    """Of whole sequences, with their prefixes."""
    masks: list[Tensor | None]
    """For each rectangle which keys a query attends to, [sequences, 1, longest, longest key] bool. None is the plain
    causal mask, which suffices where padding comes after each sequence: no real token attends to it."""

    @classmethod
    def of(cls, packing: _Packing, positions: Tensor) -> RectangleSequences:
        """Of this context-parallel rank, whose tokens have these positions in their sequences. [t] int64"""
        device, own, whole = positions.device, packing.lengths // packing.cp_size, packing.whole_lengths
        rectangles = _similar(own, whole)
        plain = [bool(own[rows[0]] == whole[rows[0]]) for rows in rectangles]
        return cls(
            PaddedRows.of(np.arange(int(own.sum())), own, rectangles, device),
            PaddedRows.of(packing.keys, whole, rectangles, device),
            [
                None if causal else _mask(positions, own, rows, longest_key=int(whole[rows].max()))
                for rows, causal in zip(rectangles, plain, strict=True)
            ],
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """See `PackedSequences.attend`."""
        queries, keys, values = self.queries.spread(query), self.keys.spread(key), self.keys.spread(value)
        attended = [
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            for q, k, v, mask in zip(queries, keys, values, self.masks, strict=True)
        ]
        return self.queries.collect(attended)


@dataclass(frozen=True)
class PaddedRows:
    """Tokens of sequences as the rows of a few padded rectangles, each of sequences of similar lengths."""

    shapes: list[tuple[int, int]]
    """(sequences, longest) of each rectangle."""
    place: Tensor
    """[tokens] int64, place of each sequence's tokens, end to end, among the elements of all rectangles."""
    copies: Copies
    """The elements of all rectangles among the packed tokens."""

    @classmethod
    def of(
        cls, tokens: np.ndarray, lengths: np.ndarray, rectangles: list[np.ndarray], device: torch.device
    ) -> PaddedRows:
        """The rectangles of these sequences, of these lengths, whose tokens lie at these places of the batch."""
        shapes = [(len(rows), int(lengths[rows].max())) for rows in rectangles]
        before, first = 0, np.empty_like(lengths)
        for rows, (sequences, longest) in zip(rectangles, shapes, strict=True):
            first[rows] = before + np.arange(sequences) * longest
            before += sequences * longest
        place, source = spans(first, lengths), np.full(before, -1)
        source[place] = tokens
        return cls(shapes, to_device(place, device), Copies.of(source, device))

    def spread(self, x_thd: Tensor) -> list[Tensor]:
        """The rectangles of packed x, with any values on padding. [sequences, heads, longest, d] each"""
        parts = self.copies.take(x_thd).split([rows * columns for rows, columns in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def collect(self, rectangles: list[Tensor]) -> Tensor:
        """The tokens of the rectangles, end to end: what lies on padding is dropped. [t, heads, d]"""
        flat = [rectangle.transpose(1, 2).flatten(0, 1) for rectangle in rectangles]
        return collect(flat[0] if len(flat) == 1 else torch.cat(flat), self.place)


def _similar(own_lengths: np.ndarray, whole_lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of rows by the powers of two above both lengths: padding at most doubles a group, and groups are few.

    Rows of which all tokens are own stand apart, since they need no mask.
    """
    classes = np.ceil(np.log2(np.maximum(np.stack([own_lengths, whole_lengths]), 1)))
    keys = np.stack([*classes, own_lengths < whole_lengths])
    _, group = np.unique(keys, axis=1, return_inverse=True)
    return [np.flatnonzero(group == index) for index in range(group.max() + 1)]


def _mask(positions: Tensor, own_lengths: np.ndarray, rows: np.ndarray, *, longest_key: int) -> Tensor:
    """Which keys of whole sequences the queries of this rank attend to, computed on the device. Padding attends as the
    first token of its row does."""
    starts = to_device((np.cumsum(own_lengths) - own_lengths)[rows], positions.device)[:, None]
    offset = torch.arange(int(own_lengths[rows].max()), device=positions.device)[None]
    queries = (starts + offset).where(offset < to_device(own_lengths[rows], positions.device)[:, None], starts)
    return (positions[queries][:, :, None] >= torch.arange(longest_key, device=positions.device))[:, None]


def _boundaries(lengths: np.ndarray, device: torch.device) -> Tensor:
    """Where each of the sequences starts, and the last one ends. [sequences + 1] int32"""
    return to_device(np.concatenate([[0], np.cumsum(lengths)]), device, torch.int32)
