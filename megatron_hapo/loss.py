"""The formulas of the loss on one rank's tokens: pure functions without collectives.

`algorithm.objective` puts them together. `N` response tokens of one micro-batch. Source: HAPO, arXiv:2509.16591,
"differential advantage redistribution" and "asymmetric adaptive clipping"; dual clip from arXiv:1912.09729.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp of a larger log-ratio overflows into NaN gradients; beyond this bound the gradient is zero anyway."""


def adaptive_clip_range(
    h_N: Tensor, *, clip_low: float | Tensor, clip_high: float | Tensor, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Per-token clip ranges (low, high): the ratio is kept in [1 - low, 1 + high].

    Low widens to clip_low (1 - alpha h) where h <= 0, high to clip_high (1 + alpha h) where h > 0. [N] each.
    """
    low_N = torch.where(h_N <= 0, clip_low * (1 - alpha * h_N), clip_low)
    high_N = torch.where(h_N > 0, clip_high * (1 + alpha * h_N), clip_high)
    return low_N, high_N


def redistribute_advantage(
    advantages_N: Tensor, h_N: Tensor, ratio_N: Tensor, low_N: Tensor, high_N: Tensor, *, beta: float = 1.0
) -> Tensor:
    """Advantages amplified where an uncertain token moves, damped where a certain one stands still. [N]

    The neutral zone is the open interval (1 - low/2, 1 + high/2) of the clip ranges. h > 0: A (1 + beta h) outside the
    zone; h <= 0: A (1 + beta h) inside it; else A.

    Args:
        low_N, high_N: [N], or one number each, the clip ranges in effect.
    Raises:
        ValueError: shapes differ.
    """
    ranges = {"low": low_N, "high": high_N}
    check_shapes(advantages=advantages_N, h=h_N, ratio=ratio_N, **{k: v for k, v in ranges.items() if v.dim()})
    neutral_N = (ratio_N > 1 - low_N / 2) & (ratio_N < 1 + high_N / 2)
    acts_N = torch.where(h_N > 0, ~neutral_N, neutral_N)
    return torch.where(acts_N, advantages_N * (1 + beta * h_N), advantages_N)


def hapo_loss(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    h_N: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    clip_alpha: float = 1.0,
    adv_beta: float = 1.0,
    dual_clip: float = 10.0,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """HAPO's objective in one call: the policy loss of these tokens, sum / num_tokens, and sums for the metrics.

    `algorithm.objective.policy_loss` gives the same under HAPO's settings. Only the ratio has a gradient. A clip_alpha
    of 0 disables the adaptive clipping, an adv_beta of 0 the redistribution; without both it is PPO with a dual clip.

    Args:
        log_probs_N: [N], current policy, differentiable.
        old_log_probs_N: [N], policy before the step's first update.
        advantages_N: [N].
        h_N: [N], entropy modulation in [-1, 1].
        clip_low, clip_high: one number for all tokens, or [N].
        dual_clip: c > 1; a token with negative advantage loses at most c |A|.
        num_tokens: response tokens of the whole mini-batch, over all ranks and micro-batches.
    Returns:
        The loss, and sums over N (not means): `clipped_low`, `clipped_high`, `dual_clipped`, `log_ratio`, `ratio`.
    Raises:
        ValueError: shapes differ, num_tokens is not positive, dual_clip is not greater than 1.
    """
    check_shapes(log_probs=log_probs_N, old_log_probs=old_log_probs_N, advantages=advantages_N, h=h_N)
    check_num_tokens(num_tokens)
    log_ratio_N = log_probs_N - old_log_probs_N
    ratio_N = importance_ratio(log_ratio_N)
    with torch.no_grad():
        low_N, high_N = adaptive_clip_range(h_N, clip_low=clip_low, clip_high=clip_high, alpha=clip_alpha)
        advantages_N = redistribute_advantage(advantages_N, h_N, ratio_N, low_N, high_N, beta=adv_beta)
    losses_N, sums = clipped_surrogate(ratio_N, advantages_N, low_N, high_N, dual_clip=dual_clip)
    sums |= {"log_ratio": log_ratio_N.detach().sum(), "ratio": ratio_N.detach().sum()}
    return losses_N.sum() / num_tokens, sums


def importance_ratio(log_ratio_N: Tensor) -> Tensor:
    """exp of the log-ratio, clamped to +-MAX_LOG_RATIO: the released code does not clamp it, and has NaN gradients
    beyond 88. [N]"""
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, low_N: Tensor, high_N: Tensor, *, dual_clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss of each token with a dual clip [N], and sums for the metrics.

    Only the ratio carries gradient. The loss is homogeneous in the advantages, so any aggregation other than the token
    mean is a non-negative weight of each token on its advantage.

    Args:
        ratio_N: [N], differentiable in the current policy.
        low_N, high_N: [N], the ratio is kept in [1 - low, 1 + high].
        dual_clip: c > 1; a token with negative advantage loses at most c |A|.
    Returns:
        Losses [N], and sums over N (not means): `clipped_low`, `clipped_high`, `dual_clipped`.
    Raises:
        ValueError: shapes differ, dual_clip is not greater than 1.
    """
    check_shapes(ratio=ratio_N, advantages=advantages_N, low=low_N, high=high_N)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * torch.minimum(torch.maximum(ratio_N, 1 - low_N), 1 + high_N)
    pessimistic_N = torch.maximum(unclipped_N, clipped_N)
    bounded_N = torch.minimum(-advantages_N * dual_clip, pessimistic_N)
    losses_N = torch.where(advantages_N < 0, bounded_N, pessimistic_N)
    with torch.no_grad():
        clips_N = clipped_N > unclipped_N
        sums = {
            "clipped_low": (clips_N & (ratio_N < 1)).sum(),
            "clipped_high": (clips_N & (ratio_N > 1)).sum(),
            "dual_clipped": ((pessimistic_N > -advantages_N * dual_clip) & (advantages_N < 0)).sum(),
        }
    return losses_N, sums


def check_num_tokens(num_tokens: int) -> None:
    """Raises ValueError unless the divisor of the loss is positive."""
    if num_tokens <= 0:
        raise ValueError(f"num_tokens is the mini-batch's global token count and must be positive, got {num_tokens}")


def check_shapes(**tensors: Tensor) -> None:
    """Raises ValueError, with all names and shapes, if the tensors do not have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"all must have one shape, got {listed}")
