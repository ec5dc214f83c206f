"""DAPO: GRPO's advantage, a higher upper clip bound, dynamic sampling, overlong shaping, and a mean over tokens.

    L = -1/sum |o_i| sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)

with eps_low = 0.2, eps_high = 0.28. Groups whose rewards are all equal are sampled anew (`rollout.group_queue`), and
the reward falls linearly over the last tokens before the length limit (`reward.overlong`). Decided here: dual clip,
which the authors' released code has too.

Source: arXiv:2503.14476, equations 8 and 13.
"""

from __future__ import annotations

from megatron_hapo.algorithm.part import Part


class TokenMean(Part):
    """Mean over the tokens of the mini-batch, so long responses count more: the weights are all 1."""

    choice = ("aggregation", "token_mean")
