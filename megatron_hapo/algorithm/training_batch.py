"""From scored groups to the batch that the trainer updates on: advantages, token weights, per-token data. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_hapo.algorithm.methods import enabled_parts, first_answer
from megatron_hapo.algorithm.part import GroupedRewards
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.types import EntropyStats, ScoredGroup, TokenScores, TrainBatch


def training_batch(
    batch: TrainBatch,
    groups: Sequence[ScoredGroup],
    scores: TokenScores,
    stats: EntropyStats,
    algorithm: AlgorithmConfig,
    controls: Mapping[str, float] | None = None,
) -> TrainBatch:
    """The batch with everything that the updates read.

    Args:
        batch: the groups' rollouts in order (`types.pack_rollouts`), all of the step.
        scores: the trainer's, before the step's first update.
        stats: of these scores.
        controls: what controllers set for the step's updates (`controllers.step_controls`).
    """
    scored = replace(batch, old_log_probs=scores.log_probs, stats=stats, controls=controls or {})
    scored = replace(scored, advantages=advantages(scored, groups, scores, algorithm))
    return with_token_data(scored, scores, algorithm)


def advantages(
    batch: TrainBatch, groups: Sequence[ScoredGroup], scores: TokenScores, algorithm: AlgorithmConfig
) -> np.ndarray:
    """The advantage of every response. [B] float32"""
    parts = enabled_parts(algorithm)
    rewards_B = torch.tensor([score.reward for group in groups for score in group.scores], dtype=torch.float64)
    for part in parts:
        rewards_B = part.rewards(batch, scores, rewards_B)
    rewards = GroupedRewards(
        rewards=rewards_B,
        lengths=torch.from_numpy(batch.response_lengths),
        groups=torch.tensor([index for index, group in enumerate(groups) for _ in group.rollouts]),
        entropies=torch.from_numpy(scores.entropies),
    )
    advantages_B = first_answer(part.advantages(rewards) for part in parts)
    assert advantages_B is not None, "algorithm.advantage is a choice that a part must implement"
    return advantages_B.float().numpy()


def with_token_data(batch: TrainBatch, scores: TokenScores, algorithm: AlgorithmConfig) -> TrainBatch:
    """The batch with the token weights and the per-token data of the method's parts.

    Weights here do not depend on the mini-batch, such as a token filter and an importance correction; None without any.

    Args:
        batch: all responses of the step, with advantages, old log-probs and statistics.
    """
    parts = enabled_parts(algorithm)
    weights = [weights_N for part in parts if (weights_N := part.token_weights(batch, scores)) is not None]
    data = [(name, data_N) for part in parts for name, data_N in part.token_data(batch, scores).items()]
    names = [name for name, _ in data]
    assert len(set(names)) == len(names), f"several parts use one name of per-token data: {names}"
    return replace(
        batch,
        weights=math.prod(weights[1:], start=weights[0]).numpy() if weights else None,
        token_data={name: data_N.numpy() for name, data_N in data},
    )
