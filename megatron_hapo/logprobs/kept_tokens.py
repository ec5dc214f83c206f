"""The tokens that top-p and top-k left to the sampler, and a softmax over them alone.

`N` rows, `V` this rank's vocabulary columns, `K` kept tokens of all rows together. With x of `row_statistics` and the
kept tokens S of a row,

    log p_t = x_t - log Z                  Z = sum over S of exp(x)
    d log p_t / d logit_j = ([j = t] - [j in S] exp(x_j) / Z) / T

Only the kept logits are read, which are few. Sums run along the rows in order, so results are the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.algorithm.microbatches import to_device


@dataclass(frozen=True)
class Kept:
    """The kept tokens of some rows, each of which has at least one."""

    columns: Tensor
    """[K] int64, row after row: token ids, or columns of a rank (`on_shard`)."""
    rows: Tensor
    """[K] int64, the row of each."""
    lengths: Tensor
    """[N] int64, their number in each row."""
    starts: np.ndarray
    """[N + 1] int64, the place of each row's first among all; on the host, so that a part can be cut without waiting
    for a GPU."""

    @staticmethod
    def of(token_ids: np.ndarray, lengths: np.ndarray, *, device: torch.device) -> Kept:
        """The kept tokens with these ids [K], `lengths` [N] of them in each row."""
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns, rows, counts = (to_device(values, device) for values in (token_ids, rows, lengths))
        return Kept(columns, rows, counts, starts)

    def on_shard(self, first_column: int) -> Kept:
        """The same with columns counted from a rank's first; those of other ranks lie outside its columns."""
        return Kept(self.columns - first_column, self.rows, self.lengths, self.starts)

    def of_rows(self, rows: slice) -> Kept:
        """The part of these rows, which are counted from 0."""
        starts = self.starts[rows.start : rows.stop + 1]
        part = slice(int(starts[0]), int(starts[-1]))
        return Kept(self.columns[part], self.rows[part] - rows.start, self.lengths[rows], starts - starts[0])

    def gather(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Which of them this rank holds [K], and their logits [K]; anything where it does not."""
        here_K = (self.columns >= 0) & (self.columns < logits_NV.shape[1])
        if not logits_NV.shape[1]:
            return here_K, logits_NV.new_zeros(len(self.columns))
        return here_K, logits_NV[self._places(logits_NV)]

    def add_to(self, logits_NV: Tensor, values_K: Tensor) -> None:
        """Adds these values, 0 for what other ranks hold, to the elements of the kept tokens."""
        if logits_NV.shape[1]:
            # Accumulates, since tokens of other ranks all point at columns of this one.
            logits_NV.index_put_(self._places(logits_NV), values_K.to(logits_NV.dtype), accumulate=True)

    def reduce(self, values_K: Tensor, operation: str) -> Tensor:
        """The `sum` or `max` of each row's values. [N]"""
        if not len(self.lengths):
            return values_K.new_zeros(0)
        return torch.segment_reduce(values_K, operation, lengths=self.lengths, unsafe=True)

    def _places(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows, self.columns.clamp(0, logits_NV.shape[1] - 1)
