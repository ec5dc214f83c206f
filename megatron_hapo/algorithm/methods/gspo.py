"""GSPO: one importance ratio per response, the geometric mean of its tokens' ratios.

    s_i = exp(1/|o_i| sum_t (log pi(o_it) - log pi_old(o_it)))
    L = -1/B sum_i min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i)

with eps_low = 3e-4, eps_high = 4e-4. Written as the paper's GSPO-token, in which each token carries the value of s_i
and the gradient of its own log-prob: with one advantage per response and GRPO's aggregation
(`sequence_mean_token_mean`), value and gradient are GSPO's, and per-token advantages (redistribution) remain possible.

Source: arXiv:2507.18071, equations 5 to 7 and 13, 14.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.algorithm.part import LossTokens, Part


class SequenceRatio(Part):
    """`sequence_log_ratio` of the micro-batch's responses."""

    choice = ("ratio", "sequence")

    def log_ratio(self, tokens: LossTokens) -> Tensor:
        microbatch = tokens.microbatch
        return sequence_log_ratio(
            tokens.log_probs, microbatch["old_log_probs"], microbatch.response_rows,
            num_rows=len(microbatch.rows), cp_group=tokens.cp_group,
        )  # fmt: skip


def sequence_log_ratio(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    rows_N: Tensor,
    *,
    num_rows: int,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log s of each token's response, with the gradient of the token's own log-prob. [N]

    All tokens of a response are in one micro-batch. With context parallelism they are spread over `cp_group`, which
    sums their log-ratios in one all-reduce; every rank of the group must call, with its own tokens and equal num_rows.

    Args:
        log_probs_N, old_log_probs_N: [N], this rank's response tokens.
        rows_N: [N] int64 in [0, num_rows), the response that each token belongs to.
    """
    with torch.no_grad():
        sums = log_probs_N.new_zeros(2, num_rows, dtype=torch.float64)
        sums[0].index_add_(0, rows_N, (log_probs_N - old_log_probs_N).double())
        sums[1].index_add_(0, rows_N, torch.ones_like(rows_N, dtype=torch.float64))
        if cp_group is not None:
            dist.all_reduce(sums, group=cp_group)
        mean_N = (sums[0] / sums[1].clamp_min(1))[rows_N].to(log_probs_N.dtype)
    return mean_N + (log_probs_N - log_probs_N.detach())
