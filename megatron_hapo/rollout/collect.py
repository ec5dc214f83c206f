"""Prompts to scored groups: generation, rewards, and dynamic sampling until there are enough groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_hapo.config import AlgorithmConfig, DynamicSamplingConfig
from megatron_hapo.errors import RolloutError
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.types import AdaptiveTemperature, Prompt, Sampling, ScoredGroup

if TYPE_CHECKING:
    from megatron_hapo.entropy import EntropyStats

StageClock = Callable[[str], AbstractContextManager[None]]


def generate_scored(
    pool: RolloutPool, rewards: RewardPool, prompts: Sequence[Prompt], sampling: Sampling, clock: StageClock
) -> list[ScoredGroup]:
    """One scored group a prompt."""
    with clock("rollout"):
        groups = pool.generate(prompts, sampling)
    with clock("reward"):
        scores = iter(rewards.score([rollout for group in groups for rollout in group]))
        return [ScoredGroup(group, [next(scores) for _ in group]) for group in groups]


def collect_groups(
    pool: RolloutPool,
    rewards: RewardPool,
    next_prompts: Callable[[int], list[Prompt]],
    sampling: Sampling,
    clock: StageClock,
    *,
    num_groups: int,
    dynamic: DynamicSamplingConfig,
) -> tuple[list[ScoredGroup], dict[str, float]]:
    """`num_groups` scored groups and how they came about.

    With dynamic sampling (DAPO, arXiv:2503.14476, equation 11) only groups with differing correctness are kept;
    generation goes on, a batch of num_groups prompts at a time, until there are enough, and the surplus is dropped.

    Raises:
        RolloutError: max_generation_batches did not give enough groups.
    """
    kept: list[ScoredGroup] = []
    num_seen = 0
    for generation in range(dynamic.max_generation_batches if dynamic.enabled else 1):
        # A batch of its own seed: a prompt that comes again must not repeat its responses.
        batch_sampling = replace(sampling, seed=sampling.seed + generation)
        groups = generate_scored(pool, rewards, next_prompts(num_groups), batch_sampling, clock)
        num_seen += len(groups)
        kept += [group for group in groups if group.informative or not dynamic.enabled]
        if len(kept) >= num_groups:
            return kept[:num_groups], _metrics(kept[:num_groups], kept_share=len(kept) / num_seen)
    raise RolloutError(
        f"dynamic sampling: {len(kept)} of {num_seen} groups had responses of differing correctness after "
        f"{dynamic.max_generation_batches} generation batches, {num_groups} are needed; raise "
        "dynamic_sampling.max_generation_batches, or use easier or harder prompts"
    )


def steering(algorithm: AlgorithmConfig, stats: EntropyStats | None) -> AdaptiveTemperature | None:
    """What statistics ask of the sampler; None for the base temperature."""
    if not algorithm.adaptive_temperature.enabled or stats is None:
        return None
    tau, entropy = algorithm.adaptive_temperature.tau, algorithm.entropy
    return AdaptiveTemperature(stats=stats, tau=tau, sign=entropy.sign, floor=entropy.floor)


def staleness(groups: Sequence[ScoredGroup], step: int) -> float:
    """Steps by which the weights behind a token of the groups lag behind those of this step's start, on average."""
    versions = np.concatenate([rollout.policy_versions for group in groups for rollout in group.rollouts])
    return float(np.mean(step - 1 - versions))


def _metrics(groups: list[ScoredGroup], *, kept_share: float) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    temperatures = np.concatenate([rollout.temperatures for rollout in rollouts])
    return {
        "reward/mean": float(np.mean([score.reward for score in scores])),
        "reward/accuracy": float(np.mean([score.correct for score in scores])),
        "reward/failures": sum(score.failure is not None for score in scores),
        "rollout/kept_groups": kept_share,
        "rollout/informative_groups": float(np.mean([group.informative for group in groups])),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "temperature/min": float(temperatures.min()),
        "temperature/mean": float(temperatures.mean()),
        "temperature/max": float(temperatures.max()),
        "num_response_tokens": float(lengths.sum()),
    }
