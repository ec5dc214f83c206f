"""Deterministic mode: what a step trains on, and its metrics, do not depend on when groups finish, nor on a resume."""

from __future__ import annotations

import json
import random
import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from megatron_hapo.config import CurriculumConfig
from megatron_hapo.data.sampling import PromptSampler
from megatron_hapo.errors import RolloutError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.rollout.group_queue import GroupQueue
from megatron_hapo.rollout.group_stream import GroupStream
from megatron_hapo.rollout.saved_groups import from_arrays, to_arrays
from megatron_hapo.types import GroupRequest
from tests.rollout.grouped import SAMPLING, number_of, numbered_prompts, queue_config, scored
from tests.rollout.test_group_stream import Pool, Rewards
from tests.time_limits import patient

STEPS = 6
Trained = tuple[list[tuple[str, int, bool]], float, dict[str, float]]


def run(*, staleness: int, dynamic: bool, schedule: int, resumed: bool) -> list[Trained]:
    """What each step trains on, with groups that are requested and finish in an order drawn with this seed."""
    chance = random.Random(schedule)
    config = queue_config(
        staleness=staleness, steps=STEPS, deterministic=True, dynamic_sampling={"enabled": dynamic},
    )  # fmt: skip

    def opened() -> GroupQueue:
        curriculum = CurriculumConfig(enabled=True, after=1, revisit=0.5)
        return GroupQueue(config, PromptSampler(numbered_prompts(30), seed=0, shuffle=True, curriculum=curriculum))

    queue, running, trained = opened(), list[tuple[GroupRequest, int]](), list[Trained]()

    def go_on(version: int) -> None:
        if (not running or chance.random() < 0.5) and (request := queue.next_request()) is not None:
            running.append((request, version))
        elif running:
            request, since = running.pop(chance.randrange(len(running)))
            teaches = number_of(request.prompt) % 3 > 0
            queue.finished(request, scored(request.prompt, [since], informative=teaches))

    for step in range(1, STEPS + 1):
        queue.begin(step, replace(SAMPLING, seed=step << 10))
        while not queue.is_ready() or chance.random() < 0.5:
            go_on(step - 1)
        taken = queue.take()
        places = [
            (group.rollouts[0].prompt.uid, group.rollouts[0].policy_version, group.informative)
            for group in taken.groups
        ]
        trained.append((places, taken.kept_share, taken.metrics))
        while not queue.is_settled():
            go_on(step - 1)
        if resumed:
            state = json.loads(json.dumps(queue.state()))
            finished = from_arrays(to_arrays(queue.finished_groups(), config), config)
            queue = opened()
            assert finished is not None
            assert queue.restore(state, finished) == 0
    return trained


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_step_does_not_depend_on_when_groups_finish(staleness: int, dynamic: bool) -> None:
    expected = run(staleness=staleness, dynamic=dynamic, schedule=0, resumed=False)
    for schedule in range(1, 20):
        assert run(staleness=staleness, dynamic=dynamic, schedule=schedule, resumed=schedule % 2 == 1) == expected
    for step, (places, _, _) in enumerate(expected, start=1):
        assert {version for _, version, _ in places} <= set(range(max(0, step - 1 - staleness), step))
        assert dynamic or {version for _, version, _ in places} == {max(0, step - 1 - staleness)}


def test_settling_and_saving_wait_for_all_groups_of_the_current_weights() -> None:
    """Also for those that have not started."""
    pool = Pool(allowed=4)
    with opened_stream(pool) as stream:
        stream.collect(1, replace(SAMPLING, seed=1 << 10), StepClock())
        for ask in (stream.state, lambda: stream.settle(StepClock())):
            asked = threading.Thread(target=ask)
            asked.start()
            asked.join(0.2)
            assert asked.is_alive() == (len(pool.generated) < 8)
            pool.allow(4)
            asked.join(patient(60))
            assert not asked.is_alive()
            assert pool.generated == list(range(8))
        assert len(stream.finished_groups()) > 0


def test_without_engines_for_weights_that_are_gone_the_run_ends() -> None:
    pool = Pool(allowed=4)
    with opened_stream(pool) as stream:
        stream.collect(1, replace(SAMPLING, seed=1 << 10), StepClock())
        pool.waits_for_sync = True
        with pytest.raises(RolloutError, match=r"deterministic: all engines have died .* continues from the newest"):
            stream.settle(StepClock())


def opened_stream(pool: Any) -> closing[GroupStream]:
    prompts = PromptSampler(numbered_prompts(40), seed=0, shuffle=False)
    config = queue_config(staleness=1, deterministic=True)
    return closing(GroupStream(config, pool, Rewards(), prompts, restore_engines=lambda: None))
