"""From prompts to scored groups: generation, rewards, and dynamic sampling until there are enough groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_hapo.config import Config, DynamicSamplingConfig
from megatron_hapo.data.sampling import PromptSource, SamplerState
from megatron_hapo.errors import RolloutError
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.types import AdaptiveTemperature, Prompt, Sampling, ScoredGroup

StageClock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The groups that a step trains on."""

    groups: list[ScoredGroup]
    kept_share: float
    """Share of the generated groups that dynamic sampling kept, before the surplus was dropped; 1 without it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the prompts' source says of the prompts that were drawn."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`time/*` of stages that ran beside another step's training."""

    @property
    def details(self) -> dict[str, Any]:
        """What a replay needs besides the groups, as JSON values."""
        return {"kept_share": self.kept_share, "metrics": self.metrics}


class GroupSource(Protocol):
    """Where the groups of each step come from."""

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The groups of this step; called for one step after another."""
        ...

    def state(self) -> SamplerState:
        """Where the sequence of prompts stands, for `restore` and for checkpoints."""
        ...

    def restore(self, state: SamplerState) -> None:
        """Continue from the state of a source of the same prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampledGroups:
    """GroupSource of a run with engines: the next prompts, sampled and scored."""

    config: Config
    pool: RolloutPool
    rewards: RewardPool
    prompts: PromptSource

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The groups of the next prompts."""
        collected = collect_groups(
            self.pool, self.rewards, self.prompts.next, sampling, clock,
            num_groups=self.config.batch.prompts_per_step, dynamic=self.config.dynamic_sampling,
            record=self.prompts.record,
        )  # fmt: skip
        return replace(collected, metrics=self.prompts.metrics())

    def state(self) -> SamplerState:
        """Of the prompts."""
        return self.prompts.state()

    def restore(self, state: SamplerState) -> None:
        """Of the prompts."""
        self.prompts.restore(state)


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


def collect_groups(
    pool: RolloutPool,
    rewards: RewardPool,
    next_prompts: Callable[[int], list[Prompt]],
    sampling: Sampling,
    clock: StageClock,
    *,
    num_groups: int,
    dynamic: DynamicSamplingConfig,
    record: Callable[[Sequence[ScoredGroup]], object] = lambda groups: None,
) -> Collected:
    """`num_groups` scored groups.

    With dynamic sampling (DAPO, arXiv:2503.14476, equation 11) only groups with differing correctness are kept.
    Generation continues, num_groups prompts at a time, until there are enough; the surplus is dropped. `record` gets
    all groups, also those that are dropped.

    Raises:
        RolloutError: max_generation_batches did not yield enough groups.
    """
    kept: list[ScoredGroup] = []
    num_seen = 0
    for generation in range(dynamic.max_generation_batches if dynamic.enabled else 1):
        # Every batch has its own seed: a prompt that comes again must not repeat its responses.
        batch_sampling = replace(sampling, seed=sampling.seed + generation)
        groups = generate_scored(pool, rewards, next_prompts(num_groups), batch_sampling, clock)
        record(groups)
        num_seen += len(groups)
        kept += [group for group in groups if group.informative or not dynamic.enabled]
        if len(kept) >= num_groups:
            return Collected(groups=kept[:num_groups], kept_share=len(kept) / num_seen)
    raise RolloutError(
        f"dynamic sampling: {len(kept)} of {num_seen} groups had responses of differing correctness after "
        f"{dynamic.max_generation_batches} generation batches, but {num_groups} are needed; raise "
        "dynamic_sampling.max_generation_batches, or use easier or harder prompts"
    )
