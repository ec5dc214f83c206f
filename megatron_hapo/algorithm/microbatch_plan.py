"""From a mini-batch to micro-batches: which rank takes which responses, and with which others. Pure, on the host.

`B` responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_hapo.types import TrainBatch


class SharedPrompts(NamedTuple):
    """Which responses can share the forward and backward passes of their prompts."""

    ids: np.ndarray
    """[B] int64, equal for responses to the same prompt."""
    lengths: np.ndarray
    """[B] int64, tokens that they share: all of the prompt but its last token, whose output is each response's own."""

    @classmethod
    def none(cls, number: int) -> SharedPrompts:
        """Of so many responses that share nothing."""
        return cls(np.arange(number), np.zeros(number, dtype=np.int64))

    def select(self, rows: Sequence[int]) -> SharedPrompts:
        """Those of these responses, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        return SharedPrompts(self.ids[index], self.lengths[index])


def can_share_prompts(*, cp_size: int, transformer_engine: bool) -> bool:
    """Whether the trainer's attention takes sequences that continue a shared prompt.

    Context parallelism cuts whole sequences, and Transformer Engine's rotation starts every sequence at position 0.
    """
    return cp_size == 1 and not transformer_engine


def shared_prompts(batch: TrainBatch) -> SharedPrompts:
    """The prompts of a batch, found by their tokens, and by the experts that the engine chose for them."""
    lengths = batch.sequence_lengths - batch.response_lengths - 1
    starts = np.cumsum(batch.sequence_lengths) - batch.sequence_lengths
    numbers: dict[tuple[bytes, bytes] | int, int] = {}
    ids = np.empty(len(batch), dtype=np.int64)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        tokens = slice(start, start + length)
        routes = b"" if batch.routes is None else batch.routes[tokens].tobytes()
        # A prompt of one token leaves nothing to share.
        key = (batch.token_ids[tokens].tobytes(), routes) if length else row
        ids[row] = numbers.setdefault(key, len(numbers))
    return SharedPrompts(ids, lengths)


Plan = list[list[list[int]]]
"""plan[dp_rank][microbatch] = rows, each row of the batch exactly once."""


def plan_microbatches(
    lengths_B: np.ndarray,
    *,
    dp_size: int,
    max_tokens: int,
    multiple: int = 1,
    prompts: SharedPrompts | None = None,
) -> Plan:
    """Balanced tokens, and equally many micro-batches per rank: collectives need equal numbers.

    Responses to one prompt are cut into parts, each of which stays together. Parts go largest first to the rank with
    the fewest tokens, then first-fit into micro-batches of at most `max_tokens`. A rank with fewer micro-batches splits
    its largest, or, once nothing is left to split, gets empty ones. Of whole groups, halves, quarters and so on down to
    single responses, the best plan wins: parts that are larger share more, and are harder to balance.

    Args:
        max_tokens: of whole sequences, as if nothing were shared: keys and values are copied for each response. A
            longer sequence gets a micro-batch of its own.
        multiple: the number of micro-batches becomes a multiple of this: the interleaved pipeline takes them in groups.
        prompts: None: responses share nothing.
    """
    if dp_size < 1 or max_tokens < 1:
        raise ValueError(f"dp_size and max_tokens must be positive, got {dp_size} and {max_tokens}")
    assert multiple >= 1, multiple
    prompts = prompts or SharedPrompts.none(len(lengths_B))
    groups = _groups(prompts.ids, lengths_B)
    most = max(map(len, groups), default=1)
    candidates = (
        _plan(
            _parts(groups, lengths_B, pieces=min(2**halvings, most), max_tokens=max_tokens),
            lengths_B,
            prompts,
            dp_size=dp_size,
            max_tokens=max_tokens,
            multiple=multiple,
        )
        for halvings in range((most - 1).bit_length() + 1)
    )
    return min(candidates, key=lambda plan: _cost(plan, lengths_B, prompts))


def computed_tokens(rows: Sequence[int], lengths_B: np.ndarray, prompts: SharedPrompts) -> int:
    """Tokens of a micro-batch of these rows, without padding: shared ones count once."""
    return int(lengths_B[rows].sum() - saved_prompts(rows, prompts).sum())


def saved_prompts(rows: Sequence[int], prompts: SharedPrompts) -> np.ndarray:
    """Lengths of the prompts that a micro-batch of these rows need not compute again, [responses] int64."""
    _, first, counts = np.unique(prompts.ids[rows], return_index=True, return_counts=True)
    return np.repeat(prompts.lengths[rows][first], counts - 1)


def _cost(plan: Plan, lengths_B: np.ndarray, prompts: SharedPrompts) -> int:
    """Tokens of the slowest rank, if the ranks wait for each other in every micro-batch, as experts make them."""
    return sum(max(computed_tokens(rows, lengths_B, prompts) for rows in turn) for turn in zip(*plan, strict=True))


def _groups(ids: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
    """Rows of each prompt, longest first."""
    order = np.lexsort((-lengths_B, ids))
    return np.split(order, np.flatnonzero(np.diff(ids[order])) + 1) if len(order) else []


def _parts(groups: list[np.ndarray], lengths_B: np.ndarray, *, pieces: int, max_tokens: int) -> list[np.ndarray]:
    """Each group in so many parts, or in more until they fit; every n-th response makes them alike in size."""
    parts = []
    for group in groups:
        number = min(pieces, len(group))
        while number < len(group) and lengths_B[group[::number]].sum() > max_tokens:
            number += 1
        parts += [group[first::number] for first in range(number)]
    return parts


def _plan(
    parts: list[np.ndarray],
    lengths_B: np.ndarray,
    prompts: SharedPrompts,
    *,
    dp_size: int,
    max_tokens: int,
    multiple: int,
) -> Plan:
    whole = np.array([lengths_B[rows].sum() for rows in parts], dtype=np.int64)
    costs = whole - np.array([(len(rows) - 1) * prompts.lengths[rows[0]] for rows in parts], dtype=np.int64)
    loads, parts_of_rank = np.zeros(dp_size, dtype=np.int64), [[] for _ in range(dp_size)]
    for index in np.argsort(-costs, kind="stable"):
        rank = int(loads.argmin())
        parts_of_rank[rank].append(int(index))
        loads[rank] += costs[index]
    plan = [
        [[int(row) for index in indices for row in parts[index]] for indices in _first_fit(own, whole, max_tokens)]
        for own in parts_of_rank
    ]
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


def _first_fit(items: Sequence[int], sizes: np.ndarray, max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for item in items:
        size = int(sizes[item])
        for index, free in enumerate(room):
            if size <= free:
                bins[index].append(item)
                room[index] -= size
                break
        else:
            bins.append([item])
            room.append(max_tokens - size)
    return bins
