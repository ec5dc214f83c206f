"""Where the driver takes a step's groups from: generated when they are asked for, or one step ahead of training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.types import ScoredGroup

Collected = tuple[list[ScoredGroup], dict[str, float]]
Generation = Callable[[StepClock], Collected]


class RolloutSource:
    """Groups of each step.

    Args:
        prepare: settles how a step will be sampled, from what is known now; what it returns generates the step's groups
            and their metrics, with its stages timed on the clock.
        ahead: 0, or 1: `take` starts the generation of the next step, which runs in a thread while the caller trains.
            Where weights must not change meanwhile, `wait` first.
        last_step: nothing is generated beyond it.
    """

    def __init__(self, prepare: Callable[[int], Generation], *, ahead: int, last_step: int):
        self._prepare, self._ahead, self._last_step = prepare, ahead, last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, Future[Any]] | None = None

    def take(self, step: int, clock: StepClock) -> Collected:
        """The groups of this step. Generated ahead, they bring the seconds of their own stages as metrics: those ran
        beside another step's training, and this step's clock has what was waited for (`rollout_wait`)."""
        if not self._ahead:
            return self._prepare(step)(clock)
        if self._next is None:
            self._next = self._start(step)
        of_step, future = self._next
        assert of_step == step, f"step {of_step} was generated, {step} asked for"
        with clock("rollout_wait"):
            collected = future.result()
        self._next = self._start(step + 1) if step < self._last_step else None
        return collected

    def wait(self, clock: StepClock) -> None:
        """Return when nothing is being generated; raises what the generation raised."""
        if self._next is not None:
            with clock("rollout_wait"):
                self._next[1].result()

    def _start(self, step: int) -> tuple[int, Future[Any]]:
        return step, self._thread.submit(_timed, self._prepare(step))


def _timed(generation: Generation) -> Collected:
    clock = StepClock()
    groups, metrics = generation(clock)
    return groups, metrics | {name: value for name, value in clock.metrics().items() if name != "time/step"}
