"""Where the driver gets a step's groups: generated on demand, or one step ahead of training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from megatron_hapo.observe.metrics import StepClock
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.rollout.collect import Collected

Generation = Callable[[StepClock], Collected]
_POLL_SECONDS = 0.5


class RolloutSource:
    """The groups of each step.

    Args:
        prepare: decides how a step will be sampled from what is known now; the function that it returns generates the
            step's groups, with its stages timed on the clock.
        ahead: 0, or 1: `take` starts the generation of the next step, which runs in a thread while the caller trains.
            Call `wait` before changing weights that the generation needs.
        last_step: nothing is generated beyond it.
        is_stuck: whether what is generated ahead cannot go on before the weights are synced, since no engine is left.
        restore: syncs the current weights, into new engines.
    """

    def __init__(
        self,
        prepare: Callable[[int], Generation],
        *,
        ahead: int,
        last_step: int,
        is_stuck: Callable[[], bool] = lambda: False,
        restore: Callable[[], object] = lambda: None,
    ):
        self._prepare, self._ahead, self._last_step = prepare, ahead, last_step
        self._is_stuck, self._restore = is_stuck, restore
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, Future[Collected]] | None = None

    def take(self, step: int, clock: StepClock) -> Collected:
        """The groups of this step.

        Groups generated ahead carry the seconds of their own stages, which ran beside the previous step's training; the
        clock of this step has the time spent waiting for them (`rollout_wait`).
        """
        if not self._ahead:
            return self._prepare(step)(clock)
        if self._next is None:
            self._next = self._start(step)
        generated_step, future = self._next
        assert generated_step == step, f"step {generated_step} was generated, but step {step} is requested"
        with clock("rollout_wait"):
            while not _done(future):
                if self._is_stuck():
                    self._restore()
            collected = future.result()
        self._next = self._start(step + 1) if step < self._last_step else None
        return collected

    def wait(self, clock: StepClock) -> None:
        """Returns when no generation is running, or it is stuck until the next sync; raises what it raised."""
        if self._next is not None:
            with clock("rollout_wait"):
                while not _done(self._next[1]):
                    if self._is_stuck():
                        return
                self._next[1].result()

    def _start(self, step: int) -> tuple[int, Future[Collected]]:
        return step, self._thread.submit(_timed, step, self._prepare(step))


def _done(future: Future[Collected]) -> bool:
    """Whether it is done; waits for it a moment."""
    return bool(wait([future], timeout=_POLL_SECONDS).done)


def _timed(step: int, generation: Generation) -> Collected:
    clock = StepClock()
    with stage(f"step {step} ahead"):
        collected = generation(clock)
    return replace(collected, seconds={name: value for name, value in clock.metrics().items() if name != "time/step"})
