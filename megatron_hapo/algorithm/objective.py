"""The loss of one micro-batch: a surrogate of ratio and advantages, into which the parts of the run's method hook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.algorithm.methods import enabled_parts, first_answer
from megatron_hapo.algorithm.microbatches import MicroBatch
from megatron_hapo.algorithm.part import LossTokens, Part
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.loss import check_num_tokens, check_shapes, importance_ratio
from megatron_hapo.types import EntropyStats

UPDATED_TOKENS = ("token_advantages", "importance_ratios", "clip_low", "clip_high")
"""What `policy_loss` returns of each token with `keep_tokens`, besides `h`."""


def policy_loss(
    log_probs_N: Tensor,
    entropies_N: Tensor,
    microbatch: MicroBatch,
    algorithm: AlgorithmConfig,
    *,
    num_tokens: int,
    stats: EntropyStats | None = None,
    controls: Mapping[str, float] | None = None,
    cp_group: dist.ProcessGroup | None = None,
    keep_tokens: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the mini-batch's loss, sum / num_tokens, and sums over its tokens for the metrics.

    Only the log-ratio and what `loss_term` returns carry gradient: clip ranges and advantages are constants.

    Args:
        log_probs_N: [N] current policy, differentiable.
        entropies_N: [N] current policy, nats.
        microbatch: with advantages and old_log_probs.
        num_tokens: response tokens of the whole mini-batch, over all ranks and micro-batches.
        stats: of the step, for `algorithm.entropy.source: current`.
        controls: what controllers set for the step's updates.
        cp_group: ranks that hold the other tokens of this micro-batch; all of them call this.
        keep_tokens: also return what the loss used of each token, for records.
    Returns:
        The loss, and sums over N (not means): `loss`, `log_ratio`, `ratio`, those of the surrogate and of
        `Part.sums`. With `keep_tokens` also [N] each, float32: `token_advantages`, `importance_ratios`, `clip_low`,
        `clip_high`, and `h` if the method has one.
    Raises:
        ValueError: shapes differ, or num_tokens is not positive.
    """
    check_num_tokens(num_tokens)
    check_shapes(log_probs=log_probs_N, **microbatch.per_token)
    parts = enabled_parts(algorithm)
    tokens = LossTokens(
        log_probs=log_probs_N, entropies=entropies_N, microbatch=microbatch, stats=stats, cp_group=cp_group,
        controls=controls or {},
    )  # fmt: skip
    with torch.no_grad():
        for part in parts:
            tokens = replace(tokens, microbatch=tokens.microbatch.with_per_token(part.current_token_data(tokens)))
    log_ratio_N = first_answer(part.log_ratio(tokens) for part in parts)
    assert log_ratio_N is not None, "algorithm.ratio is a choice that a part must implement"
    ratio_N = importance_ratio(log_ratio_N)
    with torch.no_grad():
        low_N, high_N = _clip_range(parts, tokens, algorithm)
        advantages_N = _token_advantages(parts, tokens, ratio_N, low_N, high_N)
    surrogate = first_answer(part.surrogate(tokens, ratio_N, advantages_N, low_N, high_N) for part in parts)
    assert surrogate is not None, "algorithm.surrogate is a choice that a part must implement"
    losses_N, sums = surrogate
    loss = losses_N.sum() / num_tokens
    for part in parts:
        if (term := part.loss_term(tokens)) is not None:
            loss = loss + term / num_tokens
    with torch.no_grad():
        sums = {"loss": loss.detach(), **sums, "log_ratio": log_ratio_N.sum(), "ratio": ratio_N.sum()}
        for part in parts:
            sums |= part.sums(tokens, ratio_N.detach(), advantages_N)
        if not keep_tokens:
            return loss, sums
        kept = dict(zip(UPDATED_TOKENS, (advantages_N, ratio_N.detach(), low_N, high_N), strict=True))
        h_N = tokens.microbatch.get("modulation")
        return loss, sums | kept | ({} if h_N is None else {"h": h_N})


def _clip_range(parts: list[Part], tokens: LossTokens, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    low_N = torch.full_like(tokens.log_probs, algorithm.clip_low)
    high_N = torch.full_like(tokens.log_probs, algorithm.clip_high)
    for part in parts:
        low_N, high_N = part.clip_range(tokens, low_N, high_N)
    return low_N, high_N


def _token_advantages(parts: list[Part], tokens: LossTokens, ratio_N: Tensor, low_N: Tensor, high_N: Tensor) -> Tensor:
    advantages_N, weights_N = tokens.microbatch["advantages"], tokens.microbatch.get("weights")
    if weights_N is not None:
        advantages_N = advantages_N * weights_N
    for part in parts:
        advantages_N = part.token_advantages(tokens, advantages_N, ratio_N, low_N, high_N)
    return advantages_N
