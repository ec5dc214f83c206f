"""From the trainer's scores to the step's entropy statistics, and from those to the next step's sampler. Pure."""

from __future__ import annotations

import torch

from megatron_hapo.algorithm.methods import enabled_parts, first_answer
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.entropy import entropy_stats
from megatron_hapo.types import AdaptiveTemperature, EntropyStats, TokenScores


def step_statistics(scores: TokenScores, algorithm: AlgorithmConfig) -> EntropyStats:
    """Order statistics of log entropy over all response tokens of the step."""
    settings = algorithm.entropy
    return entropy_stats(
        torch.from_numpy(scores.entropies),
        pivot=settings.pivot, floor=settings.floor, scale_quantile=settings.scale_quantile,
    )  # fmt: skip


def steering(algorithm: AlgorithmConfig, stats: EntropyStats | None) -> AdaptiveTemperature | None:
    """How the statistics of a step steer the sampler of the next; None for the base temperature."""
    if stats is None:
        return None
    return first_answer(part.sampling(stats) for part in enabled_parts(algorithm))
