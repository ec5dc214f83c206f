"""Accuracy on held-out problems, sampled at a fixed temperature and scored without the overlong penalty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.rollout.collect import generate_scored
from megatron_hapo.types import Prompt, Sampling

EVAL_SEED = 1 << 40  # outside the seeds of the training steps


def evaluate(pool: RolloutPool, rewards: RewardPool, prompts: Sequence[Prompt], config: Config) -> dict[str, float]:
    """Means over `eval.samples` responses to each prompt; seeds are always the same, so that steps are comparable."""
    sampling = Sampling(
        samples=config.eval.samples, temperature=config.eval.temperature, top_p=config.eval.top_p,
        max_response_tokens=config.rollout.max_response_tokens, stop_token_ids=config.rollout.stop_token_ids,
        seed=config.seed + EVAL_SEED,
    )  # fmt: skip
    groups = generate_scored(pool, rewards, prompts, sampling, StepClock())
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "eval/accuracy": float(np.mean([score.correct for group in groups for score in group.scores])),
        "eval/response_length": float(np.mean([len(rollout.response_ids) for rollout in rollouts])),
        "eval/truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    }
