"""The tensors of a packed micro-batch. Pure; `microbatch_plan` says which rank takes which responses.

`B` responses, `T` packed tokens, `N` response tokens. With context parallelism `T` and `N` are those of one rank's
slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.microbatch_plan import SharedPrompts
from megatron_hapo.types import KeptTokens, TrainBatch, unknown_route


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences laid end to end, on the device; only positions that predict a response token reach the output head.

    The tensors hold this context-parallel rank's slice, cut by `zigzag`; without context parallelism that is
    everything. `microbatch["advantages"]` is a per-token tensor.
    """

    rows: list[int]
    """Rows of the batch that it was cut from, in the order of the sequences; equal on all context-parallel ranks."""
    sequence_lengths: list[int]
    """Lengths of the packed sequences before context parallelism, including padding; the last may be padding alone."""
    prefixes: list[int] | None = None
    """For each packed sequence the one that it continues, or -1: a prompt that several responses share is packed once,
    without its last token, which predicts the first of each response. None: all are -1."""
    num_response_tokens: int
    """Response tokens of the whole sequences."""
    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence, or from its prefix's length."""
    predicting_positions: Tensor
    """[N] int64: position in the slice whose output predicts the response token."""
    response_index: Tensor
    """[N] int64: place of each token among the num_response_tokens of the whole sequences."""
    response_rows: Tensor
    """[N] int64: index into `rows`."""
    targets: Tensor
    """[N] int64, the response tokens."""
    per_token: Mapping[str, Tensor]
    """[N] each, by the names of `TrainBatch.per_token`: float32, or bool where the batch has bool."""
    kept: KeptTokens | None = None
    """Of its N response tokens, on the host; None: the whole vocabulary."""
    routes: Tensor | None = None
    """[T, expert layers, top_k] int16, the experts of each token, -1 where the router chooses; None: it always does."""

    def __getitem__(self, name: str) -> Tensor:
        """The per-token tensor of this name. [N]

        Raises:
            KeyError: the batch did not bring it; names those that it did bring.
        """
        if name not in self.per_token:
            raise KeyError(f"the batch has no per-token data {name!r}, only {', '.join(sorted(self.per_token))}")
        return self.per_token[name]

    def get(self, name: str) -> Tensor | None:
        """The per-token tensor of this name [N], or None."""
        return self.per_token.get(name)

    def with_per_token(self, tensors: Mapping[str, Tensor]) -> MicroBatch:
        """The same with these per-token tensors added, or in place of those of the same name."""
        return replace(self, per_token={**self.per_token, **tensors})


