"""Scored groups to the batches that the trainer updates on: advantages, modulation, weights, mini-batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_hapo.advantage import group_mean_advantage, token_level_group_average
from megatron_hapo.algorithm.methods.archer import reasoning_mask
from megatron_hapo.algorithm.methods.dapo import token_mean_weights
from megatron_hapo.algorithm.methods.dr_grpo import fixed_length_weights
from megatron_hapo.algorithm.methods.edge_grpo import entropy_driven_advantage
from megatron_hapo.algorithm.methods.forking_tokens import forking_weights
from megatron_hapo.algorithm.methods.grpo import sequence_mean_weights
from megatron_hapo.algorithm.methods.importance import importance_weights
from megatron_hapo.config import AlgorithmConfig, BatchConfig
from megatron_hapo.entropy import EntropyStats, entropy_modulation, entropy_stats
from megatron_hapo.types import ScoredGroup, TokenScores, TrainBatch, pack_rollouts

MISMATCH_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}


def with_advantages(groups: Sequence[ScoredGroup], algorithm: AlgorithmConfig) -> TrainBatch:
    """All rollouts of a step with the advantages of their groups, not yet scored by the trainer.

    `entropy_driven` advantages need the trainer's entropies: they start as GRPO's, and `with_scores` completes them.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([score.reward for group in groups for score in group.scores], dtype=torch.float64)
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    group_ids = torch.tensor([index for index, group in enumerate(groups) for _ in group.rollouts])
    if algorithm.advantage == "token_level_group_average":
        advantages = token_level_group_average(
            rewards, lengths, group_ids, norm_by_std=algorithm.norm_by_std, fallback=algorithm.advantage_fallback
        )
    else:
        advantages = group_mean_advantage(rewards, lengths, group_ids, norm_by_std=algorithm.norm_by_std)
    return pack_rollouts(rollouts, advantages.numpy())


def with_scores(
    batch: TrainBatch, scores: TokenScores, algorithm: AlgorithmConfig, *, group_size: int
) -> tuple[TrainBatch, EntropyStats]:
    """The batch with all that the old policy's log-probs and entropies say, and the step's entropy statistics.

    Args:
        batch: of the whole step, groups of group_size responses one after another.
    """
    settings = algorithm.entropy
    entropies_N, lengths_B = torch.from_numpy(scores.entropies), torch.from_numpy(batch.response_lengths)
    stats = entropy_stats(
        entropies_N, pivot=settings.pivot, floor=settings.floor, scale_quantile=settings.scale_quantile
    )
    h_N = entropy_modulation(entropies_N, stats, sign=settings.sign, floor=settings.floor)
    advantages = batch.advantages
    if algorithm.advantage == "entropy_driven":
        groups_B = torch.arange(len(batch)) // group_size
        advantages = entropy_driven_advantage(torch.from_numpy(advantages), entropies_N, lengths_B, groups_B).numpy()
    reasoning = None
    if algorithm.dual_constraint.enabled:
        reasoning = reasoning_mask(entropies_N, lengths_B, quantile=algorithm.dual_constraint.quantile).numpy()
    weights_N = _step_weights(batch, scores, algorithm)
    scored = replace(
        batch,
        advantages=advantages,
        old_log_probs=scores.log_probs,
        modulation=h_N.numpy(),
        weights=None if weights_N is None else weights_N.numpy(),
        reasoning=reasoning,
        stats=stats,
    )
    return scored, stats


def _step_weights(batch: TrainBatch, scores: TokenScores, algorithm: AlgorithmConfig) -> Tensor | None:
    """Token weights that do not depend on the mini-batch: token filter and importance correction. [N]"""
    weights_N = None
    correction = algorithm.importance_correction
    if correction.level != "none":
        weights_N = importance_weights(
            torch.from_numpy(scores.log_probs),
            torch.from_numpy(batch.rollout_log_probs),
            torch.from_numpy(batch.response_lengths),
            level=correction.level,
            mode=correction.mode,
            max_weight=correction.max_weight,
        )
    if algorithm.forking_tokens.enabled:
        forking_N = forking_weights(torch.from_numpy(scores.entropies), share=algorithm.forking_tokens.share)
        weights_N = forking_N if weights_N is None else weights_N * forking_N
    return weights_N


def minibatches(
    batch: TrainBatch, algorithm: AlgorithmConfig, sizes: BatchConfig, *, max_tokens: int, seed: int, step: int
) -> list[TrainBatch]:
    """The step's mini-batches with the token weights of the chosen aggregation, which counts within a mini-batch.

    Args:
        batch: scored, of the whole step.
        max_tokens: longest response allowed, the constant of `sequence_mean_token_sum_norm`.
    """
    parts = [batch.select(rows) for rows in minibatch_rows(sizes, seed=seed, step=step)]
    if algorithm.aggregation == "token_mean":
        return parts
    return [_with_aggregation(part, algorithm.aggregation, max_tokens) for part in parts]


def _with_aggregation(part: TrainBatch, aggregation: str, max_tokens: int) -> TrainBatch:
    weights_N = aggregation_weights(torch.from_numpy(part.response_lengths), aggregation, max_tokens=max_tokens).numpy()
    return replace(part, weights=weights_N if part.weights is None else part.weights * weights_N)


def aggregation_weights(lengths_B: Tensor, aggregation: str, *, max_tokens: int) -> Tensor:
    """Token weights that turn the loss's sum / (number of tokens) into another aggregation. [N] float32"""
    if aggregation == "sequence_mean_token_mean":
        return sequence_mean_weights(lengths_B)
    if aggregation == "sequence_mean_token_sum_norm":
        return fixed_length_weights(lengths_B, max_tokens=max_tokens)
    return token_mean_weights(lengths_B)


def minibatch_rows(batch: BatchConfig, *, seed: int, step: int) -> list[np.ndarray]:
    """Rows of each mini-batch: whole groups, in an order that depends on (seed, step) alone."""
    order = np.random.default_rng([seed % 2**64, step]).permutation(batch.prompts_per_step)
    rows = order[:, None] * batch.samples_per_prompt + np.arange(batch.samples_per_prompt)
    return [part.ravel() for part in np.split(rows, batch.prompts_per_step // batch.prompts_per_minibatch)]


def entropy_metrics(scores: TokenScores, stats: EntropyStats) -> dict[str, float]:
    """Nats, at the base temperature."""
    return {
        "entropy/mean": float(scores.entropies.mean()),
        "entropy/pivot": float(np.exp(stats.pivot)),
        "entropy/min": float(scores.entropies.min()),
        "entropy/max": float(scores.entropies.max()),
    }


def weight_metrics(batch: TrainBatch) -> dict[str, float]:
    """The step's token weights, where the method has any."""
    if batch.weights is None:
        return {}
    return {
        "weights/mean": float(batch.weights.mean()),
        "weights/max": float(batch.weights.max()),
        "weights/zero_fraction": float((batch.weights == 0).mean()),
    }


def mismatch_metrics(batch: TrainBatch, scores: TokenScores) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's at the same temperature."""
    difference = scores.rollout_temperature_log_probs - batch.rollout_log_probs
    # k3 estimate of KL(engine || trainer) from the engine's samples, never negative: E[r - 1 - log r]
    kl = np.expm1(difference) - difference
    return {
        "rollout/logprob_abs_diff": float(np.abs(difference).mean()),
        "rollout/logprob_abs_diff_max": float(np.abs(difference).max()),
        "rollout/mismatch_kl": float(kl.mean()),
        **{f"rollout/mismatch_kl_{name}": float(np.quantile(kl, q)) for name, q in MISMATCH_QUANTILES.items()},
    }
