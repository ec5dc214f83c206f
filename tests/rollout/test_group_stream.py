"""The threads behind a step's groups: what runs beside training, where failures are raised, what a resume has."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from megatron_hapo.data.sampling import PromptSampler
from megatron_hapo.errors import RolloutError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.rollout.collect import Collected
from megatron_hapo.rollout.group_stream import GroupStream
from megatron_hapo.types import GroupRequest, Rollout, Score
from tests.rollout.grouped import SAMPLING, number_of, numbered_prompts, numbers_of, queue_config, rollouts_of
from tests.time_limits import patient


class Pool:
    """Generates group after group, as far as it is allowed; `version` is that of its weights."""

    def __init__(self, allowed: int = 10**9):
        self.version, self.generated = 0, []
        self.waits_for_sync = False
        self.allowed = threading.Semaphore(allowed)

    def allow(self, count: int) -> None:
        self.allowed.release(count)

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        while (request := requests()) is not None:
            assert self.allowed.acquire(timeout=patient(60))
            self.generated.append(number_of(request.prompt))
            yield request, rollouts_of(request.prompt, [self.version])


class Rewards:
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(reward=1.0, correctness=1.0) for _ in rollouts]


def open_stream(pool: Any, rewards: Any = None, *, staleness: int, restore: Any = None, **settings: Any) -> Any:
    prompts = PromptSampler(numbered_prompts(40), seed=0, shuffle=False)
    config = queue_config(staleness=staleness, **settings)
    return closing(GroupStream(config, pool, rewards or Rewards(), prompts, restore_engines=restore or (lambda: None)))


def collect(stream: GroupStream, step: int) -> tuple[Collected, StepClock]:
    clock = StepClock()
    return stream.collect(step, replace(SAMPLING, seed=step << 10), clock), clock


def test_on_policy_nothing_is_generated_before_it_is_requested() -> None:
    pool = Pool()
    with open_stream(pool, staleness=0) as stream:
        for step in (1, 2):
            collected, clock = collect(stream, step)
            pool.version = step
            assert numbers_of(collected.groups) == [4 * step - 4 + n for n in range(4)]
            assert clock.metrics().keys() == {"time/rollout_wait", "time/step"}
            assert collected.seconds.keys() == {"time/rollout", "time/reward"}
            stream.settle(clock)
            assert pool.generated == list(range(4 * step))
            assert stream.state() == 4 * step


def test_with_staleness_the_next_groups_come_while_this_step_trains_and_settle_lets_none_start() -> None:
    pool = Pool(allowed=4)
    with open_stream(pool, staleness=1) as stream:
        assert numbers_of(collect(stream, 1)[0].groups) == [0, 1, 2, 3]
        settled = threading.Thread(target=stream.settle, args=(StepClock(),))
        settled.start()
        settled.join(0.2)
        assert settled.is_alive()  # group 4 is being generated
        pool.allow(1)
        settled.join(patient(60))
        assert not settled.is_alive()
        assert pool.generated == [0, 1, 2, 3, 4]
        pool.version = 1
        pool.allow(100)
        collected = collect(stream, 2)[0]
        assert numbers_of(collected.groups) == [4, 5, 6, 7]
        assert [group.rollouts[0].policy_version for group in collected.groups] == [0, 1, 1, 1]


class FailingRewards:
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        raise RolloutError("judge: gone")


class DyingPool(Pool):
    """Its engine dies after the groups that are allowed."""

    def stream(self, requests: Callable[[], GroupRequest | None]) -> Iterator[tuple[GroupRequest, list[Rollout]]]:
        for _ in range(4):
            yield (request := requests()), rollouts_of(request.prompt, [self.version])
        self.allowed.acquire()
        raise RolloutError("engine 0: the process died")


def test_what_fails_in_a_thread_is_raised_where_groups_are_awaited() -> None:
    with open_stream(Pool(), FailingRewards(), staleness=1) as stream, pytest.raises(RolloutError, match="judge: gone"):
        collect(stream, 1)
    pool = DyingPool(allowed=0)
    with open_stream(pool, staleness=1) as stream:
        collect(stream, 1)
        pool.allow(1)
        with pytest.raises(RolloutError, match="engine 0"):
            stream.settle(StepClock())
        with pytest.raises(RolloutError, match="engine 0"):
            collect(stream, 2)


def test_generation_that_has_lost_its_engines_is_restored_where_it_is_awaited_and_not_before_a_sync() -> None:
    pool, events = Pool(allowed=0), []

    def restore() -> None:
        events.append("restored")
        pool.waits_for_sync = False
        pool.allow(4)

    pool.waits_for_sync = True
    with open_stream(pool, staleness=1, restore=restore) as stream:
        collect(stream, 1)
        assert events == ["restored"]
        pool.waits_for_sync = True
        stream.settle(StepClock())  # returns: the sync that follows brings engines
        assert events == ["restored"]
        pool.version, pool.waits_for_sync = 1, False
        pool.allow(100)
        assert numbers_of(collect(stream, 2)[0].groups) == [4, 5, 6, 7]


def test_a_resumed_run_has_the_finished_groups_and_generates_the_unfinished_ones_again(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    pool = Pool(allowed=6)
    with open_stream(pool, staleness=2) as stream:
        collect(stream, 1)
        while len(stream.finished_groups().get("response_ids", ())) < 4:  # 2 groups of 2 responses of 1 token
            pass
        state, finished = stream.state(), stream.finished_groups()
        pool.allow(100)
    again = Pool()
    again.version = 1
    with open_stream(again, staleness=2) as resumed:
        resumed.restore(state, finished)
        assert "groups that wait to be trained on: 2 finished; 2 are generated again" in caplog.text
        second, third = (collect(resumed, step)[0].groups for step in (2, 3))
    assert numbers_of(second) == [4, 5, 6, 7]
    assert [group.rollouts[0].policy_version for group in second] == [0, 0, 1, 1]
    assert second[0].rollouts[0].prompt.uid == "s/4"
    assert numbers_of(third) == [8, 9, 10, 11]
    assert again.generated[:6] == [6, 7, 8, 9, 10, 11]
    with open_stream(Pool(), staleness=2, rollout={"temperature": 0.5, "kv_cache_tokens": 20000}) as changed:
        changed.restore(state, finished)
        assert "no finished group, since settings have changed; 4 are generated again" in caplog.text