def pack(
    batch: TrainBatch,
    rows: list[int],
    *,
    device: torch.device,
    prompts: SharedPrompts | None = None,
    multiple: int = 1,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> MicroBatch:
    """The micro-batch of these rows: one context-parallel rank's slice of it.

    Args:
        prompts: of the batch; one that several rows share is packed once. None: nothing is; for context parallelism.
        multiple: the slice of every rank is padded at its end to a multiple of this (sequence parallelism), and to at
            least one multiple.
        cp_size: if greater than 1, each sequence is padded at its end to a multiple of 2 cp_size, so that `zigzag` can
            cut it. Padding follows the sequence's tokens, where the causal mask hides it from them.
    """
    assert prompts is None or cp_size == 1, "context parallelism cuts whole sequences"
    part = batch.select(rows)
    sequences = _sequences(part, None if prompts is None else prompts.select(rows))
    sequence_lengths = padded_lengths(sequences.lengths, multiple=multiple, cp_size=cp_size)
    total = sum(sequence_lengths)
    padded = np.asarray(sequence_lengths[: len(sequences.lengths)], dtype=np.int64)

    starts = np.cumsum(padded) - padded
    token_ids = np.zeros(total, dtype=part.token_ids.dtype)
    own_tokens, sources = spans(starts, sequences.lengths), spans(sequences.sources, sequences.lengths)
    of_rows = slice(len(padded) - len(part), None)
    ends = (starts + sequences.lengths)[of_rows]
    predicting = spans(ends - part.response_lengths - 1, part.response_lengths)

    token_ids[own_tokens] = part.token_ids[sources]
    prefix_lengths = np.where(sequences.prefixes >= 0, padded[sequences.prefixes], 0) if len(padded) else padded
    padding = len(sequence_lengths) - len(padded)
    positions = spans(np.pad(prefix_lengths, (0, padding)), sequence_lengths)
    here = zigzag(sequence_lengths, cp_size=cp_size, cp_rank=cp_rank)
    place = np.full(total, -1)
    place[here] = np.arange(len(here))
    kept = np.flatnonzero(place[predicting] >= 0)

    row_of_token = np.repeat(np.arange(len(rows)), part.response_lengths)
    return MicroBatch(
        rows=list(rows),
        sequence_lengths=sequence_lengths,
        prefixes=[*sequences.prefixes.tolist(), *[-1] * padding] if (sequences.prefixes >= 0).any() else None,
        num_response_tokens=part.num_response_tokens,
        input_ids=to_device(token_ids[here], device)[None],
        position_ids=to_device(positions[here], device)[None],
        predicting_positions=to_device(place[predicting[kept]], device),
        response_index=to_device(kept, device),
        response_rows=to_device(row_of_token[kept], device),
        targets=to_device(token_ids[predicting[kept] + 1], device),
        per_token={
            name: to_device(array[kept], device, torch.bool if array.dtype == np.bool_ else torch.float32)
            for name, array in part.per_token().items()
        },
        kept=None if part.kept is None else part.kept[kept],
        routes=None
        if part.routes is None
        else to_device(_routes(part.routes[sources], own_tokens, total)[here], device, torch.int16),
    )


class _Sequences(NamedTuple):
    """What a micro-batch packs: shared prompts, without their last tokens, and then a sequence for each row."""

    lengths: np.ndarray
    """[sequences] int64, without padding."""
    sources: np.ndarray
    """[sequences] int64, place of the first token in the batch."""
    prefixes: np.ndarray
    """[sequences] int64, the sequence that each continues, or -1."""


def _sequences(part: TrainBatch, prompts: SharedPrompts | None) -> _Sequences:
    lengths = part.sequence_lengths
    sources = np.cumsum(lengths) - lengths
    if prompts is None:
        return _Sequences(lengths, sources, np.full(len(part), -1))
    _, first, of_row, rows = np.unique(prompts.ids, return_index=True, return_inverse=True, return_counts=True)
    shared = np.flatnonzero((rows > 1) & (prompts.lengths[first] > 0))
    place = np.full(len(first), -1)
    place[shared] = np.arange(len(shared))
    prefixes = place[of_row]
    cut = np.where(prefixes >= 0, prompts.lengths, 0)
    return _Sequences(
        np.concatenate([prompts.lengths[first[shared]], lengths - cut]),
        np.concatenate([sources[first[shared]], sources + cut]),
        np.concatenate([np.full(len(shared), -1), prefixes]),
    )


def _routes(routes: np.ndarray, own_tokens: np.ndarray, total: int) -> np.ndarray:
    """The routes at their places in the packed batch, -1 where they are unknown. [total, expert layers, top_k] int16"""
    packed = np.full((total, *routes.shape[1:]), -1, dtype=np.int16)
    packed[own_tokens] = np.where(routes == unknown_route(routes.dtype), np.int16(-1), routes.astype(np.int16))
    return packed


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The array as a tensor on the device. A GPU gets it through pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded_lengths(lengths_B: np.ndarray, *, multiple: int, cp_size: int) -> list[int]:
    """Sequence lengths of a packed micro-batch as `pack` lays it out; one more entry if its end is padding alone."""
    chunks = 1 if cp_size == 1 else 2 * cp_size
    lengths = -(-lengths_B // chunks) * chunks
    total, whole = int(lengths.sum()), math.lcm(chunks, cp_size * multiple)
    padding = -total % whole if total else whole
    return [*lengths.tolist(), padding] if padding else lengths.tolist()


def zigzag(sequence_lengths: Sequence[int], *, cp_size: int, cp_rank: int) -> np.ndarray:
    """Positions in the packed batch of the tokens that a context-parallel rank holds, in its order.

    Each sequence is cut into 2 cp_size chunks; rank r holds the r-th from the front and the r-th from the back, so that
    causal attention costs every rank the same. This is Megatron's order for packed sequences.
    """
    lengths = np.asarray(sequence_lengths, dtype=np.int64)
    if cp_size == 1:
        return np.arange(int(lengths.sum()))
    assert not (lengths % (2 * cp_size)).any(), f"lengths {sequence_lengths} must be multiples of {2 * cp_size}"
    chunk = lengths // (2 * cp_size)
    starts = np.cumsum(lengths) - lengths
    first, last = starts + cp_rank * chunk, starts + (2 * cp_size - 1 - cp_rank) * chunk
    return spans(np.stack([first, last], 1).ravel(), np.repeat(chunk, 2))


def spans(starts: np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The integers of [start, start + length) of each span, one span after another."""
    lengths = np.asarray(lengths, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
