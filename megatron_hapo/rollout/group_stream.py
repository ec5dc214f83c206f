"""The groups of a run with engines: they are generated and scored in threads, while the caller trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from queue import SimpleQueue

import numpy as np

from megatron_hapo.config import Config
from megatron_hapo.data.sampling import PromptSource, SamplerState
from megatron_hapo.errors import RolloutError
from megatron_hapo.observe.running_stages import stage
from megatron_hapo.protocols import RewardPool, RolloutPool
from megatron_hapo.rollout.collect import Collected, StageClock
from megatron_hapo.rollout.group_queue import GroupQueue
from megatron_hapo.rollout.saved_groups import from_arrays, to_arrays
from megatron_hapo.types import GroupRequest, Rollout, Sampling, ScoredGroup

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
"""Between looks whether the engines wait for weights."""
_Generated = tuple[GroupRequest, list[Rollout]]


class GroupStream:
    """GroupSource of a run with engines: a thread that generates, one that scores, and the queue between and behind.

    With `async.max_staleness: 0` all this ends before `collect` returns; otherwise it goes on while the caller trains.

    Args:
        prompts: used by nobody else from here on.
        restore_engines: syncs the current weights into new engines; called by `collect` if no engine is left.
    """

    def __init__(
        self,
        config: Config,
        pool: RolloutPool,
        rewards: RewardPool,
        prompts: PromptSource,
        *,
        restore_engines: Callable[[], object],
    ):
        self._config, self._pool, self._rewards = config, pool, rewards
        self._restore_engines = restore_engines
        self._queue = GroupQueue(config, prompts)
        self._changed = threading.Condition()  # guards the following and the queue
        self._threads: list[threading.Thread] = []
        self._is_generating, self._is_held, self._is_closed = False, False, False
        self._failure: Exception | None = None
        self._generation, self._scoring = _BusyTime(), _BusyTime()
        self._generated: SimpleQueue[_Generated | None] = SimpleQueue()

    def collect(self, step: int, sampling: Sampling, clock: StageClock) -> Collected:
        """The groups of this step, and the seconds of generation and scoring since the step before.

        The clock gets what the caller has waited for them (`rollout_wait`).
        """
        with self._changed:
            self._queue.begin(step, sampling)
            self._is_held = False
            self._changed.notify_all()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._until_failure, args=(work,), name=work.__name__.strip("_"), daemon=True)
                for work in (self._generate, self._score)
            ]
            for thread in self._threads:
                thread.start()
        with clock("rollout_wait"):
            while not self._wait_for(self._queue.is_ready):
                if self._pool.waits_for_sync:
                    self._restore_engines()
        with self._changed:
            collected = self._queue.take()
        seconds = {"time/rollout": self._generation.since_last(), "time/reward": self._scoring.since_last()}
        return replace(collected, seconds=seconds)

    def settle(self, clock: StageClock) -> None:
        """Starts no group before the next `collect`; returns when the engines have finished those that they had, or
        have died and wait for a sync."""
        self._wait_until_settled(clock)
        with self._changed:
            self._is_held = True
        with clock("rollout_wait"):
            while not self._wait_for(lambda: not self._is_generating):
                if self._pool.waits_for_sync:
                    return

    def state(self) -> SamplerState:
        """Where the prompts stand, and those of groups that no step has taken.

        With `deterministic` it first waits for the groups that belong to the current weights: a resumed run could not
        generate them again.
        """
        self._wait_until_settled(lambda _: nullcontext())
        with self._changed:
            return self._queue.state()

    def finished_groups(self) -> dict[str, np.ndarray]:
        """The groups that are finished and that no step has taken, for `restore`."""
        with self._changed:
            groups = self._queue.finished_groups()
        return to_arrays(groups, self._config)

    def restore(self, state: SamplerState, finished: Mapping[str, np.ndarray]) -> None:
        """Continue from here; groups that were being generated start again, from the same prompts and seeds."""
        groups = from_arrays(finished, self._config)
        again = self._queue.restore(state, groups or {})
        if groups or again:
            kept = "no finished group, since settings have changed" if groups is None else f"{len(groups)} finished"
            logger.info("groups that wait to be trained on: %s; %d are generated again", kept, again)

    def close(self) -> None:
        """Ends the threads, that of generation as soon as its engines answer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._generated.put(None)

    def _wait_until_settled(self, clock: StageClock) -> None:
        """With `deterministic`: returns when all groups are there that the current weights are to generate.

        Raises:
            RolloutError: no engine is left for them, and the trainer has changed the weights already.
        """
        if not self._config.deterministic or not self._threads:
            return
        with clock("rollout_wait"):
            while not self._wait_for(self._queue.is_settled):
                if self._pool.waits_for_sync:
                    raise RolloutError(
                        "deterministic: all engines have died while they generated with weights that no rank holds any "
                        "more; the same command continues from the newest checkpoint, and repeats what they did"
                    )

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits a moment; whether the condition holds. Raises what a thread has raised."""
        with self._changed:
            holds = self._changed.wait_for(lambda: self._failure is not None or condition(), _POLL_SECONDS)
            if self._failure is not None:
                raise self._failure
            return holds

    # ----- in the threads

    def _until_failure(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # raised again in the caller's thread
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _generate(self) -> None:
        while True:
            with self._changed:
                self._is_generating = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closed or (not self._is_held and self._queue.has_request()))
                if self._is_closed:
                    return
                self._is_generating = True
            with stage("rollout"), self._generation:
                for generated in self._pool.stream(self._next_request):
                    self._generated.put(generated)

    def _next_request(self) -> GroupRequest | None:
        with self._changed:
            return None if self._is_held or self._is_closed else self._queue.next_request()

    def _score(self) -> None:
        """Scores what has been generated, as many groups at once as there are."""
        while (first := self._generated.get()) is not None:
            groups = [first]
            while not self._generated.empty() and (another := self._generated.get()) is not None:
                groups.append(another)
            with stage("reward"), self._scoring:
                scores = iter(self._rewards.score([rollout for _, rollouts in groups for rollout in rollouts]))
            with self._changed:
                for request, rollouts in groups:
                    self._queue.finished(request, ScoredGroup(rollouts, [next(scores) for _ in rollouts]))
                self._changed.notify_all()


class _BusyTime:
    """Seconds that one thread spends inside the context, as another reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._since = 0.0, None

    def __enter__(self) -> None:
        with self._lock:
            self._since: float | None = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._add()
            self._since = None

    def since_last(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            self._add()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _add(self) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now
