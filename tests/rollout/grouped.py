"""Groups, configs and prompts for tests of the queue: a response's tokens say nothing, its versions do."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.types import KeptTokens, Prompt, Rollout, Sampling, Score, ScoredGroup

SAMPLES = 2
SAMPLING = Sampling(samples=SAMPLES, temperature=1.0, max_response_tokens=4, seed=0)


def queue_config(*, staleness: int, size: int = 4, steps: int = 8, **settings: Any) -> Config:
    """A run of `size` prompts a step; `settings` are sections, `stale_groups` is that of `async`."""
    values: dict[str, Any] = {
        "name": "queue", "steps": steps, "device": "cpu", "model": {"path": "model"},
        "batch": {"prompts_per_step": size, "samples_per_prompt": SAMPLES, "prompts_per_minibatch": size},
        "rollout": {"max_prompt_tokens": 8, "max_response_tokens": 8, "kv_cache_tokens": 64},
        "algorithm": {"importance_correction": {"level": "token"}},
        "async": {"max_staleness": staleness}, "data": {"train": {"type": "arithmetic", "size": 4}},
    }  # fmt: skip
    if policy := settings.pop("stale_groups", None):
        values["async"]["stale_groups"] = policy
    return Config.model_validate(values | settings)


def numbered_prompts(count: int) -> list[Prompt]:
    """Prompts with the uids s/0, s/1, and so on."""
    ids = np.ones(1, np.int32)
    return [Prompt(uid=f"s/{n}", token_ids=ids, ground_truth="", data_source="") for n in range(count)]


def number_of(prompt: Prompt) -> int:
    """Of a numbered prompt."""
    return int(prompt.uid.removeprefix("s/"))


def rollouts_of(prompt: Prompt, versions: list[int], *, samples: int = SAMPLES, cut: bool = False) -> list[Rollout]:
    """Responses whose tokens were sampled from weights of these versions."""
    length = len(versions)
    kept = KeptTokens(np.arange(2 * length, dtype=np.int32), np.full(length, 2, np.int32)) if cut else None
    return [
        Rollout(
            prompt=prompt, response_ids=np.full(length, sample, np.int32),
            rollout_log_probs=np.full(length, -0.1 * sample, np.float32), temperatures=np.ones(length, np.float32),
            policy_versions=np.array(versions, np.int32), finish_reason="stop", kept=kept,
        )
        for sample in range(samples)
    ]  # fmt: skip


def scored(prompt: Prompt, versions: list[int], *, informative: bool = True) -> ScoredGroup:
    """A group; with different rewards if it is informative."""
    rollouts = rollouts_of(prompt, versions)
    right = [float(informative and index == 0) for index in range(len(rollouts))]
    return ScoredGroup(rollouts, [Score(reward=2 * one - 1, correctness=one) for one in right])


def numbers_of(groups: list[ScoredGroup]) -> list[int]:
    """The numbers of the groups' prompts."""
    return [number_of(group.rollouts[0].prompt) for group in groups]
