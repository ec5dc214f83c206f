"""The loss of one micro-batch under the run's algorithm: the switches of the config around the clipped objective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.algorithm.batching import MicroBatch
from megatron_hapo.algorithm.methods.archer import kl_to_old_policy
from megatron_hapo.algorithm.methods.gspo import sequence_log_ratio
from megatron_hapo.algorithm.methods.hapo import current_modulation
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.entropy import EntropyStats
from megatron_hapo.loss import hapo_loss


def policy_loss(
    log_probs_N: Tensor,
    entropies_N: Tensor,
    microbatch: MicroBatch,
    algorithm: AlgorithmConfig,
    *,
    num_tokens: int,
    stats: EntropyStats | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the mini-batch's loss, and sums over its tokens for the metrics.

    Args:
        log_probs_N: [N] current policy, differentiable.
        entropies_N: [N] current policy, nats; no gradient is taken through them.
        num_tokens: response tokens of the whole mini-batch.
        stats: of the step, for `algorithm.entropy.source: current`.
        cp_group: ranks that hold the other tokens of this micro-batch; all of them call this.
    """
    old_log_probs_N = microbatch.old_log_probs
    assert old_log_probs_N is not None, "update needs a scored batch"
    weighted_N = microbatch.advantages if microbatch.weights is None else microbatch.advantages * microbatch.weights
    clip_low, clip_high = _clip_bounds(microbatch, algorithm)
    if algorithm.ratio == "sequence":
        ratio_log_probs_N = sequence_log_ratio(
            log_probs_N, old_log_probs_N, microbatch.response_rows, num_rows=len(microbatch.rows), cp_group=cp_group
        )
        ratio_old_N = torch.zeros_like(old_log_probs_N)
    else:
        ratio_log_probs_N, ratio_old_N = log_probs_N, old_log_probs_N
    loss, sums = hapo_loss(
        ratio_log_probs_N,
        ratio_old_N,
        weighted_N,
        _modulation(entropies_N, microbatch, algorithm, stats),
        clip_low=clip_low,
        clip_high=clip_high,
        clip_alpha=algorithm.adaptive_clip.alpha if algorithm.adaptive_clip.enabled else 0.0,
        adv_beta=algorithm.redistribution.beta if algorithm.redistribution.enabled else 0.0,
        dual_clip=algorithm.dual_clip,
        num_tokens=num_tokens,
    )
    if algorithm.dual_constraint.enabled:
        loss = loss + algorithm.dual_constraint.kl * _knowledge_kl(log_probs_N, microbatch) / num_tokens
    return loss, {"loss": loss.detach(), **sums}


def _modulation(
    entropies_N: Tensor, microbatch: MicroBatch, algorithm: AlgorithmConfig, stats: EntropyStats | None
) -> Tensor:
    settings = algorithm.entropy
    if settings.source == "old" or not (algorithm.adaptive_clip.enabled or algorithm.redistribution.enabled):
        assert microbatch.modulation is not None, "update needs the modulation"
        return microbatch.modulation
    return current_modulation(
        entropies_N, stats, source=settings.source, pivot=settings.pivot, sign=settings.sign, floor=settings.floor,
        scale_quantile=settings.scale_quantile,
    )  # fmt: skip


def _clip_bounds(microbatch: MicroBatch, algorithm: AlgorithmConfig) -> tuple[float | Tensor, float | Tensor]:
    wide = algorithm.dual_constraint
    if not wide.enabled:
        return algorithm.clip_low, algorithm.clip_high
    assert microbatch.reasoning is not None, "dual_constraint needs the reasoning tokens"
    low_N = torch.where(microbatch.reasoning, wide.clip_low, algorithm.clip_low)
    high_N = torch.where(microbatch.reasoning, wide.clip_high, algorithm.clip_high)
    return low_N, high_N


def _knowledge_kl(log_probs_N: Tensor, microbatch: MicroBatch) -> Tensor:
    """Weighted sum of the KL over the knowledge tokens."""
    assert microbatch.old_log_probs is not None
    assert microbatch.reasoning is not None
    kl_N = kl_to_old_policy(log_probs_N, microbatch.old_log_probs).where(~microbatch.reasoning, 0)
    return (kl_N if microbatch.weights is None else kl_N * microbatch.weights).sum()
