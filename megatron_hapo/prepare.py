"""Scored groups to the batches that the trainer updates on: advantages, modulation, mini-batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_hapo.advantage import group_mean_advantage, token_level_group_average
from megatron_hapo.config import AlgorithmConfig, BatchConfig, EntropyConfig
from megatron_hapo.entropy import EntropyStats, entropy_modulation, entropy_stats
from megatron_hapo.rollout import ScoredGroup
from megatron_hapo.types import TokenScores, TrainBatch, pack_rollouts


def with_advantages(groups: Sequence[ScoredGroup], algorithm: AlgorithmConfig) -> TrainBatch:
    """All rollouts of a step with the advantages of their groups, not yet scored by the trainer."""
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


def with_modulation(batch: TrainBatch, scores: TokenScores, settings: EntropyConfig) -> tuple[TrainBatch, EntropyStats]:
    """The batch with old log-probs and h, and the step's entropy statistics over all its response tokens."""
    entropies = torch.from_numpy(scores.entropies)
    stats = entropy_stats(entropies, pivot=settings.pivot, floor=settings.floor)
    h = entropy_modulation(entropies, stats, sign=settings.sign, floor=settings.floor)
    return replace(batch, old_log_probs=scores.log_probs, modulation=h.numpy()), stats


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
        "entropy/min": float(np.exp(stats.log_min)),
        "entropy/max": float(np.exp(stats.log_max)),
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
    }
