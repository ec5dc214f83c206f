"""A mini-batch to packed micro-batches: which rank takes which responses, and the tensors of one micro-batch. Pure.

`B` responses, `T` packed tokens, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.types import TrainBatch


def plan_microbatches(lengths_B: np.ndarray, *, dp_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Rows of each micro-batch of each data-parallel rank: balanced tokens, equally many micro-batches on every rank.

    Sequences go longest first to the rank with the fewest tokens, then first-fit into micro-batches of at most
    `max_tokens` (a longer sequence stands alone). A rank with fewer micro-batches splits its largest, or, when nothing
    is left to split, gets empty ones: collectives need equal numbers.

    Returns:
        plan[dp_rank][microbatch] = rows, each row exactly once.
    """
    if dp_size < 1 or max_tokens < 1:
        raise ValueError(f"dp_size and max_tokens must be positive, got {dp_size} and {max_tokens}")
    order = np.argsort(-lengths_B, kind="stable")
    loads, rows_of_rank = np.zeros(dp_size, dtype=np.int64), [[] for _ in range(dp_size)]
    for row in order:
        rank = int(loads.argmin())
        rows_of_rank[rank].append(int(row))
        loads[rank] += lengths_B[row]
    plan = [_first_fit(rows, lengths_B, max_tokens) for rows in rows_of_rank]
    most = max(1, max(len(microbatches) for microbatches in plan))
    for microbatches in plan:
        while len(microbatches) < most:
            largest = max(microbatches, key=len, default=[])
            # Every other row of a list that is sorted by length: two halves of nearly the same size.
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
    """Sequences laid end to end, on the device; only positions that predict a response token reach the output head."""

    rows: list[int]
    """Rows of the batch it came from, in the order of the arrays below."""
    input_ids: Tensor
    """[1, T] int64, padded at the end to a multiple that sequence parallelism needs."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    sequence_lengths: list[int]
    """With the padding as a last sequence of its own."""
    predicting_positions: Tensor
    """[N] int64: position whose output predicts the response token."""
    targets: Tensor
    """[N] int64, the response tokens."""
    temperatures: Tensor
    """[N] float32."""
    advantages: Tensor
    """[N] float32."""
    old_log_probs: Tensor | None
    modulation: Tensor | None


def pack(batch: TrainBatch, rows: list[int], *, device: torch.device, multiple: int = 1) -> MicroBatch:
    """The micro-batch of these rows; total tokens are padded up to a multiple, and to at least one multiple."""
    part = batch.select(rows)
    lengths = part.sequence_lengths
    total = int(lengths.sum())
    padding = -total % multiple if total else multiple
    ends = np.cumsum(lengths)
    sequence_lengths = [*lengths.tolist(), padding] if padding else lengths.tolist()
    positions = [
        np.arange(end - response - 1, end - 1) for end, response in zip(ends, part.response_lengths, strict=True)
    ]
    predicting = np.concatenate([np.zeros(0, dtype=np.int64), *positions])
    token_ids = np.concatenate([part.token_ids, np.zeros(padding, dtype=part.token_ids.dtype)])

    def to_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

    def optional(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else to_device(array, torch.float32)

    return MicroBatch(
        rows=list(rows),
        input_ids=to_device(token_ids, torch.int64)[None],
        position_ids=to_device(np.concatenate([np.arange(n) for n in sequence_lengths]), torch.int64)[None],
        sequence_lengths=sequence_lengths,
        predicting_positions=to_device(predicting, torch.int64),
        targets=to_device(part.token_ids[predicting + 1], torch.int64),
        temperatures=to_device(part.temperatures, torch.float32),
        advantages=to_device(np.repeat(part.advantages, part.response_lengths), torch.float32),
        old_log_probs=optional(part.old_log_probs),
        modulation=optional(part.modulation),
    )
