"""Advantages of responses from the rewards and lengths of their group: pure functions, without padding.

`B` responses. An integer for each response tells its group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_level_group_average(
    rewards_B: Tensor,
    lengths_B: Tensor,
    groups_B: Tensor,
    *,
    norm_by_std: bool = True,
    fallback: float = 5.0,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of every token of each response, normalised over the tokens of its group.

    Each response is weighted by its length: mu = sum len R / sum len, sigma the biased standard deviation, and the
    advantage is (R - mu) / (sigma + eps). If any |advantage| of the group reaches `fallback`, the whole group takes the
    GRPO advantage instead. The fallback comes from the released code, which also looks at padding; here only tokens
    count. Groups of one, without tokens, or whose rewards are all equal give 0.

    Args:
        rewards_B: [B], one reward per response, finite.
        lengths_B: [B], valid response tokens, at least 0.
        groups_B: [B] integers, equal for responses to one prompt.
        norm_by_std: if False, the advantage is R - mu, and there is no fallback.
    Returns:
        [B] float32, or float64 for float64 rewards; all tokens of a response share its value.
    Raises:
        ValueError: shapes differ, a reward is not finite, a length is negative.
    Source: HAPO, arXiv:2509.16591, "token-level group average".
    """
    return per_group(
        rewards_B, lengths_B, groups_B,
        lambda rewards, lengths: _token_level(rewards, lengths, norm_by_std=norm_by_std, fallback=fallback, eps=eps),
    )  # fmt: skip


def group_mean_advantage(
    rewards_B: Tensor, lengths_B: Tensor, groups_B: Tensor, *, norm_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GRPO's advantage: (R - mean) / (unbiased std + eps) over the responses of the group. [B]

    Arguments, result and errors are those of `token_level_group_average`; lengths only tell which responses have
    tokens. Groups of one or whose rewards are all equal give 0.

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2.
    """
    return per_group(
        rewards_B,
        lengths_B,
        groups_B,
        lambda rewards, lengths: _group_mean(rewards, norm_by_std=norm_by_std, eps=eps),
    )


def _token_level(rewards: Tensor, lengths: Tensor, *, norm_by_std: bool, fallback: float, eps: float) -> Tensor:
    total = lengths.sum()
    centred = rewards - (lengths * rewards).sum() / total
    if not norm_by_std:
        return centred
    std = ((lengths * centred.square()).sum() / total).sqrt()
    normalised = centred / (std + eps)
    if bool((normalised.abs()[lengths > 0] >= fallback).any()):
        return _group_mean(rewards, norm_by_std=True, eps=eps)
    return normalised


def _group_mean(rewards: Tensor, *, norm_by_std: bool, eps: float) -> Tensor:
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + eps) if norm_by_std else centred


def per_group(
    rewards_B: Tensor, lengths_B: Tensor, groups_B: Tensor, advantage: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The advantages of every group by a function of its rewards and lengths (float64); 0 where rewards do not differ.

    Arguments, result and errors are those of `token_level_group_average`.
    """
    if not rewards_B.shape == lengths_B.shape == groups_B.shape or rewards_B.dim() != 1:
        raise ValueError(
            "rewards, lengths and groups must be 1-d and of equal length, got "
            f"{tuple(rewards_B.shape)}, {tuple(lengths_B.shape)}, {tuple(groups_B.shape)}"
        )
    if not bool(rewards_B.isfinite().all()):
        row = int((~rewards_B.isfinite()).nonzero()[0])
        raise ValueError(f"reward of response {row} is {float(rewards_B[row])}; it must be finite")
    if bool((lengths_B < 0).any()):
        row = int((lengths_B < 0).nonzero()[0])
        raise ValueError(f"length of response {row} is {int(lengths_B[row])}; it must be at least 0")
    dtype = torch.float64 if rewards_B.dtype == torch.float64 else torch.float32
    # In float64, so that the order of a group's responses does not affect a float32 result.
    rewards_B, lengths_B = rewards_B.double(), lengths_B.double()
    advantages_B = torch.zeros_like(rewards_B)
    for group in groups_B.unique():
        rows = groups_B == group
        rewards, lengths = rewards_B[rows], lengths_B[rows]
        # Rounding in the mean must not turn equal rewards into advantages; responses without tokens are ignored.
        with_tokens = rewards[lengths > 0]
        if len(with_tokens) > 1 and bool((with_tokens != with_tokens[0]).any()):
            advantages_B[rows] = advantage(rewards, lengths)
    return advantages_B.to(dtype)
