"""From prompts to scored groups: what a step gets, how it is sampled, and one call that samples and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.data.sampling import SamplerState
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.types import AdaptiveTemperature, Prompt, Sampling, ScoredGroup

StageClock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The groups that a step trains on."""

    groups: list[ScoredGroup]
    kept_share: float
    """Share of the groups generated since the step before that dynamic sampling kept; 1 without it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the prompts' source says of the prompts that were drawn, and the state of the queue."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`time/*` of stages that ran in other threads since the step before."""

    @property
    def details(self) -> dict[str, Any]:
        """What a replay needs besides the groups, as JSON values."""
        return {"kept_share": self.kept_share, "metrics": self.metrics}


class GroupSource(Protocol):
    """Where the groups of each step come from."""

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The groups of this step; called for one step after another.

        Args:
            sampling: as the newest weights and statistics, those of the step before, require.
        """
        ...

    def settle(self, clock: StageClock) -> None:
        """Returns when nothing is being generated, and starts nothing before the next `collect`."""
        ...

    def state(self) -> SamplerState:
        """Where the sequence of prompts stands, for `restore` and for checkpoints."""
        ...

    def finished_groups(self) -> dict[str, np.ndarray]:
        """Finished groups that no step has taken, as arrays for `restore` and for checkpoints."""
        ...

    def restore(self, state: SamplerState, finished: Mapping[str, np.ndarray]) -> None:
        """Continue from state and finished groups of a source of the same prompts."""
        ...


def training_sampling(config: Config, *, step: int, adaptive: AdaptiveTemperature | None) -> Sampling:
    """How a training step samples; every step has seeds of its own."""
    rollout = config.rollout
    return Sampling(
        samples=config.batch.samples_per_prompt, temperature=rollout.temperature,
        max_response_tokens=rollout.max_response_tokens, stop_token_ids=rollout.stop_token_ids,
        top_p=rollout.top_p, top_k=rollout.top_k, keep_cut=rollout.cuts, keep_routes=rollout.replay_routes,
        seed=(config.seed << 50) + (step << 10), adaptive=adaptive,
    )  # fmt: skip


def generate_scored(
    pool: RolloutPool, rewards: RewardPool, prompts: Sequence[Prompt], sampling: Sampling, clock: StageClock
) -> list[ScoredGroup]:
    """One scored group for each prompt, in the prompts' order."""
    with clock("rollout"):
        groups = pool.generate(prompts, sampling)
    with clock("reward"):
        scores = iter(rewards.score([rollout for group in groups for rollout in group]))
        return [ScoredGroup(group, [next(scores) for _ in group]) for group in groups]
