"""Dynamic sampling with a scripted pool and scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import DynamicSamplingConfig
from megatron_hapo.errors import RolloutError
from megatron_hapo.observe.step_metrics import group_metrics
from megatron_hapo.rollout.collect import collect_groups
from megatron_hapo.types import Prompt, Rollout, Sampling, Score, ScoredGroup


def _rollout(prompt: Prompt) -> Rollout:
    one = np.zeros(1, np.float32)
    return Rollout(
        prompt=prompt,
        response_ids=one.astype(np.int32),
        rollout_log_probs=one,
        temperatures=one + 1,
        finish_reason="stop",
        policy_versions=np.zeros(1, np.int32),
    )


class Pool:
    """Answers every prompt with two rollouts and records the calls."""

    def __init__(self) -> None:
        self.calls: list[Sampling] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        self.calls.append(sampling)
        return [[_rollout(prompt) for _ in range(sampling.samples)] for prompt in prompts]

    def update_weights(self, buckets: Iterator[Any], *, policy_version: int) -> None:
        raise AssertionError("not used")


class Rewards:
    """Differing rewards for prompts whose number is in `informative`."""

    def __init__(self, informative: set[int]):
        self.informative = informative

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        right = [index % 2 == 0 and int(r.prompt.uid) in self.informative for index, r in enumerate(rollouts)]
        return [Score(reward=1.0 if yes else -1.0, correctness=float(yes)) for yes in right]


def collect(informative: set[int], *, num_groups: int = 4, **dynamic: Any):
    pool, counter = Pool(), iter(range(1000))

    def next_prompts(count: int) -> list[Prompt]:
        numbers = [next(counter) for _ in range(count)]
        ids = np.ones(1, np.int32)
        return [Prompt(uid=str(n), token_ids=ids, ground_truth="", data_source="") for n in numbers]

    collected = collect_groups(
        pool, Rewards(informative), next_prompts, Sampling(samples=2, temperature=1.0, max_response_tokens=4, seed=7),  # type: ignore[arg-type]
        lambda _: nullcontext(), num_groups=num_groups, dynamic=DynamicSamplingConfig(**dynamic),
    )  # fmt: skip
    metrics = group_metrics(collected.groups) | {"rollout/kept_groups": collected.kept_share}
    return pool, [int(group.rollouts[0].prompt.uid) for group in collected.groups], metrics


def test_without_dynamic_sampling_one_batch_is_taken_as_it_is():
    pool, numbers, metrics = collect({1})
    assert numbers == [0, 1, 2, 3]
    assert len(pool.calls) == 1
    assert metrics["rollout/kept_groups"] == 1
    assert metrics["rollout/informative_groups"] == 0.25


def test_generation_goes_on_until_the_batch_is_full_and_the_surplus_is_dropped():
    pool, numbers, metrics = collect({1, 4, 5, 8, 9, 10}, enabled=True)
    assert numbers == [1, 4, 5, 8]
    assert metrics["rollout/kept_groups"] == 6 / 12
    assert metrics["rollout/informative_groups"] == 1
    assert [call.seed for call in pool.calls] == [7, 8, 9]
    assert metrics["num_response_tokens"] == 8


def test_responses_that_differ_in_length_alone_are_not_informative():
    """DAPO's condition is on right and wrong; the overlong penalty makes rewards differ among wrong ones too."""
    rollout = _rollout(Prompt(uid="0", token_ids=np.ones(1, np.int32), ground_truth="", data_source=""))
    wrong, long = Score(reward=-1.0, correctness=0.0), Score(reward=-1.5, correctness=0.0)
    assert not ScoredGroup([rollout, rollout], [wrong, long]).informative
    assert ScoredGroup([rollout, rollout], [wrong, Score(reward=-1.0, correctness=0.5)]).informative


def test_generation_is_bounded():
    with pytest.raises(RolloutError, match="2 of 12 groups had responses of differing correctness after 3 gen"):
        collect({1, 4, 13, 14, 15}, enabled=True, max_generation_batches=3)
    assert collect({1, 4, 9, 11}, enabled=True, max_generation_batches=3)[1] == [1, 4, 9, 11]
