"""GRPO: A_i = (R_i - mean R) / std R over the group, token ratios, symmetric clipping, mean of responses' token means.

    L = -1/B sum_i 1/|o_i| sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i)

Decided here: no KL to a reference policy (the paper has one with coefficient 0.04; the methods compared with HAPO leave
it out; `reference_kl` and the overlay `grpo_kl` add it), and dual clip as in every method of this package.

Source: DeepSeekMath, arXiv:2402.03300, equation 3.
"""

from __future__ import annotations

from torch import Tensor

from megatron_hapo.advantage import group_mean_advantage
from megatron_hapo.algorithm.part import GroupedRewards, LossTokens, Part
from megatron_hapo.loss import clipped_surrogate


class GroupMean(Part):
    """`advantage.group_mean_advantage`."""

    choice = ("advantage", "group_mean")

    def advantages(self, rewards: GroupedRewards) -> Tensor:
        return group_mean_advantage(
            rewards.rewards, rewards.lengths, rewards.groups, norm_by_std=self.algorithm.norm_by_std
        )


class TokenRatio(Part):
    """The importance ratio of each token."""

    choice = ("ratio", "token")

    def log_ratio(self, tokens: LossTokens) -> Tensor:
        return tokens.log_probs - tokens.microbatch["old_log_probs"]


class ClippedSurrogate(Part):
    """`loss.clipped_surrogate`."""

    order = 100
    choice = ("surrogate", "clipped")

    def surrogate(
        self, tokens: LossTokens, ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_surrogate(ratio_N, advantages_N, low_N, high_N, dual_clip=self.algorithm.dual_clip)


class SequenceMeanTokenMean(Part):
    """Mean over responses of their token means."""

    choice = ("aggregation", "sequence_mean_token_mean")

    def minibatch_weights(self, lengths_B: Tensor, *, max_tokens: int) -> Tensor:
        return sequence_mean_weights(lengths_B)


def sequence_mean_weights(lengths_B: Tensor) -> Tensor:
    """Weights that turn sum / (number of tokens) into the mean over responses of their token means. [N] float32

    Each token of response i gets sum |o| / (B |o_i|), with B the number of responses that have tokens.
    """
    lengths = lengths_B.double()
    num_responses = int((lengths_B > 0).sum())
    return (lengths.sum() / (num_responses * lengths)).float().repeat_interleave(lengths_B)
