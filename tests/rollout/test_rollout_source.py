"""The time at which groups are generated."""

from __future__ import annotations

import threading

import pytest

from megatron_hapo.errors import RolloutError
from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.rollout.collect import Collected
from megatron_hapo.rollout.source import Generation, RolloutSource


class Recorder:
    """Prepares generations and records the order of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def prepare(self, step: int) -> Generation:
        self.events.append(f"prepared {step}")

        def generate(clock: StepClock) -> Collected:
            with clock("rollout"):
                self.events.append(f"generated {step}")
            return Collected(groups=[], kept_share=float(step))

        return generate


def test_on_policy_nothing_is_generated_before_it_is_requested() -> None:
    recorder, clock = Recorder(), StepClock()
    source = RolloutSource(recorder.prepare, ahead=0, last_step=2)
    for step in (1, 2):
        assert source.take(step, clock) == Collected(groups=[], kept_share=float(step))
        source.wait(clock)
    assert recorder.events == ["prepared 1", "generated 1", "prepared 2", "generated 2"]
    assert "time/rollout_wait" not in clock.metrics()


def test_one_step_ahead_the_next_groups_come_while_this_step_trains() -> None:
    recorder, clock = Recorder(), StepClock()
    source = RolloutSource(recorder.prepare, ahead=1, last_step=2)
    collected = source.take(1, clock)
    assert collected.kept_share == 1
    assert collected.seconds["time/rollout"] >= 0
    assert "prepared 2" in recorder.events
    source.wait(clock)
    assert recorder.events[-1] == "generated 2"
    assert source.take(2, clock).kept_share == 2
    assert "prepared 3" not in recorder.events
    assert "time/rollout" not in clock.metrics()
    assert clock.metrics()["time/rollout_wait"] > 0


def test_a_generation_that_failed_raises_where_it_is_waited_for() -> None:
    def prepare(step: int) -> Generation:
        def generate(clock: StepClock) -> Collected:
            if step == 2:
                raise RolloutError("engine 0: the process died")
            return Collected(groups=[], kept_share=1.0)

        return generate

    source = RolloutSource(prepare, ahead=1, last_step=5)
    source.take(1, StepClock())
    with pytest.raises(RolloutError, match="engine 0"):
        source.wait(StepClock())


def test_generation_that_has_lost_its_engines_is_restored_where_it_is_taken_and_not_awaited_before_a_sync() -> None:
    restored, clock = threading.Event(), StepClock()

    def prepare(step: int) -> Generation:
        def generate(clock: StepClock) -> Collected:
            assert restored.wait(60)
            return Collected(groups=[], kept_share=float(step))

        return generate

    source = RolloutSource(prepare, ahead=1, last_step=2, is_stuck=lambda: not restored.is_set(), restore=restored.set)
    assert source.take(1, clock).kept_share == 1  # a sync of the same weights
    restored.clear()
    source._next = source._start(2)
    source.wait(clock)  # returns: the sync that follows brings engines
    restored.set()
    assert source.take(2, clock).kept_share == 2
