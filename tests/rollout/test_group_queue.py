"""What is generated when, and what a step trains on: hand-worked cases, and random schedules against the invariants."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.data.sampling import PromptSampler
from megatron_hapo.errors import RolloutError
from megatron_hapo.rollout.group_queue import GroupQueue
from megatron_hapo.types import GroupRequest
from tests.rollout.grouped import SAMPLING, number_of, numbered_prompts, numbers_of, queue_config, scored

NUM_PROMPTS = 10_000


def open_queue(config: Config, *, shuffle: bool = False) -> GroupQueue:
    return GroupQueue(config, PromptSampler(numbered_prompts(NUM_PROMPTS), seed=0, shuffle=shuffle))


def begin(queue: GroupQueue, step: int) -> None:
    queue.begin(step, replace(SAMPLING, seed=step << 10))


def requested(queue: GroupQueue) -> list[GroupRequest]:
    """All requests that the queue has now."""
    requests = []
    while (request := queue.next_request()) is not None:
        requests.append(request)
    return requests


def finish(queue: GroupQueue, requests: list[GroupRequest], *, version: int, informative: set[int] | None = None):
    for request in requests:
        teaches = informative is None or number_of(request.prompt) in informative
        queue.finished(request, scored(request.prompt, [version], informative=teaches))


def test_on_policy_a_step_gets_the_groups_that_were_requested_in_it_in_their_order() -> None:
    queue = open_queue(queue_config(staleness=0))
    assert queue.next_request() is None  # nothing is known of the weights yet
    for step in (1, 2):
        begin(queue, step)
        requests = requested(queue)
        assert [request.sampling.seed for request in requests] == [step << 10] * 4
        finish(queue, requests[::-1][:3], version=step - 1)
        assert not queue.is_ready()
        finish(queue, requests[:1], version=step - 1)
        assert queue.is_ready()
        collected = queue.take()
        assert numbers_of(collected.groups) == [4 * step - 4 + n for n in range(4)]
        assert collected.metrics["rollout/statistics_lag"] == collected.metrics["rollout/queued_groups"] == 0
        assert queue.next_request() is None
        assert queue.state() == 4 * step


def test_with_staleness_2_three_steps_are_requested_at_once_and_then_one_after_each_sync() -> None:
    queue = open_queue(queue_config(staleness=2))
    begin(queue, 1)
    first = requested(queue)
    assert [number_of(request.prompt) for request in first] == list(range(12))
    assert len({request.sampling.seed for request in first}) == 3
    finish(queue, first, version=0)
    for step in (1, 2, 3):
        if step > 1:
            begin(queue, step)
            assert len(requested(queue)) == 4
        assert queue.is_ready()
        collected = queue.take()
        assert numbers_of(collected.groups) == [4 * step - 4 + n for n in range(4)]
        # sampled with the statistics before step 1, while those of the step before are known
        assert collected.metrics["rollout/statistics_lag"] == step - 1
        assert collected.metrics["rollout/queued_groups"] == 12 - 4 * step


def test_nothing_is_requested_for_steps_beyond_the_last() -> None:
    queue = open_queue(queue_config(staleness=4, steps=2))
    begin(queue, 1)
    assert len(requested(queue)) == 8


def test_a_step_waits_for_groups_that_would_be_too_old_for_the_next() -> None:
    queue = open_queue(queue_config(staleness=1))
    begin(queue, 1)
    first = requested(queue)  # of version 0: 8 groups, for steps 1 and 2
    finish(queue, first[1:5], version=0)
    assert queue.is_ready()  # group 0 may come a step later
    assert numbers_of(queue.take().groups) == [1, 2, 3, 4]
    begin(queue, 2)
    second = requested(queue)
    finish(queue, second, version=1)
    finish(queue, first[5:], version=0)
    assert not queue.is_ready()
    finish(queue, first[:1], version=0)
    assert queue.is_ready()
    assert numbers_of(queue.take().groups) == [0, 5, 6, 7]  # the oldest first


def test_with_drop_a_step_takes_others_and_what_comes_too_late_is_dropped_and_made_up_for() -> None:
    queue = open_queue(queue_config(staleness=1, stale_groups="drop"))
    begin(queue, 1)
    first = requested(queue)
    finish(queue, first[1:5], version=0)
    queue.take()
    begin(queue, 2)
    second = requested(queue)
    finish(queue, first[5:], version=0)
    finish(queue, second[:1], version=1)
    assert queue.is_ready()
    assert numbers_of(queue.take().groups) == [5, 6, 7, 8]
    finish(queue, first[:1], version=0)
    begin(queue, 3)
    third = requested(queue)
    finish(queue, second[1:], version=1)
    assert not queue.is_ready()
    finish(queue, third[:1], version=2)
    collected = queue.take()
    assert numbers_of(collected.groups) == [9, 10, 11, 12]
    assert collected.metrics["rollout/dropped_groups"] == 1
    assert len(third) == 4


def test_the_oldest_of_a_groups_tokens_counts() -> None:
    """A group that was paused holds tokens of several versions."""
    queue = open_queue(queue_config(staleness=1, size=2))
    begin(queue, 1)
    first = requested(queue)
    finish(queue, first[:2], version=0)
    queue.take()
    begin(queue, 2)
    second = requested(queue)
    finish(queue, second, version=1)
    for request in first[2:]:
        queue.finished(request, scored(request.prompt, [0, 1, 1]))
    assert numbers_of(queue.take().groups) == [2, 3]


# ----- dynamic sampling


def dynamic_queue(informative: set[int], *, staleness: int = 0, batches: int = 10) -> list[int]:
    """The numbers of the first step's groups; everything that is requested finishes, batch after batch."""
    dynamic = {"enabled": True, "max_generation_batches": batches}
    queue = open_queue(queue_config(staleness=staleness, dynamic_sampling=dynamic))
    begin(queue, 1)
    while not queue.is_ready():
        finish(queue, requested(queue), version=0, informative=informative)
    collected = queue.take()
    assert collected.kept_share == len(informative) / 12
    return numbers_of(collected.groups)


