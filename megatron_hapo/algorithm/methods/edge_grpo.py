"""EDGE-GRPO's entropy-driven advantage: confident answers count more, right or wrong.

    A_i' = A_i / (P_i / mean P),   P_i the mean token entropy of response i

A_i is GRPO's advantage; the mean of P runs over the response's group (in the released code over whatever the devices
hold together). Decided here: P_i / mean P is kept in [0.1, 10], the bounds in the released code's comment, since P_i of
a response without uncertainty is 0; entropies are the old policy's, so A' is a constant of the step. The paper's other
half, guided error correction, rewrites wrong responses with reference solutions; prompts here carry none, so it is left
out.

Source: arXiv:2507.21848, equations 3, 6 and 7 (numbered as other implementations cite them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hapo.advantage import group_mean_advantage
from megatron_hapo.algorithm.part import GroupedRewards, Part

BOUNDS = (0.1, 10.0)


class EntropyDriven(Part):
    """`entropy_driven_advantage` of GRPO's advantages."""

    choice = ("advantage", "entropy_driven")

    def advantages(self, rewards: GroupedRewards) -> Tensor:
        plain_B = group_mean_advantage(
            rewards.rewards, rewards.lengths, rewards.groups, norm_by_std=self.algorithm.norm_by_std
        )
        return entropy_driven_advantage(plain_B.float(), rewards.entropies, rewards.lengths, rewards.groups)


def entropy_driven_advantage(advantages_B: Tensor, entropies_N: Tensor, lengths_B: Tensor, groups_B: Tensor) -> Tensor:
    """Each response's advantage divided by its share of the group's mean entropy. [B]

    Args:
        advantages_B: [B].
        entropies_N: [N] nats, the responses' tokens in order.
        lengths_B: [B] int64, response tokens.
        groups_B: [B] integers, equal for responses to one prompt.
    """
    rows_N = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
    sums_B = torch.zeros(len(lengths_B), dtype=torch.float64).index_add_(0, rows_N, entropies_N.double())
    means_B = sums_B / lengths_B.clamp_min(1)
    shares_B = torch.ones_like(means_B)
    for group in groups_B.unique():
        rows = (groups_B == group) & (lengths_B > 0)
        if rows.any() and means_B[rows].mean() > 0:
            shares_B[rows] = means_B[rows] / means_B[rows].mean()
    return (advantages_B.double() / shares_B.clamp(*BOUNDS)).to(advantages_B.dtype)
