"""Quantile advantage estimation: a quantile of the group's rewards as baseline in place of their mean.

    A_i = (R_i - Q_K(R)) / std R,   Q_K(R) = inf {x : F(x) >= K},   F(x) the share of the group's rewards up to x

With rewards 0 and 1 and a share p of right responses, the baseline is 0 for p <= 1 - K: only the rare right responses
count; else 1: only the remaining wrong ones do. Decided here: the quantile is a reward of the group, as the paper's two
regimes require (the released code's torch.quantile interpolates between two); std and its epsilon are GRPO's.

Source: arXiv:2509.22611; K = 0.4 from the authors' README, on top of DAPO.
"""

from __future__ import annotations

import math

from torch import Tensor

from megatron_hapo.advantage import per_group
from megatron_hapo.algorithm.part import GroupedRewards, Part


class GroupQuantile(Part):
    """`group_quantile_advantage` with the quantile `algorithm.advantage_quantile`."""

    choice = ("advantage", "group_quantile")

    def advantages(self, rewards: GroupedRewards) -> Tensor:
        return group_quantile_advantage(
            rewards.rewards, rewards.lengths, rewards.groups,
            quantile=self.algorithm.advantage_quantile, norm_by_std=self.algorithm.norm_by_std,
        )  # fmt: skip


def group_quantile_advantage(
    rewards_B: Tensor,
    lengths_B: Tensor,
    groups_B: Tensor,
    *,
    quantile: float,
    norm_by_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """(R - quantile of the group's R) / (unbiased std + eps). [B]

    Arguments, result and errors are those of `advantage.group_mean_advantage`.
    """

    def advantage(rewards: Tensor, lengths: Tensor) -> Tensor:
        # 0.4 * 5 is 2.0000000000000004 in some roundings: it must not move on by one reward.
        rank = max(math.ceil(quantile * len(rewards) - 1e-9), 1)
        centred = rewards - rewards.kthvalue(rank).values
        return centred / (rewards.std() + eps) if norm_by_std else centred

    return per_group(rewards_B, lengths_B, groups_B, advantage)