def test_batches_are_drawn_until_the_step_is_full_and_the_surplus_is_dropped() -> None:
    """The surplus cannot be trained on later: it would be too old."""
    assert dynamic_queue({1, 4, 5, 8, 9, 10}) == [1, 4, 5, 8]
    assert dynamic_queue({1, 4, 9, 11}, batches=3) == [1, 4, 9, 11]
    queue = open_queue(queue_config(staleness=0, dynamic_sampling={"enabled": True}))
    begin(queue, 1)
    finish(queue, first := requested(queue), version=0, informative={0, 1})
    finish(queue, second := requested(queue), version=0, informative={4, 5, 6})
    assert [request.sampling.seed - (1 << 10) for request in (*first, *second)] == [0] * 4 + [1] * 4
    collected = queue.take()
    assert numbers_of(collected.groups) == [0, 1, 4, 5]
    assert (collected.kept_share, collected.metrics["rollout/dropped_groups"]) == (5 / 8, 1)
    assert queue.state() == 8


def test_with_staleness_the_surplus_is_trained_on_later() -> None:
    queue = open_queue(queue_config(staleness=1, dynamic_sampling={"enabled": True}))
    begin(queue, 1)
    finish(queue, requested(queue), version=0, informative={0, 1, 2, 3, 4, 5})
    assert numbers_of(queue.take().groups) == [0, 1, 2, 3]
    begin(queue, 2)
    finish(queue, requested(queue), version=1)
    collected = queue.take()
    assert numbers_of(collected.groups) == [4, 5, 8, 9]
    assert collected.metrics["rollout/dropped_groups"] == 0


def test_generation_is_bounded() -> None:
    with pytest.raises(RolloutError, match="2 of 12 groups had responses of differing correctness after 3 gen"):
        dynamic_queue({1, 4, 13, 14, 15}, batches=3)


# ----- no sample lost or doubled


@pytest.mark.parametrize(
    ("staleness", "policy"), [(0, "wait"), *((n, policy) for n in (1, 2, 4) for policy in ("wait", "drop"))]
)
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_finishing_trains_on_every_prompt_at_most_once_and_on_none_too_old(
    staleness: int, policy: str, seed: int
) -> None:
    """Groups finish in random order, some far later than others; the queue is saved and restored between some steps.

    With `wait` the steps train on the first prompts without gaps.
    """
    rng = np.random.default_rng([seed, staleness])
    settings = {} if policy == "wait" else {"stale_groups": policy}
    config = queue_config(staleness=staleness, steps=30, **settings)
    queue, running = open_queue(config, shuffle=True), {}
    trained: list[int] = []
    dropped = 0.0
    for step in range(1, 31):
        if rng.random() < 0.2:
            state, finished = queue.state(), {group.place: group for group in queue.finished_groups()}
            queue, running = open_queue(config, shuffle=True), {}
            queue.restore(state, finished)
        begin(queue, step)
        while not queue.is_ready():
            # engines ask whenever they have room; one request in eight or so takes long
            for request in requested(queue):
                finishes = step + rng.exponential() * rng.choice([0.3, 0.3, 0.3, 3])
                running[request.sampling.seed, request.prompt.uid] = (finishes, step - 1, request)
            place = min(running, key=lambda place: running[place][0])
            _, version, request = running.pop(place)
            queue.finished(request, scored(request.prompt, [version, step - 1]))
        collected = queue.take()
        dropped += collected.metrics["rollout/dropped_groups"]
        for group in collected.groups:
            assert step - 1 - min(rollout.policy_version for rollout in group.rollouts) <= staleness
        assert len(collected.groups) == 4
        trained += numbers_of(collected.groups)
    assert max(Counter(trained).values()) == 1
    if policy == "wait":
        assert dropped == 0
        first = PromptSampler(numbered_prompts(NUM_PROMPTS), seed=0, shuffle=True).next(len(trained))
        assert sorted(trained) == sorted(number_of(prompt) for prompt in first)
