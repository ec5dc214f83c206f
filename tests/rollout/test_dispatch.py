"""Assignment of groups to engines: hand-worked cases and a simulation of long-tailed lengths."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from megatron_hapo.rollout.dispatch import Dispatch


def dispatch_of(response_tokens: list[int], *, samples: int, engines: int, room: int) -> Dispatch:
    """A dispatch to which these groups have been added."""
    dispatch = Dispatch(engines=engines, room=room)
    for group, tokens in enumerate(response_tokens):
        dispatch.add(group, samples=samples, response_tokens=tokens)
    return dispatch


def test_a_group_goes_to_the_engine_with_the_fewest_tokens() -> None:
    dispatch = dispatch_of([10, 3, 3, 3, 3, 1], samples=2, engines=2, room=100)
    assert dispatch.assign([0, 1]) == {0: [0, 5], 1: [1, 2, 3, 4]}


def test_an_engine_with_enough_requests_gets_no_more_until_responses_finish() -> None:
    dispatch = dispatch_of([5] * 6, samples=3, engines=2, room=4)
    assert dispatch.assign([0, 1]) == {0: [0, 2], 1: [1, 3]}  # 6 requests each: more than 4, by whole groups
    assert dispatch.assign([0, 1]) == {0: [], 1: []}
    for group in (1, 3):
        dispatch.finished(1, group)
    assert dispatch.assign([1]) == {1: []}  # 4 left
    dispatch.finished(1, 3)
    assert dispatch.assign([1]) == {1: [4]}
    assert dispatch.assign([0]) == {0: []}


def test_a_group_larger_than_the_room_goes_to_an_engine_that_has_nothing_else() -> None:
    dispatch = dispatch_of([5, 5], samples=16, engines=1, room=4)
    assert dispatch.assign([0]) == {0: [0]}


def test_done_when_every_response_has_finished() -> None:
    dispatch = dispatch_of([5, 5], samples=2, engines=2, room=4)
    assert not dispatch.done
    for engine, groups in dispatch.assign([0, 1]).items():
        assert dispatch.busy(engine)
        for group in groups:
            assert not dispatch.done
            assert not dispatch.finished(engine, group)
            assert dispatch.finished(engine, group)
        assert not dispatch.busy(engine)
    assert dispatch.done
    assert dispatch_of([], samples=2, engines=2, room=4).done


def test_more_groups_are_wanted_while_none_waits_and_an_engine_has_room() -> None:
    dispatch = dispatch_of([], samples=2, engines=2, room=3)
    assert dispatch.wants_groups([0, 1])
    dispatch.add(7, samples=2, response_tokens=5)
    assert not dispatch.wants_groups([0, 1])
    assert dispatch.assign([0, 1]) == {0: [7], 1: []}
    assert dispatch.wants_groups([0])  # 2 responses; by whole groups it may have more than 3
    dispatch.add(8, samples=4, response_tokens=1)
    assert dispatch.assign([0]) == {0: [8]}
    assert not dispatch.wants_groups([0])
    assert dispatch.wants_groups([0, 1])


def test_groups_of_a_lost_engine_are_assigned_again_first_and_in_order() -> None:
    dispatch = dispatch_of([5] * 6, samples=2, engines=2, room=4)
    assert dispatch.assign([0, 1]) == {0: [0, 2], 1: [1, 3]}
    dispatch.finished(0, 0)
    dispatch.finished(0, 0)
    dispatch.finished(0, 2)
    dispatch.lost(0)
    assert not dispatch.busy(0)
    assert dispatch.assign([0]) == {0: [2, 4]}
    assert dispatch.assign([1]) == {1: []}


def makespan(lengths_GS: np.ndarray, engines: int, running: int, *, dispatched: bool) -> float:
    """Ticks until all responses are finished, if up to `running` responses per engine grow by one token per tick.

    Args:
        dispatched: by Dispatch; otherwise each engine has its share of the groups from the start, round robin.
    """
    groups, samples = lengths_GS.shape
    room = running + running // 8 if dispatched else groups * samples
    dispatch = dispatch_of([1] * groups, samples=samples, engines=engines, room=room)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(engines)]
    slots: list[tuple[float, int, int]] = []  # end, engine, group
    in_use, now = [0] * engines, 0.0
    while not dispatch.done:
        for engine, given in dispatch.assign(range(engines)).items():
            queues[engine] += [(group, sample) for group in given for sample in range(samples)]
            while queues[engine] and in_use[engine] < running:
                group, sample = queues[engine].pop(0)
                in_use[engine] += 1
                heapq.heappush(slots, (now + lengths_GS[group, sample], engine, group))
        now, engine, group = heapq.heappop(slots)
        in_use[engine] -= 1
        dispatch.finished(engine, group)
    return now


@pytest.mark.parametrize("seed", range(3))
def test_no_engine_idles_before_the_last_responses_have_started(seed: int) -> None:
    """8,192 responses with long-tailed lengths; every eighth prompt is hard, which round robin gives to one engine."""
    rng = np.random.default_rng(seed)
    hardness = rng.lognormal(sigma=0.7, size=(512, 1)) * np.where(np.arange(512) % 8 == 0, 3, 1)[:, None]
    lengths = np.minimum(1000 * hardness * rng.lognormal(sigma=0.3, size=(512, 16)), 12_000).round()
    ideal = lengths.sum() / (8 * 64)
    balanced = makespan(lengths, 8, 64, dispatched=True)
    assert balanced < ideal + lengths.max()  # Graham's bound for lists
    assert makespan(lengths, 8, 64, dispatched=False) > 1.5 * balanced
