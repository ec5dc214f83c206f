"""From a mini-batch to packed micro-batches: which rank takes which responses, and the tensors of one of them. Pure.

`B` responses, `T` packed tokens, `N` response tokens. With context parallelism `T` and `N` are those of one rank's
slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.types import KeptTokens, TrainBatch, unknown_route


def plan_microbatches(
    lengths_B: np.ndarray, *, dp_size: int, max_tokens: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Rows of each micro-batch of each data-parallel rank: balanced tokens, equally many micro-batches per rank.

    Sequences go longest first to the rank with the fewest tokens, then first-fit into micro-batches of at most
    `max_tokens` (a longer sequence gets one of its own). A rank with fewer micro-batches splits its largest, or, once
    nothing is left to split, gets empty ones: collectives need equal numbers.

    Args:
        multiple: the number of micro-batches becomes a multiple of this: the interleaved pipeline takes them in groups.
    Returns:
        plan[dp_rank][microbatch] = rows, each row exactly once.
    """
    if dp_size < 1 or max_tokens < 1:
        raise ValueError(f"dp_size and max_tokens must be positive, got {dp_size} and {max_tokens}")
    assert multiple >= 1, multiple
    order = np.argsort(-lengths_B, kind="stable")
    loads, rows_of_rank = np.zeros(dp_size, dtype=np.int64), [[] for _ in range(dp_size)]
    for row in order:
        rank = int(loads.argmin())
        rows_of_rank[rank].append(int(row))
        loads[rank] += lengths_B[row]
    plan = [_first_fit(rows, lengths_B, max_tokens) for rows in rows_of_rank]
    most = max(1, max(len(microbatches) for microbatches in plan))
    most = -(-most // multiple) * multiple
    for microbatches in plan:
        while len(microbatches) < most:
            largest = max(microbatches, key=len, default=[])
            # Every other row of a list sorted by length gives two halves of nearly equal size.
            half = largest[1::2]
            microbatches.append(half)
            if half:
                largest[:] = largest[::2]
    return plan


def _first_fit(rows: Sequence[int], lengths_B: np.ndarray, max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        length = int(lengths_B[row])
        for index, free in enumerate(room):
            if length <= free:
                bins[index].append(row)
                room[index] -= length
                break
        else:
            bins.append([row])
            room.append(max_tokens - length)
    return bins


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences laid end to end, on the device; only positions that predict a response token reach the output head.

    The tensors hold this context-parallel rank's slice, cut by `zigzag`; without context parallelism that is
    everything. `microbatch["advantages"]` is a per-token tensor.
    """

    rows: list[int]
    """Rows of the batch that it was cut from, in the order of the sequences; equal on all context-parallel ranks."""
    sequence_lengths: list[int]
    """Lengths of the whole sequences, including padding; the last sequence may be padding alone."""
    num_response_tokens: int
    """Response tokens of the whole sequences."""
    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
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
    batch: TrainBatch, rows: list[int], *, device: torch.device, multiple: int = 1, cp_size: int = 1, cp_rank: int = 0
) -> MicroBatch:
    """The micro-batch of these rows: one context-parallel rank's slice of it.

    Args:
        multiple: the slice of every rank is padded at its end to a multiple of this (sequence parallelism), and to at
            least one multiple.
        cp_size: if greater than 1, each sequence is padded at its end to a multiple of 2 cp_size, so that `zigzag` can
            cut it. Padding follows the sequence's tokens, where the causal mask hides it from them.
    """
    part = batch.select(rows)
    sequence_lengths = padded_lengths(part.sequence_lengths, multiple=multiple, cp_size=cp_size)
    total = sum(sequence_lengths)
    lengths = np.asarray(sequence_lengths[: len(part)], dtype=np.int64)

    starts = np.cumsum(lengths) - lengths
    token_ids = np.zeros(total, dtype=part.token_ids.dtype)
    own_tokens = spans(starts, part.sequence_lengths)
    predicting = spans(starts + part.sequence_lengths - part.response_lengths - 1, part.response_lengths)

    token_ids[own_tokens] = part.token_ids
    here = zigzag(sequence_lengths, cp_size=cp_size, cp_rank=cp_rank)
    place = np.full(total, -1)
    place[here] = np.arange(len(here))
    kept = np.flatnonzero(place[predicting] >= 0)

    row_of_token = np.repeat(np.arange(len(rows)), part.response_lengths)
    return MicroBatch(
        rows=list(rows),
        sequence_lengths=sequence_lengths,
        num_response_tokens=part.num_response_tokens,
        input_ids=to_device(token_ids[here], device)[None],
        position_ids=to_device(spans(np.zeros(len(sequence_lengths), int), sequence_lengths)[here], device)[None],
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
        else to_device(_routes(part.routes, own_tokens, total)[here], device, torch.int16),
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
