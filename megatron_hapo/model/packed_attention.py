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
        return _Collect.apply(gathered, params.gathered_order)


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
    cp_size: int = 1,
    cp_rank: int = 0,
    routes: Tensor | None = None,
) -> PackedBatchParams:
    """Boundaries of sequences packed end to end; the lengths are those of whole sequences, before cp slices them."""
    lengths = np.asarray(sequence_lengths, dtype=np.int64)
    cu_seqlens = _boundaries(lengths, device)
    longest = int(lengths.max())
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
    slices = [zigzag(sequence_lengths, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    positions = spans(np.zeros_like(lengths), lengths)
    params.positions = to_device(positions[slices[cp_rank]], device)
    params.gathered_order = to_device(np.argsort(np.concatenate(slices)), device)
    kind = VarlenSequences if packed_format == "varlen" else RectangleSequences
    params.sequences = kind.of(lengths, device, cp_size=cp_size, cp_rank=cp_rank)
    return params


class PackedSequences(ABC):
    """The sequences of a packed micro-batch as one kind of attention takes them."""

    @classmethod
    @abstractmethod
    def of(cls, lengths: np.ndarray, device: torch.device, *, cp_size: int, cp_rank: int) -> PackedSequences:
        """From the lengths of whole sequences, [sequences] int64; with cp_size > 1 multiples of 2 cp_size."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """Causal attention within each sequence, [t, heads, d].

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
    key_places: tuple[Tensor, ...]
    """For the front and for the back pieces, places of their keys in the packed batch, int64. No place occurs twice in
    one of them, so that gradients need no atomic additions. Empty if the pieces are the sequences."""

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device, *, cp_size: int, cp_rank: int) -> VarlenSequences:
        """See `PackedSequences.of`."""
        if cp_size == 1:
            boundaries, longest = _boundaries(lengths, device), int(lengths.max())
            return cls(boundaries, boundaries, longest, longest, None, None, ())
        starts = np.cumsum(lengths) - lengths
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
            key_places=tuple(to_device(spans(starts, part), device) for part in key_lengths),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """See `PackedSequences.attend`."""
        if self.query_order is not None:
            query = _Collect.apply(query, self.query_order)
            key, value = (torch.cat([_Collect.apply(x, places) for places in self.key_places]) for x in (key, value))
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
        return attended if self.query_place is None else _Collect.apply(attended, self.query_place)


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

    query_layout: PaddedLayout
    """Of this rank's tokens."""
    key_layout: PaddedLayout
    """Of the tokens of all context-parallel ranks."""
    masks: list[Tensor | None]
    """For each rectangle which keys a query attends to, [sequences, 1, longest, longest key] bool. None is the plain
    causal mask, which suffices where padding comes after each sequence: no real token attends to it."""

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device, *, cp_size: int, cp_rank: int) -> RectangleSequences:
        """See `PackedSequences.of`."""
        groups = _similar(lengths)
        if cp_size == 1:
            layout = _padded_layout(lengths, groups, device)
            return cls(layout, layout, [None] * len(groups))
        own_lengths = lengths // cp_size
        own_places = to_device(zigzag(lengths.tolist(), cp_size=cp_size, cp_rank=cp_rank), device)
        return cls(
            _padded_layout(own_lengths, groups, device),
            _padded_layout(lengths, groups, device),
            [_mask(lengths, own_lengths, rows, own_places) for rows in groups],
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """See `PackedSequences.attend`."""
        queries = self.query_layout.spread(query)
        keys, values = (self.key_layout.spread(x) for x in (key, value))
        attended = [
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            for q, k, v, mask in zip(queries, keys, values, self.masks, strict=True)
        ]
        return self.query_layout.collect(attended)


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


def _similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of rows by the power of two above the length: padding at most doubles a group, and groups are few."""
    size_class = np.ceil(np.log2(np.maximum(lengths, 1)))
    return [np.flatnonzero(size_class == size) for size in np.unique(size_class)]


def _padded_layout(lengths: np.ndarray, groups: list[np.ndarray], device: torch.device) -> PaddedLayout:
    """The rectangles of groups of rows, for packed sequences of these lengths."""
    shapes = [(len(rows), int(lengths[rows].max())) for rows in groups]
    before, first = 0, np.empty_like(lengths)
    for rows, (sequences, longest) in zip(groups, shapes, strict=True):
        first[rows] = before + np.arange(sequences) * longest
        before += sequences * longest
    return PaddedLayout(shapes, to_device(spans(first, lengths), device))


def _mask(lengths: np.ndarray, own_lengths: np.ndarray, rows: np.ndarray, own_places: Tensor) -> Tensor:
    """Which keys of whole sequences the queries of this rank's slice attend to, computed on the device."""
    queries, _ = _rectangle(own_lengths, rows, own_places.device)
    keys, valid = _rectangle(lengths, rows, own_places.device)
    sees = own_places[queries][:, :, None] >= keys[:, None, :]
    return (sees & valid[:, None, :])[:, None]


def _rectangle(lengths: np.ndarray, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the packed batch of the sequences `rows`, and which are not padding (that points at their start)."""
    starts = to_device((np.cumsum(lengths) - lengths)[rows], device)[:, None]
    offset = torch.arange(int(lengths[rows].max()), device=device)[None]
    valid = offset < to_device(lengths[rows], device)[:, None]
    return (starts + offset).where(valid, starts), valid


def _boundaries(lengths: np.ndarray, device: torch.device) -> Tensor:
    """Where each of the sequences starts, and the last one ends. [sequences + 1] int32"""
    return to_device(np.concatenate([[0], np.cumsum(lengths)]), device, torch.int32)
