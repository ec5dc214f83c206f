"""Advantages of responses from the rewards and lengths of their group: pure functions, no padding anywhere.

`B` responses. Groups are given by an integer for each response.
"""

from __future__ import annotations

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

    Each response counts with its length: mu = sum len R / sum len, sigma the biased deviation. If some normalised
    |advantage| of the group reaches `fallback`, the whole group takes the GRPO advantage instead (released code).
    Groups of one, without tokens, or whose rewards are all equal give 0.

    Args:
        rewards_B: [B], one reward a response.
        lengths_B: [B], valid response tokens.
        groups_B: [B] integers, equal for responses to one prompt.
    Returns:
        [B] float32; all tokens of a response share its value.
    Source: HAPO, arXiv:2509.16591, "token-level group average".
    """
    return _per_group(
        rewards_B, lengths_B, groups_B,
        lambda rewards, lengths: _token_level(rewards, lengths, norm_by_std=norm_by_std, fallback=fallback, eps=eps),
    )  # fmt: skip


def group_mean_advantage(
    rewards_B: Tensor, lengths_B: Tensor, groups_B: Tensor, *, norm_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GRPO's advantage: (R - mean) / (unbiased std + eps) over the responses of the group. [B] float32

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2.
    """
    return _per_group(
        rewards_B,
        lengths_B,
        groups_B,
        lambda rewards, lengths: _group_mean(rewards, norm_by_std=norm_by_std, eps=eps),
    )


def _token_level(rewards: Tensor, lengths: Tensor, *, norm_by_std: bool, fallback: float, eps: float) -> Tensor:
    total = lengths.sum()
    if total == 0:
        return torch.zeros_like(rewards)
    mean = (lengths * rewards).sum() / total
    centred = rewards - mean
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


def _per_group(rewards_B: Tensor, lengths_B: Tensor, groups_B: Tensor, advantage) -> Tensor:
    if not rewards_B.shape == lengths_B.shape == groups_B.shape or rewards_B.dim() != 1:
        raise ValueError(
            "rewards, lengths and groups must be 1-d and of one length, got "
            f"{tuple(rewards_B.shape)}, {tuple(lengths_B.shape)}, {tuple(groups_B.shape)}"
        )
    # float64: a closed form from at most n values a group must not depend on their order
    rewards_B, lengths_B = rewards_B.double(), lengths_B.double()
    advantages_B = torch.zeros_like(rewards_B)
    for group in groups_B.unique():
        rows = groups_B == group
        rewards = rewards_B[rows]
        if rewards.numel() > 1 and bool((rewards != rewards[0]).any()):
            advantages_B[rows] = advantage(rewards, lengths_B[rows])
    return advantages_B.float()
